"""Keeps test images out of training and selection, whatever their set is called.

A benchmark's test set, and a set declared OOD, is refused by its manifest. A copy under a different
name is found by the hashes of its images (`rft.shards.samples`): a training set is compared with
every such set beside it. Sets elsewhere cannot be checked.

A test set of own photos is not declared as such, and a different run may have trained on a part of
it, so an evaluation counts the images that its models have seen (`seen_images`).
"""

import contextlib
import logging
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from rft.classes import mismatch
from rft.sets import ID_SET, TEST_SETS, TRAIN_SET
from rft.shards.folder import MANIFEST
from rft.shards.index import Index
from rft.shards.manifest import Manifest
from rft.shards.root import packed_sets
from rft.shards.samples import Samples
from rft.storage import files

OFFICIAL_COPIES = 1000  # up to one image in so many of ImageNet's training set may be a test image

EVALUATED = "those of the evaluated sets"

Located = tuple[str, Manifest]
"""A packed set: its URL and manifest."""

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """Counts of a test set's images that a model was trained on."""

    images: int = 0
    other_label: int = 0
    """Of these, the images that the training sets have only under other labels."""


def require_no_test_images(root: str, name: str, manifest: Manifest, key_N: np.ndarray) -> None:
    """Check that a set below a data root may be used for training and selection.

    Args:
        root: the data root.
        name: the training set's name below it.
        manifest: its manifest.
        key_N: the keys of its index, for the message.

    Raises:
        ValueError: if it is a test set, or holds an image of a test set beside it.
    """
    url = files.join(root, name)
    if is_test_set(manifest):
        what = "an out-of-distribution" if manifest.is_ood else "a"
        raise ValueError(
            f"{url} is {what} test set ({manifest.dataset}), so it cannot be used for training or "
            "selection; name a different set with --train-set "
            "(docs/data.md#no-training-on-test-images)"
        )
    others = _test_sets(root, name)
    if not others:
        return
    if manifest.samples_sha256 is None:
        _warn(url, f"its images with those of {', '.join(others)}", "it was packed without hashes")
        return
    source_N = Samples.load(url, manifest).source
    found: dict[str, np.ndarray] = {}
    for other, its in others.items():
        theirs_M = _source(files.join(root, other), its, f"those of {name}")
        if theirs_M is None:
            continue
        if (common_M := np.isin(theirs_M, source_N)).any():
            found[other] = theirs_M[common_M]
    if found:
        shared = np.isin(source_N, np.concatenate(list(found.values())))
        rows = np.flatnonzero(shared)
        first = key_N[rows[0]].decode("ascii", "replace")
        which = "is a test set" if len(found) == 1 else "are test sets"
        images = "1 image" if len(rows) == 1 else f"{len(rows):,} images"
        held = f"{url} holds {images} of {', '.join(found)} (first: {first!r})"
        if manifest.dataset == TRAIN_SET and source_N.size > len(rows) * OFFICIAL_COPIES:
            # published with a few copies of test images among over a million
            log.warning(held)
            return
        raise ValueError(
            f"{held}, which {which}, so its accuracy would be meaningless; remove them from the "
            "training set and pack it again (docs/data.md#no-training-on-test-images)"
        )


def is_test_set(manifest: Manifest) -> bool:
    """Whether a set is known to be only for testing: a benchmark's, or one declared OOD."""
    return manifest.is_ood or manifest.dataset == ID_SET


def find_set(roots: Iterable[str], name: str, sha256: str) -> Located | None:
    """Find the packed set with a name and a manifest's hash below one of some data roots.

    A set with a damaged manifest cannot be compared; a warning names it.
    """
    for root in roots:
        url = files.join(root, name)
        try:
            if files.exists(files.join(url, MANIFEST)):
                manifest = Manifest.load(url)
                if manifest.sha256 == sha256:
                    return url, manifest
        except ValueError as error:
            _warn(url, f"its images with {EVALUATED}", str(error))
    return None


