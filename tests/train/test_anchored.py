"""Weights regularised towards the pre-trained ones: L2-SP, selective projection decay, FTP."""

import copy
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.step import Arguments, Batch, build_job
from rft import dist, recipes
from rft.clip.classifier import load_state
from rft.config import OptimConfig
from rft.method import weight_space
from rft.runs.filenames import LAST
from rft.train import checkpoint, loop
from rft.train.anchored import FastTrainableProjection, SelectiveProjectionDecay
from rft.train.checkpoint import Progress, Store
from rft.train.job import Job
from rft.train.kernels import Choice
from rft.train.objective import Objective
from rft.train.optim import build_optimizer, set_schedule
from rft.train.step import accumulate_gradients
from tests import tiny
from tests.conftest import build_model
from tests.reference import weight_space as reference

ALONE = dist.World(rank=0, size=1, local_rank=0)
# none of them a default; beta1 oscillates as in one-cycle
UNUSUAL = OptimConfig(lr=0.02, weight_decay=0.3, beta1=0.6, beta2=0.8, eps=1e-3)
SHAPES = ((4, 3, 2, 2), (5, 7), (6,), (1, 9), (1,))
STEPS = 30


def gradients_of(step: int) -> list[np.ndarray]:
    """Gradients that keep a direction for some steps, then turn; fp32, as on both sides."""
    numbers = np.random.default_rng(step)
    drift = np.random.default_rng(99)
    sign = 1 if step % 10 < 6 else -1
    return [
        (sign * drift.normal(size=shape) + 0.3 * numbers.normal(size=shape)).astype(np.float32)
        for shape in SHAPES
    ]


def rates(step: int) -> OptimConfig:
    return replace(UNUSUAL, lr=0.02 * (1 + step % 3), beta1=0.6 + 0.1 * (step % 2))


def run_both(optimizer_class, moments_class, strength: float, start: float = 0.0):
    """Thirty steps of both; return weights, theta_0 and the references."""
    draw = np.random.default_rng(5)
    anchors = [draw.normal(scale=0.1, size=shape).astype(np.float32) for shape in SHAPES]
    moved = [a + np.float32(start) * draw.normal(size=a.shape).astype(np.float32) for a in anchors]
    weights = [torch.from_numpy(weight.copy()).requires_grad_() for weight in moved]
    expected = [
        moments_class(weight, anchor, strength)
        for weight, anchor in zip(moved, anchors, strict=True)
    ]
    options = {"lr": 1.0, "eps": UNUSUAL.eps, "weight_decay": UNUSUAL.weight_decay, "fused": True}
    tensors = list(map(torch.from_numpy, anchors))
    optimizer = optimizer_class(weights, tensors, strength, **options)
    for step in range(STEPS):
        config = rates(step)
        (group,) = optimizer.param_groups
        group["lr"], group["betas"] = config.lr, (config.beta1, config.beta2)
        gradients = gradients_of(step)
        for weight, gradient, own in zip(weights, gradients, expected, strict=True):
            weight.grad = torch.from_numpy(gradient)
            own.step(gradient.astype(np.float64), config.lr, config)
        optimizer.step()
    return [weight.detach().numpy() for weight in weights], anchors, expected


@pytest.mark.parametrize("start", [0.0, 0.2])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_selective_projection_decay_is_the_references(strength, start):
    found, _, expected = run_both(SelectiveProjectionDecay, reference.Decayed, strength, start)
    for weight, own in zip(found, expected, strict=True):
        assert 0 < own.drawn_back < STEPS
        np.testing.assert_allclose(weight, own.weight, rtol=0, atol=1e-6 * abs(own.weight).max())


@pytest.mark.parametrize("k", [1.0, 0.3, 0.0])
def test_fast_trainable_projection_is_the_references(k):
    found, anchors, expected = run_both(FastTrainableProjection, reference.Projected, k)
    changes = [abs(weight - anchor).max() for weight, anchor in zip(found, anchors, strict=True)]
    assert max(changes) > 1e-2, "the balls grew"
    for weight, own in zip(found, expected, strict=True):
        np.testing.assert_allclose(weight, own.weight, rtol=0, atol=1e-6 * abs(own.weight).max())


