"""Weights record the images that they have seen: test images of a different split cause a warning.

The same sets are below two data roots as `train` and `test`, like own photos; the second manifest
and samples.npz of `train` differ, as after repacking with a different split.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rft.clip.classifier import load_state, map_state, save_state
from rft.convert import command as convert
from rft.evaluate import command as evaluate_command
from rft.merge import command as merge_command
from rft.runs import trained_on
from rft.runs.filenames import LAST, SELECTED
from rft.runs.records import read_config
from rft.runs.trained_on import TrainedOn
from rft.shards.manifest import Manifest
from rft.shards.samples import Samples
from rft.storage import files
from tests import tiny
from tests.tiny import call, forget_weights

pytestmark = pytest.mark.slow

SEEN = "it may have seen images of these test sets"
TOGETHER = "together they may have seen the test images beside either"


@pytest.fixture(scope="module")
def roots(tiny_data, tmp_path_factory) -> tuple[Path, Path]:
    """Two data roots of own photos, split differently."""
    root = tmp_path_factory.mktemp("splits")
    for name in ("a", "b"):
        shutil.copytree(tiny_data / "imagenet-train", root / name / "train")
        shutil.copytree(tiny_data / "imagenet-val", root / name / "test")
    train = root / "b" / "train"
    manifest = Manifest.load(str(train))
    data = Samples(source=Samples.load(str(train), manifest).source[::-1]).to_bytes()
    (train / "samples.npz").write_bytes(data)
    replace(manifest, samples_sha256=files.sha256_bytes(data)).save(str(train))
    return root / "a", root / "b"


@pytest.fixture(scope="module")
def runs(roots, tiny_clip, tmp_path_factory) -> Path:
    """Runs on either root, and one on the second that starts from one on the first."""
    folder, (a, b) = tmp_path_factory.mktemp("runs"), roots
    own = ("--train-set", "train")
    tiny.train("zero-shot", a, tiny_clip, folder / "zero", *own, "--optim.epochs", 0)
    tiny.train("vanilla", a, tiny_clip, folder / "a", *own)
    tiny.train("vanilla", b, tiny_clip, folder / "b", *own, "--seed", 1)
    tiny.train("vanilla", b, tiny_clip, folder / "a-then-b", *own, "--model.start", folder / "a")
    return folder


@pytest.fixture
def said(capsys):
    """Run a command; return its standard error."""

    def run(command, *arguments: object) -> str:
        capsys.readouterr()
        call(command, *arguments)
        return capsys.readouterr().err

    return run


def evaluation(model: Path, data: Path) -> tuple[object, ...]:
    return (model, "--data", data, "--sets", "test", "--workers", 0, "--device", "cpu")


def test_a_run_and_its_weights_alone(runs, roots, said):
    a, b = roots
    for model in (runs / "a", runs / "a" / SELECTED, runs / "a" / LAST):
        assert "WARNING" not in said(evaluate_command, *evaluation(model, a))
        warning = said(evaluate_command, *evaluation(model, b))
        assert f"{model} was trained on a different train (manifest " in warning
        assert SEEN in warning
        assert SEEN in said(evaluate_command, *evaluation(model, b))  # although nothing is left
    assert SEEN not in said(evaluate_command, *evaluation(runs / "zero", b))


def test_the_same_images_under_a_different_manifest(runs, roots, said, tmp_path):
    """Tars indexed again over a different path: only the names of the shards differ."""
    run, data = shutil.copytree(runs / "a", tmp_path / "run"), tmp_path / "data"
    shutil.copytree(roots[0], data)
    shutil.copytree(data / "train", data / "leak")
    for name in ("train", "leak"):
        (data / name / "000000.tar").rename(data / name / "first.tar")
        path = data / name / "manifest.json"
        manifest = json.loads(path.read_text().replace("000000.tar", "first.tar"))
        path.write_text(json.dumps({**manifest, "dataset": name}))

    def seen(of: Path) -> int | None:
        line = said(evaluate_command, *evaluation(of, data), "--sets", "leak")
        results = json.loads((of / "results.json").read_text())
        assert (SEEN in line) == (results["sets"]["leak"]["seen"] is None)
        return results["sets"]["leak"]["seen"]

    # images are compared although the training set below --data is a different one
    assert seen(run) == 76
    # the original is gone: what this model has seen is unknown
    (run / "results.json").unlink()
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": str(tmp_path / "gone")}))
    assert seen(run) is None


def test_a_run_that_starts_from_another(runs, roots, said):
    assert SEEN in said(evaluate_command, *evaluation(runs / "a-then-b", roots[1]))


def test_merges(runs, roots, said, tmp_path):
    a, b = roots
    wise = ("wise", runs / "zero", runs / "a", "--out", tmp_path / "wise")
    assert TOGETHER not in said(merge_command, *wise)
    assert SEEN not in said(evaluate_command, *evaluation(tmp_path / "wise", a))
    assert SEEN in said(evaluate_command, *evaluation(tmp_path / "wise", b))
    soup = ("uniform-soup", runs / "a", runs / "b", "--out", tmp_path / "soup")
    assert TOGETHER in said(merge_command, *soup)
    for root in roots:
        assert SEEN in said(evaluate_command, *evaluation(tmp_path / "soup", root))


def test_imports_and_exports(runs, roots, said, tmp_path, tiny_clip):
    clip = ("--text", tiny_clip)
    for to, name, more in (("safetensors", "m.safetensors", ()), ("open-clip", "hub", clip)):
        out, again = tmp_path / name, tmp_path / f"again-{name}"
        call(convert, "export", runs / "a", "--to", to, "--out", out, *more)
        call(convert, "import", out, "--data", roots[0], "--set", "train", "--out", again)
        assert SEEN in said(evaluate_command, *evaluation(again, roots[1]))


def test_a_run_that_has_not_ended(runs, roots, said, tmp_path):
    run = shutil.copytree(runs / "a", tmp_path / "run")
    (run / "training.json").unlink()
    assert SEEN in said(evaluate_command, *evaluation(run, roots[1]))


def test_weights_that_do_not_say(runs, roots, said, tmp_path):
    """Of an earlier version; the folder of their run does."""
    run = shutil.copytree(runs / "a", tmp_path / "run")
    saved = load_state(run / SELECTED)
    del saved.metadata[trained_on.KEY]
    save_state(str(run / SELECTED), saved.state, saved.architecture, saved.metadata, saved.classes)
    forget_weights(run)
    assert SEEN in said(evaluate_command, *evaluation(run, roots[1]))
    assert SEEN not in said(evaluate_command, *evaluation(run / SELECTED, roots[1]))


def test_imagenet_has_one_split(tiny_data, tiny_clip, said, tmp_path):
    """However it is packed: its sets share no image."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    tiny_run = tiny.train("vanilla", tiny_data, tiny_clip, tmp_path / "run")
    path = data / "imagenet-train" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "plan_hash": "0" * 64}))
    line = (tiny_run, "--data", data, "--sets", "imagenet-val", "--workers", 0)
    assert SEEN not in said(evaluate_command, *line)
    assert read_config(tiny_run).train_set == "imagenet-train"
    seen = trained_on.of_metadata(tiny_run, map_state(tiny_run / SELECTED).metadata)
    assert seen is not None
    assert [one.name for one in seen] == ["imagenet-train"]


def test_a_list_is_read_as_it_was_written():
    path = Path("weights.safetensors")
    seen = frozenset({TrainedOn("train", "0" * 64), TrainedOn("other", "1" * 64)})
    assert trained_on.of_metadata(path, trained_on.entries(seen)) == seen
    assert trained_on.of_metadata(path, trained_on.entries([])) == frozenset()
    assert trained_on.of_metadata(path, {}) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "3",
        '["train"]',
        '[["train"]]',
        '[["a", "b", "c"]]',
        '{"a": 1}',
        '[["train", "../x"]]',
        '[["a\\u001b", "' + "0" * 64 + '"]]',
        "[" * 100_000,
    ],
)
def test_a_damaged_header_is_named(text):
    with pytest.raises(ValueError, match=r"^weights\.safetensors is damaged: trained_on"):
        trained_on.of_metadata(Path("weights.safetensors"), {trained_on.KEY: text})
