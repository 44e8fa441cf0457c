"""Parts of a step that differ from the released code: clipping, draws, precision."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.step import Arguments, Batch, build_job
from rft.device import autocast
from rft.dist import World
from rft.method.counterfactual import Draws
from rft.train.job import Job
from rft.train.step import accumulate_gradients, draw_micro_batch
from tests.conftest import build_model


@pytest.fixture
def job() -> Job:
    job = build_job(Arguments(batch_size=6), torch.device("cpu"), "fp32", build_model(0))
    # that job's teacher equals its student, so distillation has no gradient
    job.objective.teacher.load_state_dict(build_model(1).state_dict())
    return job


def with_optim(job: Job, **changes) -> Job:
    return replace(job, config=replace(job.config, optim=replace(job.config.optim, **changes)))


def with_method(job: Job, **changes) -> Job:
    return replace(job, config=replace(job.config, method=replace(job.config.method, **changes)))


def gradient(job: Job, batch: Batch) -> torch.Tensor:
    job.student.zero_grad()
    accumulate_gradients(job, job.objective, batch, step=0)
    return torch.cat([p.grad.flatten() for p in job.student.parameters()])


def draws_of(
    job: Job, step: int = 5, micro: int = 0, rank: int = 0, ranks: int = 1, images: int = 3
) -> Draws:
    """The draws of one micro-batch."""
    world = World(rank=rank, size=ranks, local_rank=rank)
    return draw_micro_batch(job.config, world, step=step, micro=micro, images=images, patches=16)


def clipped(vector: torch.Tensor, norm: float) -> torch.Tensor:
    return vector * min(1.0, norm / (vector.norm().item() + 1e-6))


@pytest.mark.parametrize("norm", [1.0, 15.0])
def test_clipping_after_every_micro_batch(job, images_BCHW, labels_B, norm):
    batch = Batch(images_BCHW, labels_B, labels_B)
    free = with_optim(job, clip_norm=1e9, accumulate=3)
    # the contribution of each micro-batch, from the sums of the first one, two and three
    whole = gradient(free, batch)
    parts = []
    for micro in range(3):
        alone = copy.deepcopy(free)
        address = draws_of(alone, step=0, micro=micro, images=2)
        rows = slice(2 * micro, 2 * micro + 2)
        alone.student.zero_grad()
        clean = alone.objective(images_BCHW[rows], labels_B[rows], address)
        (clean.loss / 3).backward()
        mse = alone.objective(images_BCHW[rows], labels_B[rows], address, clean.donor_BP).terms[
            "mse"
        ]
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
    first, second = (draws_of(job, rank=rank, ranks=2) for rank in (0, 1))
    assert torch.equal(first.mask_BP, second.mask_BP) == same
    assert torch.equal(first.source_BP, second.source_BP) == same


@pytest.mark.parametrize("donors", ["local", "global"])
def test_steps_micro_batches_and_ranks_draw_for_themselves(job, donors):
    job = with_method(with_optim(job, accumulate=2), mask="random", fill="multi", donors=donors)
    # a global pool of 12 images in four micro-batches
    job = replace(job, config=replace(job.config, loader=replace(job.config.loader, batch_size=12)))
    first = draws_of(job, ranks=2)
    for place in ({"step": 6}, {"micro": 1}, {"rank": 1}, {"micro": 1, "rank": 1}):
        other = draws_of(job, ranks=2, **place)
        assert not torch.equal(first.mask_BP, other.mask_BP), place
        assert not torch.equal(first.source_BP, other.source_BP), place
    seeded = draws_of(replace(job, config=replace(job.config, seed=1)), ranks=2)
    assert not torch.equal(first.mask_BP, seeded.mask_BP)
    assert torch.equal(first.mask_BP, draws_of(job, ranks=2).mask_BP)


def test_a_global_pool_is_cut_in_the_order_of_ranks_and_micro_batches(job):
    job = with_method(with_optim(job, accumulate=2), mask="random", fill="multi", donors="global")
    job = replace(job, config=replace(job.config, loader=replace(job.config.loader, batch_size=12)))
    parts = [draws_of(job, rank=rank, ranks=2, micro=micro) for rank in (0, 1) for micro in (0, 1)]
    own = torch.cat([part.own_B1 for part in parts])
    assert own.flatten().tolist() == list(range(12))
    masks = torch.cat([part.mask_BP for part in parts])
    assert len(masks.unique(dim=0)) == 12


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_autocast_is_for_bf16(name):
    with autocast(torch.device("cpu"), name):
        assert torch.is_autocast_enabled("cpu") == (name == "bf16")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
