"""Temperatures are fitted only on images that a training held out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rft.clip.classifier import build_classifier, load_state
from rft.config import load_config
from rft.dist import World
from rft.evaluate import command as evaluation
from rft.evaluate.count import predict
from rft.loading.batches import plan_training
from rft.loading.dataset import PackedDataset
from rft.merge import command as merging
from rft.runs.filenames import SELECTED
from rft.runs.predictions import path_of, read
from rft.runs.trained_on import of_metadata
from rft.statistics import calibration
from tests.shards.test_guard import copy, pack_as
from tests.tiny import call, complaints, unstamped

pytestmark = pytest.mark.slow
SET = "imagenet-val"


def evaluate(data: Path, *options: object) -> None:
    words = ("--sets", SET, "--workers", 0, "--device", "cpu", "--temperature")
    call(evaluation, *options, "--data", data, *words)


def recorded(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())["sets"][SET]


def logits(run: Path, packed: PackedDataset, samples: np.ndarray) -> np.ndarray:
    saved = load_state(run / SELECTED)
    (found,) = predict(
        [build_classifier(saved.state, saved.architecture)],
        packed,
        image_size=saved.architecture.image_size,
        world=World(rank=0, size=1, local_rank=0),
        device=torch.device("cpu"),
        samples=samples,
        logits=np.float32,
    )
    assert found.logits_NK is not None
    return found.logits_NK


def test_it_is_fitted_on_held_out_images_alone(train, tiny_data):
    """Trap 3: fitted on the ID test set it differs, and the test set was used."""
    run = train("vanilla", "--split-seed", 3)
    evaluate(tiny_data, run)
    packed = PackedDataset(f"{tiny_data}/imagenet-train")
    held_out = plan_training(packed, load_config(run))[2]
    label_N = packed.index.label
    expected = calibration.fit_temperature(logits(run, packed, held_out), label_N[held_out])
    found = recorded(run)["temperature"]
    assert found["value"] == pytest.approx(expected, rel=1e-12)
    assert (found["images"], found["split_seed"], found["train_set"]) == (8, 3, "imagenet-train")
    test = PackedDataset(f"{tiny_data}/{SET}")
    everything = np.arange(len(test))
    test_NK = logits(run, test, everything)
    faulty = calibration.fit_temperature(test_NK, test.index.label)
    assert abs(faulty - expected) > 0.01 * expected
    rows = read(path_of(run, SET), len(test))
    scaled_N = calibration.log_likelihood(test_NK, test.index.label, found["value"])
    assert rows.scaled_log_likelihood == pytest.approx(scaled_N, rel=1e-5, abs=1e-5)
    plain_N = calibration.log_likelihood(test_NK, test.index.label)
    assert rows.log_likelihood == pytest.approx(plain_N, rel=1e-5, abs=1e-5)
    # a prediction does not depend on the temperature
    assert (rows.prediction == test_NK.argmax(axis=1)).all()


def test_models_of_several_splits_in_one_call(train, tiny_data, capsys, tmp_path):
    runs = [
        train("vanilla", "--split-seed", seed, "--seed", seed, name=f"run{seed}") for seed in (1, 2)
    ]
    none = train("zero-shot", "--loader.held-out", 0, "--optim.epochs", 0)
    soup, wise = tmp_path / "soup", tmp_path / "wise"
    call(merging, "uniform-soup", *runs, "--out", soup)
    call(
        merging,
        "wise",
        train("zero-shot", "--optim.epochs", 0, name="zero"),
        runs[0],
        "--out",
        wise,
    )
    capsys.readouterr()
    evaluate(tiny_data, *runs, none, soup, wise)
    warnings = [
        line for line in unstamped(capsys.readouterr().err).splitlines() if "gets no" in line
    ]
    assert warnings == [
        f"WARNING: {none} gets no temperature: its run holds out no images (--loader.held-out 0)",
        f"WARNING: {soup} gets no temperature: its trainings held out different images, so none is "
        "new to the model; train all of them with the same --split-seed",
    ]
    # a rerun has nothing to do, and repeats the message
    before = (soup / "results.json").stat().st_mtime_ns
    evaluate(tiny_data, *runs, none, soup, wise)
    again = capsys.readouterr()
    assert "all results are current, nothing to do" in again.out
    # and the accuracies, in the order of the command line
    shown = [line.partition(":")[0] for line in again.out.splitlines() if f": {SET} " in line]
    assert shown == [str(one) for one in (*runs, none, soup, wise)]
    assert [line for line in unstamped(again.err).splitlines() if "gets no" in line] == warnings
    assert (soup / "results.json").stat().st_mtime_ns == before
    seeds = [recorded(run)["temperature"] for run in (*runs, none, soup, wise)]
    assert [found and found["split_seed"] for found in seeds] == [1, 2, None, None, 1]
    assert read(path_of(soup, SET), recorded(soup)["total"]).scaled_confidence is None


def test_a_training_on_a_run_keeps_both_splits(train):
    """For a model that saw the other split's held-out images, none of them are new."""
    first = train("linear-probe", "--split-seed", 1)
    second = train("lp-ft", "--model.start", first, "--split-seed", 2)
    seen = of_metadata(second, load_state(second / SELECTED).metadata)
    assert sorted((one.held_out, one.split_seed) for one in seen) == [(8, 1), (8, 2)]


