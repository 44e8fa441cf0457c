"""The output of `--dry-run`, compared with a real step and run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from rft import cli, commands, recipes
from rft.config import Config
from rft.dist import World
from rft.train import build
from rft.train.estimate import (
    checkpoint_steps,
    configuration,
    estimate,
    possible_ranks,
    size,
    traffic,
)
from rft.train.finish import run_job
from rft.train.job import Job
from rft.train.stop import StopRequest

ALONE = World(rank=0, size=1, local_rank=0)
CPU = torch.device("cpu")


@pytest.fixture
def arguments(tiny_data, tiny_clip, tmp_path) -> list[str]:
    return [
        *("object-mask-single-fill", "--data", str(tiny_data), "--run-dir", str(tmp_path / "run")),
        *("--scale", "miniature", "--model.clip", tiny_clip, "--loader.batch-size", "12"),
        *("--loader.held-out", "16", "--optim.epochs", "3", "--log.checkpoint-steps", "4"),
    ]


@pytest.fixture
def prepare(arguments):
    def job(*options: str, recipe: str = "object-mask-single-fill") -> Job:
        default = replace(recipes.build(recipe, scale="miniature"), precision="fp32")
        config = cli.parse(Config, args=[*arguments[1:], *options], default=default)
        return build.prepare(config, ALONE, CPU)

    return job


def test_numbers_of_ranks_that_can_share_the_batch(prepare):
    config = prepare().config
    assert possible_ranks(config, 1) == [1, 2, 4]
    assert possible_ranks(config, 3) == [1, 2, 3, 4]
    in_parts = replace(config, optim=replace(config.optim, accumulate=3))
    # a single image in a micro-batch has no other to be filled from
    assert possible_ranks(in_parts, 1) == [1, 2]


@pytest.mark.slow
def test_what_it_says(prepare, arguments, tmp_path, monkeypatch):
    job = prepare("--seed", "7")
    text = estimate(job, [*arguments, "--seed", "7"])
    assert "* seed                     7  (the recipe's is 0)" in text
    assert "  optim.lr                 0.0003\n" in text
    assert f"    run                      {tmp_path / 'run'}\n" in text
    assert "76 samples of 4 classes in 4 shards" in text
    assert "60 to train on, 16 held out" in text
    assert "5 per epoch, 15 in 3 epochs of global batch 12" in text
    assert "counted by torch's tracker; GPU context" in text
    assert re.search(r"\n  ranks  images.*\n +1 +12 +12 +[\d.]+ kB\n +2 +6 +6 ", text)
    assert "writes 6 checkpoints of " in text
    assert text.splitlines()[-1].startswith("  python -m rft.train object-mask-single-fill --data ")
    assert not (tmp_path / "run").exists()

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "progress.json").write_text(json.dumps({"step": 12, "of": 15}))
    assert "12 of them are done" in estimate(job, arguments)
    # in the spelling of the running command
    monkeypatch.setenv(commands.STARTED, "rft train")
    assert "\n  rft train object-mask-single-fill --data " in estimate(job, arguments)


def test_zero_shot_trains_nothing(prepare):
    job = prepare("--optim.epochs", "0", recipe="zero-shot")
    text = estimate(job, ["zero-shot"])
    assert "nothing is trained" in text
    assert "writes 0 checkpoints" in text


@pytest.mark.slow
def test_what_is_written_is_what_was_told(prepare):
    job = prepare("--log.keep", "100", "--log.every-steps", "2")
    run_job(job, StopRequest(""))
    run = Path(job.config.run)
    names = [path.name for path in run.glob("checkpoints/step-*.pt")]
    steps = checkpoint_steps(job.total_steps, job.batches.plan.steps_per_epoch, 4)
    assert {f"step-{step:08d}.pt" for step in steps} == set(names)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    told = "\n".join(traffic(job))
    assert f"writes {len(names)} checkpoints of " in told
    assert f"writes {len(lines)} lines of metrics, " in told


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["vanilla", "ftp"])
def test_a_checkpoint_has_the_size_of_the_estimate(prepare, recipe):
    """FTP keeps one tensor more for each weight than AdamW does."""
    job = prepare("--optim.epochs", "1", recipe=recipe)
    run_job(job, StopRequest(""))
    (path, *_) = Path(job.config.run).glob("checkpoints/step-*.pt")
    (amount, unit) = re.search(r"checkpoints of ([\d.]+) (\w+) ", "\n".join(traffic(job))).groups()
    assert unit == "kB"
    kept = pytree.tree_leaves(torch.load(path, weights_only=True))
    tensors = sum(leaf.nbytes for leaf in kept if isinstance(leaf, torch.Tensor))
    # the random state and the counts of steps are not estimated
    assert 1000 * float(amount) == pytest.approx(tensors, rel=0.04)


def test_sizes():
    assert [size(count) for count in (12, 1234.4, 5.6e9)] == ["12 bytes", "1.2 kB", "5.6 GB"]


def test_the_configuration_is_whole(prepare):
    config = prepare().config
    names = [line[2:].split()[0] for line in configuration(config)]
    assert "cluster.stop_file" in names
    assert len(names) == len(set(names)) > 50
