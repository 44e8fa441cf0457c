"""Towers that run once: shared by several models, or with features kept for the next evaluation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import tiny_world
from rft.clip.classifier import save_classifier
from rft.dist import World
from rft.evaluate import command, count
from rft.evaluate.checkpoints import load_checkpoints
from rft.evaluate.count import count_correct, predict
from rft.loading.dataset import PackedDataset
from tests import tiny
from tests.conftest import build_model

CPU = torch.device("cpu")
WORLD = World(rank=0, size=1, local_rank=0)
SETS = ("imagenet-val", "imagenet-r", "imagenet-a")


def probe(path: Path, tower: int, head: int) -> Path:
    """Write a model with one seed's tower and another's head, which distinguishes images."""
    model = build_model(tower, classes=4)
    generator = torch.Generator().manual_seed(8)
    noise = torch.randint(256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        mean_E = F.normalize(model.features(model.patches(noise)), dim=-1).mean(dim=0)
        model.head = build_model(head, classes=4).head
        # random features all point the same way
        model.head.bias.copy_(-model.head.weight @ mean_E)
    save_classifier(str(path), model, {"step": "0"}, tiny_world.LABELS.classes)
    return path


@pytest.fixture
def probes(tmp_path) -> list[Path]:
    return [probe(tmp_path / f"{head}.safetensors", 0, head) for head in range(3)]


def evaluate(paths: list[Path], data: Path, *options: object) -> dict[str, dict]:
    """Evaluate from scratch; return the counts by model and set."""
    found = {}
    for path in paths:
        path.with_suffix(".results.json").unlink(missing_ok=True)
    small = ("--workers", 0, "--batch-size", 5, "--sets", *SETS)
    tiny.call(command, *paths, "--data", data, *options, *small)
    for path in paths:
        sets = json.loads(path.with_suffix(".results.json").read_text())["sets"]
        found[path.name] = {name: entry["correct"] for name, entry in sets.items()}
    return found


@pytest.mark.slow
def test_models_of_one_tower_forward_it_once(tmp_path, tiny_data, probes):
    other = probe(tmp_path / "other.safetensors", 1, 0)
    packed = PackedDataset(f"{tiny_data}/imagenet-r")

    def flops_and_counts(*paths: Path) -> tuple[int, list]:
        _, models = load_checkpoints(paths, WORLD, CPU)
        with FlopCounterMode(display=False) as counter:
            counts = count_correct(models, packed, image_size=16, world=WORLD, device=CPU)
        return counter.get_total_flops(), counts

    one, first = flops_and_counts(probes[0])
    three, counts = flops_and_counts(*probes)
    both, mixed = flops_and_counts(probes[0], other, probes[1])
    head = 2 * len(packed) * 12 * 4
    assert three == one + 2 * head
    assert both == 2 * one + head
    alone = [flops_and_counts(path)[1][0] for path in probes]
    assert counts == alone
    assert mixed == [alone[0], flops_and_counts(other)[1][0], alone[1]]
    assert first == alone[:1]
    assert len(set(alone)) > 1


def test_an_architecture_makes_a_different_tower(tmp_path, probes):
    model = build_model(0, classes=4)
    changed = {**model.architecture.__dict__, "mean": (0.5, 0.5, 0.5)}
    model.architecture = type(model.architecture)(**changed)
    path = tmp_path / "changed.safetensors"
    save_classifier(str(path), model, {"step": "0"}, tiny_world.LABELS.classes)
    _, (first, second) = load_checkpoints([probes[0], path], WORLD, CPU)
    assert first.visual is not second.visual


@pytest.mark.slow
def test_an_evaluation_reads_the_features_of_one_before(tmp_path, tiny_data, probes):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    kept = ("--features-dir", tmp_path / "kept")
    expected = evaluate(probes, data)
    assert len({str(counts) for counts in expected.values()}) == len(probes)
    assert evaluate(probes[:1], data, *kept).items() <= expected.items()
    assert evaluate(probes, data, *kept) == expected
    for name in SETS:
        for path in (data / name).glob("*.tar"):
            path.write_bytes(bytes(path.stat().st_size))
    # no image is read, even for a head that is new
    new = probe(tmp_path / "new.safetensors", 0, 7)
    assert evaluate([*probes, new], data, *kept).items() >= expected.items()
    with pytest.raises(SystemExit):
        evaluate(probes, data)
    # a different tower, or different batches, need the images
    with pytest.raises(SystemExit):
        evaluate([probe(tmp_path / "other.safetensors", 1, 0)], data, *kept)
    with pytest.raises(SystemExit):
        evaluate(probes, data, *kept, "--features-gb", 1e-6)


@pytest.mark.slow
def test_damaged_features_are_computed_again(tmp_path, tiny_data, probes, capsys):
    kept = ("--features-dir", tmp_path / "kept")
    expected = evaluate(probes, tiny_data, *kept)
    for path in (tmp_path / "kept").iterdir():
        data = bytearray(path.read_bytes())
        data[60:200] = bytes(140)
        path.write_bytes(data)
    capsys.readouterr()
    assert evaluate(probes, tiny_data, *kept) == expected
    assert "damaged or from a different file" in capsys.readouterr().err
    assert evaluate(probes, tiny_data, *kept) == expected
    assert "damaged" not in capsys.readouterr().err


def test_a_url_is_no_folder_for_features(tmp_path, refused):
    words = (tmp_path / "run", "--data", tmp_path, "--features-dir", "s3://bucket/kept")
    assert "--features-dir is s3:" in refused(command, *words)


def test_rows_do_not_depend_on_what_is_scored_together(tiny_data, monkeypatch):
    packed = PackedDataset(str(tiny_data / "imagenet-train"))
    models = [build_model(seed, len(packed.manifest.classes)).eval() for seed in range(3)]
    options = {"image_size": 16, "world": WORLD, "device": CPU, "logits": np.float16}
    options["temperatures"] = [None, 0.5, 2.0]
    whole = predict(models, packed, **options)
    # each forward separately, then the first together with the last
    for logits in (1, 3 * 64 * 4 + 1):
        monkeypatch.setattr(count, "SCORED_TOGETHER", logits)
        apart = predict(models, packed, **options)
        for one, other in zip(whole, apart, strict=True):
            assert one.predictions.to_bytes() == other.predictions.to_bytes()
            assert np.array_equal(one.logits_NK, other.logits_NK)
    # and each model has its own temperature
    for model, temperature, one in zip(models, options["temperatures"], whole, strict=True):
        (alone,) = predict([model], packed, **{**options, "temperatures": [temperature]})
        assert alone.predictions.to_bytes() == one.predictions.to_bytes()
