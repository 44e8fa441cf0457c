"""Files of a packed set that hold a column of numbers for each sample: index.npz, samples.npz."""

import numpy as np

from rft.shards.manifest import AGAIN
from rft.storage import files
from rft.storage.arrays import read_npz


def read_columns(path: str, limit: int, sha256: str) -> dict[str, np.ndarray]:
    """Return the columns of a file of at most `limit` bytes.

    Raises:
        ValueError: if it is absent, larger, does not have the `sha256` that the manifest names, or
            is not an archive of arrays.
    """
    # no more than that, whatever the store sends
    data = files.read_bytes(path, limit)
    # before anything is parsed: what fails below this line was packed so
    if files.sha256_bytes(data) != sha256:
        raise ValueError(f"{path} does not have the sha256 in its manifest; {AGAIN}")
    try:
        return read_npz(data, limit)
    except ValueError as error:
        raise ValueError(f"{path} is no archive of columns ({error}); {AGAIN}") from error
