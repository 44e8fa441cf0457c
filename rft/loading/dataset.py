"""Reading packed sets: samples by number, whole batches by step.

A sample is read by its offset in the index and checked against its crc32; tar headers are never
parsed, so a short or damaged shard is an error with a name, not a shorter epoch. Loader processes
keep no state: item t is this rank's part of global batch t, and they write its images straight into
memory that the training process shares with them.
"""

import math
import mmap
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.reduction import DupFd
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from isal.isal_zlib import crc32
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rft.config import Config
from rft.device import to_device
from rft.loading import order
from rft.loading.order import EpochOrder, Plan, rank_slice
from rft.loading.split import held_out_split
from rft.shards import encode
from rft.shards.cache import Cache
from rft.shards.manifest import Index, Manifest, note_other_stores
from rft.shards.ranges import Patience, RangeError, Shards

SECONDS_ALONE = 2  # that a loader process outlives a trainer that was killed, at most
PAYLOAD_BYTES = 2**28  # of image files that are in memory together
BATCHES_AHEAD = 2  # batches that each loader process may have ready or under way


class Reading(NamedTuple):
    """What one batch cost to read, in its own process; see `rft.shards.ranges.Counters`."""

    seconds: float = 0.0
    decode_seconds: float = 0.0
    bytes: int = 0
    range_retries: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_repairs: int = 0


class Batch(NamedTuple):
    """Images as stored, with labels and sample numbers."""

    images_BCHW: Tensor  # uint8
    labels_B: Tensor  # int64
    samples_B: Tensor  # int64
    reading: Reading = Reading()
    ready: int = 0  # batches after this one that were waiting to be taken


class _Row(NamedTuple):
    """Where one sample's payload lies and what it must be."""

    sample: int
    shard: int
    offset: int
    length: int
    crc32: int


