"""Two systems on the same test images: who is better, and could it be chance? Pure.

Images are what is drawn at random here. Systems that were trained with several seeds are compared
by each image's mean over them, so the intervals hold for these trainings; how much another training
would differ is seen in the spread over seeds.

Shapes: N images of one set, S seeds, R replicates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from rft.statistics.accuracy import LEVEL, Interval

REPLICATES = 10_000
"""Of a bootstrap: the ends of a 95% interval are then good to about 2% of its width."""


class McNemar(NamedTuple):
    """McNemar's exact test of two models on one set."""

    gained: int
    """Images that the first model has right, and the second wrong."""
    lost: int
    p: float
    """Two-sided p-value of the hypothesis that both are equally accurate."""


class Difference(NamedTuple):
    """A difference of accuracies, in [-1, 1], and what images drawn anew make of it."""

    value: float
    interval: Interval
    p: float
    """Two-sided, at least 1 / (replicates + 1)."""


def mcnemar(one_N: np.ndarray, two_N: np.ndarray) -> McNemar:
    """Test whether two models are equally accurate, from which images each has right, bool (N,).

    Exact: of the images that only one of them has right, each is as likely the one's as the
    other's (McNemar 1947, with the binomial distribution instead of its approximation).
    """
    gained, lost = (int(np.count_nonzero(a & ~b)) for a, b in ((one_N, two_N), (two_N, one_N)))
    if gained + lost == 0:
        return McNemar(0, 0, 1.0)
    return McNemar(gained, lost, float(binomtest(gained, gained + lost).pvalue))


def gains(one_SN: np.ndarray, two_SN: np.ndarray) -> np.ndarray:
    """Return how much more often the first system has each image right, fp64 (N,), in [-1, 1].

    Both are bool (S, N); the numbers of seeds may differ.
    """
    return one_SN.mean(axis=0) - two_SN.mean(axis=0)


def bootstrap(
    sets: Sequence[np.ndarray],
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
    level: float = LEVEL,
) -> Difference:
    """Return the mean over sets of the images' mean gain (N,), with a percentile interval.

    One set gives its difference in accuracy, the five OOD benchmarks that of their average. Each
    replicate draws as many images of each set as it has, with replacement. A gain takes few values
    (with one seed -1, 0 and 1), so what is drawn are the numbers of images of each value, from the
    multinomial distribution that drawing images one by one gives.
    """
    draws = np.random.default_rng(seed)
    drawn_R = np.zeros(replicates)
    # sums of integers, times the step between gains, would be exact; these are good to 1e-15
    for gain_N in sets:
        values, counts = np.unique(gain_N, return_counts=True)
        images = len(gain_N)
        drawn_R += draws.multinomial(images, counts / images, replicates) @ values / images
    drawn_R /= len(sets)
    tail = (1 - level) / 2
    low, high = np.quantile(drawn_R, [tail, 1 - tail])
    # rounding must not make a replicate of no difference one of a side
    noise = 1e-12
    sides = [np.count_nonzero(drawn_R <= noise), np.count_nonzero(drawn_R >= -noise)]
    p = min(1.0, 2 * (min(sides) + 1) / (replicates + 1))
    value = float(np.mean([gain_N.mean() for gain_N in sets]))
    return Difference(value, Interval(float(low), float(high)), p)
