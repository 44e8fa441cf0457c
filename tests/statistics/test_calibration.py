"""Calibration equals other libraries' results, over complete sets and in any order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from rft.statistics import calibration


def draw(images: int = 500, classes: int = 7, scale: float = 2.0, seed: int = 0):
    """Return logits (N, K), overconfident by `scale`, and labels drawn from calibrated ones."""
    draws = np.random.default_rng(seed)
    logits_NK = draws.normal(size=(images, classes)) * 2
    label_N = np.array([draws.choice(classes, p=p) for p in softmax(logits_NK, axis=1)])
    return scale * logits_NK, label_N


@pytest.mark.parametrize(("how", "strategy"), [("width", "uniform"), ("mass", "quantile")])
@pytest.mark.parametrize("number", [1, 10, 15])
def test_bins_are_sklearns(how, strategy, number):
    logits_NK, label_N = draw()
    confidence_N = softmax(logits_NK, axis=1).max(axis=1)
    right_N = logits_NK.argmax(axis=1) == label_N
    found = calibration.bins(confidence_N, right_N, how, number)
    accuracy_M, confidence_M = calibration_curve(
        right_N, confidence_N, n_bins=number, strategy=strategy
    )
    assert found.accuracy_M == pytest.approx(accuracy_M, abs=1e-12)
    assert found.confidence_M == pytest.approx(confidence_M, abs=1e-12)
    assert found.count_M.sum() == len(label_N)
    expected = (found.count_M / 500 * np.abs(accuracy_M - confidence_M)).sum()
    assert found.error == pytest.approx(expected, abs=1e-12)


def test_an_edge_belongs_to_the_bin_below_it():
    found = calibration.bins(np.array([0.5, 0.50001, 1.0]), np.array([True, False, True]), number=2)
    assert found.count_M.tolist() == [1, 2]


@given(st.permutations(range(12)), st.sampled_from(["width", "mass"]))
def test_the_order_of_images_does_not_matter(order, how):
    # with equal confidences, which must not be split over bins by their order
    confidence_N = np.repeat([0.2, 0.4, 0.9], 4)
    right_N = np.arange(12) % 3 == 0
    found = calibration.bins(confidence_N[order], right_N[order], how, 4)
    expected = calibration.bins(confidence_N, right_N, how, 4)
    assert found.count_M.tolist() == expected.count_M.tolist()
    assert found.error == pytest.approx(expected.error, abs=1e-12)


def test_the_mean_over_batches_is_another_number():
    """Trap 2: averaged errors of batches are larger and depend on the batch size."""
    logits_NK, label_N = draw(images=2000, scale=1.0)
    confidence_N = softmax(logits_NK, axis=1).max(axis=1)
    right_N = logits_NK.argmax(axis=1) == label_N

    def by_batches(size: int) -> float:
        return float(
            np.mean(
                [
                    calibration.bins(confidence_N[at : at + size], right_N[at : at + size]).error
                    for at in range(0, 2000, size)
                ]
            )
        )

    whole = calibration.bins(confidence_N, right_N).error
    assert by_batches(50) > by_batches(200) > 1.5 * whole


def test_the_fitted_temperature_is_the_best():
    logits_NK, label_N = draw(images=4000, scale=3.0)
    found = calibration.fit_temperature(logits_NK, label_N)
    # the factor of overconfidence
    assert found == pytest.approx(3.0, rel=0.1)

    def loss(temperature: float) -> float:
        return -calibration.log_likelihood(logits_NK, label_N, temperature).mean()

    expected = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-10})
    # a function's minimum is only known to half of its digits
    assert found == pytest.approx(expected.x, rel=1e-6)
    assert loss(found) <= loss(expected.x) + 1e-15
    step = 1e-3
    assert loss(found) < min(loss(found - step), loss(found + step))


def test_rows_that_are_looked_at_together_do_not_matter(monkeypatch):
    logits_NK, label_N = draw()
    whole = calibration.fit_temperature(logits_NK, label_N)
    monkeypatch.setattr(calibration, "ROWS", 7)
    assert calibration.fit_temperature(logits_NK, label_N) == pytest.approx(whole, rel=1e-12)


def test_log_likelihood_is_sklearns():
    logits_NK, label_N = draw()
    found = -calibration.log_likelihood(logits_NK, label_N, 1.7).mean()
    expected = log_loss(label_N, softmax(logits_NK / 1.7, axis=1), labels=range(7))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "logits_NK",
    [10 * np.eye(3), np.zeros((3, 3)), -10 * np.eye(3)],
    ids=["all right", "nothing said", "all wrong"],
)
def test_labels_that_no_temperature_fits_are_an_error(logits_NK):
    with pytest.raises(ValueError, match=r"no temperature from 0\.01 to 100 fits these 3 images"):
        calibration.fit_temperature(logits_NK, np.arange(3))
