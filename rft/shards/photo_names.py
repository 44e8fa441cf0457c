"""Which file each sample of one's own photos was: keys lack the letters that tars do not take.

A page that shows a mistake names the photo by it; the tars have it too, in each sample's JSON, for
which a page would have to search them. Nothing that is counted depends on it.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rft.shards.folder import PHOTOS
from rft.storage import files

BYTES = 2**28  # of the file of a set that is read: some million photos


def write(url: str, names: Iterable[tuple[str, str]]) -> None:
    """Write the paths of a packed set's photos, from (key, path below the source), unless there.

    A folder is packed from one list of photos only: its plan refuses any other.
    """
    if files.exists(files.join(url, PHOTOS)):
        return
    lines = [json.dumps({"key": key, "path": path}) + "\n" for key, path in names]
    files.write_bytes(files.join(url, PHOTOS), "".join(lines).encode())


def read(url: str) -> Mapping[str, str]:
    """Return key -> path of a packed set; empty for a set of other images.

    Raises:
        ValueError: naming the file and line, if it is malformed.
    """
    data = files.find_bytes(files.join(url, PHOTOS), BYTES)
    found = {}
    for number, line in enumerate((data or b"").splitlines(), 1):
        try:
            entry: Any = json.loads(line)
            key, path = entry["key"], entry["path"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{files.join(url, PHOTOS)}, line {number}, is no photo: {files.reason(error)}; "
                "delete the file, or pack again"
            ) from error
        found[str(key)] = str(path)
    return found
