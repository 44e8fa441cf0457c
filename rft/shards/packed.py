"""One packed set, read by sample number, with verified bytes. No torch.

A sample is read at its offset in the index and checked against its crc32. Tar headers are never
parsed, so a truncated or damaged shard is an error that names it, not a shorter epoch.
`rft.loading.dataset` makes batches of images for a model.
"""

import os
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32
from PIL import Image, ImageOps

from rft.config import MAX_PIXELS
from rft.shards.cache import Cache
from rft.shards.image_files import require_affordable
from rft.shards.images import load_image, npy_header, payload_of
from rft.shards.index import Index
from rft.shards.manifest import Manifest, note_other_stores
from rft.shards.ranges import RangeError, Shards

PAYLOAD_BYTES = 2**28  # of image files that are in memory at a time


class _Row(NamedTuple):
    """The location of one sample's payload, and its checksum."""

    sample: int
    shard: int
    offset: int
    length: int
    crc32: int


class PackedSet:
    """One packed set: its manifest, its index and the bytes of any sample."""

    def __init__(
        self,
        url: str,
        *,
        cache: Cache | None = None,
        max_pixels: float = MAX_PIXELS,
        option: str = "",
    ) -> None:
        self.url = url
        self.manifest = Manifest.load(url, option)
        note_other_stores(url, self.manifest)
        self.index = Index.load(url, self.manifest)
        self.max_pixels = max_pixels
        self._payload = payload_of(self.manifest.encoding)
        self._require_affordable()
        sizes = [shard.samples for shard in self.manifest.shards]
        # samples are numbered shard by shard: each end is the first number of the next shard
        self.shard_ends = np.cumsum(sizes)
        self.shards = Shards(url, self.manifest.shards, cache=cache)
        self._npy_header = b""
        if self._payload.is_array:
            self._npy_header = npy_header(self.manifest.encoding["size"])

    def __len__(self) -> int:
        return len(self.index.label)

    def payload(self, sample: int) -> bytes:
        """Read the stored bytes of a sample's image; raises as `payloads`."""
        return self.payloads(np.array([sample]))[0]

    def payloads(self, samples: np.ndarray) -> list[bytes]:
        """Read the stored bytes of some samples; remote ones are requested concurrently.

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

    def picture(self, sample: int, data: bytes) -> Image.Image:
        """Decode a sample's stored bytes to RGB, at their own size and without the set's border.

        Raises:
            ValueError: naming shard, key and offset if they cannot be decoded.
        """
        (row,) = self._rows(np.array([sample]))
        if self._payload.is_array:
            header, size = len(self._npy_header), self.manifest.encoding["size"]
            self._require_pixels(row, data[:header])
            pixels_CHW = np.frombuffer(data, dtype=np.uint8, offset=header).reshape(3, size, size)
            return Image.fromarray(pixels_CHW.transpose(1, 2, 0))
        treatment = self._payload.treatment
        image = load_image(data, self._where(row), treatment, self.max_pixels)
        return ImageOps.crop(image, treatment.border)

    def key(self, sample: int) -> str:
        """Return a sample's id."""
        return self.index.key[sample].decode()

    def shard_of(self, sample: int) -> int:
        """Find the number of the shard that holds a sample."""
        # right: an end belongs to the next shard, and empty shards are skipped
        return int(np.searchsorted(self.shard_ends, sample, side="right"))

    def shard_sizes(self, samples: np.ndarray) -> tuple[int, ...]:
        """Count how many of the given sorted sample numbers are in each shard."""
        ends = np.searchsorted(samples, self.shard_ends)
        return tuple(np.diff(ends, prepend=0).tolist())

    def _rows(self, samples: np.ndarray) -> "list[_Row]":
        """Look up the locations of some samples."""
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
        """Read a sample's verified bytes from a local or cached shard, None if it is neither."""
        descriptor = self._descriptor(row)
        if descriptor is None:
            return None
        data = os.pread(descriptor, row.length, row.offset)
        return data if self._is_good(row, len(data), crc32(data)) else None

    def _descriptor(self, row: "_Row") -> int | None:
        try:
            return self.shards.descriptor(row.shard)
        except FileNotFoundError as error:
            raise ValueError(f"missing shard: {self._where(row)}; copy or pack it again") from error

    def _is_good(self, row: "_Row", length: int, checksum: int) -> bool:
        """Check bytes from disk: in the cache, bad ones are discarded; elsewhere, an error."""
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
                f"{self._where(row)} is not the array of 3 x {size} x {size} pixels that its "
                "manifest declares; pack the set again"
            )

    def _where(self, row: "_Row") -> str:
        return f"{self.shards.location(row.shard)}, {self._name(row)}"

    def _name(self, row: "_Row") -> str:
        return f"sample {self.key(row.sample)!r}, offset {row.offset}"

    def _require_affordable(self) -> None:
        """Check the size of the largest image in the index, before any is read."""
        index, name = self.index, f"{self.url}: its largest"
        require_affordable(int(index.length.max(initial=0)), f"{name} file", self.max_pixels)
        pixels = (index.width.astype(np.int64) * index.height).max(initial=0)
        # payloads of other encodings have the model's size, whatever their originals had
        if self._payload.is_source and pixels > self.max_pixels * 1e6:
            raise ValueError(
                f"{name} image has {pixels / 1e6:,.1f} million pixels, --max-pixels allows "
                f"{self.max_pixels:g} million; raise it (for training, --loader.max-pixels)"
            )
