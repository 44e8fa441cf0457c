"""How a step's work between its products is done: as written, or compiled for the device.

Every way gives the same gradients and masks up to rounding; rft/train/fastest.py chooses one.
"""

from typing import Literal, NamedTuple, assert_never

from rft.clip import vit
from rft.method import relevance
from rft.method.relevance import Through
from rft.storage.documents import document


@document(name="kernels")
class Choice:
    """The names of a run's kernels."""

    layers: Literal["eager", "compiled"] = "eager"
    cam: Literal["eager", "compiled", "triton"] = "eager"

    def __str__(self) -> str:
        return f"layers {self.layers}, CAM {self.cam}"


class Kernels(NamedTuple):
    """The two parts of a step that can be computed in more than one way."""

    choice: Choice = Choice()
    pieces: vit.Pieces = vit.EAGER
    """What lies between the products of a layer."""
    through: Through = relevance.through_maps
    """How the CAM goes through a layer."""


def load(choice: Choice) -> Kernels:
    """Return the kernels of these names; compiled ones compile at their first call.

    Raises:
        ImportError: if Triton is asked for and not installed.
    """
    pieces = vit.compiled() if choice.layers == "compiled" else vit.EAGER
    match choice.cam:
        case "eager":
            through = relevance.through_maps
        case "compiled":
            through = relevance.compiled_maps()
        case "triton":
            # here, because it cannot be imported where there is no Triton
            from rft.method.relevance_kernel import through_tiles as through
        case _:
            assert_never(choice.cam)
    return Kernels(choice, pieces, through)
