"""The source file of each sample in a set of own photos; keys alone do not keep all letters.

A page that shows a mistake uses it to name the photo. Each sample's JSON in the tars has the path
too, but a page would have to search them for it. No result depends on this file.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rft.shards.folder import PHOTOS
from rft.storage import files

BYTES = 2**28  # limit of the file when it is read: some million photos


def write(url: str, names: Iterable[tuple[str, str]]) -> None:
    """Write the paths of a packed set's photos, from (key, path below the source), once.

    An existing file is kept: a folder is packed from only one list of photos, as its plan refuses
    any other.
    """
    if files.exists(files.join(url, PHOTOS)):
        return
    lines = [json.dumps({"key": key, "path": path}) + "\n" for key, path in names]
    files.write_bytes(files.join(url, PHOTOS), "".join(lines).encode())


def read(url: str) -> Mapping[str, str]:
    """Read key -> path of a packed set; empty for a set of other images.

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
                f"{files.join(url, PHOTOS)}, line {number}, is not a photo: {files.reason(error)}; "
                "delete the file, or pack again"
            ) from error
        found[str(key)] = str(path)
    return found
