"""Effective robustness: OOD accuracy above the value expected from the ID accuracy. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit
from scipy.stats import linregress

MODELS = 3  # least number in a testbed; a line through two always fits perfectly


class Line(NamedTuple):
    """A line fitted to a testbed's models, with both accuracies on the logit scale."""

    slope: float
    intercept: float
    r_squared: float

    def expected(self, accuracy: float) -> float:
        """Evaluate the line: the expected OOD accuracy for an ID accuracy, in [0, 1]."""
        return float(expit(self.slope * logit(accuracy) + self.intercept))


def fit(id_accuracies: Sequence[float], ood_accuracies: Sequence[float]) -> Line:
    """Fit a line to models that were trained without robustness interventions (Taori et al. 2020).

    Accuracies are in (0, 1).

    Raises:
        ValueError: if there are fewer than three models, an accuracy is 0 or 1, or all models have
            the same ID accuracy.
    """
    if len(id_accuracies) < MODELS:
        raise ValueError(f"a testbed needs at least {MODELS} models, it has {len(id_accuracies)}")
    x, y = np.array(id_accuracies), np.array(ood_accuracies)
    if not (((x > 0) & (x < 1)).all() and ((y > 0) & (y < 1)).all()):
        raise ValueError("accuracies in a testbed must be above 0 and below 100%")
    if (x == x[0]).all():
        raise ValueError("all models of the testbed have the same ID accuracy, so no line fits")
    found = linregress(logit(x), logit(y))
    return Line(float(found.slope), float(found.intercept), float(found.rvalue) ** 2)


def effective_robustness(line: Line, id_accuracy: float, ood_accuracy: float) -> float:
    """Compute the OOD accuracy minus that of the line, in [-1, 1]."""
    return ood_accuracy - line.expected(id_accuracy)
