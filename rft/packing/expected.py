"""Checks that a copy of a benchmark is complete: number of images, classes.

An incomplete copy still gives a number (published ObjectNet results came from a truncated copy), so
a set in ImageNet's label space is checked when it is listed. In any other label space the set is
the user's own, and nothing is known about it.
"""

import re
from collections.abc import Sequence

from rft import cli, packages
from rft.sets import BENCHMARKS
from rft.shards.label_space import LabelSpace, is_imagenet


def published_classes(dataset: str, labels: LabelSpace) -> tuple[str, ...] | None:
    """Return the WordNet ids of a benchmark with a subset of the classes; None for other sets."""
    known = BENCHMARKS.get(dataset)
    if known is None or known.class_list is None or not is_imagenet(labels):
        return None
    path = packages.folder("timm") / "data" / "_info" / known.class_list
    return tuple(path.read_text().split())


def check_count(dataset: str, found: int, labels: LabelSpace, allowed: int | None = None) -> None:
    """Compare the number of images found with the published one, or the allowed one.

    `allowed` is the user's number for this copy, which must be exact.

    Raises:
        ValueError: with the found and the expected number.
    """
    if allowed is not None and found != allowed:
        raise ValueError(
            f"{dataset} has {found:,} images here, --allow-count says {allowed:,}; it must be the "
            f"exact number of images"
        )
    # only for ImageNet's label space: a subset of classes has fewer images
    if allowed is not None or dataset not in BENCHMARKS or not is_imagenet(labels):
        return
    if found != (count := BENCHMARKS[dataset].images):
        raise ValueError(
            f"{dataset} has {found:,} images here, {count:,} were published; download the "
            f"set again, or accept this copy with --allow-count {dataset}={found}"
        )


def parse_allowed_counts(texts: Sequence[str], datasets: Sequence[str]) -> dict[str, int]:
    """Parse `--allow-count SET=N ...` into counts by data set.

    Raises:
        ValueError: if a value is malformed, or its set is not one of `datasets`.
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
