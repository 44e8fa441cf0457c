"""Two systems on the same test images: which is better, and could the difference be chance? Pure.

The images are the random sample here. Systems that were trained with several seeds are compared by
the mean over seeds of each image, so the intervals hold for these trainings. How much a further
training would differ shows in the spread over seeds.

A bootstrap draws units. A unit is an image, or all versions of one image, as in ImageNet-C, where
all versions of an easy image are easy.

Shapes: N images or units of one set, S seeds, R replicates, V different gains.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from rft.statistics.accuracy import LEVEL, Interval

REPLICATES = 10_000
"""Replicates of a bootstrap: the ends of a 95% interval then vary between draws with a standard
deviation of about 0.7% of its width."""


NOISE = 1e-12  # a difference up to this is 0 with rounding errors


class McNemar(NamedTuple):
    """McNemar's exact test of two models on one set."""

    gained: int
    """Images that the first model gets right and the second wrong."""
    lost: int
    """Images that the second model gets right and the first wrong."""
    p: float
    """Two-sided p-value of the hypothesis that both are equally accurate."""


class Difference(NamedTuple):
    """A difference of accuracies, in [-1, 1], with the bootstrap interval and p-value."""

    value: float
    interval: Interval
    p: float
    """Two-sided, at least 1 / (replicates + 1)."""

    def __neg__(self) -> "Difference":
        """Exchange the two systems."""
        low, high = self.interval
        return Difference(-self.value, Interval(-high, -low), self.p)


class Gains(NamedTuple):
    """A histogram of gains: how much more often one system is right on a unit than the other.

    A bootstrap needs no more, because the mean does not depend on which unit has which gain.
    """

    gain_V: np.ndarray
    """Mean gain of a unit's images, fp64, in [-1, 1]; rising where units are images."""
    units_V: np.ndarray
    """Number of units with each gain, int64."""
    size_V: np.ndarray
    """Images in each of these units, int64."""
    lowest: float = -1.0
    """The lowest possible gain of an image: -1 for a difference, 0 for an accuracy."""

    @property
    def mean(self) -> float:
        """The difference in accuracy over all images."""
        images_V = self.units_V * self.size_V
        return float(images_V @ self.gain_V / images_V.sum())

    @property
    def gained(self) -> int:
        """Number of units on which the first system is right more often."""
        return int(self.units_V[self.gain_V > 0].sum())

    @property
    def lost(self) -> int:
        """Number of units on which the first system is right less often."""
        return int(self.units_V[self.gain_V < 0].sum())


def mcnemar(one_N: np.ndarray, two_N: np.ndarray) -> McNemar:
    """Test whether two models are equally accurate; bool (N,) marks the images each gets right."""
    gained, lost = (int(np.count_nonzero(a & ~b)) for a, b in ((one_N, two_N), (two_N, one_N)))
    return McNemar(gained, lost, float(mcnemar_p(np.array(gained), np.array(lost))))


