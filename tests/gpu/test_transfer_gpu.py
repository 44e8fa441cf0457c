"""Batches on a real GPU: read from page-locked memory, and never overwritten early."""

import numpy as np
import pytest
import torch

from rft.device import transferring
from rft.loading.batches import EvaluationBatches
from rft.loading.dataset import PackedDataset
from rft.loading.read import Slots, read_batches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

CYCLES = 20_000_000  # of idle work on the GPU, some milliseconds


@pytest.fixture(scope="module")
def batches(tiny_data) -> EvaluationBatches:
    packed = PackedDataset(str(tiny_data / "imagenet-train"))
    return EvaluationBatches(packed, np.arange(len(packed)), image_size=16, batch_size=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_batch_is_overwritten_before_it_was_used(batches, workers, capsys):
    device, seen = torch.device("cuda", 0), []
    for batch in read_batches(batches, range(len(batches)), workers=workers, device=device):
        # the host is far ahead: it takes the next batches while this one is pending
        torch.cuda._sleep(CYCLES)
        seen.append((batch.images_BCHW.clone(), batch.labels_B))
    assert capsys.readouterr().err == "", "memory was page-locked without a warning"
    for number, (images_BCHW, labels_B) in enumerate(seen):
        expected = batches.packed.batch(batches.samples_of(number), batches.image_size)
        assert torch.equal(images_BCHW.cpu(), expected.images_BCHW)
        assert torch.equal(labels_B.cpu(), expected.labels_B)


def test_the_gpu_reads_the_slots_themselves_and_they_are_unlocked(batches):
    device, slots = torch.device("cuda", 0), Slots(batches, 2)
    with transferring(slots.memory, slots.largest, device) as transfer:
        assert slots.images(0).is_pinned()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found_BCHW = transfer.copy(0, slots.images(0))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found_BCHW.cpu(), slots.images(0))
    assert not slots.images(0).is_pinned()


def test_memory_that_cannot_be_locked_is_copied_with_one_warning(batches, capsys):
    device, slots = torch.device("cuda", 0), Slots(batches, 2)
    slots.images(0).fill_(7)
    # no memory is page-locked twice
    with (
        transferring(slots.memory, slots.largest, device),
        transferring(slots.memory, slots.largest, device) as refused,
    ):
        found_BCHW = refused.copy(0, slots.images(0)) + 1
    assert (found_BCHW == 8).all()
    assert "WARNING: no pinned memory (" in capsys.readouterr().err
