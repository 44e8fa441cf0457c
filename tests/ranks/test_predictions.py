"""Predictions are byte-identical files for any number of ranks and any batch size."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.tiny_world import LABELS, write_images
from rft.clip.classifier import save_classifier
from rft.evaluate import command
from rft.evaluate.forward import TOGETHER, forward
from rft.loading.batches import EvaluationBatches, rank_part
from rft.loading.dataset import PackedDataset
from rft.packing.pack import Options, pack
from rft.runs.predictions import path_of, read
from rft.storage import files
from tests.conftest import build_model
from tests.tiny import call, torchrun

pytestmark = pytest.mark.slow
SET = "imagenet-val"


def weights(path: Path, seed: int = 0) -> Path:
    model = build_model(seed, classes=len(LABELS.ids))
    save_classifier(str(path), model, {"step": "1"}, LABELS.classes)
    return path


IMAGES = 4 * 38


@pytest.fixture(scope="module")
def large_data(tmp_path_factory) -> Path:
    """A set of several forwards: the last one is incomplete, and each of three ranks has one."""
    root = tmp_path_factory.mktemp("large")
    write_images(root / "images", SET, IMAGES // len(LABELS.ids))
    options = Options(encoding="pixels", size=16, shard_mb=0.05, workers=1)
    pack(SET, str(root / "images"), str(root / "shards"), LABELS, options)
    return root / "shards"


def written(folder: Path, data: Path, ranks: int, *options: str) -> dict[str, bytes]:
    """Evaluate two models; return the written files, results without provenance."""
    folder.mkdir()
    models = [weights(folder / f"{seed}.safetensors", seed) for seed in (0, 1)]
    words = ["rft.evaluate", *map(str, models), "--data", str(data), "--sets", SET]
    words += ["--workers", "0", "--device", "cpu", "--logits", *options]
    assert torchrun(ranks, *words).returncode == 0
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            document = json.loads(path.read_text())
            del document["provenance"]
            found[path.name] = json.dumps(document).encode()
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_ranks_and_batches_do_not_change_a_byte(tmp_path, large_data):
    expected = written(tmp_path / "one", large_data, 1)
    assert sorted(expected) == sorted(
        [
            *(
                f"{seed}.predictions/{SET}{end}"
                for seed in (0, 1)
                for end in (".npz", ".logits.npy")
            ),
            *(f"{seed}.{end}" for seed in (0, 1) for end in ("results.json", "safetensors")),
        ]
    )
    for ranks in (2, 3):
        assert written(tmp_path / f"{ranks}", large_data, ranks) == expected, ranks
    for size in ("1", "64", "100", "1000"):
        assert written(tmp_path / f"b{size}", large_data, 1, "--batch-size", size) == expected, size


def test_a_file_is_what_the_page_says(tmp_path, large_data):
    model = weights(tmp_path / "model.safetensors")
    options = ("--sets", SET, "--workers", "0", "--device", "cpu", "--logits")
    call(command, model, "--data", large_data, *options)
    path = path_of(model, SET)
    # the code of docs/evaluation.md
    table = pd.DataFrame(dict(np.load(path)))
    results = json.loads((tmp_path / "model.results.json").read_text())["sets"][SET]
    assert results["predictions_sha256"] == files.sha256_file(path)
    assert len(table) == results["total"] == IMAGES
    assert (table["rank"] < 1).sum() == results["correct"]
    assert table["key"].is_unique
    logits_NK = np.load(tmp_path / "model.predictions" / f"{SET}.logits.npy").astype(np.float64)
    assert logits_NK.shape == (IMAGES, len(LABELS.ids))
    probability_NK = np.exp(logits_NK - np.logaddexp.reduce(logits_NK, axis=1, keepdims=True))
    # logits in half precision are accurate to three digits
    assert table["confidence"].to_numpy() == pytest.approx(probability_NK.max(axis=1), rel=0.05)
    own_N = probability_NK[np.arange(IMAGES), table["label"]]
    assert np.exp(table["log_likelihood"]).to_numpy() == pytest.approx(own_N, rel=0.05, abs=1e-6)
    assert read(path, IMAGES, results["predictions_sha256"]).rank.tolist() == table["rank"].tolist()


def test_what_is_there_is_not_made_anew(tmp_path, large_data, capsys):
    model = weights(tmp_path / "model.safetensors")
    words = (model, "--data", large_data, "--sets", SET, "--workers", "0", "--device", "cpu")
    call(command, *words)
    first = path_of(model, SET).stat().st_mtime_ns
    call(command, *words)
    assert "nothing to do" in capsys.readouterr().out
    assert path_of(model, SET).stat().st_mtime_ns == first
    # of a different model, or damaged: recomputed
    data = path_of(model, SET).read_bytes()
    path_of(model, SET).write_bytes(data[:-1])
    call(command, *words)
    assert path_of(model, SET).read_bytes() == data
    path_of(model, SET).unlink()
    call(command, *words)
    assert path_of(model, SET).read_bytes() == data
    # logits were not requested before
    call(command, *words, "--logits")
    assert (tmp_path / "model.predictions" / f"{SET}.logits.npy").is_file()
    assert path_of(model, SET).read_bytes() == data
    call(command, *words)
    results = json.loads((tmp_path / "model.results.json").read_text())["sets"][SET]
    assert results["logits_sha256"]


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("batch_size", [1, 64, 100, 1000])
def test_a_forward_has_the_same_images_whatever_the_batch(large_data, batch_size, ranks):
    """On this CPU a row's bits do not depend on its neighbours; on a GPU they may."""
    sizes = []

    class Recording(torch.nn.Module):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images_BCHW))
            return torch.zeros(len(images_BCHW), len(LABELS.ids))

    packed = PackedDataset(f"{large_data}/{SET}")
    for rank in range(ranks):
        part = rank_part(len(packed), rank, ranks, TOGETHER)
        batches = EvaluationBatches(
            packed,
            np.arange(len(packed))[part],
            image_size=16,
            batch_size=-(-batch_size // TOGETHER) * TOGETHER,
        )
        cpu = torch.device("cpu")
        for _ in forward([Recording()], batches, part.start, {}, workers=0, device=cpu):
            pass
    assert sizes == [64, 64, 24]
