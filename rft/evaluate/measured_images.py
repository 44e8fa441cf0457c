"""Selects the images of a packed set to measure the CAM on: by class, among those with a mask."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rft import rng
from rft.classes import compare
from rft.evaluate.object_masks import SUFFIX, find_masks
from rft.loading.dataset import PackedDataset
from rft.shards.label_space import LabelSpace

Measurable = Literal["restricted", "all"]

# Restricted ImageNet's dogs, cats and birds among ImageNet's 1000 classes (appendix A.2)
RESTRICTED = (*range(151, 269), *range(281, 286), *range(80, 101))

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The samples to measure, in the order of the set, and their masks."""

    samples: np.ndarray
    paths: dict[int, Path]
    """Sample number -> mask."""
    missing: int
    """Images of the chosen classes that have no mask."""


def select(
    packed: PackedDataset, masks: Path, classes: Measurable, samples: int, seed: int
) -> Selection:
    """Choose the images to measure.

    Random choices are drawn from the sorted keys, so they do not depend on how the set was packed.

    Raises:
        ValueError: if the set has other classes than ImageNet's, no image has a mask, or fewer
            images than `samples` have one.
    """
    candidates = np.arange(len(packed))
    if classes == "restricted":
        require_imagenet(packed)
        candidates = candidates[np.isin(packed.index.label, RESTRICTED)]
    if len(candidates) == 0:
        raise ValueError(f"{packed.url} holds no image of the {classes} classes")
    sample_of = {packed.key(sample): sample for sample in candidates.tolist()}
    keys = [packed.key(sample) for sample in candidates.tolist()]
    found = find_masks(masks, keys)
    if not found:
        raise ValueError(
            f"no mask below {masks} belongs to any of the {len(keys):,} images; the first image's "
            f"would be {masks}/{keys[0]}{SUFFIX}, or have the image's own path below that folder"
        )
    if samples > len(found):
        raise ValueError(
            f"--samples is {samples:,}, but only {len(found):,} of the {len(keys):,} images have a "
            f"mask below {masks}"
        )
    # by key, because sample numbers depend on how the set was packed
    chosen = sorted(found)
    if samples:
        # a permutation, so that a larger choice contains the smaller ones of the same seed
        order = rng.numpy_generator(seed, "localisation").permutation(len(chosen))
        chosen = [chosen[place] for place in order[:samples]]
    paths = {sample_of[key]: found[key] for key in chosen}
    # back in the order of the set, so that shards are read in sequence
    return Selection(samples=np.array(sorted(paths)), paths=paths, missing=len(keys) - len(found))


def require_imagenet(packed: PackedDataset) -> None:
    """Check that a set has ImageNet's classes, because RESTRICTED has indices of these.

    Raises:
        ValueError: naming the first different class.
    """
    imagenet = LabelSpace.imagenet().classes
    try:
        warnings = compare(packed.manifest.label_space, packed.url, imagenet, "ImageNet-1k")
    except ValueError as error:
        raise ValueError(
            f"--classes restricted needs ImageNet's classes, but {error}; use --classes all"
        ) from error
    for warning in warnings:
        log.warning(warning)
