"""Why a set is missing: the contents of the folders around its expected path."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.tiny_world import LABELS
from rft.config import load_config
from rft.convert import command as convert
from rft.evaluate import command as evaluate_command
from rft.evaluate import localisation
from rft.loading.dataset import PackedDataset
from rft.packing.foreign.index import index_shards
from rft.packing.foreign.rule import Options
from rft.packing.verify import verify
from rft.sets import BENCHMARKS
from rft.shards.manifest import Manifest
from rft.shards.root import LOOKED_AT, SHOWN, packed_sets, set_names
from rft.storage import files
from rft.storage.urls import set_name
from rft.train import command as train_command
from tests.tiny import call


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("shards/imagenet-train", "shards/imagenet-val", "shards/unfinished"):
        (tmp_path / name).mkdir(parents=True)
        file = "plan.json" if name.endswith("unfinished") else "manifest.json"
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.jpg").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("shards/imagenet-w", "{root}/shards has the sets imagenet-train, imagenet-val; did you "
         "mean 'imagenet-val'?"),
        ("shards/test", "{root}/shards has the sets imagenet-train, imagenet-val; name one "
         "with --sets NAME, or check --data"),
        # a benchmark that is not packed yet is no typing error of a similar name
        ("shards/imagenet-v2", "{root}/shards has the sets imagenet-train, imagenet-val; pack "
         "imagenet-v2 too (docs/data.md), or name one with --sets NAME, or check --data"),
        ("imagenet-val", "{root}/shards has the sets imagenet-train, imagenet-val; did you mean "
         "--data {root}/shards?"),
        ("shards/imagenet-train/imagenet-train", "{root}/shards/imagenet-train is a packed set "
         "itself; --data is the folder above it"),
        ("shards/unfinished", "packing has not finished"),
        ("nowhere/test", "nothing exists at {root}/nowhere; check --data"),
        ("photos/test", "no folder of {root}/photos is a packed set; check --data"),
    ],
)  # fmt: skip
def test_a_set_that_is_missing(root, url, hint):
    with pytest.raises(
        ValueError, match=r"no packed dataset at .*: manifest.json is missing; "
    ) as e:
        Manifest.load(f"{root}/{url}", "--sets")
    assert str(e.value).split("is missing; ")[1].startswith(hint.format(root=root))


def test_a_store_that_cannot_be_listed_gives_no_hint(root, monkeypatch):
    monkeypatch.setattr(files, "folders", lambda _: 1 / 0)  # an unexpected exception stays one
    with pytest.raises(ZeroDivisionError):
        Manifest.load(f"{root}/shards/test")

    def refuse(_):
        raise PermissionError(13, "no")

    monkeypatch.setattr(files, "folders", refuse)
    with pytest.raises(ValueError, match=r"manifest.json is missing$"):
        Manifest.load(f"{root}/shards/test")


def test_a_root_with_many_folders(tmp_path):
    for number in range(LOOKED_AT + 5):
        (tmp_path / f"{number:03d}").mkdir()
        (tmp_path / f"{number:03d}" / "manifest.json").write_text("{}")
    assert len(packed_sets(str(tmp_path))) == LOOKED_AT
    with pytest.raises(ValueError, match=f"and {LOOKED_AT - SHOWN} more; check --data"):
        Manifest.load(f"{tmp_path}/x")


def test_the_commands_say_it(tiny_data, refused, tmp_path):
    sets = f"{tiny_data} has the sets imagenet-a, imagenet-r, imagenet-train, imagenet-val"
    model = tmp_path / "model.safetensors"
    line = refused(evaluate_command, model, "--data", tiny_data.parent)
    assert str(model) in line  # the run is checked before the data
    model.touch()
    line = refused(evaluate_command, model, "--data", tiny_data, "--sets", "imagenet-w")
    assert sets in line
    line = refused(evaluate_command, model, "--data", tiny_data.parent)
    assert f"did you mean --data {tiny_data}?" in line
    # only the option that the command has
    line = refused(evaluate_command, model, "--data", tiny_data, "--sets", "imagenet-v2")
    assert "name one with --sets NAME, or check --data" in line
    run = ("--run-dir", tmp_path / "run")
    line = refused(train_command, "vanilla", "--data", tiny_data, "--train-set", "tests", *run)
    assert f"{sets}; name one with --train-set NAME, or check --data" in line
    line = refused(*(train_command, "vanilla", "--data", tmp_path / "no", "--scale", "small", *run))
    assert f"nothing exists at {tmp_path / 'no'}" in line
    assert not (tmp_path / "run").exists()


def renamed(data: Path, root: Path, name: str, dataset: str = "imagenet-a") -> Path:
    """A copy of a small set in a folder of a different name; `dataset` is its manifest's field."""
    shutil.copytree(data / "imagenet-a", root / name)
    manifest = Manifest.load(str(data / "imagenet-a"))
    dataclasses.replace(manifest, dataset=dataset).save(str(root / name))
    return root


