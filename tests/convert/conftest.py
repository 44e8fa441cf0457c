"""Conversions in this process, and the third-party files that they read."""

from functools import partial
from pathlib import Path

import pytest
import torch

from rft.convert import command as convert_command
from tests import formats
from tests.formats import known_models  # noqa: F401
from tests.tiny import call


@pytest.fixture
def convert(capsys):
    """Run a conversion in this process; return its output."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        call(convert_command, *arguments)
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(refused):
    """Run an invalid conversion; return its one-line error."""
    return partial(refused, convert_command)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return formats.build_state()


@pytest.fixture
def released(tmp_path, state) -> Path:
    formats.write_released(tmp_path / "ckpt-best.pt", state)
    return tmp_path / "ckpt-best.pt"


@pytest.fixture
def openai(tmp_path) -> Path:
    formats.write_openai(tmp_path / "openai.pt")
    return tmp_path / "openai.pt"


@pytest.fixture
def run(convert, released, tmp_path) -> Path:
    """An imported run folder."""
    convert("import", released, "--out", tmp_path / "run", "--clip", formats.NAME)
    return tmp_path / "run"
