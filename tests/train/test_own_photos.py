"""From a folder of own photos to a fine-tuned and evaluated model, by the commands alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tiny_world
from rft.config import Config
from rft.loading.dataset import PackedDataset
from rft.storage import files
from rft.train import command as train_command
from tests import tiny

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.slow
def test_own_photos_are_packed_trained_on_and_evaluated(tmp_path, tiny_clip):
    tiny_world.write_images(tmp_path, "photos", 20)
    photos = tmp_path / "photos"
    for wnid, colour in zip(tiny_world.LABELS.ids, tiny_world.COLOURS, strict=True):
        (photos / wnid).rename(photos / f"my {colour}s")
    classes = {
        "ids": [f"my {colour}s" for colour in tiny_world.COLOURS],
        "names": list(tiny_world.COLOURS),
        "templates": ["a {c} square"],
    }
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    command = [sys.executable, TOOLS / "shard_folder.py", "--source", photos]
    command += ["--out", tmp_path / "shards", "--classes", tmp_path / "classes.json"]
    packing = subprocess.run(
        [*map(str, command)], env=tiny_world.environment(), capture_output=True, text=True
    )
    assert packing.returncode == 0, packing.stderr
    train, test = (PackedDataset(str(tmp_path / "shards" / name)) for name in ("train", "test"))
    assert len(train) == 16 * len(tiny_world.COLOURS)
    assert len(test) == 4 * len(tiny_world.COLOURS)
    shutil.rmtree(photos)

    # the tool's `next:` line, with a model that needs no download
    (line,) = (line for line in packing.stdout.splitlines() if "rft.train" in line)
    words = line.split("-m rft.train ")[1].split()
    words[words.index("--run-dir") + 1] = str(tmp_path / "run")
    small = ["--model.clip", tiny_clip, "--optim.epochs", "2", "--optim.warmup-steps", "12"]
    small += ["--loader.workers", "1", "--device", "cpu"]
    training = tiny.torchrun(2, "rft.train", *words, *small)
    assert (tmp_path / "run" / "training.json").is_file()
    assert "--sets test" in training.stdout
    # one rank prints how the size of the set affects the run, and warnings
    assert training.stdout.count("--scale small for 64 images of 4 classes on 2 ranks:") == 1
    assert training.stderr.count("WARNING: the run has 16 steps, 12 of them warm-up") == 1
    tiny.torchrun(
        2,
        "rft.evaluate",
        *(str(tmp_path / "run"), "--data", str(tmp_path / "shards"), "--sets", "test"),
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["sets"]["test"]["total"] == len(test)
    assert results["sets"]["test"]["correct"] > 0


@pytest.fixture
def small(tiny_data, tiny_clip, tmp_path, capsys):
    """Run `rft.train --scale small` in this process; return its output."""

    def run(*options: str) -> str:
        capsys.readouterr()
        tiny.call(
            train_command,
            *("vanilla", "--data", tiny_data, "--run-dir", tmp_path / "run", "--scale", "small"),
            *("--model.clip", tiny_clip, "--loader.workers", "0", *options),
        )
        return "".join(capsys.readouterr())

    return run


RULE = """--scale small for 76 images of 4 classes on 1 rank:
  loader.held_out           0  (too few to select by: the last model is used)
  loader.batch_size         8  (the smallest; 9 of 16 steps per epoch)
  optim.warmup_steps        9  (1/10 of 90 steps, at most 500)
  log.checkpoint_steps      9  (an epoch, at most 500 steps)
""".splitlines()


@pytest.mark.slow
def test_the_size_of_the_set_decides_and_nothing_claims_to_select(small, tmp_path):
    dry = small("--dry-run")
    assert not (tmp_path / "run").exists()
    said = small()
    for line in RULE:
        assert f"  {line}" in dry.splitlines()
        assert line in tiny.unstamped(said).splitlines()
    # none of them differs from the recipe's default
    marked = {line.split()[1] for line in dry.splitlines() if line.startswith("  * ")}
    assert marked == {"model.clip", "loader.workers"}
    recorded = files.read_document(str(tmp_path / "run" / "config.json"), Config)
    assert (recorded.loader.held_out, recorded.loader.batch_size) == (0, 8)
    assert (recorded.optim.warmup_steps, recorded.log.checkpoint_steps) == (9, 9)
    assert "(the last model, of step 90: no held-out images)" in said
    for words in (dry, said):
        assert "WARNING" not in words
        assert "selected" not in words
    # the same command is the same run
    assert "run already finished" in small()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--loader.held_out=20",), "selected by 20 held-out images)"),
        (
            ("--loader.held-out", "20", "--optim.epochs", "1"),
            "the last model, of step 7: one epoch)",
        ),
        (("--optim.epochs", "0"), "(the model it started with)"),
    ],
)
def test_only_a_choice_is_called_one(small, options, words):
    said = small(*options)
    assert words in said
    assert said.count("selected") == ("selected" in words)


@pytest.mark.slow
def test_what_the_command_line_names_wins_and_a_grown_set_is_named(
    small, refused, tmp_path, tiny_data, tiny_clip
):
    options = ("--loader.batch-size=4", "--optim.epochs", "2")
    said = small(*options)
    assert (
        "  loader.batch_size         4  (given; the rule's is 8)"
        in tiny.unstamped(said).splitlines()
    )
    recorded = files.read_document(str(tmp_path / "run" / "config.json"), Config)
    assert (recorded.loader.batch_size, recorded.optim.warmup_steps) == (4, 3)
    line = refused(
        train_command,
        *("vanilla", "--data", tiny_data, "--run-dir", tmp_path / "run", "--scale", "small"),
        *("--model.clip", tiny_clip, "--loader.workers", "0", "--optim.epochs", "2"),
    )
    assert "loader.batch_size: 4 -> 8" in line
    assert "(--loader.batch-size 4 --optim.warmup-steps 3; --scale small takes them from" in line
