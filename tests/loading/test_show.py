"""`rft.data.show` prints the samples of a step, without the run."""

import io
import json
import shutil
import sys

import numpy as np
import pytest

from rft import cli, recipes
from rft.loading.batches import TrainingBatches, plan_training
from rft.loading.dataset import PackedDataset
from rft.loading.show import main
from rft.storage import files
from rft.storage.arrays import read_npz


def show(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["show", *arguments])
    try:
        cli.run(main)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return (code, *capsys.readouterr())


@pytest.fixture
def run(tiny_data, tmp_path) -> str:
    config = recipes.build("no-mask", scale="miniature", data=str(tiny_data), run=str(tmp_path))
    document = config.to_dict()
    document["loader"].update(batch_size=12, held_out=8, streams=2, block_shards=2)
    files.write_json(str(tmp_path / "config.json"), document)
    return str(tmp_path)


def test_it_names_what_each_rank_reads(run, tiny_data, monkeypatch, capsys):
    code, out, _ = show(
        monkeypatch, capsys, run, "--epoch", "2", "--step", "1", "--world-size", "3"
    )
    assert code == 0
    rows = [line.split() for line in out.splitlines()[2:]]
    config = files.read_document(f"{run}/config.json", recipes.Config)
    packed = PackedDataset(str(tiny_data / "imagenet-train"))
    plan, samples, held_out = plan_training(packed, config)
    for rank in range(3):
        batches = TrainingBatches(packed, samples, plan, image_size=0, rank=rank, world_size=3)
        mine = batches.samples_of(2 * plan.steps_per_epoch + 1)
        assert not np.isin(mine, held_out).any()
        expected = [packed.key(sample) for sample in mine]
        assert [row[2] for row in rows if row[1] == str(rank)] == expected


def test_mistakes_are_one_line(run, monkeypatch, capsys):
    for arguments, message in (
        ([run, "--step", "99"], "there is no step 99 in epoch 0"),
        ([run, "--step", "0", "--world-size", "5"], "--world-size must divide the batch of 12"),
        ([f"{run}/none", "--step", "0"], "is not a run folder"),
    ):
        code, _, err = show(monkeypatch, capsys, *arguments)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


NAMES = ["[/red]", "[bold]x", ":wave:", "[link=http://x]y[/link]"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(run, tiny_data, tmp_path, monkeypatch, capsys, name):
    """They come from a manifest and an index, and are not interpreted as rich markup."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data / "imagenet-train", data / "imagenet-train")
    path = data / "imagenet-train" / "manifest.json"
    manifest = json.loads(path.read_text())
    index = read_npz((path.parent / "index.npz").read_bytes(), 2**20)
    keys = np.array([f"{name}{number}".encode() for number in range(len(index["key"]))])
    stream = io.BytesIO()
    np.savez(stream, **{**index, "key": keys})
    (path.parent / "index.npz").write_bytes(stream.getvalue())
    manifest["classes"] = [name.replace("/", "|") + text for text in manifest["classes"]]
    manifest["index_sha256"] = files.sha256_bytes(stream.getvalue())
    path.write_text(json.dumps(manifest))
    code, out, err = show(monkeypatch, capsys, run, "--step", "0", "--data", str(data))
    assert (code, err) == (0, "")
    for line in out.splitlines()[2:]:
        assert line.split()[2].startswith(name)
        assert f" {name.replace('/', '|')}" in line
