"""The memory that `--dry-run` prints, compared with a GPU's allocator."""

import pytest
import torch

from benchmarks import step as benchmark
from rft.train.memory import needs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_dry_run_is_within_a_tenth_of_the_allocators_peak(precision, recompute):
    device = torch.device("cuda", 0)
    arguments = benchmark.Arguments(batch_size=64, recompute=recompute)
    student = benchmark.build_classifier(arguments.model, arguments.classes)
    before = torch.cuda.memory_allocated(device)
    step = benchmark.build_steps(arguments, device, precision, student)["step"]
    step()  # AdamW allocates its state
    most = benchmark.peak_memory(step, device) - before
    need = needs(benchmark.build_job(arguments, device, precision, student), [1])
    assert not need.estimated
    assert need.totals == [pytest.approx(most, rel=0.1)]