def test_another_training_set_below_the_root_is_refused(train, tiny_data, tmp_path, refused):
    from benchmarks.tiny_world import LABELS, write_images
    from rft.packing.pack import Options, pack

    run = train("vanilla")
    write_images(tmp_path / "images", "imagenet-train", 5)
    options = Options(encoding="pixels", size=16, shard_mb=0.05, workers=1)
    pack("imagenet-train", str(tmp_path / "images"), str(tmp_path / "data"), LABELS, options)
    (tmp_path / "data" / SET).symlink_to(tiny_data / SET)
    words = ("--sets", SET, "--workers", 0, "--device", "cpu", "--temperature")
    line = refused(evaluation, run, "--data", tmp_path / "data", *words)
    assert f"{run} held out images of a different imagenet-train (manifest" in line
    assert not (run / "results.json").exists()


def test_held_out_images_that_are_test_images_are_refused(train, tiny_data, tmp_path, refused):
    """The training set is an OOD set under a different name."""
    run, root = train("vanilla"), tmp_path / "data"
    copy(tiny_data, root, "imagenet-train", SET)
    pack_as(tiny_data, "imagenet-train", root, "found-later", ood=True)
    words = ("--sets", SET, "--workers", 0, "--device", "cpu", "--temperature")
    line = refused(evaluation, run, "--data", root, *words)
    assert "imagenet-train holds 76 images of found-later" in line
    assert not (run / "results.json").exists()


def test_training_images_are_counted_and_warned_of(train, tiny_data, tmp_path, capsys):
    run, root = train("vanilla"), tmp_path / "data"
    copy(tiny_data, root, "imagenet-train", SET)
    pack_as(tiny_data, "imagenet-train", root, "copy")
    capsys.readouterr()
    call(evaluation, run, "--data", root, "--sets", "copy", SET, "--workers", 0, "--device", "cpu")
    printed = capsys.readouterr()
    (line,) = (one for one in unstamped(printed.err).splitlines() if "was trained on" in one)
    assert line == (
        f"WARNING: {run} was trained on 76 of the 76 images of copy: its accuracy there is up to "
        "100 points too high"
    )
    sets = json.loads((run / "results.json").read_text())["sets"]
    assert (sets["copy"]["seen"], sets[SET]["seen"]) == (76, 0)
    # your own set leads to a report, like the benchmarks
    assert "next: python -m rft.report" in printed.out


def moved(run: Path, data: str = "") -> None:
    """Let a run name a different data root, or none, like one of a different machine."""
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": data}))


def test_results_learn_of_training_images_without_another_evaluation(
    train, tiny_data, tmp_path, capsys
):
    """The training set was missing when the model was evaluated, or the results are older."""
    run, root = train("vanilla"), tmp_path / "data"
    moved(run)
    copy(tiny_data, root, "imagenet-train", SET)
    pack_as(tiny_data, "imagenet-train", root, "copy")
    words = (run, "--data", root, "--sets", "copy", SET, "--workers", 0, "--device", "cpu")
    (root / "imagenet-train").rename(tmp_path / "away")
    capsys.readouterr()
    call(evaluation, *words)
    manifest = PackedDataset(f"{tiny_data}/imagenet-train").manifest.sha256
    assert complaints(capsys.readouterr().err) == [
        f"WARNING: training set imagenet-train (manifest {manifest[:12]}) is not below {root}: not "
        f"checked whether {run} was trained on images of copy "
        "(docs/data.md#no-training-on-test-images)"
    ]
    before = json.loads((run / "results.json").read_text())
    # ImageNet's own sets share no images
    assert (before["sets"]["copy"]["seen"], before["sets"][SET]["seen"]) == (None, 0)
    (tmp_path / "away").rename(root / "imagenet-train")
    call(evaluation, *words)
    after = json.loads((run / "results.json").read_text())
    assert after["sets"]["copy"].pop("seen") == 76
    before["sets"]["copy"].pop("seen")
    assert after == before
    # known values are kept
    (root / "imagenet-train").rename(tmp_path / "away")
    call(evaluation, *words)
    assert json.loads((run / "results.json").read_text())["sets"]["copy"]["seen"] == 76


def test_a_training_set_below_the_runs_own_root_is_compared(train, tiny_data, tmp_path):
    run, root = train("vanilla"), tmp_path / "data"
    pack_as(tiny_data, "imagenet-train", root, "copy")
    words = ("--data", root, "--sets", "copy", "--workers", 0, "--device", "cpu")
    call(evaluation, run, *words)
    assert json.loads((run / "results.json").read_text())["sets"]["copy"]["seen"] == 76
    second = train("vanilla", "--seed", 1, "--split-seed", 0, name="second")
    call(merging, "uniform-soup", run, second, "--out", tmp_path / "soup")
    unwritten = ("--wise", run, second, 0.5, "--out", tmp_path / "unwritten")
    for more in ((tmp_path / "soup",), unwritten):
        call(evaluation, *more, *words)
    for name in ("soup", "unwritten"):
        (results,) = (tmp_path / name).rglob("results.json")
        assert json.loads(results.read_text())["sets"]["copy"]["seen"] == 76
    # a run folder may be third-party, so the server that it names is not contacted
    away = train("vanilla", name="away")
    moved(away, "http://127.0.0.1:1/data")
    call(evaluation, away, *words)
    assert json.loads((away / "results.json").read_text())["sets"]["copy"]["seen"] is None


def test_one_reason_of_several_models_is_one_warning(train, tiny_data, capsys):
    options = ("--loader.held-out", 0, "--optim.epochs", 0)
    runs = [train("zero-shot", *options, "--seed", seed, name=f"run{seed}") for seed in (1, 2)]
    capsys.readouterr()
    evaluate(tiny_data, *runs)
    assert complaints(capsys.readouterr().err) == [
        "WARNING: 2 models get no temperature: its run holds out no images (--loader.held-out 0)",
        *(f"  {run}" for run in runs),
    ]
