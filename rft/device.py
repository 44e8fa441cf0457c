"""Copies between the CPU and the compute device."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rft.config import PrecisionChoice
from rft.log import EVERY_RANK

log = logging.getLogger(__name__)


def autocast(device: torch.device, precision: PrecisionChoice) -> torch.autocast:
    """Make the autocast context of a forward; disabled for fp32 and tf32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device` without making the host wait for a GPU.

    The caller may overwrite `tensor` at once: its bytes are taken before this returns. On a CPU the
    result is `tensor` itself.
    """
    if device.type != "cuda":
        return tensor.to(device, non_blocking=True)
    try:
        pinned = tensor.pin_memory()  # a copy, which the GPU reads without the host
    except RuntimeError as error:
        _warn_that_copies_wait(str(error).partition("\n")[0])
        # blocks, and raises if the GPU itself has failed
        return tensor.to(device)
    return pinned.to(device, non_blocking=True)


def to_cpu(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the CPU; the returned function waits for the copy and returns it.

    On a CPU the result is `tensor` itself.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    try:
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError as error:
        _warn_that_copies_wait(str(error).partition("\n")[0])
        # blocks, and raises if the GPU itself has failed
        copied = tensor.cpu()
        return lambda: copied
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))

    def arrived() -> Tensor:
        event.synchronize()
        return copy

    return arrived


@functools.cache
def _warn_that_copies_wait(reason: str) -> None:
    """Print the warning once per reason, not once per batch."""
    log.warning(
        f"no pinned memory ({reason}); copies to or from the GPU make the process wait. Results "
        "do not change, training may be slower. Is the machine's memory full?",
        extra=EVERY_RANK,
    )


class Transfer:
    """Copies numbered batches to a device, each during the work on the batch before it.

    On a GPU, batch t lands in buffer t modulo 2 by a copy that neither the host nor the work on
    batch t - 1 waits for. Three orderings make it correct: the work on batch t follows its copy,
    the copy follows the work on batch t - 2, and the host does not touch a batch's memory until
    `free`. Without page-locked memory (`locked` is false) `to_device` makes the copy, so on a CPU
    nothing is copied.
    """

    def __init__(self, device: torch.device, largest: Sequence[int], *, locked: bool) -> None:
        self.device = device
        self._locked = locked
        if not locked:
            return
        self._buffers = torch.empty((2, *largest), dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event(), torch.cuda.Event()]
        self._used = [torch.cuda.Event(), torch.cuda.Event()]
        # earlier work may still be using the memory that the buffers were given
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def free(self, number: int) -> None:
        """Wait until the memory of batch `number` - 2 may be overwritten; call before `number`.

        All work on batch `number` - 1 must have been launched.
        """
        if not self._locked:
            return
        self._used[(number - 1) % 2].record(torch.cuda.current_stream(self.device))
        self._copied[number % 2].synchronize()

    def copy(self, number: int, images_BCHW: Tensor) -> Tensor:
        """Copy the images of batch `number` to the device; valid until the next one is taken."""
        if not self._locked:
            return to_device(images_BCHW, self.device)
        target_BCHW = self._buffers[number % 2][: len(images_BCHW)]
        # the copy waits for the work on batch `number` - 2, which used the same buffer
        self._stream.wait_event(self._used[number % 2])
        with torch.cuda.stream(self._stream):
            target_BCHW.copy_(images_BCHW, non_blocking=True)
        self._copied[number % 2].record(self._stream)
        # and the work on this batch waits for its copy
        torch.cuda.current_stream(self.device).wait_event(self._copied[number % 2])
        return target_BCHW

    def end(self) -> None:
        """Wait for the copies in flight."""
        if self._locked:
            self._stream.synchronize()


@contextlib.contextmanager
def transferring(
    memory: Tensor, largest: Sequence[int], device: torch.device
) -> Iterator[Transfer]:
    """Prepare copies to `device` of uint8 batches in `memory`, of the shape `largest` or smaller.

    For a GPU the memory is page-locked for the length of the body, so that the GPU reads it
    directly. If page-locking is refused, one line warns and each batch is copied to pinned memory
    first.
    """
    with contextlib.ExitStack() as stack:
        locked = device.type == "cuda" and _page_lock(memory, device)
        if locked:
            stack.callback(_unlock, memory)
        transfer = Transfer(device, largest, locked=locked)
        stack.callback(transfer.end)
        yield transfer


def _page_lock(memory: Tensor, device: torch.device) -> bool:
    """Page-lock `memory` for direct reads by the GPU; False if refused."""
    cudart: Any = torch.cuda.cudart()
    try:
        torch.cuda.check_error(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    except RuntimeError as error:
        _warn_that_copies_wait(str(error).partition("\n")[0])
        # CUDA keeps the refusal as its last error, and the next kernel launch would raise it
        with contextlib.suppress(RuntimeError):
            torch.ones((), device=device)
        return False
    return True


def _unlock(memory: Tensor) -> None:
    cudart: Any = torch.cuda.cudart()
    torch.cuda.check_error(cudart.cudaHostUnregister(memory.data_ptr()))
