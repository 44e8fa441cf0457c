"""One packed set, read by sample number: checked bytes, decoded images, labels.

A sample is read by its offset in the index and checked against its crc32; tar headers are never
parsed, so a short or damaged shard is an error with a name, not a shorter epoch.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from isal.isal_zlib import crc32
from torch import Tensor

from rft.config import MAX_PIXELS
from rft.shards.cache import Cache
from rft.shards.image_files import require_affordable
from rft.shards.images import clip_pixels, load_image, npy_header, payload_of
from rft.shards.index import Index
from rft.shards.manifest import Manifest, note_other_stores
from rft.shards.ranges import RangeError, Shards, cut

PAYLOAD_BYTES = 2**28  # of image files that are in memory together


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

    images_BCHW: Tensor  # uint8; (B, 0) where `features` are all that is wanted of them
    labels_B: Tensor  # int64
    samples_B: Tensor  # int64
    reading: Reading = Reading()
    ready: int = 0  # batches after this one that were waiting to be taken
    features: Mapping[str, Tensor] = MappingProxyType({})  # (B, E), see rft/train/features.py
    computing: float = 0.0  # seconds that the process which takes the batch spent on those


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
        max_pixels: float = MAX_PIXELS,
    ) -> None:
        self.url = url
        self.manifest = Manifest.load(url)
        note_other_stores(url, self.manifest)
        self.index = Index.load(url, self.manifest)
        self.max_pixels = max_pixels
        self._payload = payload_of(self.manifest.encoding)
        self._require_affordable()
        sizes = [shard.samples for shard in self.manifest.shards]
        # samples are numbered shard by shard: each end is the number of the next shard's first one
        self.shard_ends = np.cumsum(sizes)
        self.shards = Shards(url, self.manifest.shards, cache=cache)
        self._npy_header = b""
        if self._payload.is_array:
            self._npy_header = npy_header(self.manifest.encoding["size"])

    def __len__(self) -> int:
        return len(self.index.label)

    def payload(self, sample: int) -> bytes:
        """Return the stored bytes of a sample's image; raises what `payloads` does."""
        return self.payloads(np.array([sample]))[0]

    def payloads(self, samples: np.ndarray) -> list[bytes]:
        """Return the stored bytes of some samples; remote ones are requested concurrently.

        Raises:
            ValueError: naming shard, key and offset if they are not the bytes that were packed.
        """
        rows = self._rows(samples)
        found = [self._from_disk(row) for row in rows]
        remote = [place for place, data in enumerate(found) if data is None]
        if remote:
            # shard, offset and length
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
        """Return a sample as CLIP sees it, uint8 (3, size, size); raises what `batch` does."""
        return self.batch(np.array([sample]), size).images_BCHW[0].numpy()

    def batch(self, samples: np.ndarray, size: int, out_BCHW: Tensor | None = None) -> Batch:
        """Return the named samples as one batch of uint8 images.

        The images are written to the first rows of `out_BCHW` where it is given.

        Raises:
            ValueError: if the set was packed at another size, or a sample's bytes are damaged.
        """
        self._require_size(size)
        began, before = time.perf_counter(), dataclasses.replace(self.shards.counters)
        if out_BCHW is None:
            out_BCHW = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
        images_BCHW = out_BCHW[: len(samples)]
        decoding = self._fill(samples, images_BCHW.numpy())
        spent = self.shards.counters
        reading = Reading(
            seconds=time.perf_counter() - began,
            decode_seconds=decoding,
            # all fields but the two times are counters of the same name
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
        # right: an end belongs to the next shard, and shards without samples are passed over
        return int(np.searchsorted(self.shard_ends, sample, side="right"))

    def shard_sizes(self, samples: np.ndarray) -> tuple[int, ...]:
        """Return how many of the given sorted sample numbers lie in each shard."""
        ends = np.searchsorted(samples, self.shard_ends)
        return tuple(np.diff(ends, prepend=0).tolist())

    def _fill(self, samples: np.ndarray, images_BCHW: np.ndarray) -> float:
        """Write the samples' images; return the seconds spent in decoding."""
        if self._payload.is_array:
            self._copy_pixels(samples, images_BCHW)
            return 0.0
        # at once, unless the files are huge: then some at a time
        parts = cut(self.index.length[samples].tolist(), PAYLOAD_BYTES)
        return sum(self._decode(samples[a:b], images_BCHW[a:b]) for a, b in parts)

    def _decode(self, samples: np.ndarray, images_BCHW: np.ndarray) -> float:
        """Write the images of samples whose payloads are files; return the seconds of decoding."""
        size = images_BCHW.shape[-1]
        payloads = self.payloads(samples)
        began = time.perf_counter()
        treatment = self._payload.treatment
        rows = self._rows(samples)
        for image_CHW, row, data in zip(images_BCHW, rows, payloads, strict=True):
            image = load_image(data, self._where(row), treatment, self.max_pixels)
            image_CHW[:] = clip_pixels(image, size, treatment.border)
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

    def _copy_pixels(self, samples: np.ndarray, images_BCHW: np.ndarray) -> None:
        """Write the images of samples whose payloads are arrays.

        A `.npy` payload is a header, the same in every sample, and then the pixels. A sample on
        this machine is read to where it belongs, without a copy between: this loop is all that
        stands between the page cache and a batch, so it does little more than it must.
        """
        rows = self._rows(samples)
        header = bytearray(len(self._npy_header))
        elsewhere = []
        shard, descriptor = -1, None
        # by shard, so that each descriptor is looked up once
        for place in sorted(range(len(rows)), key=lambda place: rows[place].shard):
            row = rows[place]
            if row.shard != shard:
                shard, descriptor = row.shard, self._descriptor(row)
            if descriptor is None:
                elsewhere.append(place)
                continue
            image_CHW = images_BCHW[place]
            if row.length != len(header) + image_CHW.nbytes:
                # raises; preadv would fill the buffers, whatever the length of the payload
                self._require_pixels(row, b"")
            buffers: list[Any] = [header, image_CHW]
            read = os.preadv(descriptor, buffers, row.offset)
            # the index has one crc32 over both parts
            if self._is_good(row, read, crc32(image_CHW, crc32(header))):
                self._require_pixels(row, header)
                self.shards.counters.bytes += read
            else:
                elsewhere.append(place)
                shard = -1  # its descriptor is closed
        if not elsewhere:
            return
        for place, data in zip(elsewhere, self.payloads(samples[elsewhere]), strict=True):
            self._require_pixels(rows[place], data[: len(header)])
            pixels = np.frombuffer(data, dtype=np.uint8)[len(header) :]
            images_BCHW[place] = pixels.reshape(images_BCHW.shape[1:])

    def _descriptor(self, row: "_Row") -> int | None:
        try:
            return self.shards.descriptor(row.shard)
        except FileNotFoundError as error:
            raise ValueError(f"missing shard: {self._where(row)}; copy or pack it again") from error

    def _is_good(self, row: "_Row", length: int, checksum: int) -> bool:
        """Check what came from a disk; bad bytes of the cache are thrown away, others an error."""
        if self.shards.is_local(row.shard):
            self._require_whole(row, length, checksum)
            return True
        good = length == row.length and checksum == row.crc32
        if good:
            self.shards.counters.cache_hits += 1
        else:
            self.shards.repair(row.shard)
        return good

    def _require_whole(self, row: "_Row", length: int, checksum: int) -> None:
        if length != row.length:
            raise ValueError(f"short read: {length} of {row.length} bytes at {self._where(row)}")
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
        require_affordable(int(index.length.max(initial=0)), f"{name} file", self.max_pixels)
        pixels = (index.width.astype(np.int64) * index.height).max(initial=0)
        # payloads of other encodings have the model's size, whatever that of their originals
        if self._payload.is_source and pixels > self.max_pixels * 1e6:
            raise ValueError(
                f"{name} image has {pixels / 1e6:,.1f} million pixels, --max-pixels allows "
                f"{self.max_pixels:g} million: raise it (for training, --loader.max-pixels)"
            )

    def _require_size(self, size: int) -> None:
        packed = self.manifest.encoding.get("size", size)
        if packed != size:
            raise ValueError(
                f"{self.url} was packed at {packed} px, the model wants {size} px; "
                f"pack it again with --size {size} or --encoding original"
            )
