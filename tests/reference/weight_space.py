"""L2-SP, selective projection decay and fast trainable projection, number by number, in float64."""

import math

import numpy as np

from tests.reference.adamw import Moments


def l2_sp_gradient(weight: np.ndarray, anchor: np.ndarray, strength: float) -> np.ndarray:
    """Of strength / 2 |theta - theta_0|^2."""
    return strength * (weight.astype(np.float64) - anchor.astype(np.float64))


class Decayed(Moments):
    """A tensor under AdamW with selective projection decay."""

    def __init__(self, weight: np.ndarray, anchor: np.ndarray, strength: float) -> None:
        super().__init__(weight)
        self._anchor, self._strength = anchor.astype(np.float64), strength
        self.drawn_back = 0  # steps

    def step(self, gradient: np.ndarray, lr: float, config) -> None:
        delta = self.weight - self._anchor
        aligned, before = (gradient * delta).sum(), math.sqrt((delta**2).sum())
        super().step(gradient, lr, config)
        if aligned > 0:
            delta = self.weight - self._anchor
            after = math.sqrt((delta**2).sum())
            share = min(max((after - before) / after, 0.0), 1.0)
            self.drawn_back += share > 0
            self.weight = self.weight - self._strength * share * delta


class Projected(Moments):
    """A tensor under AdamW with fast trainable projection."""

    def __init__(self, weight: np.ndarray, anchor: np.ndarray, k: float) -> None:
        super().__init__(weight)
        self._anchor, self._k = anchor.astype(np.float64), k
        self.radius, self._first_of_radius, self._second_of_radius = 1e-8, 0.0, 0.0
        self._before = None

    def _rows(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(1 if tensor.ndim == 1 else len(tensor), -1)

    def step(self, gradient: np.ndarray, lr: float, config) -> None:
        super().step(gradient, lr, config)
        move = self.weight - self._anchor
        rows = self._rows(move)
        norms = [sum(abs(number) for number in row) + 1e-8 for row in rows]
        if self._before is not None:
            self._learn_radius(self._rows(gradient), max(norms))
        projected = [
            min(self.radius / norm, 1.0) * row for norm, row in zip(norms, rows, strict=True)
        ]
        self._before = rows.copy()
        self.weight = self._anchor + np.stack(projected).reshape(move.shape)

    def _learn_radius(self, gradient_rows: np.ndarray, largest: float) -> None:
        slope = 0.0
        for gradient_row, row in zip(gradient_rows, self._before, strict=True):
            slope += (gradient_row * row).sum() / (sum(abs(number) for number in row) + 1e-8)
        if slope > 0:
            slope *= self._k
        self._first_of_radius = 0.9 * self._first_of_radius + 0.1 * slope
        self._second_of_radius = 0.999 * self._second_of_radius + 0.001 * slope**2
        first = self._first_of_radius / (1 - 0.9**self._steps)
        second = self._second_of_radius / (1 - 0.999**self._steps)
        self.radius -= 0.01 * first / (math.sqrt(second) + 1e-8)
        self.radius = min(max(self.radius, 1e-8), largest)
