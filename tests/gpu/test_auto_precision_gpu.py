"""The choice of `--precision auto` on this machine's GPU."""

import json

import pytest
import torch

from rft import dist
from rft.train import command as train_command
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def test_native_bf16_or_fp32(tiny_data, tiny_clip, tmp_path, capsys):
    native = torch.cuda.get_device_capability() >= (8, 0)
    assert dist.has_bf16(torch.device("cuda", 0)) == native
    run, expected = tmp_path / "run", "bf16" if native else "fp32"
    tiny.call(
        train_command,
        *("vanilla", "--data", tiny_data, "--run-dir", run, "--scale", "miniature"),
        *("--model.clip", tiny_clip, "--loader.batch-size", "6", "--loader.held-out", "0"),
        *("--optim.epochs", "1"),
    )
    assert f"on 1 x cuda, {expected} (auto: " in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["precision"] == expected
