"""Read-ahead of batches by loader processes, into memory shared with the training process.

Loader processes keep no state: item t is this rank's part of global batch t. They write its images
to a slot in shared memory, so that no batch is copied between processes.
"""

import math
import mmap
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Generator, Iterator
from multiprocessing.reduction import DupFd
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rft import cpus
from rft.device import Transfer, to_device, transferring
from rft.loading.batches import Batches
from rft.loading.dataset import Batch, Reading

SECONDS_ALONE = 2  # a loader process outlives a killed trainer by at most this time
BATCHES_AHEAD = 2  # batches that each loader process may have ready or in progress


def read_batches(
    batches: Batches, numbers: range, *, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield the numbered batches in order, on `device`, images uint8.

    A batch's images are valid until the next batch is taken, because their memory is reused.

    Raises:
        ValueError: if a sample is damaged; the message names shard, key and offset.
        ChildProcessError: if a loader process was killed.
    """
    # More processes than cores or batches would wait for each other, and starting a process takes
    # longer than reading the single batch of a small held-out set.
    workers = min(workers, cpus.available(), len(numbers))
    alone = workers == 0 or len(numbers) == 1
    # at least two, so that a batch never overwrites the one before it
    slots = Slots(batches, (0 if alone else workers) * BATCHES_AHEAD + 2)
    if alone:
        found: Iterator[_Item | ValueError] = map(slots.__getitem__, numbers)
    else:
        # forkserver, because a fork of a process with CUDA, gloo or fsspec threads can hang
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rft.loading.forkserver", "rft.loading.read"])
        found = iter(
            DataLoader(
                slots,
                batch_size=None,
                sampler=numbers,
                num_workers=workers,
                prefetch_factor=BATCHES_AHEAD,
                collate_fn=_as_it_is,
                worker_init_fn=_start_loader,
                multiprocessing_context=context,
            )
        )
    with transferring(slots.memory, slots.largest, device) as transfer:
        for number in numbers:
            # `next` may overwrite the slot of the batch two before: it reads a batch into it, or
            # sends a number to a loader process
            transfer.free(number)
            try:
                item = next(found)
            except RuntimeError as error:
                # del ends the loader processes at once; torch has no class for this error
                del found
                if "DataLoader worker" not in str(error):
                    raise
                raise ChildProcessError(
                    f"a loader process was killed before batch {number} ({error}), manually or "
                    "because memory ran out: use fewer --loader.workers, then run the same "
                    "command again"
                ) from error
            if isinstance(item, ValueError):
                # otherwise the error keeps this frame alive, and the frame the loader processes
                del found
                raise item
            yield slots.batch(number, item, transfer)


def _start_loader(_: int) -> None:
    info = get_worker_info()
    assert info is not None, "this is a loader process"
    slots: Any = info.dataset
    # the process exits without garbage collection: this ends the cache's filling thread, which
    # removes its partial file
    Finalize(None, slots.batches.packed.shards.close, exitpriority=0)
    _follow_trainer()


def _follow_trainer() -> None:
    """End this loader process on SIGTERM from the training process, or when that has ended.

    Signals from other processes are ignored (rft/loading/forkserver.py). torch itself only watches
    the process that forked this one, which lives just as long.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "a loader process has a training process"

    def wait() -> None:
        while trainer.is_alive():
            if not hasattr(signal, "sigtimedwait"):  # macOS
                trainer.join(SECONDS_ALONE)
                continue
            # only waiting for a signal reveals its sender
            signalled = signal.sigtimedwait({signal.SIGTERM}, SECONDS_ALONE)
            if signalled is not None and signalled.si_pid == trainer.pid:
                break
        # in a thread, sys.exit would only end the thread
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _Item(NamedTuple):
    """A batch whose images are in a slot."""

    labels_B: np.ndarray
    samples_B: np.ndarray
    reading: Reading


class Slots(Dataset[_Item | ValueError]):
    """Shared memory for several batches of images; reading item t fills a slot.

    Batch t goes to slot t modulo their number. Reused memory is many times faster than fresh
    memory, because the system must clear every new page. The memory has no name and is not in
    /dev/shm, so nothing is left behind and a container's small limit does not apply.
    """

    def __init__(self, batches: Batches, count: int) -> None:
        self.batches = batches
        self._shape = (count, batches.largest, 3, batches.image_size, batches.image_size)
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("rft batches")
        else:
            with tempfile.TemporaryFile() as file:
                self._descriptor = os.dup(file.fileno())
        # 8 bytes per slot for its mark
        os.ftruncate(self._descriptor, 8 * count + math.prod(self._shape))
        self._attach()
        self._marks_S.fill_(-1)

    def __getstate__(self) -> tuple[Any, ...]:
        # pass the memory to a started process by its descriptor
        return self.batches, self._shape, DupFd(self._descriptor)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.batches, self._shape, duplicate = state
        self._descriptor = duplicate.detach()
        self._attach()

    def _attach(self) -> None:
        # mmap is shared by default, so all processes see the same pages
        self.memory = torch.frombuffer(mmap.mmap(self._descriptor, 0), dtype=torch.uint8)
        marks = 8 * self._shape[0]
        # marks first, because torch views bytes as int64 only at a multiple of 8
        self._marks_S = self.memory[:marks].view(torch.int64)  # number of the batch in each slot
        self._images_SBCHW = self.memory[marks:].view(self._shape)

    def __del__(self) -> None:
        # the mapping stays valid, because mmap duplicated the descriptor
        os.close(self._descriptor)

    def __getitem__(self, index: int) -> _Item | ValueError:
        try:
            batch = self.batches.read(index, self.images(index))
        except ValueError as error:
            # returned, because DataLoader would re-raise it with a full traceback as its message
            return error
        # set after the images are written, because the trainer counts marks as ready batches
        self._marks_S[index % self._shape[0]] = index
        return _Item(batch.labels_B.numpy(), batch.samples_B.numpy(), batch.reading)

    @property
    def largest(self) -> tuple[int, ...]:
        """The shape of the largest batch, BCHW."""
        return self._shape[1:]

    def images(self, number: int) -> Tensor:
        """Find the slot for the images of batch `number`."""
        return self._images_SBCHW[number % self._shape[0]]

    def batch(self, number: int, item: _Item, transfer: Transfer) -> Batch:
        """Copy batch `number` from its slot to the device."""
        images_BCHW = transfer.copy(number, self.images(number)[: len(item.labels_B)])
        labels_B = to_device(torch.from_numpy(item.labels_B), transfer.device)
        # slots of taken batches keep their smaller numbers
        ready = int((self._marks_S > number).sum())
        return Batch(images_BCHW, labels_B, torch.from_numpy(item.samples_B), item.reading, ready)


def _as_it_is(item: Any) -> Any:
    return item  # no collation: a batch is complete and already in its slot
