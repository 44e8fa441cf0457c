"""Sample keys: what a sample is called in its tar, in the index and by its object mask."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from rft.storage import files

UNSAFE_IN_KEY = re.compile(r"[^A-Za-z0-9_-]")
HASH_DIGITS = 16  # of a path, behind names that are not distinct without
HASH = re.compile(rf"-[0-9a-f]{{{HASH_DIGITS}}}$")


def make_keys(paths: Sequence[str]) -> list[str]:
    """Return a sample key for each `class folder/file name`, all distinct.

    webdataset cuts a member's name at the first dot, so keys keep only ASCII letters, digits, "_"
    and "-". The whole set uses the first naming under which no two keys are equal: the file's stem,
    then folder and stem, then folder, stem and a hash of the path.

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
    # of the path as it is: two paths may differ only in letters that keys do not have
    hashed = [
        f"{stem}-{files.sha256_json(path)[:HASH_DIGITS]}"
        for stem, path in zip(long, paths, strict=True)
    ]
    if len(set(hashed)) < len(hashed):
        ((twice, _),) = Counter(paths).most_common(1)
        raise ValueError(f"image {twice} is listed twice; remove one of them from the source")
    return hashed


def below_domain(key: str, domain: str) -> str:
    """Return a key without the folders of its domain and without a hash: what versions share.

    A key that does not begin with the folders keeps all before the hash: domains of a table are no
    folders.
    """
    return HASH.sub("", key.removeprefix(f"{safe_in_key(domain)}_"))


def safe_in_key(name: str) -> str:
    """Replace the letters that no key has."""
    return UNSAFE_IN_KEY.sub("_", name)
