"""Effective robustness: how far a model lies above what its ID accuracy lets expect. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit
from scipy.stats import linregress

MODELS = 3  # of a testbed; a line through two says nothing of how well it fits


class Line(NamedTuple):
    """A line through a testbed's models, both accuracies on the logit scale."""

    slope: float
    intercept: float
    r_squared: float

    def expected(self, accuracy: float) -> float:
        """Return the OOD accuracy that a model of this ID accuracy has on the line, in [0, 1]."""
        return float(expit(self.slope * logit(accuracy) + self.intercept))


def fit(id_accuracies: Sequence[float], ood_accuracies: Sequence[float]) -> Line:
    """Fit a line through models that were trained without robustness in mind (Taori et al. 2020).

    Accuracies are in (0, 1).

    Raises:
        ValueError: if there are fewer than three models, an accuracy is 0 or 1, or all models have
            one ID accuracy.
    """
    if len(id_accuracies) < MODELS:
        raise ValueError(f"a testbed needs {MODELS} models or more, it has {len(id_accuracies)}")
    x, y = np.array(id_accuracies), np.array(ood_accuracies)
    if not (((x > 0) & (x < 1)).all() and ((y > 0) & (y < 1)).all()):
        raise ValueError("an accuracy of a testbed must be above 0 and below 100%")
    if (x == x[0]).all():
        raise ValueError("all models of the testbed have one ID accuracy, so no line fits best")
    found = linregress(logit(x), logit(y))
    return Line(float(found.slope), float(found.intercept), float(found.rvalue) ** 2)


def effective_robustness(line: Line, id_accuracy: float, ood_accuracy: float) -> float:
    """Return OOD accuracy minus that of the line, in [-1, 1]."""
    return ood_accuracy - line.expected(id_accuracy)
