"""Run by torchrun: the averaged gradient of one batch, written by rank 0."""

import dataclasses
import sys
import types
from pathlib import Path

import torch

from rft import dist, recipes
from rft.data.loader import Batch
from rft.train.loop import Job, accumulate_gradients, settle_buckets
from rft.train.objective import Objective
from tests.conftest import build_model

BATCH = 12


class FixedBatches:
    """Stands where the training data is: only these are asked for."""

    image_size = 16
    plan = types.SimpleNamespace(steps_per_epoch=1)


def main(recipe: str, donors: str, accumulate: int, out: str) -> None:
    world = dist.world_from_env()
    config = recipes.build(recipe, data="-", run="-")
    config = dataclasses.replace(
        config,
        loader=dataclasses.replace(config.loader, batch_size=BATCH),
        method=dataclasses.replace(config.method, donors=donors),
        # unclipped: clipping would hide a wrong scale
        optim=dataclasses.replace(config.optim, accumulate=accumulate, clip_norm=1e9),
    )
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (BATCH, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(5, (BATCH,), generator=generator)
    share = BATCH // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    device = torch.device("cpu")
    student = build_model(0)
    student.visual.requires_grad_(config.optim.trains == "all")
    with dist.process_group(world, device):
        job = Job(
            config=config,
            world=world,
            device=device,
            objective=Objective(student, build_model(1), config.method),
            batches=FixedBatches(),
            held_out=[],
            fingerprint={},
        )
        module = dist.data_parallel(world, job.objective, device)
        settle_buckets(job, module)
        batch = Batch(images[mine], labels[mine], labels[mine])
        accumulate_gradients(job, module, batch, step=0)
        if world.is_main:
            named = job.student.named_parameters()
            gradients = {n: p.grad for n, p in named if p.requires_grad}
            torch.save(gradients, Path(out))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