@pytest.mark.parametrize("optimizer", ["spd", "ftp"])
def test_the_projection_does_something(optimizer):
    plain = [reference.Decayed(np.zeros(s) + 0.1, np.zeros(s), 0.0) for s in SHAPES]
    held_class = {"spd": reference.Decayed, "ftp": reference.Projected}[optimizer]
    held = [held_class(np.zeros(s) + 0.1, np.zeros(s), 1.0) for s in SHAPES]
    for step in range(STEPS):
        for one, other, gradient in zip(plain, held, gradients_of(step), strict=True):
            one.step(gradient, 0.02, UNUSUAL)
            other.step(gradient, 0.02, UNUSUAL)
    for one, other in zip(plain, held, strict=True):
        assert abs(other.weight - one.weight).max() > 1e-3


def test_ftps_first_step_returns_to_the_pre_trained_weights():
    anchors = [torch.randn(4, 3), torch.randn(5)]
    weights = [(anchor + 0.3).requires_grad_() for anchor in anchors]
    optimizer = FastTrainableProjection(weights, anchors, 1.0, lr=0.1)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    for weight, anchor in zip(weights, anchors, strict=True):
        torch.testing.assert_close(weight.detach(), anchor, rtol=0, atol=1e-7)


@pytest.mark.parametrize("optimizer_class", [SelectiveProjectionDecay, FastTrainableProjection])
def test_weights_that_never_move_stay_finite(optimizer_class):
    anchors = [torch.randn(4, 3), torch.zeros(5)]
    weights = [anchor.clone().requires_grad_() for anchor in anchors]
    optimizer = optimizer_class(weights, anchors, 1.0, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    for weight, anchor in zip(weights, anchors, strict=True):
        assert torch.equal(weight.detach(), anchor)


def test_l2_sp_is_the_gradient_of_its_loss():
    anchors = [torch.randn(4, 3), torch.randn(5)]
    weights = [(anchor + 1e-4 * torch.randn_like(anchor)).requires_grad_() for anchor in anchors]
    for weight, anchor in zip(weights, anchors, strict=True):
        (0.35 * (weight.double() - anchor).square().sum()).backward()
    expected = [weight.grad + 1 for weight in weights]
    for weight, anchor in zip(weights, anchors, strict=True):
        by_hand = reference.l2_sp_gradient(weight.detach().numpy(), anchor.numpy(), 0.7)
        np.testing.assert_allclose(weight.grad, by_hand, rtol=1e-5)
        weight.grad = torch.ones_like(weight)
    weight_space.add_l2_sp(weights, anchors, 0.7)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-7, atol=1e-7)


@pytest.fixture
def job() -> Job:
    job = build_job(Arguments(batch_size=6), torch.device("cpu"), "fp32", build_model(0))
    job.objective.teacher.load_state_dict(build_model(1).state_dict())
    return job


