"""The two-call step has the textbook step's gradients."""

import copy
import dataclasses
from dataclasses import replace

import pytest
import torch

from rft import recipes
from rft.config import MethodConfig
from rft.method import losses
from rft.method.counterfactual import Draws, StepAddress, draw
from rft.train.objective import Objective
from tests.conftest import build_model, build_texts, sharpen
from tests.reference import textbook

ADDRESS = StepAddress(seed=0, step=3, rank=0, micro=0)
MASKED = [n for n in recipes.TRAINED if recipes.build(n).method.masks]
OPTIONS = {
    "fixed random masks": ("random-mask-single-fill", {"random_mask": "fixed"}),
    "bernoulli masks dropped": ("random-mask-no-fill", {"random_mask": "bernoulli"}),
    "derangement": ("object-mask-single-fill", {"single_fill": "derangement"}),
    "grad-cam": ("object-mask-multi-fill", {"cam": "grad-cam"}),
    # no weight is 1 and no temperature the paper's, so that an ignored one shows
    "weights of every loss": (
        "wise-kd-object-mask-single-fill",
        {"kd_weight": 2.5, "kd_temperature": 4.0, "distill_weight": 7.0},
    ),
    "weight on clean images": ("no-mask", {"distill_weight": 7.0}),
    "the head on clean images": ("no-mask", {"head_weight": 3.0}),
    "the head on dropped patches": ("object-mask-no-fill", {"head_weight": 3.0}),
    "donors with replacement": ("object-mask-single-fill", {"single_fill": "replacement"}),
    "unlike donors of each patch": ("random-mask-multi-fill", {"donor_choice": "unlike"}),
}


def method_of(recipe: str) -> MethodConfig:
    return recipes.build(recipe).method


def build_objective(method: MethodConfig, **options) -> Objective:
    ensemble = build_model(2) if method.kd_weight else None
    models = build_model(0), build_model(1)
    return Objective(*models, method, ensemble=ensemble, texts=build_texts(method), **options)


def draw_for(method: MethodConfig, images) -> Draws:
    return draw(method, range(len(images)), 16, len(images), ADDRESS)


def step(objective: Objective, images, labels):
    """One step as in the loop; return the clean losses, the MSE and the donors."""
    clean, found = both_calls(objective, images, labels)
    return clean, (found or clean).terms["mse"], clean.donor_BP


def both_calls(objective: Objective, images, labels):
    """One step as in the loop; return each call's result, None for one not made."""
    draws = draw_for(objective.method, images) if objective.method.masks else None
    clean = objective(images, labels, draws)
    clean.loss.backward()
    if clean.donor_BP is None:
        return clean, None
    found = objective(images, labels, draws, clean.donor_BP)
    found.loss.backward()
    return clean, found


def check_against_textbook(method, images, labels, **options):
    objective = build_objective(method, **options)
    student = objective.student
    clean, found = both_calls(objective, images, labels)
    whole = clean.loss if found is None else clean.loss + found.loss
    donor_BP = clean.donor_BP
    if donor_BP is None:
        donor_BP = torch.arange(len(images))[:, None].expand(-1, 16)
    plain = copy.deepcopy(student)
    plain.zero_grad()
    loss = textbook.step_loss(
        plain,
        objective.teacher,
        images,
        labels,
        donor_BP,
        method.distill_weight,
        objective.ensemble,
        gamma=method.kd_weight,
        temperature=method.kd_temperature,
        head_weight=method.head_weight,
    )
    loss.backward()
    torch.testing.assert_close(whole, loss, rtol=1e-5, atol=1e-5)
    for (key, fast), slow in zip(student.named_parameters(), plain.parameters(), strict=True):
        # relative to the tensor's largest entry; a key's bias has no gradient at all
        scale = slow.grad.abs().max().clamp(min=1e-3)
        difference = (fast.grad - slow.grad).abs().max() / scale
        assert difference < 1e-5, f"{key}: {difference}"


@pytest.mark.parametrize("name", [n for n in recipes.PAPER if n != "linear-probe"])
def test_gradients_equal_the_textbook_step(name, images_BCHW, labels_B):
    check_against_textbook(method_of(name), images_BCHW, labels_B)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_too_have_the_textbook_gradients(option, images_BCHW, labels_B):
    name, changes = OPTIONS[option]
    check_against_textbook(replace(method_of(name), **changes), images_BCHW, labels_B)


@pytest.mark.parametrize("no_fill", ["key-mask", "token-drop"])
@pytest.mark.parametrize("name", [n for n in MASKED if n.endswith("no-fill")])
def test_dropped_tokens_equal_masked_keys(name, no_fill, images_BCHW, labels_B):
    method = replace(method_of(name), no_fill=no_fill, threshold=0.5)
    check_against_textbook(method, images_BCHW, labels_B)
    _, auto, _ = step(build_objective(replace(method, no_fill="auto")), images_BCHW, labels_B)
    _, chosen, _ = step(build_objective(method), images_BCHW, labels_B)
    assert (auto - chosen).abs() < 1e-6


