"""Calibration: how well confidences match accuracies, and the temperature that corrects them. Pure.

A confidence is the probability of the prediction. Bins are made over a whole set, because an error
averaged over batches is biased upwards and depends on the batch size.

Shapes: N images, K classes or groups of classes, M bins.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import logsumexp, softmax

BINS = 15
"""As in Guo et al. 2017."""
TEMPERATURES = (0.01, 100.0)  # range of the search
ROWS = 4096  # rows of logits that are converted to fp64 at a time


class Bins(NamedTuple):
    """A calibration diagram: the non-empty bins of confidence, in rising order."""

    count_M: np.ndarray
    confidence_M: np.ndarray
    """Mean of the bin's images."""
    accuracy_M: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean gap over images, in [0, 1]."""
        gap_M = np.abs(self.accuracy_M - self.confidence_M)
        return float(np.average(gap_M, weights=self.count_M))


def bins(
    confidence_N: np.ndarray,
    right_N: np.ndarray,
    how: Literal["width", "mass"] = "width",
    number: int = BINS,
) -> Bins:
    """Sort images into bins by confidence.

    "width" makes bins of equal width, (0, 1/M], (1/M, 2/M], ... as in Guo et al. 2017. "mass" makes
    bins of equally many images, cut at quantiles. Equal confidences share a bin, so the order of
    the images does not matter, and bins of equal mass may differ slightly in size.
    """
    confidence_N = confidence_N.astype(np.float64)
    shares = np.linspace(0, 1, number + 1)
    edges = shares if how == "width" else np.quantile(confidence_N, shares)
    # the outer edges are not needed: no confidence is below or above them
    bin_N = np.searchsorted(edges[1:-1], confidence_N)
    count_M = np.bincount(bin_N, minlength=number)
    seen = count_M > 0
    means = (
        np.bincount(bin_N, weights=values, minlength=number)[seen] / count_M[seen]
        for values in (confidence_N, right_N)
    )
    return Bins(count_M[seen], *means)


def merge(parts: Sequence[Bins], number: int = BINS) -> Bins:
    """Merge diagrams with bins of equal width into the diagram of all their images."""
    edges = np.linspace(0, 1, number + 1)
    count_M, confidence_M, right_M = np.zeros((3, number))
    for part in parts:
        # the mean confidence of a bin lies inside that bin, so it finds the bin
        bin_M = np.searchsorted(edges[1:-1], part.confidence_M)
        count_M[bin_M] += part.count_M
        confidence_M[bin_M] += part.count_M * part.confidence_M
        right_M[bin_M] += part.count_M * part.accuracy_M
    seen = count_M > 0
    count_M = count_M[seen]
    return Bins(count_M.astype(np.int64), confidence_M[seen] / count_M, right_M[seen] / count_M)


def fit_temperature(logits_NK: np.ndarray, label_N: np.ndarray) -> float:
    """Find the temperature T for which softmax(logits / T) makes the labels most likely.

    The images must be neither training nor test images. The likelihood has one maximum, where the
    mean logit under the softmax equals that of the labels (Guo et al. 2017, section 4.2).

    Raises:
        ValueError: if the best temperature is not between 0.01 and 100, for example because every
            image is right, or the logits are uninformative.
    """
    label_logit = logits_NK[np.arange(len(label_N)), label_N].astype(np.float64).sum()

    def slope(inverse: float) -> float:
        """Differentiate the negative log-likelihood by 1 / T; the result rises with 1 / T."""
        expected = 0.0
        for start in range(0, len(logits_NK), ROWS):
            part_NK = logits_NK[start : start + ROWS].astype(np.float64)
            expected += float((softmax(inverse * part_NK, axis=1) * part_NK).sum())
        return expected - label_logit

    low, high = (1 / temperature for temperature in reversed(TEMPERATURES))
    if not slope(low) < 0 < slope(high):
        raise ValueError(
            f"no temperature from {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g} fits these "
            f"{len(label_N):,} images best (all predicted right, or at chance level); "
            "probabilities are left unscaled"
        )
    found = root_scalar(slope, bracket=(low, high), method="brentq", xtol=1e-15, rtol=1e-14)
    return float(1 / found.root)


def log_likelihood(
    logits_NK: np.ndarray, label_N: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """Compute the log-probability of each image's label, fp64 (N,)."""
    scaled_NK = logits_NK.astype(np.float64) / temperature
    return scaled_NK[np.arange(len(label_N)), label_N] - logsumexp(scaled_NK, axis=1)
