"""Top-1 by counting, for whole label spaces, class subsets and ObjectNet's groups. Pure.

Shapes: B batch, K classes, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EXCLUDED = -1


@dataclass(frozen=True)
class Count:
    """How many of how many; percentages are made by whoever prints them."""

    correct: int
    total: int

    def __add__(self, other: "Count") -> "Count":
        return Count(self.correct + other.correct, self.total + other.total)

    @property
    def share(self) -> float:
        """Return correct / total."""
        return self.correct / self.total


def is_correct(logits_BK: Tensor, labels_B: Tensor, class_to_group_K: Tensor) -> Tensor:
    """Return for each image whether its prediction is right, bool (B,).

    The prediction is the argmax over the classes that lie in a group; it is right when it lies in
    the label's group. With one group for each class this is plain top-1; for ObjectNet it equals
    the benchmark's rule over its 113 categories (groups are disjoint).
    """
    excluded_K = class_to_group_K == EXCLUDED
    predicted_B = logits_BK.masked_fill(excluded_K, -torch.inf).argmax(dim=1)
    return class_to_group_K[predicted_B] == class_to_group_K[labels_B]


def is_finite(logits_BK: Tensor) -> Tensor:
    """Return for each image whether it has a prediction at all: all logits finite, bool (B,)."""
    return logits_BK.isfinite().all(dim=1)
