"""Teachers that follow the student: running averages of its weights over the steps of a run."""

import math
from collections.abc import Iterable
from typing import assert_never

import torch
from torch import Tensor

from rft.config import MethodConfig


def shares(method: MethodConfig, steps: int) -> list[float]:
    """Compute how far the teacher moves to the student after each step; empty for a frozen one.

    After step t (from 1) the teacher is T + share (theta - T). The exponential average's share is
    always 1 - decay. The weighted one's is w_t / (w_0 + ... + w_t), so that T is the mean of all
    weights since the start, including theta_0, each weighted by the density of Beta(0.5, 0.5) at (t
    + 0.5) / (steps + 1): the first and the last steps count most (TRACER, 2026).
    """
    match method.teacher:
        case "frozen":
            return []
        case "ema":
            return [1 - method.teacher_decay] * steps
        case "wma":
            total, found = _arcsine(0.5 / (steps + 1)), []
            for step in range(1, steps + 1):
                weight = _arcsine((step + 0.5) / (steps + 1))
                total += weight
                found.append(weight / total)
            return found
        case _:
            assert_never(method.teacher)


def _arcsine(x: float) -> float:
    """Density of Beta(0.5, 0.5), the arcsine distribution."""
    return 1 / (math.pi * math.sqrt(x * (1 - x)))


@torch.no_grad()
def follow(teacher: Iterable[Tensor], student: Iterable[Tensor], share: float) -> None:
    """Move the teacher's fp32 weights towards the student's by a share of the difference."""
    torch._foreach_lerp_(list(teacher), list(student), share)
