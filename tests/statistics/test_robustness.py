"""Effective robustness is the distance from a line on the logit scale."""

import numpy as np
import pytest
from scipy.special import expit, logit

from rft.statistics import robustness


def test_models_on_a_line_are_not_robust():
    x = np.array([0.6, 0.7, 0.8, 0.9])
    y = expit(0.9 * logit(x) - 1)
    line = robustness.fit(x, y)
    assert line == pytest.approx((0.9, -1, 1), abs=1e-12)
    for one, two in zip(x, y, strict=True):
        assert robustness.effective_robustness(line, one, two) == pytest.approx(0, abs=1e-12)
    assert robustness.effective_robustness(line, 0.75, expit(0.9 * logit(0.75) - 1) + 0.1) == (
        pytest.approx(0.1, abs=1e-12)
    )


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_a_model_at_an_end_is_held_against_the_end(accuracy):
    line = robustness.Line(0.9, -1, 1)
    assert robustness.effective_robustness(line, accuracy, 0.5) == 0.5 - accuracy


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        ([0.5, 0.6], [0.4, 0.5], "at least 3 models, it has 2"),
        ([0.5, 0.6, 1.0], [0.4, 0.5, 0.6], "above 0 and below 100%"),
        ([0.5, 0.6, 0.7], [0.4, 0.0, 0.6], "above 0 and below 100%"),
        ([0.5, 0.6, float("nan")], [0.4, 0.1, 0.6], "above 0 and below 100%"),
        ([0.5, 0.5, 0.5], [0.4, 0.1, 0.6], "the same ID accuracy"),
    ],
)
def test_a_testbed_that_has_no_line_is_an_error(x, y, says):
    with pytest.raises(ValueError, match=says):
        robustness.fit(x, y)