def test_layers_computed_again_give_the_same_bits(images_BCHW, labels_B):
    method = method_of("object-mask-single-fill")
    kept, again = build_objective(method), build_objective(method, recompute=True)
    assert step(kept, images_BCHW, labels_B)[0].loss == step(again, images_BCHW, labels_B)[0].loss
    for (name, one), two in zip(
        kept.student.named_parameters(), again.student.parameters(), strict=True
    ):
        assert torch.equal(one.grad, two.grad), name


def test_object_donors_come_from_the_students_cam(images_BCHW, labels_B):
    method = MethodConfig(mask="object", fill="none", threshold=0.3)
    objective = build_objective(method)
    donor_BP = objective(images_BCHW, labels_B, draw_for(method, images_BCHW)).donor_BP
    normalised = textbook.normalise_images(objective.student, images_BCHW)
    for n, label in enumerate(labels_B.tolist()):
        relevance_P = textbook.relevance(objective.student, normalised[n], label)
        expected = relevance_P / (relevance_P.max() + 1e-8) > 0.3
        assert ((donor_BP[n] == -1) == expected).all()
        assert expected.any()


@pytest.mark.parametrize("cam", ["relevance", "grad-cam"])
@pytest.mark.parametrize("mask", ["object", "context"])
def test_masks_are_the_chosen_maps_at_the_chosen_threshold(images_BCHW, labels_B, cam, mask):
    method = MethodConfig(mask=mask, fill="none", threshold=0.6, cam=cam)
    objective = build_objective(method)
    sharpen(objective.student)
    donor_BP = objective(images_BCHW, labels_B, draw_for(method, images_BCHW)).donor_BP
    normalised = textbook.normalise_images(objective.student, images_BCHW)
    kind = textbook.relevance if cam == "relevance" else textbook.grad_cam
    for n, label in enumerate(labels_B.tolist()):
        relevance_P = kind(objective.student, normalised[n], label)
        above = relevance_P / (relevance_P.max() + 1e-8) > 0.6
        assert ((donor_BP[n] == -1) == (above if mask == "object" else ~above)).all()
        assert 0 < above.sum() < 16


@pytest.mark.parametrize("fill", ["single", "multi"])
def test_unlike_donors_are_those_the_teacher_sees_least_of_the_label_in(
    images_BCHW, labels_B, fill
):
    method = MethodConfig(mask="random", fill=fill, rate=0.9, donor_choice="unlike")
    objective = build_objective(method)
    sharpen(objective.teacher)
    draws = draw_for(method, images_BCHW)
    donor_BP = objective(images_BCHW, labels_B, draws).donor_BP
    images = textbook.normalise_images(objective.teacher, images_BCHW)
    seen = set()
    for n, label in enumerate(labels_B.tolist()):
        for p in range(16):
            rank = int(draws.source_BP[n, p if fill == "multi" else 0])
            expected = textbook.unlike_donor(objective.teacher, images, label, n, rank)
            assert donor_BP[n, p] == (expected if draws.mask_BP[n, p] else n)
            seen.add(rank)
    # the half of the five others: two
    assert seen == {0, 1}