class PackedDataset:
    """One packed set: its manifest, its index and the bytes of any sample."""

    def __init__(
        self,
        url: str,
        *,
        cache: Cache | None = None,
        patience: Patience | None = None,
        max_pixels: float = encode.MAX_PIXELS,
    ) -> None:
        self.url = url
        self.manifest = Manifest.load(url)
        note_other_stores(url, self.manifest)
        self.index = Index.load(url, self.manifest)
        self._max_pixels = max_pixels
        self._require_affordable()
        sizes = [shard.samples for shard in self.manifest.shards]
        self.shard_ends = np.cumsum(sizes)
        self.shards = Shards(url, self.manifest.shards, cache=cache, patience=patience)
        self._npy_header = b""
        if self.manifest.encoding["kind"] == "pixels":
            self._npy_header = encode.npy_header(self.manifest.encoding["size"])

    def __len__(self) -> int:
        return len(self.index.label)

    def payload(self, sample: int) -> bytes:
        """Return the stored bytes of a sample's image.

        Raises:
            ValueError: naming shard, key and offset if they are not the bytes that were packed.
        """
        return self.payloads(np.array([sample]))[0]

    def payloads(self, samples: np.ndarray) -> list[bytes]:
        """Return the stored bytes of some samples; remote ones are asked for side by side.

        Raises:
            ValueError: naming shard, key and offset if they are not the bytes that were packed.
        """
        rows = self._rows(samples)
        found = [self._from_disk(row) for row in rows]
        remote = [place for place, data in enumerate(found) if data is None]
        if remote:
            ranges = [rows[place][1:4] for place in remote]
            try:
                answers = self.shards.ranges(ranges)
            except RangeError as error:
                row = rows[remote[error.place]]
                raise ValueError(f"{error}; {self._name(row)}") from error
            for place, data in zip(remote, answers, strict=True):
                self._require_whole(rows[place], len(data), crc32(data))
                found[place] = data
            if self.shards.cache is not None:
                self.shards.counters.cache_misses += len(remote)
        self.shards.counters.bytes += sum(len(data) for data in found if data is not None)
        return [data for data in found if data is not None]

    def image(self, sample: int, size: int) -> np.ndarray:
        """Return a sample as CLIP sees it, uint8 (3, size, size).

        Raises:
            ValueError: if it was packed at another size, or its bytes are damaged.
        """
        return self.batch(np.array([sample]), size).images_BCHW[0].numpy()

    def batch(self, samples: np.ndarray, size: int, out_BCHW: Tensor | None = None) -> Batch:
        """Return the named samples as one batch of uint8 images.

        The images are written to the first rows of `out_BCHW` where it is given.

        Raises:
            ValueError: if the set was packed at another size, or a sample's bytes are damaged.
        """
        self._require_size(size)
        began, before = time.perf_counter(), self.shards.counters.copy()
        if out_BCHW is None:
            out_BCHW = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
        images_BCHW = out_BCHW[: len(samples)]
        decoding = self._fill(samples, images_BCHW.numpy())
        spent = self.shards.counters
        reading = Reading(
            seconds=time.perf_counter() - began,
            decode_seconds=decoding,
            **{name: getattr(spent, name) - getattr(before, name) for name in Reading._fields[2:]},
        )
        labels_B = self.index.label[samples].astype(np.int64)
        return Batch(
            images_BCHW,
            torch.from_numpy(labels_B),
            torch.from_numpy(np.array(samples, dtype=np.int64)),
            reading,
        )

    def key(self, sample: int) -> str:
        """Return a sample's id."""
        return self.index.key[sample].decode()

    def shard_of(self, sample: int) -> int:
        """Return the number of the shard that holds a sample."""
        return int(np.searchsorted(self.shard_ends, sample, side="right"))

    def shard_sizes(self, samples: np.ndarray) -> tuple[int, ...]:
        """Return how many of the given sorted sample numbers lie in each shard."""
        ends = np.searchsorted(samples, self.shard_ends)
        return tuple(np.diff(ends, prepend=0).tolist())

    def _fill(self, samples: np.ndarray, images_BCHW: np.ndarray) -> float:
        """Write the samples' images; return the seconds spent in decoding."""
        size = images_BCHW.shape[-1]
        if self.manifest.encoding["kind"] == "pixels":
            # a sample that is on this machine is read to where it belongs, without a copy between
            elsewhere = self._pixels_from_disk(samples, images_BCHW)
            if elsewhere:
                payloads = self.payloads(samples[elsewhere])
                rows = self._rows(samples[elsewhere])
                for place, row, data in zip(elsewhere, rows, payloads, strict=True):
                    self._require_pixels(row, data[: len(self._npy_header)])
                    pixels = np.frombuffer(data, dtype=np.uint8)[len(self._npy_header) :]
                    images_BCHW[place] = pixels.reshape(3, size, size)
            return 0.0
        # at once, unless the files are huge: then some at a time
        parts = portions(self.index.length[samples].tolist(), PAYLOAD_BYTES)
        return sum(self._decode(samples[part], images_BCHW[part]) for part in parts)

    def _decode(self, samples: np.ndarray, images_BCHW: np.ndarray) -> float:
        """Write the images of samples whose payloads are files; return the seconds of decoding."""
        size = images_BCHW.shape[-1]
        payloads = self.payloads(samples)
        began = time.perf_counter()
        treatment = encode.payload_treatment(self.manifest.encoding)
        rows = self._rows(samples)
        for image_CHW, row, data in zip(images_BCHW, rows, payloads, strict=True):
            image = encode.load_image(data, self._where(row), treatment, self._max_pixels)
            image_CHW[:] = encode.clip_pixels(image, size, treatment.border)
        return time.perf_counter() - began

    def _rows(self, samples: np.ndarray) -> "list[_Row]":
        """Return where some samples lie."""
        index = self.index
        columns = (
            samples,
            np.searchsorted(self.shard_ends, samples, side="right"),
            index.offset[samples],
            index.length[samples],
            index.crc32[samples],
        )
        return list(map(_Row, *(column.tolist() for column in columns)))

    def _from_disk(self, row: "_Row") -> bytes | None:
        """Return a sample's checked bytes from a local or cached shard, None if it is neither."""
        descriptor = self._descriptor(row)
        if descriptor is None:
            return None
        data = os.pread(descriptor, row.length, row.offset)
        return data if self._is_good(row, len(data), crc32(data)) else None

    def _pixels_from_disk(self, samples: np.ndarray, images_BCHW: np.ndarray) -> list[int]:
        """Read pixels to their places; return the places whose shards are not local nor cached.

        A `.npy` payload is a header, the same in every sample, and then the pixels. This loop is
        all that stands between the page cache and a batch, so it does little more than it must.
        """
        rows = self._rows(samples)
        header = bytearray(len(self._npy_header))
        elsewhere = []
        shard, descriptor = -1, None
        for place in sorted(range(len(rows)), key=lambda place: rows[place].shard):
            row = rows[place]
            if row.shard != shard:
                shard, descriptor = row.shard, self._descriptor(row)
            if descriptor is None:
                elsewhere.append(place)
                continue
            image_CHW = images_BCHW[place]
            if row.length != len(header) + image_CHW.nbytes:
                self._require_pixels(row, b"")
            buffers: list[Any] = [header, image_CHW]
            read = os.preadv(descriptor, buffers, row.offset)
            if self._is_good(row, read, crc32(image_CHW, crc32(header))):
                self._require_pixels(row, header)
                self.shards.counters.bytes += read
            else:
                elsewhere.append(place)
                shard = -1  # its descriptor is closed
        return elsewhere

    def _descriptor(self, row: "_Row") -> int | None:
        try:
            return self.shards.descriptor(row.shard)
        except FileNotFoundError as error:
            raise ValueError(f"missing shard: {self._where(row)}; copy or pack it again") from error

    def _is_good(self, row: "_Row", length: int, checksum: int) -> bool:
        """Check what came from a disk; bad bytes of the cache are thrown away, others an error."""
        good = length == row.length and checksum == row.crc32
        if self.shards.is_local(row.shard):
            if not good:
                self._require_whole(row, length, checksum)
            return True
        if good:
            self.shards.counters.cache_hits += 1
            return True
        self.shards.repair(row.shard)
        return False

    def _require_whole(self, row: "_Row", length: int, checksum: int) -> None:
        if length != row.length:
            where = self._where(row)
            raise ValueError(f"short read: {length} of {row.length} bytes at {where}")
        if checksum != row.crc32:
            where = self._where(row)
            raise ValueError(f"damaged bytes (crc32 mismatch) at {where}; pack the shard again")

    def _require_pixels(self, row: "_Row", header: bytes | bytearray) -> None:
        size = self.manifest.encoding["size"]
        if header != self._npy_header or row.length != len(header) + 3 * size**2:
            raise ValueError(
                f"{self._where(row)} is no array of 3 x {size} x {size} pixels, as its manifest "
                "says; pack the set again"
            )

    def _where(self, row: "_Row") -> str:
        return f"{self.shards.location(row.shard)}, {self._name(row)}"

    def _name(self, row: "_Row") -> str:
        return f"sample {self.key(row.sample)!r}, offset {row.offset}"

    def _require_affordable(self) -> None:
        """Check what the index says of the largest image, before any is read."""
        index, name = self.index, f"{self.url}: its largest"
        encode.require_affordable(
            int(index.length.max(initial=0)), f"{name} file", self._max_pixels
        )
        pixels = (index.width.astype(np.int64) * index.height).max(initial=0)
        if self.manifest.encoding["kind"] == "original" and pixels > self._max_pixels * 1e6:
            raise ValueError(
                f"{name} image has {pixels / 1e6:,.1f} million pixels, --max-pixels allows "
                f"{self._max_pixels:g} million: raise it (for training, --loader.max-pixels)"
            )

    def _require_size(self, size: int) -> None:
        packed = self.manifest.encoding.get("size", size)
        if packed != size:
            raise ValueError(
                f"{self.url} was packed at {packed} px, the model wants {size} px; "
                f"pack it again with --size {size} or --encoding original"
            )


