"""The end of a run, and the checks of a finished one."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from rft.shards.manifest import Manifest
from rft.train import build, pictures
from rft.train.pictures import one_of_each_class
from tests.tiny import unstamped

pytestmark = pytest.mark.slow  # together


@pytest.fixture
def untrained(train):
    """Run `rft.train` without training steps; return the run folder."""

    def run(recipe: str, *options: object, name: str = "run") -> Path:
        return train(recipe, "--optim.epochs", 0, *options, name=name)

    return run


def test_a_finished_run_refuses_other_weights_to_build_on(untrained, capsys):
    probes = [untrained("linear-probe", "--seed", seed, name=f"p{seed}") for seed in ("0", "1")]
    head = ("--model.head", "random", "--seed", "3")
    probes.append(untrained("linear-probe", *head, name="random"))
    run = untrained("lp-ft", "--model.start", str(probes[0]))
    assert "start_sha256" in json.loads((run / "training.json").read_text())["inputs"]
    # the same weights under a different name are the same
    untrained("lp-ft", "--model.start", str(probes[1]))
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        untrained("lp-ft", "--model.start", str(probes[2]))
    assert "was built on other weights: start_sha256" in capsys.readouterr().err


def test_a_run_whose_held_out_images_show_one_class_finishes(untrained, monkeypatch):
    # its gallery would have one picture, which no other image can fill
    def shown(labels, samples, count):
        return one_of_each_class(np.zeros_like(labels), samples, count)

    monkeypatch.setattr(pictures, "one_of_each_class", shown)
    run = untrained("object-mask-multi-fill")
    assert (run / "training.json").exists()
    assert not (run / "gallery.npz").exists()


def test_other_pretrained_weights_under_a_started_run(train, capsys, monkeypatch):
    run = train("vanilla", "--optim.epochs", "1", name="run")
    (run / "training.json").unlink()
    monkeypatch.setattr(build, "tower_sha256", lambda model: "another")
    with pytest.raises(SystemExit):
        train("vanilla", "--optim.epochs", "1", name="run")
    assert "pretrained_sha256" in capsys.readouterr().err


@pytest.fixture
def moved_data(tiny_data, tmp_path):
    """A data root of the test's own."""
    return shutil.copytree(tiny_data, tmp_path / "data")


@pytest.mark.parametrize("name", ["", "imagenet-val"])
def test_a_run_never_goes_into_the_data(untrained, moved_data, capsys, name):
    before = sorted(moved_data.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        untrained("vanilla", "--data", str(moved_data), name=f"data/{name}")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --run-dir {moved_data / name} holds packed data (")
    assert line.endswith("name a folder of the run's own")
    assert sorted(moved_data.rglob("*")) == before
    # its subfolders are the user's choice, and none of the sets
    untrained("vanilla", "--data", str(moved_data), name="data/runs/first")


def with_other_order(url: Path) -> None:
    """Replace a set's manifest by one with its classes in a different order."""
    manifest = Manifest.load(str(url))
    dataclasses.replace(manifest, classes=manifest.classes[::-1]).save(str(url))


def test_a_finished_run_refuses_other_data(untrained, moved_data, capsys):
    options = ("--data", str(moved_data))
    run = untrained("vanilla", *options)
    url = moved_data / "imagenet-train"
    before = Manifest.load(str(url)).sha256
    untrained("vanilla", *options)
    assert capsys.readouterr().out.endswith(f"run already finished: {run} (in fp32)\n")
    with_other_order(url)
    with pytest.raises(SystemExit) as stopped:
        untrained("vanilla", *options)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run} is a finished run")
    hashes = f"hash was {before[:12]}, it is {Manifest.load(str(url)).sha256[:12]}"
    for part in (str(url), hashes, "Restore the data", "choose another --run-dir"):
        assert part in line
    # a run of an older rft recorded no hash
    record = json.loads((run / "training.json").read_text())
    del record["manifest_sha256"]
    (run / "training.json").write_text(json.dumps(record))
    untrained("vanilla", *options)
    assert "already finished" in capsys.readouterr().out


def test_a_finished_run_whose_data_is_gone_is_still_finished(untrained, moved_data, capsys):
    options = ("--data", str(moved_data))
    run = untrained("vanilla", *options)
    shutil.rmtree(moved_data)
    capsys.readouterr()
    untrained("vanilla", *options)
    (line,) = unstamped(capsys.readouterr().out).splitlines()
    start = f"run already finished: {run} (in fp32; its data could not be compared: no packed"
    assert line.startswith(start)


@pytest.mark.parametrize("record", ["null", "[]", '"done"', '{"inputs": null}', "{"])
def test_a_damaged_record_is_no_finished_run(untrained, capsys, record):
    run = untrained("vanilla")
    (run / "training.json").write_text(record)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        untrained("vanilla")
    assert stopped.value.code == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert str(run / "training.json") in line
    assert "finished:" not in said.out


@pytest.mark.parametrize("name", ["visual.conv1.weight", "text_projection"])
def test_pretrained_weights_that_are_not_finite_are_refused(
    untrained, tiny_clip, tmp_path, capsys, name
):
    folder = shutil.copytree(tiny_clip.removeprefix("local-dir:"), tmp_path / "clip")
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    state[name].view(-1)[3] = float("nan")
    save_file(state, file)
    with pytest.raises(SystemExit) as stopped:
        untrained("vanilla", "--model.clip", f"local-dir:{folder}")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: local-dir:{folder}: 1 of ")
    assert f"weights of {name} are not finite" in line
    assert not (tmp_path / "run").exists()
