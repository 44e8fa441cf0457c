"""Two systems on the same test images: who is better, and could it be chance? Pure.

Images are what is drawn at random here. Systems that were trained with several seeds are compared
by each image's mean over them, so the intervals hold for these trainings; how much another training
would differ is seen in the spread over seeds.

Shapes: N images of one set, S seeds, R replicates, V different gains.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

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

    def __neg__(self) -> "Difference":
        """Return the difference with the systems exchanged."""
        low, high = self.interval
        return Difference(-self.value, Interval(-high, -low), self.p)


class Gains(NamedTuple):
    """How much more often one system has images right than the other has, and on how many images.

    A bootstrap needs no more: which image has which gain makes no difference to a mean.
    """

    gain_V: np.ndarray
    """Different gains in rising order, fp64, in [-1, 1]."""
    images_V: np.ndarray
    """How many images have each, int64."""

    @property
    def mean(self) -> float:
        """Return the difference in accuracy."""
        return float(self.images_V @ self.gain_V / self.images_V.sum())

    @property
    def gained(self) -> int:
        """Return how many images the first system has right more often."""
        return int(self.images_V[self.gain_V > 0].sum())

    @property
    def lost(self) -> int:
        """Return how many images the first system has right less often."""
        return int(self.images_V[self.gain_V < 0].sum())


def mcnemar(one_N: np.ndarray, two_N: np.ndarray) -> McNemar:
    """Test whether two models are equally accurate, from which images each has right, bool (N,)."""
    gained, lost = (int(np.count_nonzero(a & ~b)) for a, b in ((one_N, two_N), (two_N, one_N)))
    return McNemar(gained, lost, float(mcnemar_p(np.array(gained), np.array(lost))))


def mcnemar_p(gained: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Return McNemar's exact p-values of many pairs of models, of any shape.

    Of the images that only one of the two has right, each is as likely the one's as the other's
    (McNemar 1947, with the binomial distribution instead of its approximation).
    """
    # both tails are equal, and where gained is lost they share the middle
    return np.minimum(1.0, 2 * binom.cdf(np.minimum(gained, lost), gained + lost, 0.5))


def gains(one_SN: np.ndarray, two_SN: np.ndarray) -> np.ndarray:
    """Return how much more often the first system has each image right, fp64 (N,), in [-1, 1].

    Both are bool (S, N); the numbers of seeds may differ.
    """
    return one_SN.mean(axis=0) - two_SN.mean(axis=0)


def tally(one_N: np.ndarray, one_seeds: int, two_N: np.ndarray, two_seeds: int) -> Gains:
    """Count the gains of two systems, from how many seeds of each have an image right, int (N,).

    With zeros of one seed in place of the second system, the gains are the first one's accuracy.
    """
    width = two_seeds + 1
    # a pair of numbers of seeds as one number
    pair_N = one_N.astype(np.intp) * width + two_N
    images_P = np.bincount(pair_N, minlength=(one_seeds + 1) * width)
    one_P, two_P = np.divmod(np.arange(len(images_P)), width)
    # whole numbers, so that equal gains are one
    steps_V, place_P = np.unique(one_P * two_seeds - two_P * one_seeds, return_inverse=True)
    images_V = np.zeros(len(steps_V), dtype=np.int64)
    np.add.at(images_V, place_P, images_P)
    seen = images_V > 0
    return Gains(steps_V[seen] / (one_seeds * two_seeds), images_V[seen])


def redraw(found: Gains, draws: np.random.Generator, replicates: int = REPLICATES) -> np.ndarray:
    """Return the mean gain of each replicate, fp64 (R,).

    Each draws as many images as there are, with replacement. What is drawn are the numbers of
    images of each gain, from the multinomial distribution that drawing images one by one gives.
    """
    # the last number is what the others leave over and costs nothing, so it is the largest
    order = np.argsort(found.images_V, kind="stable")
    gain_V, images_V = found.gain_V[order], found.images_V[order]
    images = images_V.sum()
    # sums of integers, times the step between gains, would be exact; these are good to 1e-15
    return draws.multinomial(images, images_V / images, replicates) @ gain_V / images


def summarise(value: float, drawn_R: np.ndarray, level: float = LEVEL) -> Difference:
    """Return a difference with the percentile interval and p-value that its replicates give."""
    tail = (1 - level) / 2
    low, high = np.quantile(drawn_R, [tail, 1 - tail])
    # rounding must not make a replicate of no difference one of a side
    noise = 1e-12
    sides = [np.count_nonzero(drawn_R <= noise), np.count_nonzero(drawn_R >= -noise)]
    p = min(1.0, 2 * (min(sides) + 1) / (len(drawn_R) + 1))
    return Difference(value, Interval(float(low), float(high)), p)


def bootstrap_of(
    sets: Sequence[Gains],
    draws: np.random.Generator,
    *,
    replicates: int = REPLICATES,
    level: float = LEVEL,
) -> Difference:
    """Return the mean over sets of the mean gains, with a percentile interval.

    One set gives its difference in accuracy, the five OOD benchmarks that of their average.
    """
    drawn_R = np.mean([redraw(found, draws, replicates) for found in sets], axis=0)
    return summarise(float(np.mean([found.mean for found in sets])), drawn_R, level)


def bootstrap(
    sets: Sequence[np.ndarray],
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
    level: float = LEVEL,
) -> Difference:
    """Return the mean over sets of the images' mean gain (N,); see `bootstrap_of`."""
    found = [Gains(*np.unique(gain_N, return_counts=True)) for gain_N in sets]
    draws = np.random.default_rng(seed)
    return bootstrap_of(found, draws, replicates=replicates, level=level)
