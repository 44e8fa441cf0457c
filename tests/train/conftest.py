"""A training of some length, as several tests here start it again and again."""

from pathlib import Path

import pytest


@pytest.fixture
def three_epochs(train):
    """Train 30 steps with checkpoints in between; returns the run folder."""

    def run(name: str = "run", *options: object) -> Path:
        length = ("--loader.held-out", 16, "--optim.epochs", 3)
        often = ("--log.checkpoint-steps", 4, "--log.every-steps", 3)
        return train("object-mask-single-fill", *length, *often, *options, name=name)

    return run
