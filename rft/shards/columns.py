"""Files of a packed set that hold a column of numbers for each sample: index.npz, samples.npz."""

import numpy as np

from rft.shards.manifest import AGAIN
from rft.storage import files
from rft.storage.arrays import read_npz


def read_columns(path: str, limit: int, sha256: str) -> dict[str, np.ndarray]:
    """Read the columns of a file of at most `limit` bytes.

    Raises:
        ValueError: if it is absent or larger, does not have the manifest's `sha256`, or is not an
            archive of arrays.
    """
    # bounded, whatever the store sends
    data = files.read_bytes(path, limit)
    # before parsing: a file that fails after this check was packed that way
    if files.sha256_bytes(data) != sha256:
        raise ValueError(f"{path} does not have the sha256 in its manifest; {AGAIN}")
    try:
        return read_npz(data, limit)
    except ValueError as error:
        raise ValueError(f"{path} is not an archive of columns ({error}); {AGAIN}") from error
