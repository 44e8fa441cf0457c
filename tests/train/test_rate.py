"""Rates that are measured before a run."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from rft import recipes
from rft.clip.classifier import Classifier
from rft.dist import World
from rft.train.estimate import expected_time
from rft.train.rate import ALONE, about, forward_seconds, seconds_of, step_seconds, step_seconds_of
from tests.conftest import ARCHITECTURE, build_model

CPU = torch.device("cpu")


def config(recipe: str = recipes.DEFAULT, images: int = 8):
    found = recipes.build(recipe, scale="miniature", data="-", run="-")
    return replace(found, precision="fp32", loader=replace(found.loader, batch_size=images))


def test_the_first_of_several_calls_is_left_out():
    calls = []
    seconds_of(lambda: calls.append(None), CPU)
    assert len(calls) == 6


@pytest.mark.parametrize("recipe", ["vanilla", recipes.DEFAULT, "no-mask"])
def test_a_measured_step_changes_no_weight(recipe):
    model = build_model()
    before = copy.deepcopy(model.state_dict())
    assert step_seconds_of(config(recipe), model, build_model(), CPU) > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_takes_images_of_the_models_size():
    sizes = []

    class Noted(Classifier):
        def forward(self, images_BCHW):
            sizes.append(tuple(images_BCHW.shape))
            return super().forward(images_BCHW)

    model = build_model()
    noted = Noted(model.visual, model.head, ARCHITECTURE)
    assert forward_seconds(noted, ARCHITECTURE.image_size, CPU) > 0
    assert set(sizes) == {(8, 3, 16, 16)}


def test_ranks_that_share_a_step_are_not_measured():
    class Shared:
        world = World(rank=0, size=2, local_rank=0)
        total_steps = 7

    with pytest.raises(ValueError, match="one rank cannot measure"):
        step_seconds(Shared())
    (line,) = expected_time(Shared())
    assert line.startswith("not measured: one rank cannot")
    assert ALONE.size == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "a few seconds"),
        (12, "about 10 s"),
        (94, "about 90 s"),
        (100, "about 2 min"),
        (3000, "about 50 min"),
        (9000, "about 2.5 h"),
    ],
)
def test_times_are_as_precise_as_they_are_known(seconds, text):
    assert about(seconds) == text


def test_a_total_is_not_below_the_sum_of_its_parts():
    totals = [about(seconds, math.ceil) for seconds in (7, 31, 121, 148, 9001)]
    assert totals == ["a few seconds", "about 40 s", "about 3 min", "about 3 min", "about 2.6 h"]