def mcnemar_p(gained: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Compute McNemar's exact p-values for many pairs of models, in arrays of any shape.

    Under the null hypothesis, an image that only one of the two models gets right is as likely to
    be the first model's as the second's (McNemar 1947, with the binomial distribution instead of
    its approximation).
    """
    # both tails are equal; if gained equals lost they share the middle, hence the minimum
    return np.minimum(1.0, 2 * binom.cdf(np.minimum(gained, lost), gained + lost, 0.5))


def gains(one_SN: np.ndarray, two_SN: np.ndarray) -> np.ndarray:
    """Compute how much more often the first system gets each image right, fp64 (N,), in [-1, 1].

    Both arguments are bool (S, N); the numbers of seeds may differ.
    """
    return one_SN.mean(axis=0) - two_SN.mean(axis=0)


def tally(
    one_N: np.ndarray,
    one_seeds: int,
    two_N: np.ndarray | None = None,
    two_seeds: int = 1,
    size_N: np.ndarray | None = None,
) -> Gains:
    """Count the gains of two systems from their right predictions on each unit, int (N,).

    Args:
        one_N: right predictions on a unit's images by all seeds of the first system.
        one_seeds: number of these seeds.
        two_N: the same of the second system; without it, gains are the first system's accuracy.
        two_seeds: number of the second system's seeds.
        size_N: images in each unit; without it, a unit is an image.
    """
    lowest = 0.0 if two_N is None else -1.0
    two_N = np.zeros_like(one_N) if two_N is None else two_N
    # integers, so that equal gains fall into one entry
    if size_N is None:
        width = two_seeds + 1
        # a pair of counts is coded as one number, because counting is faster than sorting
        images_P = np.bincount(
            one_N.astype(np.intp) * width + two_N, minlength=(one_seeds + 1) * width
        )
        one_P, two_P = np.divmod(np.arange(len(images_P)), width)
        steps_V, place_P = np.unique(one_P * two_seeds - two_P * one_seeds, return_inverse=True)
        units_V = np.zeros(len(steps_V), dtype=np.int64)
        np.add.at(units_V, place_P, images_P)
        seen = units_V > 0
        steps_V, units_V, size_V = steps_V[seen], units_V[seen], np.ones(seen.sum(), np.int64)
    else:
        steps_N = one_N.astype(np.int64) * two_seeds - two_N.astype(np.int64) * one_seeds
        (steps_V, size_V), units_V = np.unique(
            np.stack([steps_N, size_N]), axis=1, return_counts=True
        )
    return Gains(steps_V / (one_seeds * two_seeds * size_V), units_V, size_V, lowest)


def of_images(gain_N: np.ndarray) -> Gains:
    """Count the gains (N,) of images."""
    gain_V, images_V = np.unique(gain_N, return_counts=True)
    return Gains(gain_V, images_V, np.ones_like(images_V))


def redraw(found: Gains, draws: np.random.Generator, replicates: int = REPLICATES) -> np.ndarray:
    """Draw bootstrap replicates and compute the mean gain of each, fp64 (R,).

    A replicate draws as many units as the data have, with replacement. Only the number of units
    with each gain matters, so these are drawn from the multinomial distribution.

    If all units have the same gain, for example because every image is right, resampling shows no
    uncertainty. Then a share of the units gets the highest or the lowest gain instead. The share is
    drawn from the shares that remain likely after none was seen among so many units: 95% of them
    are below 3 / units (the rule of three, Hanley and Lippman-Hand 1983).
    """
    units = found.units_V.sum()
    if np.ptp(found.gain_V) < NOISE:
        other_R = draws.beta(1, units, replicates)
        # exactly half of the replicates on each side, so that neither side is more likely
        upwards_R = draws.permutation(replicates) % 2 == 0
        end_R = np.where(upwards_R, 1.0, found.lowest)
        return found.gain_V[0] + other_R * (end_R - found.gain_V[0])
    # numpy draws one binomial per value, and the last follows from the others without a draw: sort
    # so that this is the largest
    order = np.argsort(found.units_V, kind="stable")
    gain_V, units_V, size_V = found.gain_V[order], found.units_V[order], found.size_V[order]
    drawn_RV = draws.multinomial(units, units_V / units, replicates)
    # integer sums times the step between gains would be exact; this is accurate to 1e-15
    return drawn_RV @ (gain_V * size_V) / (drawn_RV @ size_V)


def summarise(value: float, drawn_R: np.ndarray, level: float = LEVEL) -> Difference:
    """Add the percentile interval and p-value of the replicates to a difference."""
    tail = (1 - level) / 2
    low, high = np.quantile(drawn_R, [tail, 1 - tail])
    # a replicate without a difference counts on both sides, despite rounding errors
    sides = [np.count_nonzero(drawn_R <= NOISE), np.count_nonzero(drawn_R >= -NOISE)]
    p = min(1.0, 2 * (min(sides) + 1) / (len(drawn_R) + 1))
    return Difference(value, Interval(float(low), float(high)), p)


def bootstrap_of(
    sets: Sequence[Gains],
    draws: np.random.Generator,
    *,
    replicates: int = REPLICATES,
    level: float = LEVEL,
) -> Difference:
    """Compute the mean over sets of the mean gains, with a percentile interval.

    One set gives its difference in accuracy. The five OOD benchmarks give that of their average.
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
    """Compute the mean over sets of the mean gain of the images (N,); see `bootstrap_of`."""
    found = [of_images(gain_N) for gain_N in sets]
    draws = np.random.default_rng(seed)
    return bootstrap_of(found, draws, replicates=replicates, level=level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979), in the order given."""
    corrected, least = list(p_values), 0.0
    places = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, place in enumerate(places):
        # never below that of a smaller p-value
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = least
    return corrected
