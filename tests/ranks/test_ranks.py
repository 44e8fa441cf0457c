"""One, two and three ranks compute the same: gradients, evaluation counts, batches."""

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import torchrun

RANKS = (1, 2, 3)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict:
    """Gradients of the whole batch in one process, by recipe."""
    folder = tmp_path_factory.mktemp("single")
    found = {}
    for recipe in ("vanilla", "no-mask"):
        path = folder / f"{recipe}.pt"
        torchrun(1, "tests.ranks.gradients", recipe, "1", str(path))
        found[recipe] = torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("recipe", ["vanilla", "no-mask"])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 3), (2, 1), (2, 2), (3, 1)])
def test_gradients_do_not_depend_on_ranks(tmp_path, single, recipe, ranks, accumulate):
    # masks draw donors from each rank's own images, so only these recipes can be equal
    path = tmp_path / "gradients.pt"
    torchrun(ranks, "tests.ranks.gradients", recipe, str(accumulate), str(path))
    for name, value in torch.load(path, weights_only=True).items():
        expected = single[recipe][name]
        scale = expected.abs().max().clamp(min=1)
        assert (value - expected).abs().max() / scale < 2e-6, name


@pytest.fixture(scope="module")
def zero_shot(tmp_path_factory, tiny_data, tiny_clip) -> Path:
    run = tmp_path_factory.mktemp("zero") / "run"
    options = ["--data", str(tiny_data), "--run-dir", str(run), "--scale", "miniature"]
    options += ["--model.clip", tiny_clip, "--loader.held-out", "8", "--loader.batch-size", "6"]
    torchrun(1, "rft.train", "zero-shot", *options)
    return run


@pytest.mark.parametrize("ranks", RANKS)
def test_counts_do_not_depend_on_ranks(tmp_path, tiny_data, zero_shot, ranks):
    # 28, 20 and 12 images in batches of 5: ranks get unequal parts and a short last batch
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((zero_shot / "checkpoints" / "best.safetensors").read_bytes())
    sets = ("imagenet-val", "imagenet-r", "imagenet-a")
    options = ["--data", str(tiny_data), "--batch-size", "5", "--workers", "0", "--sets", *sets]
    torchrun(ranks, "rft.evaluate", str(copy), *options)
    results = json.loads((tmp_path / "model.results.json").read_text())["sets"]
    assert [results[name]["total"] for name in sets] == [28, 20, 12]
    expected = zero_shot / "expected.json"
    counts = {name: entry["correct"] for name, entry in results.items()}
    if ranks == 1:
        expected.write_text(json.dumps(counts))
        assert 0 < sum(counts.values()) < 60
    assert counts == json.loads(expected.read_text())
