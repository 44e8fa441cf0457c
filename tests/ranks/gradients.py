"""Run by torchrun: the averaged gradients of one batch in each case, written by rank 0."""

import dataclasses
import sys
import types
from pathlib import Path

import torch

from rft import dist, recipes
from rft.dist import World
from rft.loading.dataset import Batch
from rft.train.job import Job
from rft.train.objective import Objective
from rft.train.step import accumulate_gradients, settle_buckets
from tests.conftest import build_model, build_texts

BATCH = 12
CPU = torch.device("cpu")


# a recipe with an option of its own
VARIANTS = {
    "flyp-on-counterfactuals": ("random-mask-single-fill", {"loss": "contrastive"}),
    "every-text": ("flyp", {"context_weight": 2.0, "lipsum_weight": 0.1}),
}


class FixedBatches:
    """Stands in for the training data: only these attributes are used."""

    image_size = 16
    plan = types.SimpleNamespace(steps_per_epoch=1)


def build_job(world: World, recipe: str, donors: str, accumulate: int) -> Job:
    recipe, changes = VARIANTS.get(recipe, (recipe, {}))
    config = recipes.build(recipe, data="-", run="-")
    config = dataclasses.replace(
        config,
        precision="fp32",
        loader=dataclasses.replace(config.loader, batch_size=BATCH),
        method=dataclasses.replace(config.method, donors=donors, **changes),
        # unclipped: clipping would hide a wrong scale
        optim=dataclasses.replace(config.optim, accumulate=accumulate, clip_norm=1e9),
    )
    student = build_model(0)
    student.visual.requires_grad_(config.optim.trains == "all")
    student.head.requires_grad_(config.method.loss == "cross-entropy")
    texts = build_texts(config.method)
    return Job(
        config=config,
        world=world,
        device=CPU,
        objective=Objective(student, build_model(1), config.method, texts=texts),
        batches=FixedBatches(),
        held_out=[],
        fingerprint={},
    )


def gradients(job: Job) -> dict[str, torch.Tensor]:
    """The gradients of the complete batch, of which this rank sees its share."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (BATCH, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(5, (BATCH,), generator=generator)
    share = BATCH // job.world.size
    mine = slice(job.world.rank * share, (job.world.rank + 1) * share)
    module = dist.data_parallel(job.world, job.objective, CPU)
    settle_buckets(job, module)
    batch = Batch(images[mine], labels[mine], torch.arange(BATCH)[mine])
    accumulate_gradients(job, module, batch, step=0)
    # names as the student's own, and those of a text tower that learns
    learns = ((n, p) for n, p in job.objective.named_parameters() if p.requires_grad)
    return {n.removeprefix("student."): p.grad for n, p in learns}


def main(out: str, *cases: str) -> None:
    """Write RECIPE-DONORS-ACCUMULATE.pt for each case RECIPE:DONORS:ACCUMULATE."""
    world = dist.world_from_env()
    with dist.process_group(world, CPU):
        for case in cases:
            recipe, donors, accumulate = case.split(":")
            found = gradients(build_job(world, recipe, donors, int(accumulate)))
            if world.is_main:
                torch.save(found, Path(out, f"{recipe}-{donors}-{accumulate}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
