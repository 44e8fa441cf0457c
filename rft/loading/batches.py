"""Which samples each batch holds, for training and for evaluation.

Batch t is a function of the plan, the step and the rank alone. So any process can read any batch,
and a resumed run continues with the batch that would have come next. `fingerprint` is what a
checkpoint keeps of it: a run that would read other batches is refused.
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
    """Batch t is one rank's part of global batch t, counted from the start of training."""

    packed: PackedDataset
    samples: np.ndarray
    plan: Plan
    _: KW_ONLY
    image_size: int
    rank: int
    world_size: int
    ranks_on_node: Sequence[int] = ()
    """Ranks that share this one's cache."""
    augment_seed: int | None = None
    """Seed of the augmentation; None reads the images as they are."""
    _order: EpochOrder | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # a plan counts positions in `samples`, so the two must be of one split
        assert len(self.samples) == self.plan.samples
        assert self.plan.batch_size % self.world_size == 0
        self.ranks_on_node = self.ranks_on_node or (self.rank,)

    @property
    def largest(self) -> int:
        """Samples in the largest batch."""
        return self.plan.batch_size // self.world_size

    def global_samples(self, step: int) -> np.ndarray:
        """Return the sample numbers of the whole global batch `step`, (B,)."""
        epoch, step_of_epoch = divmod(step, self.plan.steps_per_epoch)
        # the plan orders positions among the training samples; these are the numbers in the set
        return self.samples[self._order_of(epoch).batch(step_of_epoch)]

    def samples_of(self, number: int) -> np.ndarray:
        """Return this rank's sample numbers of step `number`, and let the cache look ahead."""
        if self.packed.shards.cache is not None:
            epoch, step_of_epoch = divmod(number, self.plan.steps_per_epoch)
            ahead = self._order_of(epoch).shards_ahead(
                step_of_epoch, self.ranks_on_node, self.world_size
            )
            # few shots leave shards without a sample
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
        # one epoch is kept, because steps are read in rising order
        if self._order is None or self._order.epoch != epoch:
            self._order = EpochOrder(self.plan, epoch)
        return self._order


@dataclass(eq=False)
class EvaluationBatches:
    """The given samples in their order, cut into batches; the last one may be short."""

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
        """Return the sample numbers of batch `number`."""
        return self.samples[number * self.largest : (number + 1) * self.largest]

    def read(self, number: int, out_BCHW: Tensor | None = None) -> Batch:
        """Read batch `number`; see `PackedDataset.batch`."""
        return self.packed.batch(self.samples_of(number), self.image_size, out_BCHW)


def rank_part(samples: int, rank: int, world_size: int, whole: int = 1) -> slice:
    """Return a rank's part of so many samples of an evaluation: every sample is in exactly one.

    Parts begin at multiples of `whole` samples.
    """
    # next to each other, so that a rank reads few shards
    wholes = -(-samples // whole)
    first, last = (wholes * number // world_size * whole for number in (rank, rank + 1))
    return slice(first, min(last, samples))


# what `rft.loading.read` reads, in any order
Batches = TrainingBatches | EvaluationBatches


def plan_training(packed: PackedDataset, config: Config) -> tuple[Plan, np.ndarray, np.ndarray]:
    """Split a set for a run: its plan, the sample numbers that it orders, and those held out.

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
    """Collect all that decides which samples step t holds, for a checkpoint to be compared with."""
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
        # checkpoints of runs without shots stay as they were
        **({"shots": shots} if shots else {}),
    }
