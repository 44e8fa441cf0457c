"""Processes that read or count in parallel, started by the tests of the data plane."""

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rft import dist
from rft.evaluate.count import count_correct
from rft.loading.batches import TrainingBatches
from rft.loading.dataset import PackedDataset
from rft.loading.order import Plan
from rft.loading.read import read_batches

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """A classifier by mean colour: wrong often enough to be worth counting."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        means_B = images_BCHW.float().mean(dim=(1, 2, 3))
        return torch.stack([means_B * 0, means_B - 127, 2 * (means_B - 150)], dim=1)


def plan_of(packed: PackedDataset, batch: int, streams: int, block_shards: int) -> Plan:
    sizes = tuple(shard.samples for shard in packed.manifest.shards)
    return Plan(
        shard_sizes=sizes, batch_size=batch, seed=3, streams=streams, block_shards=block_shards
    )


def batches_of(packed: PackedDataset, plan: Plan, rank: int, world_size: int) -> TrainingBatches:
    return TrainingBatches(
        packed,
        np.arange(len(packed)),
        plan,
        image_size=24,
        rank=rank,
        world_size=world_size,
    )


def count(rank: int, world_size: int, port: int, url: str, out: str) -> None:
    """One rank of an evaluation; every rank writes its results."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    world = dist.world_from_env()
    with dist.process_group(world, CPU):
        (found,) = count_correct(
            [Brightness()],
            PackedDataset(url),
            image_size=24,
            world=world,
            device=CPU,
            batch_size=4,
        )
    Path(out, f"{rank}.txt").write_text(f"{found.correct} {found.total}")


def log_ids(url: str, out: str, start: int, rank: int, world_size: int) -> None:
    """Append the ids of each step to a file, like a training process that uses them."""
    packed = PackedDataset(url)
    plan = plan_of(packed, 8, 2, 2)
    steps = range(start, 100 * plan.steps_per_epoch)
    mine = batches_of(packed, plan, rank, world_size)
    batches = read_batches(mine, steps, workers=1, device=CPU)
    with Path(out).open("a") as stream:
        for step, batch in zip(steps, batches, strict=True):
            stream.write(f"{step} {' '.join(map(str, batch.samples_B.tolist()))}\n")
            stream.flush()
            time.sleep(0.02)  # the step itself
