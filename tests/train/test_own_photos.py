"""From a folder of one's own photos to a fine-tuned and evaluated model, by the commands alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rft.data.loader import PackedDataset
from tests import tiny

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.slow
def test_own_photos_are_packed_trained_on_and_evaluated(tmp_path, tiny_clip):
    tiny.write_images(tmp_path, "photos", 20)
    photos = tmp_path / "photos"
    for wnid, colour in zip(tiny.LABELS.ids, tiny.COLOURS, strict=True):
        (photos / wnid).rename(photos / f"my {colour}s")
    classes = {
        "ids": [f"my {colour}s" for colour in tiny.COLOURS],
        "names": list(tiny.COLOURS),
        "templates": ["a {c} square"],
    }
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    command = [sys.executable, TOOLS / "shard_folder.py", "--source", photos]
    command += ["--out", tmp_path / "shards", "--classes", tmp_path / "classes.json"]
    packing = subprocess.run(
        [*map(str, command)], env=tiny.environment(), capture_output=True, text=True
    )
    assert packing.returncode == 0, packing.stderr
    train, test = (PackedDataset(str(tmp_path / "shards" / name)) for name in ("train", "test"))
    assert len(train) == 16 * len(tiny.COLOURS)
    assert len(test) == 4 * len(tiny.COLOURS)
    shutil.rmtree(photos)

    # what the tool says to do next, with a model that needs no download
    (line,) = (line for line in packing.stdout.splitlines() if "rft.train" in line)
    words = line.split("-m rft.train ")[1].split()
    words[words.index("--run-dir") + 1] = str(tmp_path / "run")
    small = ["--model.clip", tiny_clip, "--loader.batch-size", "8", "--optim.epochs", "2"]
    small += ["--loader.workers", "1", "--device", "cpu"]
    training = tiny.torchrun(2, "rft.train", *words, *small)
    assert (tmp_path / "run" / "training.json").is_file()
    assert "--sets test" in training.stdout
    tiny.torchrun(
        2,
        "rft.evaluate",
        *(str(tmp_path / "run"), "--data", str(tmp_path / "shards"), "--sets", "test"),
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["sets"]["test"]["total"] == len(test)
    assert results["sets"]["test"]["correct"] > 0
