"""The samples of each batch, for training and for evaluation.

Batch t depends only on the plan, the step and the rank. Any process can therefore read any batch,
and a resumed run continues with the next batch. Checkpoints store a `fingerprint` of it, and a run
that would read other batches is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from rft.config import Config
from rft.loading import order
from rft.loading.augment import Augmentation
from rft.loading.dataset import Batch, PackedDataset
from rft.loading.order import EpochOrder, Plan, rank_slice
from rft.loading.split import split_set


@dataclass(eq=False)
class TrainingBatches:
    """One rank's training batches: batch t is its part of global batch t of the run."""

    packed: PackedDataset
    samples: np.ndarray
    plan: Plan
    _: KW_ONLY
    image_size: int
    rank: int
    world_size: int
    ranks_on_node: Sequence[int] = ()
    """Ranks that share this rank's cache."""
    augment_seed: int | None = None
    """Seed of the augmentation; None for no augmentation."""
    _order: EpochOrder | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # a plan counts positions in `samples`, so both must belong to the same split
        assert len(self.samples) == self.plan.samples
        assert self.plan.batch_size % self.world_size == 0
        self.ranks_on_node = self.ranks_on_node or (self.rank,)

    @property
    def largest(self) -> int:
        """Samples in the largest batch."""
        return self.plan.batch_size // self.world_size

    def global_samples(self, step: int) -> np.ndarray:
        """Look up the sample numbers of global batch `step`, (B,)."""
        epoch, step_of_epoch = divmod(step, self.plan.steps_per_epoch)
        # the plan orders positions among the training samples; convert to numbers in the set
        return self.samples[self._order_of(epoch).batch(step_of_epoch)]

    def samples_of(self, number: int) -> np.ndarray:
        """Look up this rank's sample numbers of step `number`, and let the cache look ahead."""
        if self.packed.shards.cache is not None:
            epoch, step_of_epoch = divmod(number, self.plan.steps_per_epoch)
            ahead = self._order_of(epoch).shards_ahead(
                step_of_epoch, self.ranks_on_node, self.world_size
            )
            # with few shots, some shards have no sample
            sizes = self.plan.shard_sizes
            self.packed.shards.look_ahead([shard for shard in ahead if sizes[shard]])
        return rank_slice(self.global_samples(number), self.rank, self.world_size)

    def read(self, number: int, out_BCHW: Tensor | None = None) -> Batch:
        """Read batch `number`; see `PackedDataset.batch`."""
        drawn = None
        if self.augment_seed is not None:
            drawn = Augmentation(self.augment_seed, number // self.plan.steps_per_epoch)
        samples = self.samples_of(number)
        return self.packed.batch(samples, self.image_size, out_BCHW, drawn)

    def _order_of(self, epoch: int) -> EpochOrder:
        # only one epoch is kept, because steps are read in ascending order
        if self._order is None or self._order.epoch != epoch:
            self._order = EpochOrder(self.plan, epoch)
        return self._order


@dataclass(eq=False)
class EvaluationBatches:
    """The given samples in their order, split into batches; the last one may be short."""

    packed: PackedDataset
    samples: np.ndarray
    _: KW_ONLY
    image_size: int
    batch_size: int

    @property
    def largest(self) -> int:
        """Samples in the largest batch."""
        return self.batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.largest)

    def samples_of(self, number: int) -> np.ndarray:
        """Look up the sample numbers of batch `number`."""
        return self.samples[number * self.largest : (number + 1) * self.largest]

    def read(self, number: int, out_BCHW: Tensor | None = None) -> Batch:
        """Read batch `number`; see `PackedDataset.batch`."""
        return self.packed.batch(self.samples_of(number), self.image_size, out_BCHW)


def rank_part(samples: int, rank: int, world_size: int, whole: int = 1) -> slice:
    """Compute a rank's part of an evaluation's samples: every sample is in exactly one part.

    Parts begin at multiples of `whole` samples.
    """
    # consecutive samples, so that a rank reads few shards
    wholes = -(-samples // whole)
    first, last = (wholes * number // world_size * whole for number in (rank, rank + 1))
    return slice(first, min(last, samples))


# `rft.loading.read` reads these, in any order
Batches = TrainingBatches | EvaluationBatches


def plan_training(packed: PackedDataset, config: Config) -> tuple[Plan, np.ndarray, np.ndarray]:
    """Split a set for a run: its plan, the sample numbers in it, and the held-out ones.

    Raises:
        ValueError: if the set is too small for the batch, the held-out part or the shots.
    """
    loader = config.loader
    samples, held_out = split_set(
        packed.index, packed.manifest, loader.held_out, loader.shots, config.held_out_seed
    )
    if loader.shots and loader.batch_size > len(samples):
        raise ValueError(
            f"a batch of {loader.batch_size} is larger than the {len(samples)} training samples "
            f"that --loader.shots {loader.shots} leaves; choose a --loader.batch-size of at most "
            f"{len(samples)}, or more shots"
        )
    plan = Plan(
        shard_sizes=packed.shard_sizes(samples),
        batch_size=loader.batch_size,
        seed=config.sample_seed,
        streams=loader.streams,
        block_shards=loader.block_shards,
    )
    return plan, samples, held_out


def fingerprint(
    packed: PackedDataset, plan: Plan, held_out: int, held_out_seed: int, shots: int = 0
) -> dict[str, Any]:
    """Collect everything that decides the samples of step t, to be compared with checkpoints."""
    return {
        "algorithm": order.ALGORITHM,
        "manifest_sha256": packed.manifest.sha256,
        "samples": plan.samples,
        "batch_size": plan.batch_size,
        "streams": plan.streams,
        "block_shards": plan.block_shards,
        "seed": plan.seed,
        "held_out": held_out,
        "held_out_seed": held_out_seed,
        # omitted without shots, so that older checkpoints still match
        **({"shots": shots} if shots else {}),
    }
