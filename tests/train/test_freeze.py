"""`--optim.freeze`: weights that do not learn, by patterns of their names."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from rft import recipes
from rft.clip.classifier import load_state
from rft.method.counterfactual import StepAddress, draw
from rft.runs.filenames import LAST
from rft.train.build import freeze
from rft.train.objective import Objective
from rft.train.optim import build_optimizer
from tests import tiny
from tests.conftest import build_model, sharpen

EARLY = ("visual.conv1*", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre*")
# all weights of the first two of three layers and below
FIRST_LAYERS = (*EARLY, "visual.transformer.resblocks.[01].*")


def learning(model) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def test_patterns_are_matched_against_whole_names():
    model = build_model()
    freeze(model, ("visual.transformer.resblocks.[0-1].*", "head.bias", "*.ln_pre.weigh?"))
    frozen = {name for name, _ in model.named_parameters()} - set(learning(model))
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("visual.transformer.resblocks.0.", "visual.transformer.resblocks.1."))
    }
    assert frozen == expected | {"head.bias", "visual.ln_pre.weight"}
    freeze(model, ())
    assert len(learning(model)) == len(list(model.parameters())) - len(frozen)


REFUSED = {
    "no match": (
        ("visual.conv2*",),
        "'visual.conv2*' matches no weight; the nearest: visual.",
    ),
    "a part of a name": (("conv1",), "'conv1' matches no weight; the nearest: "),
    "nothing": (("",), "'' matches no weight; the nearest: "),
    "twice": (("visual.conv1*", "*conv1.weight"), "'*conv1.weight' changes nothing: visual.conv1"),
    "everything": (("*",), "leaves no weight of image tower and head that learns"),
    "everything in parts": (
        ("visual.*", "head.*"),
        "leaves no weight of image tower and head that learns",
    ),
    "the tower": (("visual.*",), "the image tower; --optim.trains head does that"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_patterns_without_sense_are_refused(case):
    patterns, message = REFUSED[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its text is compared below)
        freeze(build_model(), patterns)
    assert message in str(error.value)


def test_a_linear_probe_has_its_tower_frozen_already():
    model = build_model()
    model.visual.requires_grad_(False)
    with pytest.raises(ValueError, match=r"changes nothing: visual\.conv1\.weight and all others"):
        freeze(model, ("visual.conv1*",))
    freeze(model, ("head.bias",))
    assert learning(model) == ["head.weight"]


def test_the_command_refuses_them_in_one_line(refused, tiny_data, tiny_clip, tmp_path):
    from rft.train import command

    words = tiny.training("vanilla", tiny_data, tiny_clip, tmp_path / "run")
    line = refused(command, *words, "--optim.freeze", "visual.conv1*", "visual.nothing")
    assert "--optim.freeze 'visual.nothing' matches no weight; the nearest: visual." in line
    words = tiny.training("linear-probe", tiny_data, tiny_clip, tmp_path / "probe")
    assert "changes nothing" in refused(command, *words, "--optim.freeze", "visual.ln_post.*")


def clean_and_counterfactual(objective: Objective, images, labels):
    """A step's two calls; return the donors and the gradients."""
    draws = draw(objective.method, range(len(images)), 16, len(images), StepAddress(0, 3, 0, 0))
    objective.zero_grad()
    clean = objective(images, labels, draws)
    clean.loss.backward()
    objective(images, labels, draws, clean.donor_BP).loss.backward()
    gradients = {n: p.grad for n, p in objective.student.named_parameters() if p.grad is not None}
    return clean.donor_BP, gradients


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cam", ["relevance", "grad-cam"])
@pytest.mark.parametrize("patterns", [EARLY, FIRST_LAYERS, (*FIRST_LAYERS, "*resblocks.2.*")])
def test_the_cam_and_the_gradients_of_what_learns_are_the_same(
    images_BCHW, labels_B, patterns, cam, recompute
):
    method = replace(recipes.build("object-mask-single-fill").method, cam=cam)
    student, teacher = sharpen(build_model(0)), build_model(1)
    frozen = copy.deepcopy(student)
    freeze(frozen, patterns)
    whole, part = (
        clean_and_counterfactual(
            Objective(one, copy.deepcopy(teacher), method, recompute=recompute),
            images_BCHW,
            labels_B,
        )
        for one in (student, frozen)
    )
    assert torch.equal(part[0], whole[0]), "the donors that the CAM decides"
    assert part[0].unique().numel() > 2
    assert sorted(part[1]) == sorted(learning(frozen))
    assert len(part[1]) < len(whole[1])
    for name, gradient in part[1].items():
        torch.testing.assert_close(gradient, whole[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cam", ["relevance", "grad-cam"])
def test_the_relevance_itself_is_the_same(images_BCHW, labels_B, cam):
    from rft.method import counterfactual

    def of(model) -> torch.Tensor:
        taps: list = []
        patches = model.patches(images_BCHW)
        logits = model.logits(model.features(patches, taps=taps))
        return counterfactual.cam(cam, logits, labels_B, taps).detach()

    student = sharpen(build_model(0))
    expected = of(student)
    freeze(student, FIRST_LAYERS)
    torch.testing.assert_close(of(student), expected, rtol=0, atol=0)


def test_frozen_weights_have_no_state_and_no_decay(images_BCHW, labels_B):
    student = build_model(0)
    freeze(student, FIRST_LAYERS)
    method = recipes.build("vanilla").method
    optim = replace(recipes.build("vanilla").optim, weight_decay=0.5)
    objective = Objective(student, build_model(1), method)
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    optimizer = build_optimizer(objective, optim)
    objective(images_BCHW, labels_B, None).loss.backward()
    optimizer.step()
    assert len(optimizer.state) == len(learning(student))
    for name, weight in student.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["object-mask-single-fill", "object-mask-no-fill", "ftp"])
def test_a_run_with_frozen_layers_resumes_and_another_pattern_is_another_run(
    train, refused, tiny_data, tiny_clip, tmp_path, recipe
):
    from rft.train import command

    patterns = ("--optim.freeze", *EARLY, "visual.transformer.resblocks.0.*")
    often = ("--log.checkpoint-steps", 4, "--log.keep", 9, *patterns)
    run = train(recipe, *often, name="run")
    whole = tiny.weights(run)
    start = load_state(train("zero-shot", "--optim.epochs", 0) / LAST)[0]
    end = load_state(run / LAST)[0]
    for name, value in start.items():
        frozen = name.startswith(
            ("visual.conv1", "visual.class", "visual.positional", "visual.ln_pre")
        ) or name.startswith("visual.transformer.resblocks.0.")
        assert torch.equal(end[name], value) == frozen, name
    # as if killed after step 8
    (run / "training.json").unlink()
    for path in run.glob("checkpoints/step-*.pt"):
        if int(path.stem.removeprefix("step-")) > 8:
            path.unlink()
    assert json.loads((run / "config.json").read_text())["optim"]["freeze"] == [*patterns[1:]]
    train(recipe, *often, name="run")
    assert tiny.weights(run) == whole
    (run / "training.json").unlink()
    words = tiny.training(recipe, tiny_data, tiny_clip, run, *often, "head.bias")
    assert "optim.freeze" in refused(command, *words)


@pytest.mark.slow
def test_two_ranks_do_not_wait_for_frozen_weights(tiny_data, tiny_clip, tmp_path):
    # so large that AdamW does not amplify gradients that are only rounding, as of a key's bias
    options = ("--optim.eps", 1e-2, "--optim.freeze", *EARLY, "head.*")
    # no fill: donors do not depend on the number of ranks
    recipe = "object-mask-no-fill"
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        tiny.train(recipe, tiny_data, tiny_clip, run, *options, ranks=ranks)
        assert (run / "training.json").exists()
    one, two = (load_state(tmp_path / str(ranks) / LAST)[0] for ranks in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert torch.equal(two["head.weight"], one["head.weight"])
