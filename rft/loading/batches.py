"""Which samples each batch holds, for training and for evaluation.

Batch t is a function of the plan, the step and the rank alone. So any process can read any batch,
and a resumed run continues with the batch that would have come next. `fingerprint` is what a
checkpoint keeps of it: a run that would read other batches is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np

from rft.config import Config
from rft.loading import order
from rft.loading.dataset import PackedDataset
from rft.loading.order import EpochOrder, Plan, rank_slice
from rft.loading.split import held_out_split


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
            self.packed.shards.look_ahead(
                self._order_of(epoch).shards_ahead(
                    step_of_epoch, self.ranks_on_node, self.world_size
                )
            )
        return rank_slice(self.global_samples(number), self.rank, self.world_size)

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
        ValueError: if the set is too small for the batch or for the held-out part.
    """
    loader = config.loader
    samples, held_out = held_out_split(
        packed.index.key, packed.index.label, loader.held_out, config.held_out_seed
    )
    plan = Plan(
        shard_sizes=packed.shard_sizes(samples),
        batch_size=loader.batch_size,
        seed=config.sample_seed,
        streams=loader.streams,
        block_shards=loader.block_shards,
    )
    return plan, samples, held_out


def fingerprint(packed: PackedDataset, plan: Plan, held_out: int, held_out_seed: int) -> dict:
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
    }
