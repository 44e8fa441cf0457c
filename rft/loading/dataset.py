"""Batches of a packed set: decoded images and labels of any samples, as tensors."""

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

from rft.loading.augment import Augmentation
from rft.shards.images import clip_pixels, load_image
from rft.shards.packed import PAYLOAD_BYTES, PackedSet
from rft.shards.ranges import cut


class Reading(NamedTuple):
    """Cost of reading one batch, in its process; see `rft.shards.ranges.Counters`."""

    seconds: float = 0.0
    decode_seconds: float = 0.0
    bytes: int = 0
    range_retries: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_repairs: int = 0


class Batch(NamedTuple):
    """Images as stored, with labels and sample numbers."""

    images_BCHW: Tensor  # uint8; (B, 0) if only `features` are needed
    labels_B: Tensor  # int64
    samples_B: Tensor  # int64
    reading: Reading = Reading()
    ready: int = 0  # later batches that were ready when this one was taken
    features: Mapping[str, Tensor] = MappingProxyType({})  # (B, E), see rft/train/features.py
    computing: float = 0.0  # seconds that the consuming process spent on the features


class PackedDataset(PackedSet):
    """A packed set whose samples are read as batches."""

    def image(self, sample: int, size: int) -> np.ndarray:
        """Read a sample as CLIP's input, uint8 (3, size, size); raises the errors of `batch`."""
        return self.batch(np.array([sample]), size).images_BCHW[0].numpy()

    def batch(
        self,
        samples: np.ndarray,
        size: int,
        out_BCHW: Tensor | None = None,
        augmentation: Augmentation | None = None,
    ) -> Batch:
        """Read samples as one batch of uint8 images.

        The images are written to the first rows of `out_BCHW`, if given. `augmentation` requires a
        set whose images are decoded (`require_decoded`).

        Raises:
            ValueError: if the set was packed at another size, or a sample's bytes are damaged.
        """
        self._require_size(size)
        began, before = time.perf_counter(), dataclasses.replace(self.shards.counters)
        if out_BCHW is None:
            out_BCHW = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
        images_BCHW = out_BCHW[: len(samples)]
        decoding = self._fill(samples, images_BCHW.numpy(), augmentation)
        spent = self.shards.counters
        reading = Reading(
            seconds=time.perf_counter() - began,
            decode_seconds=decoding,
            # all fields except the two times are counters of the same name
            **{name: getattr(spent, name) - getattr(before, name) for name in Reading._fields[2:]},
        )
        labels_B = self.index.label[samples].astype(np.int64)
        return Batch(
            images_BCHW,
            torch.from_numpy(labels_B),
            torch.from_numpy(np.array(samples, dtype=np.int64)),
            reading,
        )

    def require_decoded(self, option: str) -> None:
        """Check that the set's images can be augmented, as `option` requires.

        Raises:
            ValueError: if they are stored as pixels.
        """
        if self._payload.is_array:
            raise ValueError(
                f"{option} crops each image anew in each epoch, but {self.url} was packed with "
                "--encoding pixels, which is never decoded; pack the set with --encoding "
                "original, or omit the option (docs/data.md#encodings)"
            )

    def _fill(
        self, samples: np.ndarray, images_BCHW: np.ndarray, augmentation: Augmentation | None
    ) -> float:
        """Write the samples' images; return the seconds spent on decoding."""
        if self._payload.is_array:
            assert augmentation is None, "require_decoded comes before it"
            self._copy_pixels(samples, images_BCHW)
            return 0.0
        # all at once, or in parts if the files are huge
        parts = cut(self.index.length[samples].tolist(), PAYLOAD_BYTES)
        return sum(self._decode(samples[a:b], images_BCHW[a:b], augmentation) for a, b in parts)

    def _decode(
        self, samples: np.ndarray, images_BCHW: np.ndarray, augmentation: Augmentation | None
    ) -> float:
        """Write the images of samples stored as files; return the seconds spent on decoding."""
        size = images_BCHW.shape[-1]
        payloads = self.payloads(samples)
        began = time.perf_counter()
        treatment = self._payload.treatment
        rows = self._rows(samples)
        for image_CHW, row, data in zip(images_BCHW, rows, payloads, strict=True):
            image = load_image(data, self._where(row), treatment, self.max_pixels)
            if augmentation is None:
                image_CHW[:] = clip_pixels(image, size, treatment.border)
            else:
                key = self.key(row.sample)
                image_CHW[:] = augmentation.pixels(image, key, size, treatment.border)
        return time.perf_counter() - began

    def _copy_pixels(self, samples: np.ndarray, images_BCHW: np.ndarray) -> None:
        """Write the images of samples stored as arrays.

        A `.npy` payload is a header, equal in all samples, followed by the pixels. Local samples
        are read directly into the batch without an intermediate copy. This loop is the only work
        between the page cache and a batch, so it is kept minimal.
        """
        rows = self._rows(samples)
        header = bytearray(len(self._npy_header))
        elsewhere = []
        shard, descriptor = -1, None
        # sorted by shard, so that each descriptor is looked up once
        for place in sorted(range(len(rows)), key=lambda place: rows[place].shard):
            row = rows[place]
            if row.shard != shard:
                shard, descriptor = row.shard, self._descriptor(row)
            if descriptor is None:
                elsewhere.append(place)
                continue
            image_CHW = images_BCHW[place]
            if row.length != len(header) + image_CHW.nbytes:
                # raises; preadv would fill the buffers even if the payload has another length
                self._require_pixels(row, b"")
            buffers: list[Any] = [header, image_CHW]
            read = os.preadv(descriptor, buffers, row.offset)
            # the index has one crc32 over header and pixels
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

    def _require_size(self, size: int) -> None:
        packed = self.manifest.encoding.get("size", size)
        if packed != size:
            raise ValueError(
                f"{self.url} was packed at {packed} px, but the model needs {size} px; pack it "
                f"again with --size {size} or --encoding original (docs/data.md#encodings)"
            )
