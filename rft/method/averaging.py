"""Averages of weights: WiSE-FT, soups and Model Stock. Pure.

A state dict maps names to tensors; models are averaged over every entry, including the head.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = Mapping[str, Tensor]
TOWER = "visual."  # prefix of a classifier's image-tower entries


def interpolate(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """Compute (1 - alpha) start + alpha end (WiSE-FT, Wortsman et al. 2022, eq. 1).

    Raises:
        ValueError: if the two do not have the same entries, shapes and types.
    """
    require_alike(start, end)
    # alpha 0 and 1 must return the inputs bit for bit, which lerp does not guarantee, nor 0 x
    # infinity
    if alpha in (0, 1):
        return {name: value.clone() for name, value in (end if alpha else start).items()}
    return {name: (1 - alpha) * start[name] + alpha * end[name] for name in start}


def interpolate_tower(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """Interpolate only the image towers, as `interpolate` does; other entries are those of `end`.

    Raises:
        ValueError: if the two do not have the same entries, shapes and types.
    """
    mixed = interpolate(start, end, alpha)
    return {
        name: value if name.startswith(TOWER) else end[name].clone()
        for name, value in mixed.items()
    }


def model_stock(
    start: State, states: Iterable[State]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Compute the Model Stock of fine-tuned models, and the ratio t of each tensor.

    Jang et al. 2024 (ECCV), section 4. For each tensor, the deltas are theta_i - theta_0 and c is
    the mean cosine over pairs of them. With t = N c / (1 + (N - 1) c), the result is t
    mean(theta_i) + (1 - t) theta_0. The less the models agree, the closer it stays to the start.

    The derivation assumes c >= 0. A negative c would give a negative t and a result beyond theta_0,
    so t is at least 0. A zero delta counts as orthogonal to all others: a tensor that no model
    changed keeps its value.

    The models are consumed one by one; only two sums are kept, in fp64.

    Raises:
        ValueError: if there are fewer than two models, or not all have the same entries, shapes and
            types as the start.
    """
    total, count = Sum(), 0
    units: dict[str, Tensor] = {}
    moved = dict.fromkeys(start, 0)
    for state in states:
        require_alike(start, state)
        total.add(state)
        count += 1
        for name, value in state.items():
            delta = value.double() - start[name].double()
            norm = delta.norm()
            if norm > 0:
                units[name] = units.get(name, 0) + delta / norm
                moved[name] += 1
    if count < 2:
        raise ValueError(f"a Model Stock needs at least two fine-tuned models, {count} named")
    found, ratios = {}, {}
    for name, mean in total.mean(dtype=torch.float64).items():
        # the squared norm of a sum of m unit vectors is m + 2 x the sum over pairs of cosines
        pairs = float(units[name].square().sum()) - moved[name] if name in units else 0.0
        cosine = max(pairs / (count * (count - 1)), 0.0)
        ratio = min(count * cosine / (1 + (count - 1) * cosine), 1.0)
        base = start[name].double()
        found[name] = (ratio * mean + (1 - ratio) * base).to(start[name].dtype)
        ratios[name] = ratio
    return found, ratios


def uniform_soup(states: Iterable[State]) -> dict[str, Tensor]:
    """Average models arithmetically (model soups, Wortsman et al. 2022).

    The models are consumed one by one and only their fp64 sum is kept. It is rounded once at the
    end, so neither their number nor their order costs precision.

    Raises:
        ValueError: if there is no model, or not all have the same entries, shapes and types.
    """
    total = Sum()
    for state in states:
        total.add(state)
    return total.mean()


@dataclass(frozen=True)
class Trial:
    """One step of the greedy recipe."""

    model: int
    """Index of the tried model."""
    score: float
    """Score of the soup including this model."""
    kept: bool


def greedy_soup(
    scores: Sequence[float],
    load: Callable[[int], State],
    score_of: Callable[[dict[str, Tensor]], float],
    tell: Callable[[Trial], None] = lambda _: None,
) -> tuple[dict[str, Tensor], list[Trial]]:
    """Make the greedy soup (recipe 1 of Wortsman et al. 2022), and list its steps.

    The best model is the first soup. Each other model, from the second best on, is kept if the mean
    including it scores strictly higher. Of equal models the later one comes first, as in the
    authors' code, which sorts in ascending order and reverses.

    `scores` are the models' own scores on the held-out images, `score_of` scores any weights;
    `load` is called once per model with its index, and `tell` after each step.

    Raises:
        ValueError: if there is no model, or not all have the same entries, shapes and types.
    """
    best_first = sorted(range(len(scores)), key=scores.__getitem__)[::-1]
    soup = Sum()
    steps: list[Trial] = []
    best = -torch.inf
    for model in best_first:
        state = load(model)
        # the best model alone is the first soup, and its score is known
        score = score_of(soup.mean(state)) if steps else scores[model]
        # the first model beats -infinity, so a soup has at least one
        steps.append(Trial(model, score, kept=score > best))
        if steps[-1].kept:
            soup.add(state)
            best = score
        tell(steps[-1])
    return soup.mean(), steps


class Sum:
    """Sum of models, in fp64."""

    def __init__(self) -> None:
        self.count = 0
        self._total: dict[str, Tensor] = {}
        self._like: dict[str, Tensor] = {}

    def add(self, state: State) -> None:
        """Add a model.

        Raises:
            ValueError: if it does not match the models before it.
        """
        if self.count == 0:
            # shapes and types without data
            self._like = {name: torch.empty_like(v, device="meta") for name, v in state.items()}
            # copy=True: for an fp64 model `to` would return its own tensors, which are changed
            # below
            self._total = {name: v.to(torch.float64, copy=True) for name, v in state.items()}
        else:
            require_alike(self._like, state)
            for name, value in state.items():
                self._total[name] += value
        self.count += 1

    def mean(
        self, new: State | None = None, *, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Compute the mean of the added models, in their own type or in `dtype`.

        With `new`, the mean includes that model without adding it.

        Raises:
            ValueError: if there is no model, or the new one does not match those before it.
        """
        if self.count == 0:
            raise ValueError("a soup needs at least one model")
        if new is not None:
            require_alike(self._like, new)
        count = self.count + (new is not None)
        return {
            name: ((total if new is None else total + new[name]) / count).to(
                dtype or self._like[name].dtype
            )
            for name, total in self._total.items()
        }


def require_alike(first: State, second: State) -> None:
    """Check that two state dicts can be averaged.

    Raises:
        ValueError: naming the first entry that only one has, or whose shapes or types differ.
    """
    if only := sorted(first.keys() ^ second.keys()):
        raise ValueError(f"the models are not alike: only one of them has {only[0]!r}")
    for name, value in first.items():
        other = second[name]
        if value.shape != other.shape:
            shapes = f"{tuple(value.shape)} and {tuple(other.shape)}"
            raise ValueError(f"the models are not alike: {name!r} has shapes {shapes}")
        # a sum has the first model's types, so a mean would depend on the order
        if value.dtype != other.dtype:
            types = f"{value.dtype} and {other.dtype}"
            raise ValueError(f"the models are not alike: {name!r} has types {types}")
