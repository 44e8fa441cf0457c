"""Accuracies and intervals equal those of scikit-learn and statsmodels."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from statsmodels.stats.proportion import proportion_confint

from rft.statistics import accuracy

predictions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


@pytest.mark.parametrize("level", [0.68, 0.95, 0.99])
@pytest.mark.parametrize(
    ("correct", "total"), [(0, 1), (1, 1), (0, 7500), (7500, 7500), (3, 10), (37123, 50000)]
)
def test_wilson_is_statsmodels(correct, total, level):
    expected = proportion_confint(correct, total, alpha=1 - level, method="wilson")
    assert accuracy.wilson(correct, total, level) == pytest.approx(expected, abs=1e-12)


@given(predictions)
def test_confusion_and_mean_per_class_are_sklearns(pairs):
    label_N, prediction_N = np.array(pairs).T
    found = accuracy.confusion(label_N, prediction_N, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = confusion_matrix(label_N, prediction_N, labels=range(5))
    assert found.tolist() == expected.tolist()
    correct, total = accuracy.per_group(label_N == prediction_N, label_N, 5)
    assert correct.tolist() == np.diag(found).tolist()
    assert total.tolist() == found.sum(axis=1).tolist()
    with warnings.catch_warnings():
        # for predicted classes without images, which it omits too
        warnings.simplefilter("ignore", UserWarning)
        expected = balanced_accuracy_score(label_N, prediction_N)
    assert accuracy.mean_of_groups(correct, total) == pytest.approx(expected, abs=1e-12)


def test_the_worst_group_is_the_first_of_the_lowest():
    correct, total = np.array([3, 0, 1, 2, 1]), np.array([4, 0, 3, 6, 3])
    assert accuracy.worst_group(correct, total) == 2
    assert accuracy.mean_of_groups(correct, total) == pytest.approx((0.75 + 3 * 1 / 3) / 4)


def test_top_k_counts_ranks_below_k():
    rank_N = np.array([0, 4, 5, 1, 0, 999])
    assert [accuracy.top(rank_N, k) for k in (1, 2, 5, 6, 1000)] == [2, 3, 4, 5, 6]
