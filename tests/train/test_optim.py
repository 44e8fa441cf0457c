"""The schedule at its landmarks."""

import pytest

from rft.config import OptimConfig
from rft.train.optim import learning_rate


def test_landmarks_of_the_papers_schedule():
    config = OptimConfig()
    total = 24_820
    assert learning_rate(0, total, config) == pytest.approx(3e-5 / 500)
    assert learning_rate(499, total, config) == pytest.approx(3e-5)
    assert learning_rate(500, total, config) == pytest.approx(3e-5)
    middle = 500 + (total - 500) // 2
    assert learning_rate(middle, total, config) == pytest.approx(1.5e-5)
    assert learning_rate(total - 1, total, config) < 1e-12


def test_no_warm_up_and_a_run_of_one_step():
    assert learning_rate(0, 1, OptimConfig(warmup_steps=0)) == pytest.approx(3e-5)
