"""Runs with few shots and with augmented images: resuming, records and refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tiny_world import LABELS
from rft.clip.classifier import map_state
from rft.config import load_config
from rft.convert import command as convert
from rft.evaluate import command as evaluate_command
from rft.loading.batches import plan_training
from rft.loading.dataset import PackedDataset
from rft.merge import command as merge_command
from rft.packing.pack import Options, pack
from rft.runs import trained_on
from rft.runs.filenames import FEATURES, GALLERY, SELECTED
from rft.runs.trained_on import TrainedOn
from rft.train import command
from tests import tiny
from tests.shards.test_guard import copy, pack_as
from tests.tiny import call, unstamped, weights

pytestmark = pytest.mark.slow

SET = "imagenet-train"
SHOTS = ("--loader.shots", 4)
CROPS = ("--loader.augment", "crop-flip")
LONG = ("--optim.epochs", 3, "--loader.held-out", 16, "--loader.batch-size", 7)


@pytest.fixture(scope="module")
def original(tiny_data, tmp_path_factory) -> Path:
    """Data root of the tiny world's images as files."""
    root = tmp_path_factory.mktemp("original")
    options = Options(encoding="original", shard_mb=0.02, workers=1)
    for name in (SET, "imagenet-val"):
        pack(name, str(tiny_data.parent / "images"), str(root), LABELS, options)
    return root


@pytest.fixture
def train_files(original, tiny_clip, tmp_path) -> Callable[..., Path]:
    """Train a recipe on images that are decoded."""

    def run(recipe: str, *options: object, name: str = "") -> Path:
        return tiny.train(recipe, original, tiny_clip, tmp_path / (name or recipe), *options)

    return run


def forget_after(run: Path, step: int) -> None:
    """Turn a run into one that was killed after a checkpoint."""
    (run / "training.json").unlink()
    for path in (run / "checkpoints").iterdir():
        if path.suffix == ".safetensors" or int(path.stem.removeprefix("step-")) > step:
            path.unlink()


def held_out_counts(run: Path) -> list[int]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["held_out_correct"] for line in found if "held_out_correct" in line]


