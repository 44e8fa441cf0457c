"""Parts of the loop that the released code does differently: clipping and draws."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.step import Arguments, Batch, build_job
from rft.dist import World
from rft.train.loop import Job, accumulate_gradients, draw_micro_batch
from tests.conftest import build_model


@pytest.fixture
def job() -> Job:
    return build_job(Arguments(batch_size=6), torch.device("cpu"), "fp32", build_model(0))


def with_optim(job: Job, **changes) -> Job:
    return replace(job, config=replace(job.config, optim=replace(job.config.optim, **changes)))


def with_method(job: Job, **changes) -> Job:
    return replace(job, config=replace(job.config, method=replace(job.config.method, **changes)))


def gradient(job: Job, batch: Batch) -> torch.Tensor:
    job.student.zero_grad()
    accumulate_gradients(job, job.objective, batch, step=0)
    return torch.cat([p.grad.flatten() for p in job.student.parameters()])


def clipped(vector: torch.Tensor, norm: float) -> torch.Tensor:
    return vector * min(1.0, norm / (vector.norm().item() + 1e-6))


@pytest.mark.parametrize("norm", [1.0, 15.0])
def test_clipping_after_every_micro_batch(job, images_BCHW, labels_B, norm):
    batch = Batch(images_BCHW, labels_B, labels_B)
    free = with_optim(job, clip_norm=1e9, accumulate=3)
    # what each micro-batch adds, from the sums of the first one, two and three of them
    whole = gradient(free, batch)
    parts = []
    for micro in range(3):
        alone = copy.deepcopy(free)
        address = draw_micro_batch(alone, 0, micro, 2)
        rows = slice(2 * micro, 2 * micro + 2)
        alone.student.zero_grad()
        clean = alone.objective(images_BCHW[rows], labels_B[rows], address)
        (clean.loss / 3).backward()
        mse = alone.objective(images_BCHW[rows], labels_B[rows], address, clean.donor_BP)
        (alone.config.method.distill_weight * mse / 3).backward()
        parts.append(torch.cat([p.grad.flatten() for p in alone.student.parameters()]))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-5)

    once = gradient(with_optim(job, clip_norm=norm, accumulate=3), batch)
    each = gradient(with_optim(job, clip_norm=norm, accumulate=3, clip="micro-step"), batch)
    torch.testing.assert_close(once, clipped(whole, norm), rtol=1e-4, atol=1e-6)
    expected = torch.zeros_like(whole)
    for part in parts:
        expected = clipped(expected + part, norm)
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(once, each, rtol=1e-2)


@pytest.mark.parametrize("same", [False, True])
def test_ranks_draw_the_same_only_if_told(job, same):
    job = with_method(job, same_draws=same, mask="random", fill="multi")
    first, second = (
        draw_micro_batch(replace(job, world=World(rank=rank, size=2, local_rank=rank)), 5, 0, 3)
        for rank in (0, 1)
    )
    assert torch.equal(first.mask_BP, second.mask_BP) == same
    assert torch.equal(first.source_BP, second.source_BP) == same
