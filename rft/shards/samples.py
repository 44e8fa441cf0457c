"""The origin of each sample: `samples.npz` beside the index, one row per sample in its order.

`source` identifies an image in any set and encoding, under any name, so that test images can be
found in a training set (`rft.shards.guard`). `domain` describes where or how it was taken, for sets
that are scored by domain. Sets of older versions have no such file.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np

from rft.shards.columns import read_columns
from rft.shards.folder import SAMPLES
from rft.shards.manifest import AGAIN, Manifest
from rft.storage import files

COLUMNS = {"source": np.dtype(np.uint64), "domain": np.dtype(np.int32)}
HEADERS_BYTES = 2**13  # more than the file has besides its rows


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Per-sample columns, all of length N, in the order of the index."""

    source: np.ndarray
    """`source_hash` of the image, uint64."""
    domain: np.ndarray | None = None
    """Position in the manifest's `domains`, int32; None if it has none."""

    def to_bytes(self) -> bytes:
        """Serialise as the content of `samples.npz`; the same columns give the same bytes."""
        stream = io.BytesIO()
        columns = {name: getattr(self, name) for name in COLUMNS}
        # members written this way are dated 1980-01-01, so the bytes do not depend on the clock
        np.savez(stream, **{name: one for name, one in columns.items() if one is not None})
        return stream.getvalue()

    @staticmethod
    def load(url: str, manifest: Manifest) -> "Samples":
        """Read `url/samples.npz` and check it against the manifest.

        Raises:
            ValueError: if the set has none, the file is absent or was changed, or a row is invalid.
        """
        path = files.join(url, SAMPLES)
        if manifest.samples_sha256 is None:
            raise ValueError(f"{url} has no {SAMPLES}: it is from an older version; {AGAIN}")
        # the size for as many rows as the manifest has samples
        row_bytes = sum(kind.itemsize for kind in COLUMNS.values())
        limit = manifest.samples * row_bytes + HEADERS_BYTES
        columns = read_columns(path, limit, manifest.samples_sha256)
        if fault := _fault(columns, manifest):
            raise ValueError(f"{path}: {fault}; {AGAIN}")
        return Samples(**columns)


def source_hash(data: bytes) -> int:
    """Identify an image file by its bytes: the first 16 hex digits of its sha256, as a number."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _fault(columns: dict[str, np.ndarray], manifest: Manifest) -> str:
    """Explain why columns do not fit the manifest's samples; empty if they do."""
    wanted = list(COLUMNS) if manifest.domains else ["source"]
    if columns.keys() != set(wanted):
        return f"its columns must be {', '.join(wanted)}, they are {', '.join(columns)}"
    for name, column in columns.items():
        if (column.dtype, column.shape) != (COLUMNS[name], (manifest.samples,)):
            return (
                f"column {name} must be {manifest.samples:,} of {COLUMNS[name]}, not "
                f"{column.dtype} {column.shape}"
            )
    if manifest.domains:
        domain_N = columns["domain"]
        wrong = np.flatnonzero((domain_N < 0) | (domain_N >= len(manifest.domains)))
        if len(wrong):
            count = len(manifest.domains)
            return (
                f"row {wrong[0]}: domain {domain_N[wrong[0]]} is not one of the {count:,} domains"
            )
    return ""
