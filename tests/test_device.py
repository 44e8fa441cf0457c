"""Copies to a GPU, checked by a recorder: pinned, non-blocking, sources reusable at once."""

import types
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from rft import device
from rft.config import MethodConfig
from rft.device import Transfer, to_device
from rft.loading import read
from rft.loading.dataset import Reading
from rft.loading.read import Slots
from rft.method.counterfactual import StepAddress, draw
from tests.tiny import unstamped

CUDA = torch.device("cuda", 0)
METHOD = MethodConfig(mask="random", fill="multi")


class Copy(NamedTuple):
    """A requested copy to a GPU, with the memory that the GPU would read later."""

    source: Tensor
    pinned: bool
    non_blocking: bool


@pytest.fixture
def copies(monkeypatch) -> list[Copy]:
    """Every copy to CUDA in this test; the result of one stays on the CPU."""
    found, pinned = [], set()
    real = Tensor.to

    def pin_memory(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        pinned.add(copy.data_ptr())
        return copy

    def to(tensor: Tensor, where, *, non_blocking: bool = False) -> Tensor:
        if torch.device(where).type == "cuda":
            found.append(Copy(tensor, tensor.data_ptr() in pinned, non_blocking))
            return tensor
        return real(tensor, where, non_blocking=non_blocking)

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    return found


@pytest.fixture
def slots() -> Slots:
    return Slots(types.SimpleNamespace(largest=4, image_size=2), 2)


def unlocked(slots: Slots, where: torch.device = CUDA) -> Transfer:
    """Copies of batches whose memory could not be page-locked."""
    return Transfer(where, slots.largest, locked=False)


def item(images: int) -> read._Item:
    return read._Item(np.arange(images) + 7, np.arange(images) + 70, Reading())


def test_a_batch_is_copied_from_pinned_memory_without_waiting(copies, slots):
    slots.images(5).copy_(torch.arange(48).reshape(4, 3, 2, 2))
    slots.batch(5, item(3), unlocked(slots))  # a short batch
    images, labels = copies
    assert all(copy.pinned and copy.non_blocking for copy in copies)
    assert torch.equal(images.source.flatten(), torch.arange(36, dtype=torch.uint8))
    assert labels.source.tolist() == [7, 8, 9]


def test_the_next_batch_may_be_written_at_once(copies, slots):
    slots.images(5).fill_(5)
    slots.batch(5, item(4), unlocked(slots))
    slots.images(7).fill_(77)
    assert (slots.images(5) == 77).all(), "batches 5 and 7 have the same memory"
    # the GPU may read it as late as here
    assert (copies[0].source == 5).all()


def test_draws_are_copied_from_pinned_memory_without_waiting(copies):
    draws = draw(METHOD, range(4), 16, 8, StepAddress(0, 0, 0, 0))
    draws.copied(partial(to_device, device=CUDA))
    assert len(copies) == 3
    assert all(copy.pinned and copy.non_blocking for copy in copies)
    for copy, expected in zip(copies, draws[:3], strict=True):
        assert torch.equal(copy.source, expected)


def test_on_a_cpu_nothing_is_copied(copies, slots):
    cpu = torch.device("cpu")
    batch = slots.batch(5, item(4), unlocked(slots, cpu))
    assert batch.images_BCHW.data_ptr() == slots.images(5).data_ptr()
    draws = draw(METHOD, range(4), 16, 8, StepAddress(0, 0, 0, 0))
    same = draws.copied(partial(to_device, device=cpu))
    assert all(one is other for one, other in zip(draws, same, strict=True))
    assert copies == []


def test_without_pinned_memory_copies_wait_and_one_line_warns(copies, slots, monkeypatch, capsys):
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    monkeypatch.setattr(Tensor, "pin_memory", fail)
    device._warn_that_copies_wait.cache_clear()
    for number in (5, 6):
        slots.images(number).fill_(number)
        slots.batch(number, item(4), unlocked(slots))
    assert [copy.source[0, 0, 0, 0].item() for copy in copies[::2]] == [5, 6]
    assert not any(copy.non_blocking for copy in copies)
    (line,) = unstamped(capsys.readouterr().err).splitlines()
    assert line.startswith("WARNING: no pinned memory (CUDA error: out of memory); ")
