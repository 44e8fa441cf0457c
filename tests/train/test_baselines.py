"""The systems that build on other runs, by their commands: LP-FT, WiSE-KD, and the presets.

A batch is 6 of the 68 training images: 11 steps per epoch.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rft.clip.classifier import load_state
from rft.merge import command as merge_command
from rft.runs.filenames import LAST, SELECTED
from tests import tiny


def weights(folder: Path, which: Path = SELECTED) -> dict[str, torch.Tensor]:
    return load_state(folder / which)[0]


def metrics(folder: Path, name: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.slow
def test_a_linear_probe_moves_the_head_alone_and_lp_ft_goes_on_from_it(train):
    zero = weights(train("zero-shot", "--optim.epochs", "0"))
    probe_run = train("linear-probe")
    probe = weights(probe_run)
    for name, value in zero.items():
        assert torch.equal(probe[name], value) == (not name.startswith("head.")), name
    # it learns nothing afterwards, so the run's last weights are its initial ones
    start = train("lp-ft", "--model.start", str(probe_run), "--optim.epochs", "0", name="start")
    for name, value in weights(start, LAST).items():
        assert torch.equal(value, probe[name]), name
    tuned = weights(train("lp-ft", "--model.start", str(probe_run)))
    assert not torch.equal(tuned["visual.proj"], probe["visual.proj"])


@pytest.mark.slow
def test_a_random_head_is_drawn_from_the_seed(train):
    options = ("--model.head", "random", "--optim.epochs", "0")
    first, again, other = (
        weights(train("linear-probe", *options, "--seed", seed, name=name))["head.weight"]
        for name, seed in (("first", "1"), ("again", "1"), ("other", "2"))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() <= first.shape[1] ** -0.5


@pytest.mark.slow
def test_wise_kd_learns_from_a_wise_ft_model(train, tmp_path):
    zero, vanilla = train("zero-shot", "--optim.epochs", "0"), train("vanilla")
    teacher = tmp_path / "wise"
    merge = ("wise", str(zero), str(vanilla), "--out", str(teacher))
    tiny.call(merge_command, *merge)
    option = ("--method.kd-teacher", str(teacher))
    for recipe in ("wise-kd-vanilla", "wise-kd-object-mask-single-fill"):
        run = train(recipe, *option)
        distilled, mse = metrics(run, "kd"), metrics(run, "mse")
        assert min(distilled) > 0
        assert (max(mse) > 0) == (recipe != "wise-kd-vanilla")
        loss = np.array(metrics(run, "ce")) + np.array(distilled) + 3 * np.array(mse)
        np.testing.assert_allclose(metrics(run, "loss"), loss, rtol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "option"),
    [("lp-ft", "--model.start"), ("wise-kd-vanilla", "--method.kd-teacher")],
)
def test_what_a_recipe_builds_on_must_be_named_and_alike(train, capsys, tmp_path, recipe, option):
    with pytest.raises(SystemExit):
        train(recipe)
    assert f"{option} RUN" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(recipe, option, str(tmp_path / "none"))
    assert "no checkpoint at" in capsys.readouterr().err
    assert not (tmp_path / recipe).exists()


@pytest.mark.slow
def test_a_started_run_refuses_other_weights_to_build_on(train, capsys):
    probes = [train("linear-probe", "--seed", str(seed), name=f"p{seed}") for seed in (0, 1)]
    run = train("lp-ft", "--model.start", str(probes[0]))
    (run / "training.json").unlink()
    with pytest.raises(SystemExit):
        train("lp-ft", "--model.start", str(probes[1]))
    assert "start_sha256" in capsys.readouterr().err


@pytest.mark.slow
def test_the_last_weights_are_kept_beside_the_selected_ones(train):
    run = train("vanilla", "--optim.epochs", "3")
    steps = {which: load_state(run / which)[2]["step"] for which in (SELECTED, LAST)}
    assert steps[LAST] == "33"
    assert int(steps[SELECTED]) % 11 == 0


@pytest.mark.slow
def test_official_parity_trains_by_its_own_schedule(train):
    every = ("--log.every-steps", "1", "--optim.accumulate", "3")
    run = train("object-mask-single-fill", "--preset", "official-parity", *every)
    config = json.loads((run / "config.json").read_text())
    assert (config["optim"]["schedule"], config["optim"]["clip"]) == ("one-cycle", "micro-step")
    rates = metrics(run, "lr")
    assert len(rates) == 11
    assert rates[-1] == pytest.approx(3e-4 / 25e4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("object-mask-single-fill", "--method.donors", "global", "--optim.accumulate", "2"),
        ("object-mask-no-fill", "--method.no-fill", "token-drop"),
        ("object-mask-multi-fill", "--method.cam", "grad-cam", "--recompute"),
        ("random-mask-single-fill", "--method.single-fill", "derangement"),
    ],
)
def test_options_of_the_method_train(train, options):
    every = ("--log.every-steps", "1")
    losses = np.array(metrics(train(*options, *every, name="with"), "loss"))
    plain = np.array(metrics(train(options[0], *every, name="without"), "loss"))
    assert len(losses) == len(plain)
    # an option with nearly the same effect: it changes the losses, but only slightly
    assert (losses != plain).any()
    np.testing.assert_allclose(losses, plain, rtol=0.3)


def test_training_refuses_the_folder_of_a_merged_model(train, tmp_path, capsys):
    run = train("vanilla")
    merge = ("wise", str(run), str(run), "--alpha", "0.3", "--out", str(tmp_path / "no-mask"))
    tiny.call(merge_command, *merge)
    before = (tmp_path / "no-mask" / SELECTED).read_bytes()
    with pytest.raises(SystemExit):
        train("no-mask")
    assert "holds a merged or imported model" in capsys.readouterr().err
    assert (tmp_path / "no-mask" / SELECTED).read_bytes() == before
