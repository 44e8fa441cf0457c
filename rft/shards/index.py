"""The location and class of each sample: `index.npz`, one row per sample.

Sample i of a set is row i, in shard order. Its row has the position of the payload in its shard and
the payload's crc32, so any sample takes a single read.
"""

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from rft.shards import tar
from rft.shards.columns import read_columns
from rft.shards.folder import INDEX
from rft.shards.manifest import AGAIN, Manifest
from rft.storage import files

KEY_BYTES = 1024  # of the longest key; every key of an index takes as much space as the longest
KEYS_AT_ONCE = 2**16  # checked together: masks of all keys would take several times the index
HEADERS_BYTES = 2**14  # more than an index has besides its rows
# The index is read at once, and is in memory twice for a moment: 600 MiB stay within 2 GB. They
# hold 15 million samples with keys like ImageNet's; ImageNet-21k has 14 million.
INDEX_BYTES = 600 * 2**20


@dataclass(frozen=True, kw_only=True)
class Index:
    """Per-sample columns, all of length N, in shard order.

    `offset` and `length` (bytes) locate the payload inside its shard's tar; `label` is a class id
    of the manifest's label space; `width` and `height` are those of the source image, in pixels, of
    own photos after turning; `key` is the sample's id as ASCII bytes (`n01440764_10026`).
    """

    offset: Annotated[np.ndarray, np.uint64]
    length: Annotated[np.ndarray, np.uint32]
    crc32: Annotated[np.ndarray, np.uint32]
    label: Annotated[np.ndarray, np.int32]
    width: Annotated[np.ndarray, np.uint16]
    height: Annotated[np.ndarray, np.uint16]
    key: Annotated[np.ndarray, np.bytes_]

    def to_bytes(self) -> bytes:
        """Serialise as the content of `index.npz`; the same columns give the same bytes.

        Raises:
            ValueError: if readers would refuse it.
        """
        if self.key.itemsize > KEY_BYTES:
            raise ValueError(
                f"a key has {self.key.itemsize:,} letters, more than the limit of {KEY_BYTES:,}; "
                f"shorten the names of the images"
            )
        stream = io.BytesIO()
        # members written this way are dated 1980-01-01, so the bytes do not depend on the clock
        np.savez(stream, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        if (size := stream.tell()) > INDEX_BYTES:
            raise ValueError(
                f"the index of {len(self.key):,} samples has {size:,} bytes, more than the limit "
                f"of {INDEX_BYTES:,}; split them into several sets"
            )
        return stream.getvalue()

    @staticmethod
    def load(url: str, manifest: Manifest) -> "Index":
        """Read `url/index.npz` and check it against the manifest.

        Raises:
            ValueError: if the file is absent or was changed, or a row is invalid.
        """
        index = Index.read(url, manifest)
        for rows, what in index.unusable(manifest):
            if len(rows):
                key = index.key[rows[0]].decode("ascii", "replace")
                path = files.join(url, INDEX)
                raise ValueError(f"{path}, row {rows[0]}, key {key!r}: {what}; {AGAIN}")
        return index

    @staticmethod
    def read(url: str, manifest: Manifest) -> "Index":
        """Read `url/index.npz` without checking its rows, for verification, which reports them all.

        Raises:
            ValueError: if the file is absent or was changed, or its columns do not fit the
                manifest's samples.
        """
        path = files.join(url, INDEX)
        # the size for as many rows as the manifest has samples
        limit = min(manifest.samples * (ROW_BYTES + KEY_BYTES) + HEADERS_BYTES, INDEX_BYTES)
        columns = read_columns(path, limit, manifest.index_sha256)
        if fault := _column_fault(columns, manifest.samples):
            raise ValueError(f"{path}: {fault}; {AGAIN}")
        return Index(**columns)

    def _odd_keys(self) -> np.ndarray:
        odd = np.zeros(len(self.key), bool)
        for start in range(0, len(self.key), KEYS_AT_ONCE):
            keys = self.key[start : start + KEYS_AT_ONCE]
            # (rows, letters)
            letters = keys.view(np.uint8).reshape(len(keys), -1)
            # NumPy pads texts with zeros, which do not count; a zero before a letter does
            wrong = ((letters < ord(" ")) & (letters > 0)) | (letters > ord("~"))
            inside = (letters[:, :-1] == 0) & (letters[:, 1:] > 0)
            odd[start : start + len(keys)] = wrong.any(axis=1) | inside.any(axis=1)
        return np.flatnonzero(odd)

    def unusable(self, manifest: Manifest) -> Iterator[tuple[np.ndarray, str]]:
        """Yield the rows that no reader may use, ascending, with the fault: once per kind of fault.

        A label must be a scored class, or every prediction of its sample would count the same. A
        payload must be inside its shard. A key must be printable ASCII, because it is printed.
        """
        yield self._odd_keys(), "its key is not printable ASCII text"
        classes = len(manifest.classes)
        known = (self.label >= 0) & (self.label < classes)
        yield np.flatnonzero(~known), f"its label is not one of the {classes} classes"
        # 0 replaces labels out of range, which were reported above
        scored = manifest.class_to_group()[np.where(known, self.label, 0)] >= 0
        yield np.flatnonzero(known & ~scored), "its label is in no group, so it never scores"
        sizes = [shard.bytes for shard in manifest.shards]
        size = np.repeat(np.array(sizes, float), [shard.samples for shard in manifest.shards])
        # as floats, because a damaged uint64 would wrap around; payloads are padded to full blocks,
        # and the archive's end follows the last one
        ends = self.offset.astype(float) + np.ceil(self.length / tar.BLOCK) * tar.BLOCK
        yield np.flatnonzero(ends + tar.END > size), "its payload reaches beyond the shard's bytes"


COLUMNS = {name: hint.__metadata__[0] for name, hint in Index.__annotations__.items()}
ROW_BYTES = sum(np.dtype(kind).itemsize for kind in COLUMNS.values())  # without the key


def _column_fault(columns: dict[str, np.ndarray], samples: int) -> str:
    """Explain why an index's columns do not fit a number of samples; empty if they do."""
    if columns.keys() != COLUMNS.keys():
        return f"its columns must be {', '.join(COLUMNS)}, they are {', '.join(columns)}"
    for name, kind in COLUMNS.items():
        column = columns[name]
        expected = np.dtype(kind)
        # the length of text columns depends on the longest key
        same = column.dtype.kind == "S" if kind is np.bytes_ else column.dtype == expected
        if not same or column.ndim != 1:
            return f"column {name} must be a list of {expected}, not {column.dtype} {column.shape}"
        if len(column) != samples:
            return f"column {name} has {len(column)} samples, the manifest {samples}"
    return ""
