"""The output of a run while it trains."""

import dataclasses
import importlib.metadata
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rft import recipes
from rft.config import Config
from rft.evaluate.count import Count
from rft.method import losses
from rft.runs.filenames import CONFIG
from rft.train import journal
from rft.train.journal import Display, Journal, require_packages, status
from rft.train.pictures import Counterfactuals, grid
from rft.train.step import terms_of
from tests.tiny import unstamped

VALUES = {
    "epoch": 0.25,
    "loss": 1.5,
    "ce": 0.9,
    "mse": 0.02,
    "kd": 0.5,
    "images_per_s": 256.0,
    "data_wait_ms": 500.0,
}

COUNTERFACTUALS = Counterfactuals(
    pool_ZCHW=torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
    donor_BP=torch.tensor([[0, 1, 1, 0]]),
    own_B1=torch.tensor([[0]]),
)
SHAPE = tuple(grid(COUNTERFACTUALS, 8).shape[1:])


def configuration(run: Path, recipe: str = recipes.DEFAULT, **log) -> Config:
    config = recipes.build(recipe, data="https://store/x", run=str(run))
    return dataclasses.replace(config, log=dataclasses.replace(config.log, **log))


def begun(run: Path, **log) -> Config:
    """The configuration of a run folder with a config.json, as training writes it."""
    run.mkdir(exist_ok=True)
    (run / CONFIG).touch()
    return configuration(run, **log)


def test_the_loss_and_its_parts_and_what_the_loader_costs(tmp_path):
    # a step of 512 images at 256 images/s takes 2 s, of which 0.5 s went by waiting
    both = ["256 img/s", "data wait 25%"]
    shown = status(configuration(tmp_path), VALUES)
    assert shown == ["epoch 0.25/10", "loss 1.500 = ce 0.900 + 30 x mse 0.0200", *both]
    shown = status(configuration(tmp_path, "vanilla"), VALUES)
    assert shown == ["epoch 0.25/10", "loss 1.500 = ce 0.900", *both]
    shown = status(configuration(tmp_path, "wise-kd-object-mask-single-fill"), VALUES)
    assert shown == [
        "epoch 0.25/10",
        "loss 1.500 = ce 0.900 + 30 x mse 0.0200 + 1 x kd 0.5000",
        *both,
    ]


@pytest.mark.parametrize("recipe", recipes.TRAINED)
def test_the_parts_that_are_shown_add_up_to_the_loss(tmp_path, recipe):
    config = configuration(tmp_path, recipe)
    terms = {name: 0.5 + 0.25 * n for n, name in enumerate(terms_of(config.method))}
    loss = losses.total(config.method, terms)
    shown = status(config, {**VALUES, **terms, "loss": loss})[1]
    total, parts = shown.removeprefix("loss ").split(" = ")
    products = [re.findall(r"[0-9.]+", part) for part in parts.split(" + ")]
    assert sum(math.prod(map(float, numbers)) for numbers in products) == pytest.approx(loss)
    assert float(total) == pytest.approx(loss, abs=1e-3)


def test_a_line_at_once_then_one_a_minute_and_each_held_out_result(tmp_path, capsys, monkeypatch):
    display = Display(configuration(tmp_path), 100, 1000, Count(1, 4))
    display.update(110, VALUES)
    display.update(120, VALUES)
    display.held_out(120, Count(3, 4))
    monkeypatch.setattr(journal, "SECONDS_PER_LINE", 0.0)
    display.update(130, VALUES)
    display.close()
    first, held_out, last = unstamped(capsys.readouterr().out).splitlines()
    assert first.startswith("step 110/1000  epoch 0.25/10  loss 1.500 = ce 0.900 + 30 x mse 0.0200")
    assert "  256 img/s  data wait 25%  ETA " in first
    assert first.endswith("  held-out 25.00%")
    assert held_out.startswith("step 120/1000  held-out 75.00% (3/4)  epoch 0.25/10")
    assert held_out.count("held-out") == 1
    assert last.startswith("step 130/1000")
    assert last.endswith("  held-out 75.00%")


