"""Accuracies on a set and their intervals. Pure.

Shapes: N images, K classes.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

LEVEL = 0.95
"""Confidence level of every interval, if not given."""


class Interval(NamedTuple):
    """The two ends of an interval, in the unit of the enclosed value."""

    low: float
    high: float


def wilson(correct: int, total: int, level: float = LEVEL) -> Interval:
    """Compute Wilson's score interval (1927) for a share, in [0, 1].

    Its coverage is close to its level for any number of images, also near 0 and 1, where the normal
    approximation of textbooks fails (benchmarks/results/coverage.md). It covers the sampling of
    test images alone: a different training seed gives a different model.
    """
    return Interval(*binomtest(correct, total).proportion_ci(level, method="wilson"))


def top(rank_N: np.ndarray, k: int) -> int:
    """Count the images whose label is among the k best; rank 0 is the prediction itself."""
    return int(np.count_nonzero(rank_N < k))


def per_group(right_N: np.ndarray, group_N: np.ndarray, groups: int) -> tuple[np.ndarray, ...]:
    """Count the right images and all images of each group, int64 (groups,).

    A group is a class, a corruption or a location of a camera, as a number from 0 on.
    """
    total = np.bincount(group_N, minlength=groups)
    correct = np.bincount(group_N[right_N], minlength=groups)
    return correct, total


def mean_of_groups(correct: np.ndarray, total: np.ndarray) -> float:
    """Average the accuracies of all groups that have an image.

    For classes this is the mean per-class accuracy, also known as balanced accuracy.
    """
    seen = total > 0
    return float((correct[seen] / total[seen]).mean())


def worst_group(correct: np.ndarray, total: np.ndarray) -> int:
    """Find the group with the lowest accuracy, the first of equal ones."""
    seen = np.flatnonzero(total > 0)
    # equal fractions of integers are equal in fp64 too, because division rounds correctly
    return int(seen[np.argmin(correct[seen] / total[seen])])


def confusion(label_N: np.ndarray, prediction_N: np.ndarray, classes: int) -> np.ndarray:
    """Count how often each class (row) was predicted as each class (column), int64 (K, K)."""
    cells = label_N.astype(np.int64) * classes + prediction_N
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)