@pytest.mark.parametrize("choice", ["any", "unlike"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_teachers_cam_is_the_frozen_models(images_BCHW, labels_B, choice, recompute):
    method = MethodConfig(
        mask="object", fill="single", threshold=0.85, cam_model="teacher", donor_choice=choice
    )
    objective = build_objective(method, recompute=recompute)
    sharpen(objective.teacher)
    draws = draw_for(method, images_BCHW)
    donor_BP = objective(images_BCHW, labels_B, draws).donor_BP
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    # the textbook's map needs a graph, which frozen weights alone do not create
    teacher = copy.deepcopy(objective.teacher).requires_grad_()
    normalised = textbook.normalise_images(teacher, images_BCHW)
    for n, label in enumerate(labels_B.tolist()):
        relevance_P = textbook.relevance(teacher, normalised[n], label)
        masked = relevance_P / (relevance_P.max() + 1e-8) > 0.85
        source = int(draws.source_BP[n, 0])
        if choice == "unlike":
            source = textbook.unlike_donor(teacher, normalised, label, n, source)
        assert (donor_BP[n] == torch.where(masked, source, n)).all()
        assert 0 < masked.sum() < 16


def test_vanilla_has_no_counterfactual_part(images_BCHW, labels_B):
    clean, mse, donors = step(build_objective(method_of("vanilla")), images_BCHW, labels_B)
    assert mse == 0
    assert donors is None
    assert clean.loss == clean.terms["ce"] > 0
    assert clean.terms["kd"] == 0


def test_the_second_teacher_adds_its_loss(images_BCHW, labels_B):
    method = method_of("wise-kd-vanilla")
    objective = build_objective(method)
    clean, mse, _ = step(objective, images_BCHW, labels_B)
    assert mse == 0
    with torch.no_grad():
        student, teacher = objective.student(images_BCHW), objective.ensemble(images_BCHW)
    expected = textbook.kd(student, teacher, 10)
    torch.testing.assert_close(clean.loss, clean.terms["ce"] + expected, rtol=1e-5, atol=1e-5)
    assert expected > 0.1


@pytest.mark.parametrize("name", ["no-mask", "wise-kd-object-mask-single-fill"])
def test_teachers_never_learn(name, images_BCHW, labels_B):
    objective = build_objective(method_of(name))
    step(objective, images_BCHW, labels_B)
    teachers = [t for t in (objective.teacher, objective.ensemble) if t is not None]
    assert all(parameter.grad is None for t in teachers for parameter in t.parameters())


def test_a_frozen_tower_gets_no_gradient_and_the_head_all_of_it(images_BCHW, labels_B):
    whole, frozen = build_objective(method_of("vanilla")), build_objective(method_of("vanilla"))
    frozen.student.visual.requires_grad_(False)
    step(whole, images_BCHW, labels_B)
    step(frozen, images_BCHW, labels_B)
    assert all(parameter.grad is None for parameter in frozen.student.visual.parameters())
    torch.testing.assert_close(frozen.student.head.weight.grad, whole.student.head.weight.grad)


def test_a_map_without_relevance_still_trains(images_BCHW, labels_B):
    objective = build_objective(method_of("object-mask-single-fill"))
    with torch.no_grad():
        objective.student.head.weight.zero_()
    clean, mse, donors = step(objective, images_BCHW, labels_B)
    assert (donors == torch.arange(6)[:, None]).all()
    # a head of zeros prefers none of the five classes, and the counterfactuals are the images
    torch.testing.assert_close(clean.loss, torch.tensor(5.0).log())
    features = [model.features(model.patches(images_BCHW)) for model in
                (objective.student, objective.teacher)]  # fmt: skip
    torch.testing.assert_close(mse, losses.feature_mse(*features))


@pytest.mark.parametrize("no_fill", ["key-mask", "token-drop"])
def test_a_context_mask_without_relevance_drops_every_patch(no_fill, images_BCHW, labels_B):
    method = replace(method_of("context-mask-no-fill"), no_fill=no_fill)
    objective = build_objective(method)
    with torch.no_grad():
        objective.student.head.weight.zero_()
    _, mse, donors = step(objective, images_BCHW, labels_B)
    assert (donors == -1).all()
    # only the class token is left, the same for each image
    assert 0 < mse < torch.inf


@pytest.mark.parametrize("name", ["vanilla", "no-mask", "object-mask-no-fill"])
def test_a_batch_of_one_image_trains(name, images_BCHW, labels_B):
    check_against_textbook(method_of(name), images_BCHW[:1], labels_B[:1])


def test_the_loss_weights_do_not_reach_the_cam(images_BCHW, labels_B):
    # the relevance rule is not scale-invariant: only the logits' own scale may enter
    light = method_of("wise-kd-object-mask-single-fill")
    heavy = dataclasses.replace(light, distill_weight=3000.0, kd_weight=50.0)
    donors = [
        build_objective(m)(images_BCHW, labels_B, draw_for(m, images_BCHW)).donor_BP
        for m in (light, heavy)
    ]
    assert torch.equal(*donors)


def test_the_heads_gradient_is_fp32_under_bf16(images_BCHW, labels_B):
    objective = build_objective(method_of("vanilla"))
    with torch.autocast("cpu", torch.bfloat16):
        clean = objective(images_BCHW, labels_B, None)
        features_BE = objective.student.features(objective.student.patches(images_BCHW)).detach()
    clean.loss.backward()
    head = copy.deepcopy(objective.student.head)
    head.zero_grad()
    logits_BK = head(torch.nn.functional.normalize(features_BE.float(), dim=-1))
    torch.nn.functional.cross_entropy(logits_BK, labels_B).backward()
    torch.testing.assert_close(
        objective.student.head.weight.grad, head.weight.grad, rtol=1e-5, atol=1e-6
    )


def test_tokens_of_one_number_need_no_mask(images_BCHW, labels_B, monkeypatch):
    masks = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*heads, attn_mask=None):
        masks.append(attn_mask)
        return real(*heads, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    step(build_objective(method_of("random-mask-no-fill")), images_BCHW, labels_B)
    assert len(masks) == 6, "two layers before the last, three forwards"
    assert all(mask is None for mask in masks)
