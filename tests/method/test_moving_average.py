"""Moving teachers are the averages after which they are named."""

import pytest
import torch

from rft.config import MethodConfig
from rft.method import moving_average
from tests.reference import later

STEPS = 40


def walk() -> list[torch.Tensor]:
    """The weights of a run, before its first step and after each step."""
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(STEPS + 1, 7, generator=generator).cumsum(dim=0))


def teacher_after(method: MethodConfig, weights: list[torch.Tensor]) -> torch.Tensor:
    teacher = weights[0].clone()
    shares = moving_average.shares(method, len(weights) - 1)
    for theta, share in zip(weights[1:], shares, strict=True):
        moving_average.follow([teacher], [theta], share)
    return teacher


def test_the_weighted_teacher_is_the_weighted_mean_of_the_run():
    weights = walk()
    found = teacher_after(MethodConfig(teacher="wma"), weights)
    torch.testing.assert_close(found, later.weighted_mean(weights), rtol=1e-5, atol=1e-5)
    plain = torch.stack(weights).mean(dim=0)
    # it is not a plain mean: the ends count more
    assert (found - plain).abs().max() > 0.1


def test_the_exponential_teacher_keeps_its_decay():
    weights = walk()
    expected = weights[0]
    for theta in weights[1:]:
        expected = 0.9 * expected + 0.1 * theta
    found = teacher_after(MethodConfig(teacher="ema", teacher_decay=0.9), weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_teacher_does_not_move():
    assert moving_average.shares(MethodConfig(), 100) == []


@pytest.mark.parametrize("steps", [1, 2, 25_000])
def test_shares_are_shares(steps):
    found = moving_average.shares(MethodConfig(teacher="wma"), steps)
    assert len(found) == steps
    assert all(0 < share < 1 for share in found)