def seen_images(
    root: str,
    trained_on: Mapping[tuple[str, str], Located | None],
    tests: Mapping[str, Manifest],
    parts: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> dict[str, Seen | None]:
    """Count the images of each set below a data root that a model was trained on.

    The count is None if it is unknown, because a training set was not found or has no hashes.
    ImageNet's own sets are known to share no images.

    Args:
        root: the data root of the test sets.
        trained_on: name and manifest's hash of each packed set that the model has seen -> the set,
            if it was found. Held-out images count as seen, because they selected the weights.
        tests: name of each set -> its manifest.
        parts: manifest's hash of a set that it has only partly seen -> numbers of the samples that
            it has seen, held-out ones included.

    Sets with damaged files cannot be compared; a warning names them.
    """
    hashes = {sha256 for _, sha256 in trained_on}
    counts: dict[str, Seen | None] = {}
    sources: dict[str, np.ndarray | None] = {}

    def source(url: str, manifest: Manifest, others: str) -> np.ndarray | None:
        if url not in sources:
            sources[url] = _source(url, manifest, others)
        return sources[url]

    for test, its in tests.items():
        if its.sha256 in hashes:
            part = parts.get(its.sha256)
            counts[test] = Seen(its.samples if part is None else len(part))
            continue
        (seen_M, same_M), known = np.zeros((2, its.samples), bool), True
        for (name, sha256), found in trained_on.items():
            hashed = found is not None and found[1].samples_sha256 and its.samples_sha256
            if not hashed and name == TRAIN_SET and its.dataset in TEST_SETS:
                continue
            source_N = None if found is None else source(*found, EVALUATED)
            theirs_M, url = None, files.join(root, test)
            if source_N is not None:
                theirs_M = source(url, its, f"those of {name}")
            if found is None or source_N is None or theirs_M is None:
                known = False
                continue
            part = parts.get(sha256, slice(None))
            found_M, equal_M = _shared(theirs_M, source_N[part], (found, (url, its)), part)
            seen_M, same_M = seen_M | found_M, same_M | equal_M
        count = Seen(int(seen_M.sum()), int((seen_M & ~same_M).sum()))
        counts[test] = count if known or count.images else None
    return counts


def shared_keys(root: str, training: Collection[str], test: str) -> tuple[list[str], list[str]]:
    """List the keys of a test set's images that are also in training sets below the data root.

    Returns:
        Those of images with equal labels, and those that training has only under other labels.
    """
    url = files.join(root, test)
    manifest = Manifest.load(url)
    theirs_M = _source(url, manifest, "those of training sets")
    found_M, same_M = np.zeros((2, manifest.samples), bool)
    for name in training:
        other = files.join(root, name)
        if theirs_M is None or not files.exists(files.join(other, MANIFEST)):
            continue
        its = Manifest.load(other)
        if (source_N := _source(other, its, f"those of {test}")) is None:
            continue
        shared = _shared(theirs_M, source_N, ((other, its), (url, manifest)))
        found_M, same_M = found_M | shared[0], same_M | shared[1]
    key_M = Index.load(url, manifest).key if found_M.any() else np.array([], np.bytes_)

    def keys(rows_M: np.ndarray) -> list[str]:
        return [key_M[row].decode("ascii") for row in np.flatnonzero(rows_M)]

    return keys(found_M & same_M), keys(found_M & ~same_M)


def _shared(
    theirs_M: np.ndarray,
    source_N: np.ndarray,
    sets: tuple[tuple[str, Manifest], tuple[str, Manifest]],
    part: np.ndarray | slice = slice(None),
) -> tuple[np.ndarray, np.ndarray]:
    """Find the test images that are also training images, and those with the same label, (M,).

    Args:
        theirs_M: hashes of the test images.
        source_N: hashes of the training images.
        sets: URL and manifest of the training and of the test set. If their labels cannot be
            compared, all count as the same; a warning names a damaged file.
        part: the samples of the training set that `source_N` is of.
    """
    found_M = np.isin(theirs_M, source_N)
    (url, manifest), (test_url, its) = sets
    if not found_M.any() or mismatch(manifest.label_space, its.label_space) is not None:
        return found_M, found_M
    try:
        label_N, label_M = Index.load(url, manifest).label[part], Index.load(test_url, its).label
    except ValueError as error:
        _warn(url, f"its labels with those of {test_url}", str(error))
        return found_M, found_M
    # classes of one group count as the same; those outside all groups are -1
    groups = its.class_to_group()
    group_N, group_M = groups[label_N], groups[label_M]
    # numbers the distinct images, so that a pair of image and label is one number
    _, number = np.unique(np.concatenate([source_N, theirs_M]), return_inverse=True)
    pair = number * (groups.max() + 2) + np.concatenate([group_N, group_M])
    return found_M, np.isin(pair[len(source_N) :], pair[: len(source_N)])


def _source(url: str, manifest: Manifest, others: str) -> np.ndarray | None:
    """Load the hashes of a set's images; None, with a warning, if they cannot be read."""
    try:
        return Samples.load(url, manifest).source
    except ValueError as error:
        _warn(url, f"its images with {others}", str(error))
        return None


def _test_sets(root: str, name: str) -> dict[str, Manifest]:
    """Find the test sets beside a set, by name; warns of a damaged one."""
    found = {}
    for other in _beside(root):
        if other == name:
            continue
        try:
            manifest = Manifest.load(files.join(root, other))
        except ValueError as error:
            # it may not be a test set, and this command does not need it: warn by name only
            if other in TEST_SETS:
                _warn(files.join(root, other), f"its images with those of {name}", str(error))
            continue
        if is_test_set(manifest):
            found[other] = manifest
    return found


def _beside(root: str) -> list[str]:
    """List the packed sets below a root; if it cannot be listed, try the benchmarks' names."""
    # some stores permit reading but not listing, and web servers have no listing
    if not root.startswith(("http://", "https://")):
        with contextlib.suppress(OSError, ValueError):
            return packed_sets(root, most=None)
    try:
        return [name for name in TEST_SETS if files.exists(files.join(root, name, MANIFEST))]
    except ValueError as error:
        _warn(root, "the training set with the sets beside it", str(error))
        return []


def _warn(url: str, what: str, why: str) -> None:
    log.warning(f"{url}: cannot compare {what} ({why})")
