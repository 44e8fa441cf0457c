"""AdamW by hand; the schedules at selected steps, and compared with torch's own."""

import numpy as np
import pytest
import torch

from rft.config import OptimConfig
from rft.train.optim import (
    build_optimizer,
    learning_rate,
    one_cycle,
    schedule_warning,
    set_schedule,
)
from tests.conftest import build_model
from tests.reference import adamw

# none of them a default of the paper's or of torch's
UNUSUAL = OptimConfig(
    lr=0.02, weight_decay=0.3, beta1=0.6, beta2=0.8, eps=0.05, warmup_steps=2, epochs=1
)


def test_one_group_has_every_parameter_that_learns_and_every_number():
    model = build_model()
    (group,) = build_optimizer(model, UNUSUAL).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.02, 0.3, 0.05)
    assert group["betas"] == (0.6, 0.8)
    assert not group["amsgrad"]
    assert not group["maximize"]
    model.visual.requires_grad_(False)
    (group,) = build_optimizer(model, UNUSUAL).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.head.parameters()]


def test_steps_by_hand():
    layer = torch.nn.Linear(3, 2)  # a matrix and a vector: both decay
    optimizer = build_optimizer(layer, UNUSUAL)
    expected = {name: adamw.Moments(p.detach().numpy()) for name, p in layer.named_parameters()}
    numbers = np.random.default_rng(0)
    for step, lr in enumerate((0.01, 0.02, 0.02, 0.01)):  # two of warm-up, then half a cosine
        gradients = {name: numbers.normal(size=p.shape) for name, p in layer.named_parameters()}
        for name, parameter in layer.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name]).float()
            expected[name].step(gradients[name], lr, UNUSUAL)
        assert set_schedule(optimizer, step, 4, UNUSUAL) == pytest.approx(lr)
        optimizer.step()
        for name, parameter in layer.named_parameters():
            found = parameter.detach().numpy()
            np.testing.assert_allclose(found, expected[name].weight, rtol=1e-5, atol=1e-7)


def test_landmarks_of_the_papers_schedule():
    config = OptimConfig()
    total = 24_820
    assert learning_rate(0, total, config) == pytest.approx(3e-5 / 500)
    assert learning_rate(499, total, config) == pytest.approx(3e-5)
    assert learning_rate(500, total, config) == pytest.approx(3e-5)
    middle = 500 + (total - 500) // 2
    assert learning_rate(middle, total, config) == pytest.approx(1.5e-5)
    assert learning_rate(total - 1, total, config) < 1e-12


def test_no_warm_up_and_a_run_of_one_step():
    assert learning_rate(0, 1, OptimConfig(warmup_steps=0)) == pytest.approx(3e-5)


def test_landmarks_of_the_released_codes_schedule():
    config, total = OptimConfig(schedule="one-cycle"), 24_820
    assert one_cycle(0, total, config) == pytest.approx((1.2e-6, 0.95))
    assert one_cycle(496, total, config) == pytest.approx((3e-5, 0.85), rel=1e-6)
    assert one_cycle(total - 1, total, config) == pytest.approx((1.2e-10, 0.95))


def test_one_cycle_is_finite_for_runs_of_any_length():
    config = OptimConfig(schedule="one-cycle")
    for total in range(1, 120):  # 2% of 50 steps is exactly the first
        for step in range(total):
            lr, beta1 = one_cycle(step, total, config)
            assert 0 < lr <= config.lr * 1.000001, (step, total)
            assert 0.85 <= beta1 <= 0.95, (step, total)


@pytest.mark.parametrize("total", [150, 1000])
def test_one_cycle_is_torchs_own(total):
    config = OptimConfig(schedule="one-cycle")
    theirs = torch.optim.AdamW([torch.zeros(1)], lr=config.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        theirs, max_lr=config.lr, total_steps=total, pct_start=0.02
    )
    ours = torch.optim.AdamW([torch.zeros(1)], lr=config.lr)
    for step in range(total):
        assert set_schedule(ours, step, total, config) == ours.param_groups[0]["lr"]
        for name in ("lr", "betas"):
            expected = theirs.param_groups[0][name]
            assert ours.param_groups[0][name] == pytest.approx(expected, rel=1e-9), (step, name)
        theirs.step()
        if step + 1 < total:
            scheduler.step()


def test_the_papers_schedule_leaves_beta1_alone():
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    set_schedule(optimizer, 3, 100, OptimConfig(beta1=0.8, beta2=0.9))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("total", "options", "words"),
    [
        (30, {"warmup_steps": 50}, "the run has 30 steps, its warm-up 50: the peak learning rate "
         "3e-05 is never reached (the highest is 1.8e-05); use --optim.warmup-steps 3"),
        (1, {"warmup_steps": 500}, "the run has 1 step, its warm-up 500"),
        (50, {"warmup_steps": 50}, "the run has 50 steps, 50 of them warm-up, half or more"),
        (50, {"warmup_steps": 25}, "the run has 50 steps, 25 of them warm-up, half or more"),
        (50, {"warmup_steps": 24}, ""),
        (49, {"warmup_steps": 24}, ""),
        (1, {"warmup_steps": 1}, ""),
        (1, {"warmup_steps": 0}, ""),
        (0, {}, ""),
        (24_820, {}, ""),
        # OneCycle's own warm-up of 2% ends before the first step of a short run
        (1, {"schedule": "one-cycle"}, "the run has 1 step: the peak learning rate 3e-05 is never "
         "reached (the highest is 1.2e-10); use --optim.schedule cosine"),
        (8, {"schedule": "one-cycle"}, "is never reached"),
        (50, {"schedule": "one-cycle"}, ""),
        (50, {"schedule": "one-cycle", "warmup_steps": 500}, ""),
    ],
)  # fmt: skip
def test_a_schedule_that_hardly_trains_at_its_peak_is_warned_of(total, options, words):
    warning = schedule_warning(total, OptimConfig(**options))
    assert warning.startswith(words) or words in warning
    assert bool(warning) == bool(words)
