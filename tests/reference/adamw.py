"""AdamW following Loshchilov and Hutter's algorithm 2, in float64."""

import numpy as np


class Moments:
    """One parameter with its two moments."""

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight.astype(np.float64)
        self._first = np.zeros_like(self.weight)
        self._second = np.zeros_like(self.weight)
        self._steps = 0

    def step(self, gradient: np.ndarray, lr: float, config) -> None:
        """One step; `config` has weight_decay, beta1, beta2 and eps."""
        self._steps += 1
        self._first = config.beta1 * self._first + (1 - config.beta1) * gradient
        self._second = config.beta2 * self._second + (1 - config.beta2) * gradient**2
        first = self._first / (1 - config.beta1**self._steps)
        second = self._second / (1 - config.beta2**self._steps)
        decay = config.weight_decay * self.weight
        self.weight = self.weight - lr * (first / (np.sqrt(second) + config.eps) + decay)
