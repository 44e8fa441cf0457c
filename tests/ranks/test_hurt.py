"""Real processes, really hurt: the same command ends with the undisturbed run's weights.

One try of each of these on three ranks; benchmarks/faults.py tries all faults many times.
"""

import re
from pathlib import Path

import pytest

from benchmarks.faults import EVERY, FAULTS, Bench, summary, table
from rft.rng import numpy_generator
from tests.tiny import torchrun

RANKS = 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), RANKS)


# by a signal the step under way is finished; ranks without torchrun finish theirs too
STOPS = {"SIGKILL torchrun", "SIGTERM everything"}
KILLS = {"SIGKILL a loader process", "rank hangs"}


@pytest.mark.parametrize("fault", sorted(STOPS | KILLS))
def test_hurt_and_started_again(bench, fault):
    outcome = bench.attempt(fault, numpy_generator("test", fault))
    assert not outcome.weights_differ
    assert outcome.lost_steps <= (0 if fault in STOPS else EVERY)


def test_the_bench_counts_what_is_lost(bench):
    outcome = bench.attempt("newest checkpoint truncated", numpy_generator("test"))
    assert outcome.lost_steps >= EVERY
    assert outcome.said.startswith("WARNING")
    assert summary([outcome, outcome]) == {
        "tries": 2, "lost_steps": 2 * outcome.lost_steps, "weights_differ": 0,
    }  # fmt: skip
    assert f"| newest checkpoint truncated | 2 | {outcome.lost_steps:.1f} |" in table([outcome] * 2)
    assert outcome.fault in FAULTS


def test_a_slow_store_is_no_rank_that_hangs(tmp_path, tiny_data, tiny_clip):
    run = tmp_path / "run"
    result = torchrun(2, "tests.ranks.slow_store", *options(tiny_data, tiny_clip, run))
    assert result.returncode == 0
    assert (run / "training.json").exists()


def test_what_ends_a_run_is_told_after_the_checkpoint_that_is_under_way(
    tmp_path, tiny_data, tiny_clip
):
    run = tmp_path / "run"
    words = options(tiny_data, tiny_clip, run)
    result = torchrun(2, "tests.ranks.slow_store", *words, NAN_AT_STEP="5")
    assert result.returncode == 1
    assert re.findall("^error.*", result.stderr, re.MULTILINE) == [
        line for line in result.stderr.splitlines() if "is not finite at step 6 (" in line
    ]
    assert "is not finite at step 6 (" in result.stderr
    assert [path.name for path in run.glob("checkpoints/*.pt")] == ["step-00000004.pt"]


def options(data: Path, clip: str, run: Path) -> list[str]:
    return [
        *("object-mask-single-fill", "--data", str(data), "--run-dir", str(run)),
        *("--scale", "miniature", "--model.clip", clip, "--loader.workers", "0"),
        *("--loader.held-out", "0", "--loader.batch-size", "6", "--optim.epochs", "1"),
        *("--log.checkpoint-steps", "4", "--log.every-steps", "1", "--cluster.timeout", "2"),
    ]