@pytest.mark.parametrize("recipe", ["object-mask-single-fill", "linear-probe"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_with_the_same_weights(train_files, recipe, step):
    options = (*LONG, "--log.keep", 100, "--log.checkpoint-steps", 4)
    run = train_files(recipe, *options, *CROPS)
    expected = weights(run)
    forget_after(run, step)
    train_files(recipe, *options, *CROPS)
    assert weights(run) == expected
    assert weights(train_files(recipe, *options, name="plain")) != expected


@pytest.mark.parametrize("recipe", ["linear-probe", "no-mask"])
def test_features_of_augmented_images_are_not_kept(train_files, recipe, monkeypatch):
    """Kept rows would belong to the first epoch's crops."""
    opened = []
    monkeypatch.setattr("rft.train.features.Rows.open", lambda *_: opened.append(1))
    run = train_files(recipe, *LONG, *CROPS)
    off = train_files(recipe, *LONG, *CROPS, "--loader.features-gb", 0, name="off")
    assert weights(run) == weights(off)
    assert held_out_counts(run) == held_out_counts(off)
    assert not opened
    assert not (run / FEATURES).exists()


def test_the_gallery_shows_images_as_they_are(train_files, original):
    run = train_files("object-mask-single-fill", *LONG, *CROPS)
    plain = train_files("object-mask-single-fill", *LONG, name="plain")
    shown = [np.load(one / GALLERY)["images_BCHW"] for one in (run, plain)]
    assert np.array_equal(*shown)
    packed = PackedDataset(f"{original}/{SET}")
    images = {packed.image(n, 16).tobytes() for n in range(len(packed))}
    assert all(image_CHW.tobytes() in images for image_CHW in shown[0])


def test_stored_pixels_are_refused(tiny_data, tiny_clip, tmp_path, refused):
    words = tiny.training("vanilla", tiny_data, tiny_clip, tmp_path / "run", *CROPS)
    for more in ([], ["--dry-run"]):
        line = refused(command, *words, *more)
        assert "--loader.augment crop-flip crops each image anew in each epoch" in line
        assert "pack the set with --encoding original" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changed", [("--loader.shots", 2), CROPS])
def test_another_choice_is_another_run(train_files, original, tiny_clip, refused, changed):
    options = (*SHOTS, "--optim.warmup-steps", 0)
    run = train_files("vanilla", *options)
    words = tiny.training("vanilla", original, tiny_clip, run, *options, *changed)
    name = changed[0].removeprefix("--")
    assert f"another configuration: {name}: " in refused(command, *words)
    # its checkpoints record it too, in case the rest of the folder is lost
    for file in ("training.json", "progress.json"):
        (run / file).unlink()
    now = {**command.parse(words).to_dict(), "precision": "fp32"}
    (run / "config.json").write_text(json.dumps(now))
    line = refused(command, *words)
    assert f"config.{name}: " in line


def test_the_dry_run_prints_them(original, tiny_clip, tmp_path, capsys):
    words = tiny.training("linear-probe", original, tiny_clip, tmp_path / "run", *LONG)
    call(command, *words, *SHOTS, *CROPS, "--dry-run")
    printed = capsys.readouterr().out
    assert "* loader.shots             4  (the recipe's is 0)" in printed
    assert "* loader.augment           crop-flip  (the recipe's is none)" in printed
    assert "16 to train on (4 of each class), 16 held out" in printed
    assert "keeps no features of training images, which are augmented anew in each epoch" in printed
    assert "2 an epoch, 6 in 3 epochs of global batch 7" in printed
    call(command, *words, "--dry-run")
    printed = capsys.readouterr().out
    assert "60 to train on, 16 held out" in printed
    assert "augmented" not in printed


def test_help_has_shots_and_all_help_both(capsys):
    shown = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            call(command, "vanilla", option)
        shown.append(capsys.readouterr().out)
    assert all("--loader.shots" in text for text in shown)
    assert ["--loader.augment" in text for text in shown] == [False, True]


def test_small_follows_from_the_shots(original, tiny_clip, tmp_path):
    """Five shots of four classes: too few for a tenth; two batches of eight, and a rest."""
    words = ("--scale", "small", "--model.clip", tiny_clip, "--loader.workers", 0)
    run = ("--data", original, "--run-dir", tmp_path / "run", "--optim.epochs", 1)
    call(command, "vanilla", *words, *run, "--loader.shots", 5)
    loader = load_config(tmp_path / "run").loader
    assert (loader.shots, loader.held_out, loader.batch_size) == (5, 0, 8)


def test_an_evaluation_counts_the_images_that_were_seen(train, tiny_data, tmp_path, capsys):
    """16 shots and 8 held-out images, not all 76 of the set."""
    run, whole, root = train("vanilla", *SHOTS), train("vanilla", name="whole"), tmp_path / "data"
    other = train("vanilla", "--loader.shots", 2, "--split-seed", 1, name="other")
    soup = tmp_path / "soup"
    call(merge_command, "uniform-soup", run, other, "--out", soup)
    copy(tiny_data, root, SET)
    pack_as(tiny_data, SET, root, "copy")
    capsys.readouterr()
    sets = ("--sets", "copy", SET, "--workers", 0, "--device", "cpu")
    call(evaluate_command, run, whole, soup, "--data", root, *sets)
    warnings = unstamped(capsys.readouterr().err)
    packed = PackedDataset(str(root / SET))

    def seen(of: Path) -> set[int]:
        _, samples, held_out = plan_training(packed, load_config(of))
        return {*samples.tolist(), *held_out.tolist()}

    expected = {run: 24, whole: 76, soup: len(seen(run) | seen(other))}
    assert 24 < expected[soup] < 40
    for model, count in expected.items():
        found = json.loads((model / "results.json").read_text())["sets"]
        assert (found["copy"]["seen"], found[SET]["seen"]) == (count, count)
        assert f"{model} was trained on {count} of the 76 images of copy" in warnings


def test_weights_name_the_shots_they_have_seen(train, tiny_data):
    run, plain = train("vanilla", *SHOTS), train("vanilla", name="plain")
    manifest = PackedDataset(f"{tiny_data}/{SET}").manifest.sha256

    def header(of: Path) -> str:
        return map_state(of / SELECTED).metadata[trained_on.KEY]

    # the format of earlier versions
    assert json.loads(header(plain)) == [[SET, manifest, 8, 0]]
    assert json.loads(header(run)) == [[SET, manifest, 8, 0, 4]]
    seen = trained_on.of_metadata(run, {trained_on.KEY: header(run)})
    assert seen == {TrainedOn(SET, manifest, 8, 0, 4)}


def test_an_export_names_the_shots(train, tiny_clip, tmp_path):
    run = train("vanilla", *SHOTS)
    call(
        convert, "export", run, "--to", "open-clip", "--text", tiny_clip, "--out", tmp_path / "hub"
    )
    card = json.loads((tmp_path / "hub" / "card.json").read_text())
    (seen,) = card["trained_on"]
    assert seen[-1] == 4
    page = (tmp_path / "hub" / "README.md").read_text()
    assert f"4 images of each class, manifest {seen[1]}" in page
    # and is restored with them
    call(convert, "import", tmp_path / "hub", "--out", tmp_path / "again")
    found = map_state(tmp_path / "again" / SELECTED).metadata[trained_on.KEY]
    assert json.loads(found) == [seen]


def test_two_ranks_learn_from_the_same_pixels(train_files, original, tiny_clip, tmp_path):
    # with weights that hardly change, a step's loss is a function of its pixels
    options = (*SHOTS, "--optim.lr", 1e-9, "--log.every-steps", 1, "--optim.epochs", 2)
    options += ("--optim.warmup-steps", 0)
    alone = losses(train_files("vanilla", *options, *CROPS, name="alone"))
    both = tmp_path / "both"
    tiny.train("vanilla", original, tiny_clip, both, *options, *CROPS, ranks=2)
    plain = losses(train_files("vanilla", *options, name="plain"))
    assert len(alone) == 4
    assert losses(both) == pytest.approx(alone, rel=1e-6)
    assert all(abs(one - other) > 1e-4 for one, other in zip(alone, plain, strict=True))


def losses(run: Path) -> list[float]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in found if "loss" in line]


def test_soups_of_different_shots_share_their_held_out_images(train, tiny_data, tmp_path, capsys):
    options = ("--split-seed", 0)
    runs = [
        train("vanilla", *options, "--loader.shots", shots, "--seed", shots, name=f"shots{shots}")
        for shots in (2, 4)
    ]
    soup = tmp_path / "soup"
    data = ("--data", tiny_data, "--workers", 0, "--device", "cpu")
    call(merge_command, "greedy-soup", *runs, "--out", soup, *data)
    call(evaluate_command, soup, *runs, *data, "--sets", "imagenet-val", "--temperature")
    assert "gets no temperature" not in capsys.readouterr().err
    for one in (soup, *runs):
        found = json.loads((one / "results.json").read_text())["sets"]["imagenet-val"]
        assert (found["temperature"]["images"], found["temperature"]["split_seed"]) == (8, 0)
