"""Sample keys: the name of a sample in its tar, in the index and for its object mask."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from rft.storage import files

UNSAFE_IN_KEY = re.compile(r"[^A-Za-z0-9_-]")
HASH_DIGITS = 16  # of a path, appended to names that would not be distinct
HASH = re.compile(rf"-[0-9a-f]{{{HASH_DIGITS}}}$")


def make_keys(paths: Sequence[str]) -> list[str]:
    """Make a distinct sample key for each `class folder/file name`.

    webdataset splits a member's name at the first dot, so keys keep only ASCII letters, digits, "_"
    and "-". The entire set uses the first scheme that gives distinct keys: the file's stem, then
    folder and stem, then folder, stem and a hash of the path.

    Raises:
        ValueError: naming a path that is listed twice.
    """
    parts = [path.rsplit("/", 1) for path in paths]
    stems = [safe_in_key(PurePosixPath(name).stem) for _, name in parts]
    if len(set(stems)) == len(stems):
        return stems
    long = [f"{safe_in_key(folder)}_{stem}" for (folder, _), stem in zip(parts, stems, strict=True)]
    if len(set(long)) == len(long):
        return long
    # a hash of the unchanged path: two paths may differ only in letters that keys replace
    hashed = [
        f"{stem}-{files.sha256_json(path)[:HASH_DIGITS]}"
        for stem, path in zip(long, paths, strict=True)
    ]
    if len(set(hashed)) < len(hashed):
        ((twice, _),) = Counter(paths).most_common(1)
        raise ValueError(f"image {twice} is listed twice; remove one of them from the source")
    return hashed


def below_domain(key: str, domain: str) -> str:
    """Strip a key of its domain's folders and its hash: the versions of one image share the rest.

    A key that does not begin with the folders loses only the hash: domains of a table are not
    folders.
    """
    return HASH.sub("", key.removeprefix(f"{safe_in_key(domain)}_"))


def safe_in_key(name: str) -> str:
    """Replace the letters that keys cannot have."""
    return UNSAFE_IN_KEY.sub("_", name)
