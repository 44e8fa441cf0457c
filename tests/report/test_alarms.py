"""Alarms: where fine-tuning lost, where it collapsed, where a test proves nothing."""

import numpy as np
import pytest
from PIL import Image

from rft.packing.own_folder import read_folder
from rft.packing.pack import Options, pack_source
from rft.report import alarms
from rft.report.page import compose
from rft.report.read import load_runs
from rft.runs.predictions import path_of
from rft.storage import files
from tests.report.make_runs import configured, edit, make_predicted, make_run, predict, run_of

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
    # it stands first among the warnings of the page
    report = compose(load_runs([zero_shot, worse]), draw=False)
    assert report.summary.warnings[0] == line


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
    # all images of the first classes are right, the others are taken for the next
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


def test_images_of_a_test_set_that_are_training_images_are_counted(tmp_path):
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for n in range(5):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / name / f"{n}.png")
    copied = read_folder(photos, None, 0.4, 0)
    # one test image gets the bytes of a training image, two others those of one and the same
    train, test = copied.sources
    for at, source in ((0, 0), (1, 1), (2, 1)):
        content = (train.root / train.items[source].path).read_bytes()
        (test.root / test.items[at].path).write_bytes(content)
    found = read_folder(photos, None, 0.4, 0)
    data = tmp_path / "shards"
    for source in found.sources:
        pack_source(source, str(data), found.labels, Options(encoding="pixels", size=8, workers=1))
    run = configured(run_of("vanilla", 0, (70.0,)), train_set="train")
    counted = run.results.sets["imagenet-val"]
    run = configured(run, train_set="train")
    own = {"test": counted}
    object.__setattr__(run.results, "sets", own)
    (line,) = alarms.shared_images([run], str(data))
    assert line.startswith("2 images of the test set test are images of the training set train too")
    # a data root without them, and a benchmark, are not compared
    assert alarms.shared_images([run], str(tmp_path / "elsewhere")) == []
    benchmark = configured(run_of("vanilla", 0, (70.0,)), train_set="train")
    assert alarms.shared_images([benchmark], str(data)) == []