def portions(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Cut a list into runs of at most `limit` bytes, or of one element."""
    start = filled = 0
    for place, size in enumerate(sizes):
        if place > start and filled + size > limit:
            yield slice(start, place)
            start, filled = place, 0
        filled += size
    if start < len(sizes):
        yield slice(start, len(sizes))


class Batches(Protocol):
    """What the loader reads: batch t for any t."""

    packed: PackedDataset
    image_size: int
    largest: int
    """Samples in the largest batch."""

    def samples_of(self, number: int) -> np.ndarray:
        """Return the sample numbers of batch `number`."""
        ...


class TrainingBatches:
    """Batch t is one rank's part of global batch t, counted from the start of training.

    `ranks_on_node` are the ranks that share this one's cache.
    """

    def __init__(
        self,
        packed: PackedDataset,
        samples: np.ndarray,
        plan: Plan,
        *,
        image_size: int,
        rank: int,
        world_size: int,
        ranks_on_node: Sequence[int] = (),
    ) -> None:
        assert len(samples) == plan.samples
        assert plan.batch_size % world_size == 0
        self.packed = packed
        self.samples = samples
        self.plan = plan
        self.image_size = image_size
        self.rank = rank
        self.world_size = world_size
        self.ranks_on_node = ranks_on_node or (rank,)
        self.largest = plan.batch_size // world_size
        self._order: EpochOrder | None = None

    def global_samples(self, step: int) -> np.ndarray:
        """Return the sample numbers of the whole global batch `step`, (B,)."""
        epoch, step_of_epoch = divmod(step, self.plan.steps_per_epoch)
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
        if self._order is None or self._order.epoch != epoch:
            self._order = EpochOrder(self.plan, epoch)
        return self._order


class EvaluationBatches:
    """The given samples in their order, cut into batches; the last one may be short."""

    def __init__(
        self, packed: PackedDataset, samples: np.ndarray, *, image_size: int, batch_size: int
    ) -> None:
        self.packed = packed
        self.samples = samples
        self.image_size = image_size
        self.largest = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.largest)

    def samples_of(self, number: int) -> np.ndarray:
        """Return the sample numbers of batch `number`."""
        return self.samples[number * self.largest : (number + 1) * self.largest]


def plan_training(packed: PackedDataset, config: Config) -> tuple[Plan, np.ndarray, np.ndarray]:
    """Return a run's plan, the sample numbers that it orders, and those held out.

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


def read_batches(
    batches: Batches, numbers: range, *, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield the numbered batches in order, on `device`, images uint8.

    A batch's images stay as they are until the next batch is asked for: their memory is used again.

    Raises:
        ValueError: if a sample is damaged; the message names shard, key and offset.
        ChildProcessError: if a loader process was killed.
    """
    # at least two, so that a batch is never written over the one before it
    slots = Slots(batches, workers * BATCHES_AHEAD + 2)
    items = _SlotItems(batches, slots)
    if workers == 0 or len(numbers) == 0:
        found: Iterator[_Item | ValueError] = map(items.__getitem__, numbers)
    else:
        # a forked copy of a process that already runs CUDA, gloo or fsspec threads can hang
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rft.loading.forkserver", "rft.loading.dataset"])
        found = iter(
            DataLoader(
                items,
                batch_size=None,
                sampler=numbers,
                num_workers=workers,
                prefetch_factor=BATCHES_AHEAD,
                collate_fn=_as_it_is,
                worker_init_fn=_start_loader,
                multiprocessing_context=context,
            )
        )
    for number in numbers:
        try:
            item = next(found)
        except RuntimeError as error:
            # so that no more loader processes are waited for; torch has no class for this error
            del found
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(
                f"a loader process was killed before batch {number} ({error}), by a person or "
                "because memory ran out: fewer --loader.workers need less; then run the same "
                "command again"
            ) from error
        if isinstance(item, ValueError):
            # the error will keep this frame alive, and the frame the loader processes
            del found
            raise item
        yield slots.batch(number, item, device)


def _start_loader(_: int) -> None:
    info = get_worker_info()
    assert info is not None, "this is a loader process"
    items: Any = info.dataset
    # the process ends without collecting what it has: this ends the cache's filling thread, which
    # removes its part
    Finalize(None, items.packed.shards.close, exitpriority=0)
    _follow_trainer()


def _follow_trainer() -> None:
    """End this loader process when the training process says so by SIGTERM, or is gone.

    Signals of others pass it by (rft/loading/forkserver.py). torch alone would have it watch the
    process that forked it, which lives as long as it does.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "a loader process has a training process"

    def wait() -> None:
        while trainer.is_alive():
            # only a thread that waits for a signal is told who sent it
            told = signal.sigtimedwait({signal.SIGTERM}, SECONDS_ALONE)
            if told is not None and told.si_pid == trainer.pid:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _Item(NamedTuple):
    """A batch whose images are in their slot."""

    labels_B: np.ndarray
    samples_B: np.ndarray
    reading: Reading


class _SlotItems(Dataset[_Item | ValueError]):
    """Item t fills the slot of batch t."""

    def __init__(self, batches: Batches, slots: "Slots") -> None:
        self._batches = batches
        self._slots = slots

    @property
    def packed(self) -> PackedDataset:
        """Return the set that is read."""
        return self._batches.packed

    def __getitem__(self, index: int) -> _Item | ValueError:
        batches = self._batches
        try:
            samples = batches.samples_of(index)
            batch = batches.packed.batch(samples, batches.image_size, self._slots.images(index))
        except ValueError as error:
            # as a value: a loader process would raise it again as a whole traceback in one string
            return error
        self._slots.mark(index)
        return _Item(batch.labels_B.numpy(), batch.samples_B.numpy(), batch.reading)


class Slots:
    """Places for some batches of images, in memory that loader processes share.

    Batch t goes to slot t modulo their number. Reused memory is many times faster than fresh: the
    system has to clear every page that it gives out. The memory has no name and is no part of
    /dev/shm, so nothing is left behind and a container's small limit does not matter.
    """

    def __init__(self, batches: Batches, count: int) -> None:
        self._shape = (count, batches.largest, 3, batches.image_size, batches.image_size)
        self._memory = _SharedMemory(8 * count + math.prod(self._shape))
        self._attach()
        self._marks_S.fill_(-1)

    def __getstate__(self) -> dict[str, Any]:
        return {"_shape": self._shape, "_memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def _attach(self) -> None:
        count = self._shape[0]
        whole = torch.frombuffer(self._memory.map, dtype=torch.uint8)
        self._marks_S = whole[: 8 * count].view(torch.int64)
        self._images_SBCHW = whole[8 * count :].view(self._shape)

    def images(self, number: int) -> Tensor:
        """Return the place for the images of batch `number`."""
        return self._images_SBCHW[number % self._shape[0]]

    def mark(self, number: int) -> None:
        """Note that batch `number` is in its slot."""
        self._marks_S[number % self._shape[0]] = number

    def batch(self, number: int, item: _Item, device: torch.device) -> Batch:
        """Return batch `number` on a device."""
        images_BCHW = to_device(self.images(number)[: len(item.labels_B)], device)
        labels_B = to_device(torch.from_numpy(item.labels_B), device)
        ready = int((self._marks_S > number).sum())
        return Batch(images_BCHW, labels_B, torch.from_numpy(item.samples_B), item.reading, ready)


class _SharedMemory:
    """Nameless memory that a started process gets by its descriptor."""

    def __init__(self, size: int) -> None:
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("rft batches")
        else:
            with tempfile.TemporaryFile() as file:
                self._descriptor = os.dup(file.fileno())
        os.ftruncate(self._descriptor, size)
        self.map = mmap.mmap(self._descriptor, size)

    def __getstate__(self) -> dict[str, Any]:
        return {"descriptor": DupFd(self._descriptor), "size": len(self.map)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._descriptor = state["descriptor"].detach()
        self.map = mmap.mmap(self._descriptor, state["size"])

    def __del__(self) -> None:
        os.close(self._descriptor)


def _as_it_is(item: Any) -> Any:
    return item


def fingerprint(packed: PackedDataset, plan: Plan, held_out: int, held_out_seed: int) -> dict:
    """Return everything that decides which samples step t holds; checkpoints carry it."""
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
