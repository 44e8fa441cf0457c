"""The plan: the samples of batch t of epoch e, as a pure function without state or torch.

A batch depends only on shard sizes, batch size, streams, block, seed, epoch and step, and not on
ranks, loader processes or earlier reads. Ranks take slices of it, so the global batches are the
same for every world size that divides the batch, and resuming simply starts at t.

Block mode reads remote shards nearly sequentially: the shards are permuted, their samples are cut
into C equal streams, each stream is shuffled in blocks of K shards, and every batch takes B/C
samples from each stream. The remaining fewer than B samples are dropped, different ones in each
epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rft.rng import numpy_generator

ALGORITHM = 1  # part of the fingerprint: raise it if the same plan would give other batches


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parameters that decide the order of samples.

    `shard_sizes` are the numbers of used samples per shard; `block_shards` 0 shuffles everything
    together and ignores `streams`.
    """

    shard_sizes: tuple[int, ...]
    batch_size: int
    seed: int
    streams: int = 1
    block_shards: int = 0

    def __post_init__(self) -> None:
        if self.batch_size > self.samples:
            raise ValueError(
                f"a batch of {self.batch_size} is larger than the {self.samples} training samples; "
                "choose a smaller loader.batch_size or loader.held_out"
            )
        assert self.batch_size % self.streams == 0

    @property
    def samples(self) -> int:
        """Number of used samples."""
        return sum(self.shard_sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches per epoch; the same for every rank."""
        return self.samples // self.batch_size


class EpochOrder:
    """The order of one epoch: `batch(step)` for any step, in any sequence.

    It caches the permuted shard list and the last block of each stream, both recomputable; memory
    is O(shards + C * K * samples per shard), or O(samples) if everything is shuffled together.
    """

    def __init__(self, plan: Plan, epoch: int) -> None:
        self.plan = plan
        self.epoch = epoch
        if plan.block_shards == 0:
            order = self._generator("global").permutation(plan.samples)
            self._permutation: np.ndarray | None = order
            return
        self._permutation = None
        sizes = np.asarray(plan.shard_sizes, dtype=np.int64)
        self._shard_order = self._generator("shards").permutation(len(sizes))
        first_position = np.cumsum(sizes) - sizes
        self._shard_first = first_position[self._shard_order]
        self._virtual_ends = np.cumsum(sizes[self._shard_order])
        # virtual positions count samples in the permuted order of the shards; cuts separate streams
        self._cuts = np.arange(plan.streams + 1, dtype=np.int64) * plan.samples // plan.streams
        self._block_ends = [self._stream_blocks(c) for c in range(plan.streams)]
        self._blocks: dict[int, tuple[int, np.ndarray]] = {}

    def batch(self, step: int) -> np.ndarray:
        """Compute the positions of global batch `step` of this epoch, int64 (B,)."""
        assert 0 <= step < self.plan.steps_per_epoch
        if self._permutation is not None:
            start = step * self.plan.batch_size
            return self._permutation[start : start + self.plan.batch_size]
        share = self.plan.batch_size // self.plan.streams
        streams = range(self.plan.streams)
        return np.concatenate([self._stream_items(c, step * share, share) for c in streams])

    def shards_ahead(self, step: int, ranks: Sequence[int], world_size: int) -> list[int]:
        """List the shards needed for the next batches of some ranks, for the cache to fetch.

        Most urgent first: for each of the ranks' streams the shards of the blocks that batch `step`
        draws from, then those of the following block. Without blocks, all shards are listed.
        """
        plan = self.plan
        if plan.block_shards == 0:
            return list(range(len(plan.shard_sizes)))
        share = plan.batch_size // plan.streams
        slots = plan.batch_size // world_size
        streams: set[int] = set()
        for rank in ranks:
            # a batch's slots are assigned to streams in runs of `share`, to ranks in runs of
            # `slots`
            streams.update(range(rank * slots // share, ((rank + 1) * slots - 1) // share + 1))
        now: list[int] = []
        later: list[int] = []
        for stream in sorted(streams):
            ends, low = self._block_ends[stream], int(self._cuts[stream])
            block = int(np.searchsorted(ends, low + step * share, side="right"))
            # if shards are small, a batch may span any number of blocks
            last = int(np.searchsorted(ends, low + (step + 1) * share - 1, side="right"))
            start = low if block == 0 else int(ends[block - 1])
            now += self._shards_between(start, int(ends[last]))
            if last + 1 < len(ends):
                later += self._shards_between(int(ends[last]), int(ends[last + 1]))
        return list(dict.fromkeys(now + later))

    def _shards_between(self, low: int, high: int) -> list[int]:
        """List the shards that contain virtual positions low ... high - 1."""
        first = int(np.searchsorted(self._virtual_ends, low, side="right"))
        last = int(np.searchsorted(self._virtual_ends, high - 1, side="right"))
        return self._shard_order[first : last + 1].tolist()

    def _generator(self, *purpose: int | str) -> np.random.Generator:
        return numpy_generator(self.plan.seed, "order", self.epoch, *purpose)

    def _stream_blocks(self, stream: int) -> np.ndarray:
        """Find the virtual positions at which the blocks of a stream end, ascending."""
        low, high = self._cuts[stream], self._cuts[stream + 1]
        inside = self._virtual_ends[(self._virtual_ends > low) & (self._virtual_ends < high)]
        # a piece is a stream's part of one shard; its first and last shard may be shared
        piece_ends = np.append(inside, high)
        # staggered, because streams with equal first blocks would all need new shards in the same
        # step
        first = int(self._generator("stagger", stream).integers(self.plan.block_shards))
        # unique, because the last end may be `high` already, and empty shards repeat an end
        return np.unique(np.append(piece_ends[first :: self.plan.block_shards], high))

    def _stream_items(self, stream: int, start: int, count: int) -> np.ndarray:
        """Collect items [start, start + count) of a stream's shuffled order."""
        ends = self._block_ends[stream]
        low = int(self._cuts[stream])
        items = []
        while count > 0:
            block = int(np.searchsorted(ends, low + start, side="right"))
            block_low = low if block == 0 else int(ends[block - 1])
            order = self._block_order(stream, block, block_low, int(ends[block]))
            inside = low + start - block_low
            taken = order[inside : inside + count]
            items.append(taken)
            start += len(taken)
            count -= len(taken)
        return np.concatenate(items)

    def _block_order(self, stream: int, block: int, low: int, high: int) -> np.ndarray:
        cached = self._blocks.get(stream)
        if cached is not None and cached[0] == block:
            return cached[1]
        virtual = np.arange(low, high, dtype=np.int64)
        shard = np.searchsorted(self._virtual_ends, virtual, side="right")
        # for the first shard, index -1 gives the last shard's end, which `where` discards
        shard_low = np.where(shard > 0, self._virtual_ends[shard - 1], 0)
        positions = self._shard_first[shard] + virtual - shard_low
        order = self._generator("block", stream, block).permutation(positions)
        # one block per stream is enough, because steps are read in ascending order
        self._blocks[stream] = (block, order)
        return order


def rank_slice(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Select the slots of a global batch that a rank reads; the world size divides the batch."""
    assert len(batch) % world_size == 0
    share = len(batch) // world_size
    return batch[rank * share : (rank + 1) * share]