def test_the_last_step_has_a_line_where_no_held_out_result_has_one(tmp_path, capsys):
    """A training of a few seconds would appear to end at "step 10/120"."""
    for last_count, expected in ((None, [10, 120]), (Count(1, 4), [10])):
        display = Display(configuration(tmp_path), 0, 120, last_count)
        for step in (10, 20, 120):
            display.update(step, VALUES)
        display.close()
        lines = unstamped(capsys.readouterr().out).splitlines()
        assert [line.split()[1] for line in lines] == [f"{step}/120" for step in expected]


@pytest.mark.slow
def test_a_bar_on_a_terminal(tmp_path, terminal):
    with terminal(90) as drawn:
        display = Display(configuration(tmp_path), 100, 1000, None)
        display.update(110, VALUES)
        display.held_out(110, Count(3, 4))
        display.update(120, VALUES)
        display.close()
    text = drawn()
    assert recipes.DEFAULT in text
    for words in ("110/1000", "120/1000", "epoch 0.25/10", "data wait 25%  held-out"):
        assert words in text, words
    assert re.search(r"[0-9]:[0-9]{2}:[0-9]{2} *\n", text), "the time that is left"
    assert re.search(r"[0-9:]{8} INFO step 110/1000  held-out 75\.00% \(3/4\)", text)


def test_the_time_of_a_row_never_goes_backwards(tmp_path, monkeypatch):
    clock = iter([1_800_000_000.12345, 1_700_000_000.0, 1_800_000_001.0])
    with Journal(begun(tmp_path), 0, 100, writes=True) as log:
        for step in (5, 10, 15):
            now = next(clock)
            monkeypatch.setattr(journal.time, "time", lambda now=now: now)
            log.metrics(step, VALUES)
            monkeypatch.undo()
    rows = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert [row["time"] for row in rows] == [1800000000.123, 1800000000.123, 1800000001.0]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert "time" not in events.Tags()["scalars"]
    # nor from one start of the run to the next
    monkeypatch.setattr(journal.time, "time", lambda: 1_700_000_000.0)
    with Journal(begun(tmp_path), 15, 100, writes=True) as log:
        log.metrics(20, VALUES)
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["time"] == 1800000001.0


def test_a_resumed_run_drops_what_comes_again_and_knows_its_last_result(tmp_path, capsys):
    lines = [{"step": 5, "loss": 1}, {"step": 10, "held_out_correct": 3, "held_out_total": 4}]
    beyond = [{"step": 15, "loss": 1}, {"step": 20, "held_out_correct": 4, "held_out_total": 4}]
    text = "".join(json.dumps(line) + "\n" for line in lines + beyond) + '{"step": 25, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    with Journal(begun(tmp_path), 10, 100, writes=True) as log:
        log.metrics(15, VALUES)
    kept = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert kept[:2] == lines, "rows of an older version have no time and stay"
    assert abs(kept[2].pop("time") - time.time()) < 60
    assert kept[2:] == [{"step": 15, **VALUES}]
    assert capsys.readouterr().out.rstrip().endswith("  held-out 75.00%")


def test_one_rank_alone_writes(tmp_path, capsys):
    with Journal(configuration(tmp_path / "run", image_steps=1), 0, 9, writes=False) as log:
        log.metrics(1, VALUES)
        log.held_out(1, Count(1, 2))
        assert log.collects(1) is None
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_scalars_and_pictures_are_in_tensorboard(tmp_path):
    with Journal(begun(tmp_path, image_steps=3), 0, 9, writes=True) as log:
        assert [step for step in range(1, 10) if log.collects(step) is not None] == [3, 6, 9]
        log.metrics(3, VALUES)
        log.pictures(2, log.collects(2), 8)
        # a step without counterfactuals has none to show
        log.pictures(3, log.collects(3), 8)
        log.pictures(6, [COUNTERFACTUALS], 8)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 1.5)]
    (picture,) = events.Images("counterfactuals")
    assert (picture.step, picture.height, picture.width) == (6, *SHAPE)
    with Journal(begun(tmp_path / "none", image_steps=0), 0, 9, writes=True) as log:
        assert not any(log.collects(step) is not None for step in range(1, 10))


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    require_packages(configuration(tmp_path))
    with pytest.raises(ValueError, match=r"--log.wandb .*: pip install '\.\[wandb\]'"):
        require_packages(configuration(tmp_path, wandb="project"))
