"""Copies from the CPU to the device that computes."""

import functools
import logging

import torch
from torch import Tensor

from rft.log import EVERY_RANK

log = logging.getLogger(__name__)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device` without making the host wait for a GPU.

    The caller may overwrite `tensor` at once: its bytes are taken before this returns. On a CPU the
    result is `tensor` itself.
    """
    if device.type != "cuda":
        return tensor.to(device, non_blocking=True)
    try:
        pinned = tensor.pin_memory()  # a copy, which the GPU reads by itself
    except RuntimeError as error:
        _warn_that_copies_wait(str(error).partition("\n")[0])
        # waits, and raises if it was the GPU that failed
        return tensor.to(device)
    return pinned.to(device, non_blocking=True)


@functools.cache
def _warn_that_copies_wait(reason: str) -> None:
    """Print the warning once per reason, not once per batch."""
    log.warning(
        f"no pinned memory ({reason}); copies to the GPU make the process wait. Results "
        "do not change, training may be slower. Is the machine's memory full?",
        extra=EVERY_RANK,
    )