@pytest.mark.parametrize("dataset", ["imagenet-a", "train", "somebody's"])
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "imagenet-a"])
def test_a_benchmarks_name_is_its_own(tiny_data, tmp_path, name, dataset, monkeypatch):
    root = renamed(tiny_data, tmp_path / "data", name, dataset)
    message = f"is named {name}, but holds {dataset!r}, whose results would count as {name}; rename"
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedDataset(f"{root}/{name}/")
    (problem,) = verify(f"{root}/{name}", deep=False, workers=1).problems
    assert message in problem.what
    monkeypatch.chdir(root / name)
    with pytest.raises(ValueError, match=re.escape(message)):
        Manifest.load(".")
    (tmp_path / name).symlink_to(tiny_data / "imagenet-a")
    with pytest.raises(ValueError, match=f"is named {name}, but holds 'imagenet-a'"):
        Manifest.load(str(tmp_path / name))


@pytest.mark.parametrize("name", ["test", "imagenet-a-again", "imagenet-w", "a/b"])
def test_other_names_are_the_users_own(tiny_data, tmp_path, name):
    assert len(PackedDataset(str(renamed(tiny_data, tmp_path, name) / name))) == 12


def test_every_command_refuses_another_set(tiny_data, tmp_path, refused):
    names = ("imagenet-train", "imagenet-val", "imagenet-r")
    for name in names:
        renamed(tiny_data, tmp_path, name)
    run, data = tmp_path / "run", ("--data", tmp_path)
    train, val, r = (f"{tmp_path}/{name} is named {name}, but holds" for name in names)
    model = tmp_path / "model.safetensors"
    model.touch()
    assert r in refused(evaluate_command, model, *data, "--sets", "imagenet-r")
    assert val in refused(evaluate_command, model, *data)
    assert train in refused(localisation, run, *data, "--masks", run)
    assert r in refused(localisation, run, *data, "--masks", run, "--set", "imagenet-r")
    assert val in refused(convert, "import", run, "--out", run, *data)
    start = ("vanilla", *data, "--run-dir", run)
    assert train in refused(train_command, *start)
    assert r in refused(train_command, *start, "--train-set", "imagenet-r")
    assert not run.exists()
    with pytest.raises(ValueError, match="is named imagenet-v2, but holds 'imagenet-r'"):
        index_shards(["x.tar"], f"{tmp_path}/imagenet-v2", LABELS, Options(dataset="imagenet-r"))


@pytest.mark.parametrize("written", ["test", "test/", "./test", "test//", "./test/."])
def test_a_set_has_one_name(written):
    assert set_name(written, "--set") == "test"
    assert set_names([written, "a/b/", "test"], "--sets") == ("test", "a/b")


@pytest.mark.parametrize(
    "written", ["", " ", ".", "./", "..", "../shards/test", "x/../test", "/test", "s3://b/t"]
)
def test_names_that_are_no_sets(written):
    with pytest.raises(ValueError, match=r"--set is .*; name a packed set by its folder below"):
        set_name(written, "--set")


@pytest.mark.slow
def test_counts_have_the_names_of_the_sets(tiny_data, tiny_clip, tmp_path):
    run, data = tmp_path / "run", ("--data", tiny_data)
    options = ("--scale", "miniature", "--model.clip", tiny_clip, "--optim.epochs", 0)
    start = ("vanilla", *data, "--run-dir", run, *options, "--loader.held-out", 8)
    call(train_command, *start, "--train-set", "./imagenet-train/")
    assert load_config(run).train_set == "imagenet-train"
    call(train_command, *start)  # the same run
    config = files.read_json(str(run / "config.json"))
    files.write_json(str(run / "config.json"), {**config, "train_set": "imagenet-train/"})
    call(train_command, *start)  # one of an older rft
    sets = ("imagenet-val/", "./imagenet-a", "imagenet-a/")
    call(evaluate_command, run, *data, "--workers", 0, "--sets", *sets)
    found = files.read_json(str(run / "results.json"))["sets"]
    assert {name: count["total"] for name, count in found.items()} == {
        "imagenet-val": 28,
        "imagenet-a": 12,
    }


def test_every_command_asks_for_a_sets_name(tmp_path, refused):
    run, data = tmp_path / "run", ("--data", tmp_path)
    what = "name a packed set by its folder below --data"
    assert what in refused(evaluate_command, run, *data, "--sets", "imagenet-val", "/x")
    assert what in refused(localisation, run, *data, "--masks", run, "--set", ".")
    assert what in refused(train_command, "vanilla", *data, "--run-dir", run, "--train-set", "./")
    assert what in refused(convert, "import", run, "--out", run, *data, "--set", "..")
    line = refused(evaluate_command, run, *data, "--sets")
    assert "--sets needs the name of at least one packed set below --data" in line
