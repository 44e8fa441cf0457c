"""How a step's work between its products is done: as written, or compiled for the device.

Every way gives the same gradients and masks up to rounding; rft/train/fastest.py chooses one.
"""

import os
import stat
from pathlib import Path
from typing import Literal, NamedTuple, assert_never

import torch

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
        PermissionError: if other users can write what the compiler runs.
    """
    if "compiled" in (choice.layers, choice.cam):
        require_own_cache()
        _set_up_compiler()
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


def _set_up_compiler() -> None:
    # the CAM goes backward through a graph that the loss needs again, and torch refuses that for a
    # graph whose buffers a backward may overwrite
    torch._functorch.config.donated_buffer = False  # pyrefly: ignore[missing-attribute]
    # kernels by rule instead of by trial: the same on each node, as a resumed run's must be
    torch._inductor.config.deterministic = True  # pyrefly: ignore[missing-attribute]
    # Two token counts, gradients or none, two types: a second teacher with dropped tokens needs the
    # eight variants that are allowed by default, and a ninth would silently run uncompiled.
    torch._dynamo.config.recompile_limit = 32  # pyrefly: ignore[missing-attribute]


def require_own_cache() -> None:
    """Check that no other user can write compiled code to torch.compile's cache.

    By default that is a folder of a known name below the system's temporary one, which torch takes
    as it finds it.

    Raises:
        PermissionError: if it belongs to another user, or all users may write to it. Its group may:
            a umask that allows that trusts the group.
    """
    # an import of a second, which only a run that compiles needs
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & stat.S_IWOTH:
        raise PermissionError(
            f"other users can write to {folder}, from which torch.compile runs code: set "
            "TORCHINDUCTOR_CACHE_DIR to a folder of your own"
        )
