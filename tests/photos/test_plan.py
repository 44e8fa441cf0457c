"""The plan as data: its commands, their order, and the basis of their expected time."""

from dataclasses import replace
from pathlib import Path

import pytest

from rft import commands, stages
from rft.photos import plan
from rft.photos.plan import Sizes, Task
from rft.photos.rates import Rates

TASK = Task(
    source=Path("photos"),
    out=Path("out"),
    clip="ViT-B-32-quickgelu",
    pretrained="openai",
    image_size=224,
    classes=None,
    test_share=0.2,
    split_seed=0,
    ignore=(),
    max_bad=0,
    epochs=None,
    seed=3,
    device="auto",
)
SIZES = Sizes(train=200, test=50, classes=4, prompts=80, held_out=20, steps=220, epochs=10)
RATES = Rates(load=2.0, prompt=0.01, pack=0.05, forward=0.02, step={"vanilla": 1.0, plan.OURS: 3.0})


def test_every_stage_is_a_command_of_rft():
    every = [
        plan.pack(TASK),
        *(plan.train(TASK, recipe) for recipe in plan.TRAINED),
        plan.evaluate(TASK, held_out=True),
        plan.choose(TASK),
        *plan.end(TASK, TASK.wise(plan.OURS), held_out=True),
    ]
    names = [stages.command_of(commands.named(stage.words)).package for stage in every]
    assert [name.removeprefix("rft.") for name in names] == [
        "packing.commands.folder",
        *["train"] * 3,
        "evaluate",
        "merge.choose",
        "merge",
        "convert",
        "report",
    ]


def test_an_average_is_written_only_if_it_was_chosen():
    for recipe in plan.FAMILIES:
        first, *_ = plan.end(TASK, TASK.wise(recipe), held_out=True)
        assert first.words[-1] == str(TASK.wise(recipe))
        assert str(TASK.run(recipe)) in first.words
    for recipe in plan.TRAINED:
        chosen = TASK.run(recipe)
        names = [stage.name for stage in plan.end(TASK, chosen, held_out=True)]
        assert names == ["export", "report"]
        (export,) = plan.export(TASK, chosen, TASK.model)
        assert str(chosen) in export.words


@pytest.mark.parametrize("held_out", [True, False])
def test_the_report_names_the_choice_only_if_held_out_images_made_it(held_out):
    *_, report = plan.end(TASK, TASK.run(plan.VANILLA), held_out=held_out)
    named = TASK.choice if held_out else TASK.run(plan.VANILLA)
    assert report.words[-2:] == ("--chosen", str(named))


def test_zero_shot_is_given_no_number_of_a_training():
    words = plan.train(replace(TASK, epochs=2), plan.ZERO_SHOT).words
    assert "--optim.epochs" not in words
    assert plan.train(replace(TASK, epochs=2), plan.OURS).words[-2:] == ("--optim.epochs", "2")
    assert "--optim.lr" not in plan.train(TASK, plan.OURS).words
    tiny = plan.train(replace(TASK, clip="rft-miniature", pretrained=""), plan.OURS).words
    assert {"--optim.lr", "--method.distill-weight"} < set(tiny)


def test_times_follow_from_sizes_and_rates():
    found = plan.seconds(SIZES, RATES)
    start = 2 + 4 * 80 * 0.01
    assert found == {
        "pack": pytest.approx(12.5),
        "train zero-shot": pytest.approx(start + 20 * 0.02),
        "train vanilla": pytest.approx(start + 220 + 10 * 20 * 0.02),
        f"train {plan.OURS}": pytest.approx(start + 660 + 10 * 20 * 0.02),
        "evaluate": pytest.approx(5 * 70 * 0.02),
        "choose": pytest.approx(5 * 20 * 0.02),
        "report": 0,
        "export": 0,
    }
    assert plan.seconds(replace(SIZES, held_out=0), RATES)["choose"] == 0


def test_the_table_has_each_stage_and_their_sum():
    lines = plan.table(
        {"pack": 20.0, "report": 100.0}, [plan.pack(TASK), plan.report(TASK, Path("runs/x"))]
    )
    assert [line.split(None, 1) for line in lines] == [
        ["pack", "about 20 s"],
        ["report", "about 2 min"],
        ["all", "about 2 min"],
    ]


def test_what_is_done_has_no_time():
    lines = plan.table(
        {"pack": 20.0, "report": 100.0},
        [plan.pack(TASK), plan.report(TASK, Path("runs/x"))],
        {"pack"},
    )
    assert [line.split(None, 1) for line in lines] == [
        ["pack", "done"],
        ["report", "about 2 min"],
        ["all", "about 2 min"],
    ]


def test_a_training_that_was_stopped_is_not_done(tmp_path):
    task = replace(TASK, out=tmp_path)
    stage = plan.train(task, plan.VANILLA)
    (tmp_path / "runs" / "vanilla").mkdir(parents=True)
    (tmp_path / "runs" / "vanilla" / "progress.json").touch()
    assert not plan.is_done(task, stage)
    (tmp_path / "runs" / "vanilla" / "training.json").touch()
    assert plan.is_done(task, stage)
    assert not plan.is_done(task, plan.train(task, plan.OURS))
    # written by every call
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").touch()
    assert not plan.is_done(task, plan.report(task, Path("runs/x")))
