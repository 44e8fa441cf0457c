"""Averages of weights: WiSE-FT and soups.

A state dict maps names to tensors; models are averaged over every entry, the head's included.
"""

from collections.abc import Mapping

from torch import Tensor

State = Mapping[str, Tensor]


def interpolate(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """Return (1 - alpha) start + alpha end (WiSE-FT, Wortsman et al. 2022, eq. 1).

    Raises:
        ValueError: if the two do not have the same entries and shapes.
    """
    require_alike(start, end)
    # alpha 0 and 1 must give back the inputs bit for bit, which lerp does not promise
    return {name: (1 - alpha) * start[name] + alpha * end[name] for name in start}


def require_alike(first: State, second: State) -> None:
    """Check that two state dicts can be averaged.

    Raises:
        ValueError: naming the first entry that only one has, or whose shapes differ.
    """
    if only := sorted(first.keys() ^ second.keys()):
        raise ValueError(f"the models are not alike: only one of them has {only[0]!r}")
    for name, value in first.items():
        if value.shape != second[name].shape:
            shapes = f"{tuple(value.shape)} and {tuple(second[name].shape)}"
            raise ValueError(f"the models are not alike: {name!r} has shapes {shapes}")
