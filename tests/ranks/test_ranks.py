"""One, two and three ranks compute the same: gradients, evaluation counts, batches."""

import functools
import json
from pathlib import Path

import pytest
import torch

from tests.tiny import torchrun

RANKS = (1, 2, 3)


def gradients(folder: Path, recipe: str, donors: str, ranks: int, accumulate: int) -> dict:
    path = folder / f"{recipe}-{donors}-{ranks}-{accumulate}.pt"
    torchrun(ranks, "tests.ranks.gradients", recipe, donors, str(accumulate), str(path))
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Gradients of the whole batch in one process, by recipe and donor pool."""
    folder = tmp_path_factory.mktemp("single")
    return functools.cache(lambda recipe, donors: gradients(folder, recipe, donors, 1, 1))


def largest_difference(found: dict, expected: dict) -> float:
    """The largest difference, relative to the largest entry of its own tensor."""
    assert found.keys() == expected.keys()
    return max(
        ((value - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-3)).item()
        for name, value in found.items()
    )


@pytest.mark.parametrize(
    ("recipe", "donors", "ranks", "accumulate"),
    [
        *(("vanilla", "local", *cut) for cut in ((1, 3), (2, 2), (3, 1))),
        ("no-mask", "local", 2, 2),
        *(("object-mask-multi-fill", "global", *cut) for cut in ((1, 3), (2, 2), (3, 1))),
        ("random-mask-single-fill", "global", 3, 1),
        ("linear-probe", "local", 2, 1),
    ],
)
def test_gradients_do_not_depend_on_ranks(tmp_path, single, recipe, donors, ranks, accumulate):
    # with local donors a fill depends on the cut: only recipes without one can be equal
    found = gradients(tmp_path, recipe, donors, ranks, accumulate)
    assert largest_difference(found, single(recipe, donors)) < 1e-6


def test_local_donors_depend_on_ranks(tmp_path, single):
    # what docs/paper.md says of the donor pool, and what makes the test above able to fail
    recipe = "object-mask-multi-fill"
    found = gradients(tmp_path, recipe, "local", 2, 1)
    assert largest_difference(found, single(recipe, "local")) > 1e-4


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
