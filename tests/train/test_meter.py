"""The averages in log lines, over the steps since the last one."""

from dataclasses import replace

import pytest
import torch

from rft import recipes
from rft.dist import World
from rft.train.meter import Meter

ALONE = World(rank=0, size=1, local_rank=0)


def build_meter(**method) -> Meter:
    config = recipes.build(recipes.DEFAULT, data="-", run="-")
    config = replace(config, method=replace(config.method, **method))
    return Meter(config, ALONE, torch.device("cpu"), steps_per_epoch=1)


def test_the_logged_terms_are_means_over_steps_with_the_losses_weights():
    meter = build_meter(distill_weight=7.0, kd_weight=2.0)
    # cross-entropy, MSE, logit distillation, share replaced; gradient norm
    meter.add(torch.tensor([1.0, 0.2, 0.5, 0.25]), torch.tensor(3.0), 0.1)
    meter.add(torch.tensor([2.0, 0.4, 1.5, 0.75]), torch.tensor(5.0), 0.2)
    found = meter.read(2)
    expected = {"ce": 1.5, "kd": 1.0, "mse": 0.3, "replaced": 0.5, "grad_norm": 4.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["loss"] == pytest.approx(1.5 + 2 * 1.0 + 7 * 0.3)
    assert found["epoch"] == 2  # of one step each
    assert meter.steps == 0


def test_a_step_that_is_not_finite_is_named():
    meter = build_meter()
    for cross_entropy in (1.0, float("nan"), 2.0):
        meter.add(torch.tensor([cross_entropy, 0, 0, 0]), torch.tensor(1.0), 0.1)
    with pytest.raises(ValueError, match="not finite at step 12 "):
        meter.read(13)
