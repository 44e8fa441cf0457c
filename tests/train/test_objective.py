"""The two-call step has the textbook step's gradients."""

import copy

import pytest
import torch

from rft import recipes
from rft.config import MethodConfig
from rft.train.objective import Objective, StepAddress
from tests.conftest import build_model
from tests.reference import textbook

ADDRESS = StepAddress(seed=0, step=3, rank=0, micro=0)


def step(objective: Objective, images, labels):
    """One step as the loop does it; returns the losses and donors."""
    ce, donor_BP = objective(images, labels, ADDRESS)
    ce.backward()
    if donor_BP is None:
        return ce, None, None
    mse, _ = objective(images, labels, ADDRESS, donor_BP)
    (objective.method.distill_weight * mse).backward()
    return ce, mse, donor_BP


@pytest.mark.parametrize("name", [n for n in recipes.names() if n not in ("zero-shot", "vanilla")])
def test_gradients_equal_the_textbook_step(name, images_BCHW, labels_B):
    method = recipes.METHODS[name]
    student, teacher = build_model(0), build_model(1)
    objective = Objective(student, teacher, method)
    ce, mse, donor_BP = step(objective, images_BCHW, labels_B)

    plain = copy.deepcopy(student)
    plain.zero_grad()
    loss = textbook.step_loss(
        plain, teacher, images_BCHW, labels_B, donor_BP, method.distill_weight
    )
    loss.backward()
    torch.testing.assert_close(ce + method.distill_weight * mse, loss, rtol=1e-5, atol=1e-5)
    for (key, fast), slow in zip(student.named_parameters(), plain.parameters(), strict=True):
        scale = slow.grad.abs().max().clamp(min=1)
        difference = (fast.grad - slow.grad).abs().max() / scale
        assert difference < 1e-5, f"{key}: {difference}"


def test_object_donors_come_from_the_students_cam(images_BCHW, labels_B):
    student = build_model(0)
    method = MethodConfig(mask="object", fill="none", threshold=0.3)
    _, donor_BP = Objective(student, build_model(1), method)(images_BCHW, labels_B, ADDRESS)
    normalised = textbook.normalise_images(student, images_BCHW)
    for n, label in enumerate(labels_B.tolist()):
        relevance_P = textbook.relevance(student, normalised[n], label)
        expected = relevance_P / (relevance_P.max() + 1e-8) > 0.3
        assert ((donor_BP[n] == -1) == expected).all()
        assert expected.any()


def test_vanilla_has_no_counterfactual_part(images_BCHW, labels_B):
    ce, mse, donors = step(
        Objective(build_model(0), build_model(1), recipes.METHODS["vanilla"]), images_BCHW, labels_B
    )
    assert mse is None
    assert donors is None
    assert ce.item() > 0


def test_teacher_never_learns(images_BCHW, labels_B):
    teacher = build_model(1)
    step(Objective(build_model(0), teacher, recipes.METHODS["no-mask"]), images_BCHW, labels_B)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_an_address_replays_its_step(images_BCHW, labels_B):
    method = recipes.METHODS["random-mask-multi-fill"]
    objective = Objective(build_model(0), build_model(1), method)
    first = objective(images_BCHW, labels_B, ADDRESS)[1]
    again = objective(images_BCHW, labels_B, ADDRESS)[1]
    other = objective(images_BCHW, labels_B, StepAddress(0, 4, 0, 0))[1]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_map_without_relevance_still_trains(images_BCHW, labels_B):
    student = build_model(0)
    with torch.no_grad():
        student.head.weight.zero_()
    method = recipes.METHODS["object-mask-single-fill"]
    ce, mse, donors = step(Objective(student, build_model(1), method), images_BCHW, labels_B)
    assert (donors == torch.arange(6)[:, None]).all()
    assert torch.isfinite(ce + mse)
