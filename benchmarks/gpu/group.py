"""One rank in a process group: `torchrun --nproc_per_node 1 -m benchmarks.gpu.group FILE ...`.

A single rank trains without a group, so on one GPU NCCL, the control group beside it, and data
parallelism over both would never run. Here a group of one runs them. FILE gets a JSON object:
whether the gradients equal those of a rank without a group, and the time of a step with the group
over the time without.
"""

import dataclasses
import statistics
import sys
from typing import Any

import torch

from benchmarks import step
from benchmarks.gpu import inputs
from rft import dist
from rft.loading.dataset import Batch
from rft.storage import files
from rft.train.job import Job
from rft.train.step import accumulate_gradients, settle_buckets

assert inputs.REHEARSAL, "the module adds the tiny model to open_clip's"


def gradients(job: Job, module: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Compute the gradients of a step."""
    job.objective.zero_grad()
    accumulate_gradients(job, module, batch, step=0)
    found = {
        name: parameter.grad.clone()
        for name, parameter in job.student.named_parameters()
        if parameter.grad is not None
    }
    job.objective.zero_grad()
    return found


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Compare two states bit by bit.

    Returns:
        Whether they are equal, the largest difference, and the largest one as a share of its own
        tensor's largest entry.

    Raises:
        ValueError: if one of them has a tensor that the other lacks, or a value that is not finite.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one state has {', '.join(sorted(ours.keys() ^ theirs.keys()))}")
    largest = relative = 0.0
    for name, value in ours.items():
        for state in (value, theirs[name]):
            if not state.isfinite().all():
                raise ValueError(f"{name} is not finite")
        apart = (value.double() - theirs[name].double()).abs().max().item()
        largest = max(largest, apart)
        relative = max(relative, apart / max(value.abs().max().item(), 1e-12))
    equal = all(torch.equal(value, theirs[name]) for name, value in ours.items())
    return {"bit_equal": equal, "largest": largest, "largest_of_its_tensor": relative}


def seconds(job: Job, module: torch.nn.Module, batch: Batch) -> float:
    """Time a step's forwards and backwards and return the median."""
    work = {"step": lambda: gradients(job, module, batch)}
    return statistics.median(step.time_steps(work, 5, job.device)["step"])


def exchange(world: dist.World, device: torch.device) -> None:
    """Call every exchange of rft.dist once, and check the result."""
    rows = torch.arange(6, device=device).view(3, 2)
    assert torch.equal(dist.sum_over_ranks(world, rows), rows)
    assert torch.equal(dist.gather_rows(world, rows), rows)
    assert dist.largest(world, 7) == 7
    assert dist.from_main(world, {"a": 1}) == {"a": 1}
    assert dist.gather_objects(world, [1]) == [[1]]
    assert dist.on_main(world, lambda: "done") == "done"
    dist.require_agreement(world, "number", 1)


def main() -> None:
    """Compare a step in a group with one without."""
    path, model, device_type, batch_size, classes = sys.argv[1:]
    world = dist.world_from_env()
    device = dist.pick_device(device_type, world)
    arguments = step.Arguments(model=model, batch_size=int(batch_size), classes=int(classes))
    student = step.build_classifier(model, arguments.classes)
    job = step.build_job(arguments, device, "bf16", student)
    batch = step.random_batch(arguments, device, student.architecture.image_size)
    expected = gradients(job, job.objective, batch)
    again = difference(expected, gradients(job, job.objective, batch))
    without = seconds(job, job.objective, batch)
    with dist.process_group(world, device, even_alone=True) as world:
        exchange(world, device)
        job = dataclasses.replace(job, world=world)
        module = dist.data_parallel(world, job.objective, device)
        settle_buckets(job, module)
        result = {
            "backend": "NCCL with gloo beside it" if device.type == "cuda" else "gloo",
            "gradients": difference(expected, gradients(job, module, batch)),
            "gradients_twice_without": again,
            "time_over_without": round(seconds(job, module, batch) / without, 3),
        }
    files.write_json(path, result)


if __name__ == "__main__":
    main()
