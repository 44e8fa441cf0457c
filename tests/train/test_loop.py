"""The loop by hand, and its parts that the released code does differently: clipping and draws."""

import copy
import types
from dataclasses import replace

import pytest
import torch

from benchmarks.step import Arguments, Batch, build_job
from rft.dist import World
from rft.train.checkpoint import Progress
from rft.train.loop import Job, Meter, accumulate_gradients, draw_micro_batch, precision, select
from tests.conftest import build_model


@pytest.fixture
def job() -> Job:
    job = build_job(Arguments(batch_size=6), torch.device("cpu"), "fp32", build_model(0))
    # that job's teacher equals its student, and then distillation has no gradient
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


def draws_of(job: Job, **place: int):
    """The draws of one micro-batch of three images."""
    where = {"step": 5, "micro": 0, "rank": 0, **place}
    world = World(rank=where["rank"], size=2, local_rank=where["rank"])
    return draw_micro_batch(replace(job, world=world), where["step"], where["micro"], 3)


@pytest.mark.parametrize("donors", ["local", "global"])
def test_steps_micro_batches_and_ranks_draw_for_themselves(job, donors):
    job = with_method(with_optim(job, accumulate=2), mask="random", fill="multi", donors=donors)
    # a global pool of 12 images in four micro-batches
    job = replace(job, config=replace(job.config, loader=replace(job.config.loader, batch_size=12)))
    first = draws_of(job)
    for place in ({"step": 6}, {"micro": 1}, {"rank": 1}, {"micro": 1, "rank": 1}):
        other = draws_of(job, **place)
        assert not torch.equal(first.mask_BP, other.mask_BP), place
        assert not torch.equal(first.source_BP, other.source_BP), place
    seeded = draws_of(replace(job, config=replace(job.config, seed=1)))
    assert not torch.equal(first.mask_BP, seeded.mask_BP)
    assert torch.equal(first.mask_BP, draws_of(job).mask_BP)


def test_a_global_pool_is_cut_in_the_order_of_ranks_and_micro_batches(job):
    job = with_method(with_optim(job, accumulate=2), mask="random", fill="multi", donors="global")
    job = replace(job, config=replace(job.config, loader=replace(job.config.loader, batch_size=12)))
    parts = [draws_of(job, rank=rank, micro=micro) for rank in (0, 1) for micro in (0, 1)]
    own = torch.cat([part.own_B1 for part in parts])
    assert own.flatten().tolist() == list(range(12))
    masks = torch.cat([part.mask_BP for part in parts])
    assert len(masks.unique(dim=0)) == 12


def test_of_equal_models_the_first_is_selected():
    progress = Progress()
    for step, correct in ((10, 4), (20, 7), (30, 7), (40, 6)):
        progress = replace(progress, step=step).selecting(correct)
    assert progress == Progress(step=40, best_step=20, best_correct=7)


def test_with_nothing_to_select_by_the_last_model_is_the_one(job):
    journal = types.SimpleNamespace(held_out=None)  # is not called
    progress = Progress()
    for step in (0, 11, 22):
        progress = select(job, replace(progress, step=step), journal)
        assert progress.best_step == step


def test_the_logged_terms_are_means_over_steps_with_the_losses_weights(job):
    job = with_method(job, distill_weight=7.0, kd_weight=2.0)
    meter = Meter(job)
    # cross-entropy, logit distillation, MSE, share replaced; gradient norm
    meter.add(torch.tensor([1.0, 0.5, 0.2, 0.25]), torch.tensor(3.0))
    meter.add(torch.tensor([2.0, 1.5, 0.4, 0.75]), torch.tensor(5.0))
    found = meter.read(2)
    expected = {"ce": 1.5, "kd": 1.0, "mse": 0.3, "replaced": 0.5, "grad_norm": 4.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["loss"] == pytest.approx(1.5 + 2 * 1.0 + 7 * 0.3)
    assert found["epoch"] == 2  # of one step each, in this job
    assert meter.steps == 0


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_autocast_is_for_bf16(job, name):
    with precision(replace(job, config=replace(job.config, precision=name))):
        assert torch.is_autocast_enabled("cpu") == (name == "bf16")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_a_step_that_is_not_finite_is_named(job):
    meter = Meter(job)
    for cross_entropy in (1.0, float("nan"), 2.0):
        meter.add(torch.tensor([cross_entropy, 0, 0, 0]), torch.tensor(1.0))
    with pytest.raises(ValueError, match="not finite at step 12 "):
        meter.read(13)


@pytest.mark.slow
def test_held_out_logits_that_are_not_finite_end_the_run(train, tmp_path, capsys):
    options = ("--optim.lr", "1e30", "--optim.warmup-steps", "0", "--loader.batch-size", "60")
    with pytest.raises(SystemExit) as stopped:
        train("run", *options, "--log.every-steps", "50", "--optim.epochs", "1")
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path / 'run'} (step 1, held-out images): the logits of ")
    assert not list((tmp_path / "run").glob("checkpoints/*.safetensors"))
    assert not (tmp_path / "run" / "training.json").exists()
