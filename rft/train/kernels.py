"""Kernels of a step's operations between the matrix products: eager, or compiled.

All give the same gradients and masks up to rounding; rft/train/fastest.py chooses one.
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
    """Names of a run's kernels."""

    layers: Literal["eager", "compiled"] = "eager"
    cam: Literal["eager", "compiled", "triton"] = "eager"

    def __str__(self) -> str:
        return f"layers {self.layers}, CAM {self.cam}"


class Kernels(NamedTuple):
    """The two exchangeable parts of a step."""

    choice: Choice = Choice()
    pieces: vit.Pieces = vit.EAGER
    """Operations between the matrix products of a layer."""
    through: Through = relevance.through_maps
    """Propagation of the CAM through a layer."""


def load(choice: Choice) -> Kernels:
    """Load kernels by name; compiled ones compile on their first call.

    Raises:
        ImportError: if Triton is requested but not installed.
        PermissionError: if other users can write to the compiler's cache.
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
            # here, because importing it requires Triton
            from rft.method.relevance_kernel import through_tiles as through
        case _:
            assert_never(choice.cam)
    return Kernels(choice, pieces, through)


def _set_up_compiler() -> None:
    # the CAM runs backward through a graph that the loss needs again, which torch refuses if a
    # backward may overwrite the graph's buffers
    torch._functorch.config.donated_buffer = False  # pyrefly: ignore[missing-attribute]
    # choose kernels by rule instead of by timing, so that all nodes and resumed runs get the same
    torch._inductor.config.deterministic = True  # pyrefly: ignore[missing-attribute]
    # Two token counts, with or without gradients, in two types: a second teacher with dropped
    # tokens needs all eight variants that are allowed by default, and a ninth would silently run
    # uncompiled.
    torch._dynamo.config.recompile_limit = 32  # pyrefly: ignore[missing-attribute]


def require_own_cache() -> None:
    """Check that no other user can write compiled code to torch.compile's cache.

    By default the cache has a predictable name in the system's temporary folder, and torch does not
    check its owner.

    Raises:
        PermissionError: if it belongs to another user, or is writable by all users. Write access
            for its group is accepted, because it comes from a umask that trusts the group.
    """
    # this import takes a second, and only compiling runs need it
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & stat.S_IWOTH:
        raise PermissionError(
            f"other users can write to {folder}, from which torch.compile runs code: set "
            "TORCHINDUCTOR_CACHE_DIR to a private folder (docs/security.md#shared-folders)"
        )
