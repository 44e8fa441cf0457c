"""Accuracies of a set and their intervals. Pure.

Shapes: N images, K classes.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

LEVEL = 0.95
"""Confidence level of every interval, if not given."""


class Interval(NamedTuple):
    """Two ends, in the unit of what they enclose."""

    low: float
    high: float


def wilson(correct: int, total: int, level: float = LEVEL) -> Interval:
    """Return Wilson's score interval (1927) for a share, in [0, 1].

    It covers the true share about as often as it says for any number of images and near 0 and 1,
    where the textbook's plus or minus does not (benchmarks/results/coverage.md). It is about the
    sampling of test images alone: a different training seed is a different model.
    """
    return Interval(*binomtest(correct, total).proportion_ci(level, method="wilson"))


def top(rank_N: np.ndarray, k: int) -> int:
    """Return on how many images the label is among the k best; rank 0 is the prediction itself."""
    return int(np.count_nonzero(rank_N < k))


def per_group(right_N: np.ndarray, group_N: np.ndarray, groups: int) -> tuple[np.ndarray, ...]:
    """Return how many images are right and how many there are in each group, int64 (groups,).

    A group is a class, a corruption, a place where photos were taken: any number from 0 on.
    """
    total = np.bincount(group_N, minlength=groups)
    correct = np.bincount(group_N[right_N], minlength=groups)
    return correct, total


def mean_of_groups(correct: np.ndarray, total: np.ndarray) -> float:
    """Return the mean of the groups' accuracies; groups without an image do not count.

    Of classes this is the mean per-class accuracy, known as balanced accuracy too.
    """
    seen = total > 0
    return float((correct[seen] / total[seen]).mean())


def worst_group(correct: np.ndarray, total: np.ndarray) -> int:
    """Return the number of the group with the lowest accuracy, the first of equal ones."""
    seen = np.flatnonzero(total > 0)
    # fractions of integers: two equal ones are equal in fp64 too, as division rounds correctly
    return int(seen[np.argmin(correct[seen] / total[seen])])


def confusion(label_N: np.ndarray, prediction_N: np.ndarray, classes: int) -> np.ndarray:
    """Return how often each class (row) was predicted as each other (column), int64 (K, K)."""
    cells = label_N.astype(np.int64) * classes + prediction_N
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)
