"""Alarms: fine-tuning lost accuracy, predictions collapsed, a test set proves nothing."""

import json

import numpy as np
import pytest

from rft.report.page import compose
from rft.report.read import load_runs
from rft.runs.predictions import path_of
from rft.storage import files
from tests.report.make_runs import edit, make_predicted, make_run, predict

pytestmark = pytest.mark.slow


def found(*runs) -> list[str]:
    return compose(load_runs(runs), draw=False).summary.alarms


def test_a_significant_loss_against_zero_shot_is_an_alarm(tmp_path):
    options = {"images": 200, "sets": ("test",)}
    zero_shot = make_predicted(tmp_path, "zero-shot", skill=0.8, **options)
    worse = make_predicted(tmp_path, "vanilla", skill=0.4, **options)
    equal = make_predicted(tmp_path, "no-mask", skill=0.8, **options)
    (line,) = found(zero_shot, worse, equal)
    assert line.startswith("vanilla lost accuracy against zero-shot on test: -")
    assert "95% interval -" in line
    # it comes first among the warnings of the page
    report = compose(load_runs([zero_shot, worse]), draw=False)
    assert report.summary.warnings[0] == line


def test_an_exported_model_that_others_beat_is_an_alarm(tmp_path):
    options = {"images": 200, "sets": ("test",)}
    zero_shot, exported, best = [
        make_predicted(tmp_path, name, skill=skill, **options)
        for name, skill in (("zero-shot", 0.2), ("no-mask", 0.4), ("vanilla", 0.8))
    ]
    runs = load_runs([zero_shot, exported, best])
    (line,) = compose(runs, draw=False, chosen=exported).summary.alarms
    assert line.startswith(
        "The exported model, no-mask, is significantly worse than others on test: vanilla +"
    )
    assert "zero-shot" not in line
    assert line.endswith("Export one of them instead, which is then a choice on test images.")
    assert compose(runs, draw=False, chosen=best).summary.alarms == []
    # one alarm, although zero-shot is better too
    (line,) = compose(runs, draw=False, chosen=zero_shot).summary.alarms
    assert line.index("vanilla") < line.index("no-mask")


def test_a_gain_and_a_report_without_zero_shot_have_none(tmp_path):
    options = {"images": 200, "sets": ("test",)}
    zero_shot = make_predicted(tmp_path, "zero-shot", skill=0.4, **options)
    better = make_predicted(tmp_path, "vanilla", skill=0.8, **options)
    assert found(zero_shot, better) == []
    assert found(make_predicted(tmp_path, "no-mask", skill=0.3, **options)) == []


@pytest.mark.parametrize(
    ("classes", "predicted", "alarmed"), [(6, 3, True), (6, 4, False), (2, 1, True)]
)
def test_few_predicted_classes_are_a_collapse(tmp_path, classes, predicted, alarmed):
    run = make_run(tmp_path, "vanilla", percent=())
    label_N = np.arange(60) % classes
    # all images of the first classes are right, the others are taken for the next class
    right_N = label_N < predicted
    predict(run, {"test": right_N}, classes=classes, labels={"test": label_N})
    path = path_of(run, "test")
    with np.load(path) as stored:
        columns = dict(stored)
    columns["prediction"] = np.where(right_N, label_N, 0).astype(np.int32)
    np.savez_compressed(path, **columns)
    edit(
        run / "results.json",
        sets={
            "test": {
                "correct": int(right_N.sum()),
                "total": 60,
                "manifest_sha256": files.sha256_bytes(b"test"),
                "predictions_sha256": files.sha256_file(path),
            }
        },
    )
    lines = found(run)
    assert bool(lines) == alarmed
    if alarmed:
        assert (
            f"vanilla collapsed on test: it predicts {predicted} of {classes} classes" in lines[0]
        )


def test_test_images_that_were_trained_on_are_an_alarm(tmp_path):
    paths = [make_predicted(tmp_path, "vanilla", seed, sets=("test",)) for seed in (0, 1)]
    for path in paths:
        sets = json.loads((path / "results.json").read_text())["sets"]
        sets["test"]["seen"] = 17
        edit(path / "results.json", sets=sets)
    (line,) = found(*paths)
    assert line == (
        "17 of the 60 images of test were in the training set of vanilla: this accuracy is up to "
        "28.3 points too high. Remove them, then run again with a new --out."
    )
    for path in paths:
        sets = json.loads((path / "results.json").read_text())["sets"]
        sets["test"]["seen_other_label"] = 1
        edit(path / "results.json", sets=sets)
    same, other = found(*paths)
    assert same.startswith("16 of the 60 images of test were in the training set of vanilla: ")
    assert other == (
        "1 of the 60 images of test was in the training set of vanilla under a different label: "
        "this accuracy is up to 1.67 points too low, because one label of each is wrong. Correct "
        "or remove it, then run again with a new --out."
    )
    assert line.startswith("17 of the 60 images of test were in the training set of vanilla:")


def test_a_test_set_that_was_not_compared_is_an_alarm(tmp_path):
    path = make_predicted(tmp_path, "vanilla", 0, sets=("test",))
    sets = json.loads((path / "results.json").read_text())["sets"]
    sets["test"]["seen"] = None
    edit(path / "results.json", sets=sets)
    (line,) = found(path)
    assert line.startswith("It was not checked whether images of test were in the training set of")
