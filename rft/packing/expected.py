"""Whether a copy of a benchmark is what its authors published: number of images, classes.

A copy that lost images on the way still gives a number (published ObjectNet results came from a
truncated copy), so a set in ImageNet's own label space is held against these when it is listed. In
another label space the set is the user's own and nothing is known about it.
"""

import re
from collections.abc import Sequence

from rft import cli, packages
from rft.sets import BENCHMARKS
from rft.shards.label_space import LabelSpace

IMAGENET_CLASSES = 1000


def is_imagenet(labels: LabelSpace) -> bool:
    """Whether the class ids are ImageNet-1k's, in its order."""
    # the length first: it spares other label spaces the reading of ImageNet's lists
    return len(labels) == IMAGENET_CLASSES and labels.ids == LabelSpace.imagenet().ids


def published_classes(dataset: str, labels: LabelSpace) -> tuple[str, ...] | None:
    """Return the WordNet ids of a set of fewer than all classes; None if nothing is known."""
    known = BENCHMARKS.get(dataset)
    if known is None or known.class_list is None or not is_imagenet(labels):
        return None
    path = packages.folder("timm") / "data" / "_info" / known.class_list
    return tuple(path.read_text().split())


def check_count(dataset: str, found: int, labels: LabelSpace, allowed: int | None = None) -> None:
    """Hold the number of images that were found against the published one, or the allowed one.

    `allowed` is what the user says about this copy; then it must be exactly the found number.

    Raises:
        ValueError: naming the found and the expected number.
    """
    if allowed is not None and found != allowed:
        raise ValueError(
            f"{dataset} has {found:,} images here, --allow-count says {allowed:,}; it must be "
            f"exactly the number that is there"
        )
    if allowed is not None or dataset not in BENCHMARKS or not is_imagenet(labels):
        return
    if found != (count := BENCHMARKS[dataset].images):
        raise ValueError(
            f"{dataset} has {found:,} images here, {count:,} were published; get the "
            f"set again, or accept this copy with --allow-count {dataset}={found}"
        )


def parse_allowed_counts(texts: Sequence[str], datasets: Sequence[str]) -> dict[str, int]:
    """Return the counts of `--allow-count SET=N ...` by data set.

    Raises:
        ValueError: if one is not of that form, or is for none of the `datasets`.
    """
    counts = {}
    for text in texts:
        match = re.fullmatch(r"([^=]+)=([0-9]{1,18})", text)
        if match is None:
            raise ValueError(f"--allow-count must be SET=N (imagenet-val=49999), not {text!r}")
        if match[1] not in datasets:
            raise cli.unknown("set in --allow-count", match[1], list(datasets))
        counts[match[1]] = int(match[2])
    return counts
