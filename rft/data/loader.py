"""Reading packed sets: samples by number, whole batches by step.

A sample is read by its offset in the index and checked against its crc32; tar headers are never
parsed, so a short or damaged shard is an error with a name, not a shorter epoch. Loader processes
keep no state: item t of the map-style dataset is this rank's part of global batch t.
"""

import math
import os
import resource
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rft import files
from rft.data import encode, order
from rft.data.manifest import Index, Manifest
from rft.data.order import EpochOrder, Plan, rank_slice

# descriptors a process keeps open on shards: half of what the system lets it have
OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


class Batch(NamedTuple):
    """Images as stored, with labels and sample numbers."""

    images_BCHW: Tensor  # uint8
    labels_B: Tensor  # int64
    samples_B: Tensor  # int64


class PackedDataset:
    """One packed set: its manifest, its index and the bytes of any sample."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.manifest = Manifest.load(url)
        self.index = Index.load(url, self.manifest)
        sizes = [shard.samples for shard in self.manifest.shards]
        self.shard_ends = np.cumsum(sizes)
        self._reader = ShardReader(url)

    def __len__(self) -> int:
        return len(self.index.label)

    def payload(self, sample: int) -> bytes:
        """Return the stored bytes of a sample's image.

        Raises:
            ValueError: naming shard, key and offset if they are not the bytes that were packed.
        """
        shard = self.manifest.shards[int(np.searchsorted(self.shard_ends, sample, side="right"))]
        offset, length = int(self.index.offset[sample]), int(self.index.length[sample])
        where = f"{files.join(self.url, shard.name)}, sample {self.key(sample)!r}, offset {offset}"
        try:
            data = self._reader.read(shard.name, offset, length)
        except FileNotFoundError as error:
            raise ValueError(f"missing shard: {where}; copy or pack it again") from error
        if len(data) != length:
            raise ValueError(f"short read: {len(data)} of {length} bytes at {where}")
        if zlib.crc32(data) != self.index.crc32[sample]:
            raise ValueError(f"damaged bytes (crc32 mismatch) at {where}; pack the shard again")
        return data

    def image(self, sample: int, size: int) -> np.ndarray:
        """Return a sample as CLIP sees it, uint8 (3, size, size).

        Raises:
            ValueError: if it was packed as pixels of another size, or its bytes are damaged.
        """
        encoding = self.manifest.encoding
        data = self.payload(sample)
        if encoding["kind"] == "pixels":
            if encoding["size"] != size:
                raise ValueError(
                    f"{self.url} was packed at {encoding['size']} px, the model wants {size} px; "
                    f"pack it again with --size {size} or --encoding original"
                )
            # the array is the end of the .npy; its header is the same in every sample
            return np.frombuffer(data, dtype=np.uint8)[-3 * size * size :].reshape(3, size, size)
        image = encode.load_image(data, name=self.key(sample))
        return encode.clip_pixels(image, size, encoding["crop_border"])

    def batch(self, samples: np.ndarray, size: int) -> Batch:
        """Return the named samples as one batch of uint8 images."""
        images_BCHW = np.empty((len(samples), 3, size, size), dtype=np.uint8)
        for image_CHW, sample in zip(images_BCHW, samples, strict=True):
            image_CHW[:] = self.image(int(sample), size)
        labels_B = self.index.label[samples].astype(np.int64)
        return Batch(
            torch.from_numpy(images_BCHW),
            torch.from_numpy(labels_B),
            torch.from_numpy(np.array(samples, dtype=np.int64)),
        )

    def key(self, sample: int) -> str:
        """Return a sample's id."""
        return self.index.key[sample].decode()

    def shard_sizes(self, samples: np.ndarray) -> tuple[int, ...]:
        """Return how many of the given sorted sample numbers lie in each shard."""
        ends = np.searchsorted(samples, self.shard_ends)
        return tuple(np.diff(ends, prepend=0).tolist())


class ShardReader:
    """Reads byte ranges of shards: pread on local files, ranged requests elsewhere.

    Descriptors and clients are made on first use in each process, because neither a remote client
    nor a shared file position survives a fork.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._process = -1
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return up to `length` bytes at `offset` of shard `name`; fewer at the end of the file."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._descriptors = OrderedDict()
            self._fs, self._path = files.open_store(self._url)
        path = files.join(self._path, name)
        if not isinstance(self._fs, LocalFileSystem):
            data = self._fs.cat_file(path, start=offset, end=offset + length)
            assert isinstance(data, bytes)
            return data
        if name in self._descriptors:
            self._descriptors.move_to_end(name)
        else:
            if len(self._descriptors) == OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[name] = os.open(path, os.O_RDONLY)
        return os.pread(self._descriptors[name], length, offset)

    def __getstate__(self) -> dict[str, str]:
        return {"_url": self._url}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["_url"])

    def __del__(self) -> None:
        if self._process == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)


class TrainingBatches(Dataset[Batch | ValueError]):
    """Item t is one rank's part of global batch t, counted from the start of training."""

    def __init__(
        self,
        packed: PackedDataset,
        samples: np.ndarray,
        plan: Plan,
        *,
        image_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        assert len(samples) == plan.samples
        self.packed = packed
        self.samples = samples
        self.plan = plan
        self.image_size = image_size
        self.rank = rank
        self.world_size = world_size
        self._order: EpochOrder | None = None

    def global_samples(self, step: int) -> np.ndarray:
        """Return the sample numbers of the whole global batch `step`, (B,)."""
        epoch, step_of_epoch = divmod(step, self.plan.steps_per_epoch)
        if self._order is None or self._order.epoch != epoch:
            self._order = EpochOrder(self.plan, epoch)
        return self.samples[self._order.batch(step_of_epoch)]

    def __getitem__(self, index: int) -> Batch | ValueError:
        samples = rank_slice(self.global_samples(index), self.rank, self.world_size)
        return _batch_or_error(self.packed, samples, self.image_size)


class EvaluationBatches(Dataset[Batch | ValueError]):
    """The given samples in their order, cut into batches; the last one may be short."""

    def __init__(
        self, packed: PackedDataset, samples: np.ndarray, *, image_size: int, batch_size: int
    ) -> None:
        self.packed = packed
        self.samples = samples
        self.image_size = image_size
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.batch_size)

    def __getitem__(self, index: int) -> Batch | ValueError:
        start = index * self.batch_size
        samples = self.samples[start : start + self.batch_size]
        return _batch_or_error(self.packed, samples, self.image_size)


def read_batches(
    dataset: Dataset[Batch | ValueError], numbers: range, *, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Yield the numbered batches of a dataset in order, on `device`, images uint8.

    Raises:
        ValueError: if a sample is damaged; the message names shard, key and offset.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # a forked copy of a process that already runs CUDA, gloo or fsspec threads can hang
        multiprocessing_context="forkserver" if workers and len(numbers) else None,
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield to_device(batch, device)


def _batch_or_error(packed: PackedDataset, samples: np.ndarray, size: int) -> Batch | ValueError:
    # as a value, because a loader process would raise it again as a whole traceback in one string
    try:
        return packed.batch(samples, size)
    except ValueError as error:
        return error


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with images and labels on `device`, copied without waiting."""
    images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
    labels_B = batch.labels_B.to(device, non_blocking=True)
    return Batch(images_BCHW, labels_B, batch.samples_B)


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
