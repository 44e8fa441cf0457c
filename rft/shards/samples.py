"""What each sample was made of: `samples.npz` beside the index, a row for each in its order.

`source` recognises an image in any set and encoding, whatever it is called there, so that a test
image is found in a training set (`rft.shards.guard`). `domain` says where or how it was taken, for
sets that are scored by domain. Sets of older versions have no such file.
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
HEADERS_BYTES = 2**13  # what the file has besides its rows, and more


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Per-sample columns, all of length N, in the order of the index."""

    source: np.ndarray
    """`source_hash` of the image, uint64."""
    domain: np.ndarray | None = None
    """Position in the manifest's `domains`, int32; None where it has none."""

    def to_bytes(self) -> bytes:
        """Return the content of `samples.npz`; the same columns give the same bytes."""
        stream = io.BytesIO()
        columns = {name: getattr(self, name) for name in COLUMNS}
        # zipfile dates members that are written so 1980-01-01: no clock gets into the bytes
        np.savez(stream, **{name: one for name, one in columns.items() if one is not None})
        return stream.getvalue()

    @staticmethod
    def load(url: str, manifest: Manifest) -> "Samples":
        """Read `url/samples.npz` and hold it against the manifest.

        Raises:
            ValueError: if the set has none, the file is absent or was changed, or a row cannot be
                right.
        """
        path = files.join(url, SAMPLES)
        if manifest.samples_sha256 is None:
            raise ValueError(f"{url} has no {SAMPLES}, which older versions did not make; {AGAIN}")
        # as many rows as the manifest says
        row_bytes = sum(kind.itemsize for kind in COLUMNS.values())
        limit = manifest.samples * row_bytes + HEADERS_BYTES
        columns = read_columns(path, limit, manifest.samples_sha256)
        if fault := _fault(columns, manifest):
            raise ValueError(f"{path}: {fault}; {AGAIN}")
        return Samples(**columns)


def source_hash(data: bytes) -> int:
    """Identify an image file by its bytes: the first 16 digits of its sha256, as a number."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _fault(columns: dict[str, np.ndarray], manifest: Manifest) -> str:
    """Explain why columns cannot be those of the manifest's samples; empty if they can."""
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
            return f"row {wrong[0]}: domain {domain_N[wrong[0]]} is none of the {count:,} domains"
    return ""