def gradient(job: Job, batch: Batch, **optim) -> torch.Tensor:
    job = replace(job, config=replace(job.config, optim=replace(job.config.optim, **optim)))
    job.student.zero_grad()
    accumulate_gradients(job, job.objective, batch, step=0)
    return torch.cat([p.grad.flatten() for p in job.student.parameters()])


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("clip", ["step", "micro-step"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_l2_sp_is_added_once_and_before_the_clipping(job, images_BCHW, labels_B, accumulate, clip):
    batch, options = Batch(images_BCHW, labels_B, labels_B), {"accumulate": accumulate}
    options["clip"] = clip
    plain = gradient(job, batch, clip_norm=1e9, **options)
    pulled = gradient(job, batch, clip_norm=1e9, l2_sp=40.0, **options)
    expected = plain + 40.0 * (flat(job.student) - flat(job.objective.teacher))
    torch.testing.assert_close(pulled, expected, rtol=1e-4, atol=1e-4)
    assert (pulled - plain).norm() > 0.1 * plain.norm()
    clipped = gradient(job, batch, clip_norm=1.0, l2_sp=40.0, **options)
    assert clipped.norm() == pytest.approx(1.0, rel=1e-3)
    if clip == "step":
        torch.testing.assert_close(clipped, expected / expected.norm(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["spd", "ftp"])
@pytest.mark.parametrize("l2_sp", [0.0, 0.5])
def test_they_compose_with_the_papers_method(job, images_BCHW, labels_B, optimizer, l2_sp):
    """One step of object-mask-single-fill under each optimizer, compared with AdamW by hand."""
    optim = replace(job.config.optim, optimizer=optimizer, l2_sp=l2_sp, lr=1e-3)
    job = replace(job, config=replace(job.config, optim=optim))
    assert job.config.method.mask == "object"
    anchors = [p.detach().numpy().copy() for p in job.objective.teacher.parameters()]
    held_class = {"spd": reference.Decayed, "ftp": reference.Projected}[optimizer]
    expected = [
        held_class(p.detach().numpy(), anchor, 1.0)
        for p, anchor in zip(job.student.parameters(), anchors, strict=True)
    ]
    built = build_optimizer(job.objective, optim)
    for step in range(2):
        lr = set_schedule(built, 600 + step, 1000, optim)
        accumulate_gradients(job, job.objective, Batch(images_BCHW, labels_B, labels_B), step)
        for own, parameter in zip(expected, job.student.parameters(), strict=True):
            own.step(parameter.grad.numpy().astype(np.float64), lr, optim)
        built.step()
        built.zero_grad()
    for own, parameter in zip(expected, job.student.parameters(), strict=True):
        atol = 2e-6 * max(1e-3, abs(own.weight).max())
        np.testing.assert_allclose(parameter.detach().numpy(), own.weight, rtol=0, atol=atol)


@pytest.mark.parametrize("recipe", ["l2-sp", "spd", "ftp"])
def test_theta_0_keeps_its_digits_where_the_teacher_is_bf16(prepare, recipe):
    job = prepare("--precision", "bf16", recipe=recipe)
    assert job.objective.teacher.visual.proj.dtype == torch.bfloat16
    exact = list(prepare(recipe=recipe).objective.teacher.parameters())
    learning, anchors = job.objective.anchored()
    assert [id(weight) for weight in learning] == [id(w) for w in job.student.parameters()]
    assert len(anchors) == len(exact)
    for anchor, own in zip(anchors, exact, strict=True):
        assert torch.equal(anchor, own)
    # no copy if nothing needs it
    assert prepare("--precision", "bf16", recipe="vanilla").objective.pretrained is None
    assert prepare(recipe=recipe).objective.pretrained is None


def test_rounded_anchors_are_refused():
    student, teacher = build_model(0), build_model(1)
    objective = Objective(student, teacher.bfloat16(), recipes.build("vanilla").method)
    with pytest.raises(AssertionError, match="theta_0 was lowered"):
        objective.anchored()


def metrics(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["l2-sp", "spd", "ftp"])
def test_a_run_stays_nearer_to_the_pre_trained_weights(train, recipe):
    def weights(run: Path) -> torch.Tensor:
        return torch.cat([value.flatten() for value in load_state(run / LAST)[0].values()])

    zero = weights(train("zero-shot", "--optim.epochs", 0))
    # without weight decay too, so that nothing else differs
    free = weights(train("vanilla", "--optim.weight-decay", 0, name="free"))
    options = ("--optim.l2-sp", 100) if recipe == "l2-sp" else ()
    held = weights(train(recipe, *options, name="held"))
    assert 0 < (held - zero).norm() < 0.95 * (free - zero).norm()


class Killed(BaseException):
    """Ends a training at a step, like a kill."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("spd",),
        ("ftp",),
        ("ftp", "--precision", "bf16", "--optim.accumulate", 2, "--optim.schedule", "one-cycle"),
        ("object-mask-single-fill", "--optim.optimizer", "ftp", "--optim.l2-sp", 0.5),
    ],
)
def test_a_killed_run_ends_bit_for_bit_as_an_undisturbed_one(train, monkeypatch, options):
    often = ("--log.checkpoint-steps", 4, "--log.keep", 9, "--optim.epochs", 2)
    calm = train(*options, *often, name="calm")
    real = loop.accumulate_gradients

    def dying(job, module, batch, step, *rest):
        if step == 10:
            raise Killed
        return real(job, module, batch, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", dying)
        with pytest.raises(Killed):
            train(*options, *often, name="killed")
    killed = train(*options, *often, name="killed")
    assert tiny.weights(killed) == tiny.weights(calm)
    name = "checkpoints/step-00000020.pt"
    ours, theirs = (torch.load(run / name, weights_only=True) for run in (killed, calm))
    for number, state in theirs["optimizer"]["state"].items():
        assert state.keys() == ours["optimizer"]["state"][number].keys()
        for part, value in state.items():
            assert torch.equal(ours["optimizer"]["state"][number][part], value), (number, part)


def own_run(optimizer: str = "ftp") -> checkpoint.Own:
    """A run that has taken two steps."""
    student = build_model(0)
    optim = OptimConfig(optimizer=optimizer)
    method = recipes.build("vanilla").method
    built = build_optimizer(Objective(student, build_model(1), method), optim)
    for _ in range(2):
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter)
        built.step()
    must_agree = {"config": {"precision": "fp32"}, "data": {}}
    return checkpoint.Own(student, built, must_agree, total_steps=100, most_correct=50)


def saved_by(run: checkpoint.Own) -> dict:
    progress = Progress(step=8)
    return copy.deepcopy(
        checkpoint.content(run.student, run.optimizer, progress, run.must_agree, 1, Choice())
    )


def test_ftps_state_is_restored_exactly(tmp_path):
    run, store = own_run(), Store(str(tmp_path), keep=2)
    before = saved_by(run)
    store.write(before)
    other = own_run()
    for parameter in other.student.parameters():
        parameter.grad = -torch.ones_like(parameter)
    other.optimizer.step()
    checkpoint.resume(store, ALONE, other, 1)
    after = saved_by(other)["optimizer"]["state"]
    for number, state in before["optimizer"]["state"].items():
        assert set(state) == {
            *("step", "exp_avg", "exp_avg_sq"),
            *("free_step", "radius", "radius_avg", "radius_avg_sq"),
        }
        assert all(torch.equal(after[number][name], value) for name, value in state.items())
        # of one tensor each, or each file would hold the radii of all tensors
        assert state["radius"].untyped_storage().nbytes() == 4


TAMPERED = {
    "a radius of 0": ("radius", torch.tensor(0.0), "optimizer.0.radius holds"),
    "a radius of NaN": ("radius", torch.tensor(torch.nan), "optimizer.0.radius holds"),
    "an infinite radius": ("radius", torch.tensor(torch.inf), "optimizer.0.radius holds"),
    "a radius for each number": ("radius", torch.ones(3), "optimizer.0.radius is"),
    "a mean of NaN": ("radius_avg", torch.tensor(torch.nan), "optimizer.0.radius_avg holds"),
    "a negative square": ("radius_avg_sq", torch.tensor(-1.0), "radius_avg_sq holds"),
    "an infinite step": ("free_step", None, "optimizer.0.free_step holds"),
    "a text": ("free_step", "x", "optimizer.0.free_step is no tensor"),
    "a surplus part": ("more", torch.tensor(1.0), "optimizer.0.more is not of this model"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_state_is_refused(tmp_path, case):
    name, value, message = TAMPERED[case]
    run, store = own_run(), Store(str(tmp_path), keep=2)
    content = saved_by(run)
    state = content["optimizer"]["state"][0]
    state[name] = state[name] / 0 if value is None else value
    store.write(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.resume(store, ALONE, run, 1)


def test_a_state_of_another_optimizer_is_refused(tmp_path):
    store = Store(str(tmp_path), keep=2)
    store.write(saved_by(own_run("spd")))
    with pytest.raises(ValueError, match=r"optimizer.0.free_step is no tensor"):
        checkpoint.resume(store, ALONE, own_run("ftp"), 1)
    store = Store(str(tmp_path / "other"), keep=2)
    store.write(saved_by(own_run("ftp")))
    with pytest.raises(ValueError, match=r"optimizer.0.free_step is not of this model"):
        checkpoint.resume(store, ALONE, own_run("spd"), 1)


def test_another_strength_is_another_run():
    one = recipes.build("spd", data="d", run="r")
    other = replace(one, optim=replace(one.optim, spd=0.5))
    assert one.identity() != other.identity()
    assert dataclasses.asdict(one.optim)["optimizer"] == "spd"
