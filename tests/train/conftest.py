"""Fixtures of several tests here: a job, and a training of some length."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rft import cli, recipes
from rft.config import Config
from rft.dist import World
from rft.train import build
from rft.train.job import Job

ALONE = World(rank=0, size=1, local_rank=0)
CPU = torch.device("cpu")


@pytest.fixture
def three_epochs(train):
    """Train 30 steps with checkpoints in between; return the run folder."""

    def run(name: str = "run", *options: object) -> Path:
        length = ("--loader.held-out", 16, "--optim.epochs", 3)
        often = ("--log.checkpoint-steps", 4, "--log.every-steps", 3)
        return train("object-mask-single-fill", *length, *often, *options, name=name)

    return run


@pytest.fixture
def prepare(tiny_data, tiny_clip, tmp_path):
    """Prepare a job of one rank on the tiny world, by the options of `rft.train`."""

    def job(*options: str, recipe: str = "object-mask-single-fill") -> Job:
        default = replace(recipes.build(recipe, scale="miniature"), precision="fp32")
        words = ["--data", str(tiny_data), "--run-dir", str(tmp_path / "run")]
        words += ["--model.clip", tiny_clip, "--loader.batch-size", "24"]
        words += ["--loader.held-out", "16", *options]
        return build.prepare(cli.parse(Config, args=words, default=default), ALONE, CPU)

    return job
