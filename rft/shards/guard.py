"""No test image of an OOD set may be trained on or selected by, whatever its set is called.

A set that is declared or known to be OOD is refused by its manifest. A copy under another name is
found by the hashes of its images (`rft.shards.samples`): a training set is held against every OOD
set that lies beside it. Sets elsewhere cannot be looked at.
"""

import contextlib
import logging

import numpy as np

from rft.sets import OOD_SETS
from rft.shards.folder import MANIFEST
from rft.shards.manifest import Manifest
from rft.shards.root import packed_sets
from rft.shards.samples import Samples
from rft.storage import files

log = logging.getLogger(__name__)


def require_no_test_images(root: str, name: str, manifest: Manifest, key_N: np.ndarray) -> None:
    """Check that a set below a data root may be trained on, and its held-out part selected by.

    Args:
        root: the data root.
        name: of the training set below it.
        manifest: its manifest.
        key_N: the keys of its index, for the message.

    Raises:
        ValueError: if it is an OOD set, or holds an image of one that lies beside it.
    """
    url = files.join(root, name)
    if manifest.is_ood:
        raise ValueError(
            f"{url} is an out-of-distribution test set ({manifest.dataset}), so nothing is trained "
            "on it or selected by it; name another set with --train-set"
        )
    others = _ood_sets(root, name)
    if not others:
        return
    if manifest.samples_sha256 is None:
        _warn(url, f"its images with those of {', '.join(others)}", "it was packed without hashes")
        return
    source_N = Samples.load(url, manifest).source
    # sorted once: each of the others is far smaller than ImageNet's training set
    sorted_N = np.sort(source_N)
    found: dict[str, np.ndarray] = {}
    for other, its in others.items():
        try:
            theirs_M = np.unique(Samples.load(files.join(root, other), its).source)
        except ValueError as error:
            _warn(files.join(root, other), f"its images with those of {name}", str(error))
            continue
        place_M = np.searchsorted(sorted_N, theirs_M).clip(max=len(sorted_N) - 1)
        if (common_M := sorted_N[place_M] == theirs_M).any():
            found[other] = theirs_M[common_M]
    if found:
        shared = np.isin(source_N, np.concatenate(list(found.values())))
        rows = np.flatnonzero(shared)
        first = key_N[rows[0]].decode("ascii", "replace")
        raise ValueError(
            f"{url} holds {len(rows):,} images of {', '.join(found)} (first: {first!r}), which are "
            "out-of-distribution test sets: their accuracy would mean nothing; take these images "
            "out of the training set and pack it again"
        )


def common_images(one: str, other: str) -> int:
    """Return how many different images two packed sets share, by the bytes of their files.

    Sets that were packed without hashes, or whose hashes are damaged, are warned of and share none.
    """
    found = []
    for url in (one, other):
        try:
            found.append(np.unique(Samples.load(url, Manifest.load(url)).source))
        except ValueError as error:
            _warn(url, "its images with those of other sets", str(error))
            return 0
    return len(np.intersect1d(*found, assume_unique=True))


def _ood_sets(root: str, name: str) -> dict[str, Manifest]:
    """Return the OOD sets beside a set, by name; a damaged one is warned of."""
    found = {}
    for other in _beside(root):
        if other == name:
            continue
        try:
            manifest = Manifest.load(files.join(root, other))
        except ValueError as error:
            # whether it is one is not known, and it is not what this command was asked to read
            if other in OOD_SETS:
                _warn(files.join(root, other), f"its images with those of {name}", str(error))
            continue
        if manifest.is_ood:
            found[other] = manifest
    return found


def _beside(root: str) -> list[str]:
    """Name the packed sets below a root; of one that cannot be listed, the known OOD sets."""
    # a store may let its files be read and not listed, and a web server has no list
    if not root.startswith(("http://", "https://")):
        with contextlib.suppress(OSError, ValueError):
            return packed_sets(root, most=None)
    try:
        return [name for name in OOD_SETS if files.exists(files.join(root, name, MANIFEST))]
    except ValueError as error:
        _warn(root, "the training set with the sets beside it", str(error))
        return []


def _warn(url: str, what: str, why: str) -> None:
    log.warning(f"{url}: cannot compare {what} ({why})")
