"""A training in this process, as several tests here start it again and again."""

from pathlib import Path

import pytest

from rft.train import command as train_command
from tests import tiny


@pytest.fixture
def train(tiny_data, tiny_clip, tmp_path):
    """Run `rft.train` for 30 steps in this process; returns the run folder."""

    def run(name: str = "run", *options: str) -> Path:
        folder = tmp_path / name
        tiny.call(
            train_command,
            *("object-mask-single-fill", "--data", tiny_data, "--run-dir", folder),
            *("--scale", "miniature", "--model.clip", tiny_clip, "--loader.workers", "0"),
            *("--loader.held-out", "16", "--loader.batch-size", "6", "--optim.epochs", "3"),
            *("--log.checkpoint-steps", "4", "--log.every-steps", "3", *options),
        )
        return folder

    return run
