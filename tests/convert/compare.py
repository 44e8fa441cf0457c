"""Comparisons shared by the tests of imports and exports."""

import json
from pathlib import Path

import torch

from rft.clip.classifier import load_state
from rft.runs.filenames import SELECTED


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return load_state(run / SELECTED)[0]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def document(path: Path) -> dict:
    return json.loads(path.read_text())
