"""How a run ends, and what a finished one still checks."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rft import cli
from rft.train import __main__ as train_command
from rft.train.gallery import one_of_each_class


@pytest.fixture
def train(tiny_data, tiny_clip, tmp_path, monkeypatch):
    """Run `rft.train` with no training step in it; returns the run folder."""

    def run(recipe: str, *options: str, name: str) -> Path:
        folder = tmp_path / name
        fixed = ("--data", str(tiny_data), "--run-dir", str(folder), "--model.clip", tiny_clip)
        fixed += ("--scale", "miniature", "--loader.batch-size", "6", "--loader.held-out", "8")
        monkeypatch.setattr(sys, "argv", ["rft", recipe, *fixed, "--optim.epochs", "0", *options])
        cli.run(train_command.main)
        return folder

    return run


@pytest.mark.slow
def test_a_finished_run_refuses_other_weights_to_build_on(train, capsys):
    probes = [train("linear-probe", "--seed", seed, name=f"p{seed}") for seed in ("0", "1")]
    head = ("--model.head", "random", "--seed", "3")
    probes.append(train("linear-probe", *head, name="random"))
    run = train("lp-ft", "--model.start", str(probes[0]), name="run")
    assert "start_sha256" in json.loads((run / "training.json").read_text())["inputs"]
    # the same weights under another name are the same
    train("lp-ft", "--model.start", str(probes[1]), name="run")
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train("lp-ft", "--model.start", str(probes[2]), name="run")
    assert "was built on other weights: start_sha256" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_whose_held_out_images_show_one_class_finishes(train, monkeypatch):
    # its gallery would have one picture, which no other image can fill
    def shown(labels, samples, count):
        return one_of_each_class(np.zeros_like(labels), samples, count)

    monkeypatch.setattr(train_command, "one_of_each_class", shown)
    run = train("object-mask-multi-fill", name="run")
    assert (run / "training.json").exists()
    assert not (run / "gallery.npz").exists()


def test_other_pretrained_weights_under_a_started_run(train, capsys, monkeypatch):
    run = train("vanilla", "--optim.epochs", "1", name="run")
    (run / "training.json").unlink()
    monkeypatch.setattr(train_command, "tower_sha256", lambda model: "another")
    with pytest.raises(SystemExit):
        train("vanilla", "--optim.epochs", "1", name="run")
    assert "pretrained_sha256" in capsys.readouterr().err
