"""Ranks that evaluate averages in memory write the same files as one process."""

import json

import pytest

from rft.clip.classifier import save_classifier
from rft.loading.dataset import PackedDataset
from tests.conftest import build_model
from tests.tiny import torchrun

pytestmark = pytest.mark.slow


def test_one_two_and_three_ranks_leave_the_same_bytes(tmp_path, tiny_data):
    classes = PackedDataset(str(tiny_data / "imagenet-val")).manifest.label_space
    models = []
    for seed in range(3):
        models.append(str(tmp_path / f"{seed}.safetensors"))
        metadata = {"step": str(5 * (seed > 0))}
        save_classifier(models[-1], build_model(seed, len(classes)), metadata, classes)
    words = ["--wise", *models[:2], "0.25", "0.75", "--soup", *models, "--logits"]
    words += ["--data", str(tiny_data), "--sets", "imagenet-train", "imagenet-a"]
    words += ["--workers", "0", "--batch-size", "10", "--device", "cpu"]
    found = []
    for ranks in (1, 2, 3):
        out = tmp_path / f"of-{ranks}"
        torchrun(ranks, "rft.evaluate", *words, "--out", str(out))
        files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for name, data in files.items():
            if name.endswith("results.json"):
                # contains the command line, with a different --out
                files[name] = json.loads(data) | {"provenance": {}}
        found.append(files)
    # config.json, results.json, predictions and logits of two sets
    assert len(found[0]) == 3 * 6
    assert found == 3 * [found[0]]
