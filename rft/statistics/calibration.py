"""How well confidences match accuracies, and the temperature that makes them. Pure.

A confidence is the probability of the prediction. Bins are made over a whole set: an error that is
averaged over batches is biased upwards and depends on their size.

Shapes: N images, K classes or groups of classes, M bins.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import logsumexp, softmax

BINS = 15
"""As in Guo et al. 2017."""
TEMPERATURES = (0.01, 100.0)  # the range that is searched
ROWS = 4096  # of logits that are looked at together, in fp64


class Bins(NamedTuple):
    """A calibration diagram: bins of confidence that are not empty, in rising order."""

    count_M: np.ndarray
    confidence_M: np.ndarray
    """Mean of the bin's images."""
    accuracy_M: np.ndarray

    @property
    def error(self) -> float:
        """Return the expected calibration error: the mean gap over images, in [0, 1]."""
        gap_M = np.abs(self.accuracy_M - self.confidence_M)
        return float(np.average(gap_M, weights=self.count_M))


def bins(
    confidence_N: np.ndarray,
    right_N: np.ndarray,
    how: Literal["width", "mass"] = "width",
    number: int = BINS,
) -> Bins:
    """Put images into bins by confidence.

    "width": bins of equal width, (0, 1/M], (1/M, 2/M], ... as in Guo et al. 2017; "mass": bins of
    equally many images, cut at quantiles. Equal confidences share a bin, so that the order of the
    images does not matter, and bins of equal mass are then not quite equal.
    """
    confidence_N = confidence_N.astype(np.float64)
    shares = np.linspace(0, 1, number + 1)
    edges = shares if how == "width" else np.quantile(confidence_N, shares)
    # the outer edges take no part: nothing is below or above them
    bin_N = np.searchsorted(edges[1:-1], confidence_N)
    count_M = np.bincount(bin_N, minlength=number)
    seen = count_M > 0
    means = (
        np.bincount(bin_N, weights=values, minlength=number)[seen] / count_M[seen]
        for values in (confidence_N, right_N)
    )
    return Bins(count_M[seen], *means)


def merge(parts: Sequence[Bins], number: int = BINS) -> Bins:
    """Return the diagram of all images of several, each of bins of equal width."""
    edges = np.linspace(0, 1, number + 1)
    count_M, confidence_M, right_M = np.zeros((3, number))
    for part in parts:
        # a bin's mean confidence lies in it
        bin_M = np.searchsorted(edges[1:-1], part.confidence_M)
        count_M[bin_M] += part.count_M
        confidence_M[bin_M] += part.count_M * part.confidence_M
        right_M[bin_M] += part.count_M * part.accuracy_M
    seen = count_M > 0
    count_M = count_M[seen]
    return Bins(count_M.astype(np.int64), confidence_M[seen] / count_M, right_M[seen] / count_M)


def fit_temperature(logits_NK: np.ndarray, label_N: np.ndarray) -> float:
    """Return the temperature T whose softmax(logits / T) makes the labels most likely.

    The images must be neither training nor test images. The likelihood has one maximum, where the
    mean logit under the softmax equals that of the labels (Guo et al. 2017, section 4.2).

    Raises:
        ValueError: if no temperature from 0.01 to 100 is the best one, as where every image is
            right, or the logits say nothing.
    """
    label_logit = logits_NK[np.arange(len(label_N)), label_N].astype(np.float64).sum()

    def slope(inverse: float) -> float:
        """Return the derivative of the negative log-likelihood by 1 / T, which rises with it."""
        expected = 0.0
        for start in range(0, len(logits_NK), ROWS):
            part_NK = logits_NK[start : start + ROWS].astype(np.float64)
            expected += float((softmax(inverse * part_NK, axis=1) * part_NK).sum())
        return expected - label_logit

    low, high = (1 / temperature for temperature in reversed(TEMPERATURES))
    if not slope(low) < 0 < slope(high):
        raise ValueError(
            f"no temperature from {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g} fits these "
            f"{len(label_N):,} images best, as where all are predicted right, or by chance; "
            "probabilities stay as the model has them"
        )
    found = root_scalar(slope, bracket=(low, high), method="brentq", xtol=1e-15, rtol=1e-14)
    return float(1 / found.root)


def log_likelihood(
    logits_NK: np.ndarray, label_N: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """Return the log-probability of each image's label, fp64 (N,)."""
    scaled_NK = logits_NK.astype(np.float64) / temperature
    return scaled_NK[np.arange(len(label_N)), label_N] - logsumexp(scaled_NK, axis=1)
