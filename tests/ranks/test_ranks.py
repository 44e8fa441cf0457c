"""One, two and three ranks compute the same gradients and evaluation counts."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import tiny_world
from rft.clip.classifier import save_classifier
from rft.evaluate import command as evaluate_command
from tests.conftest import build_model
from tests.tiny import torchrun

pytestmark = pytest.mark.slow

CUTS = ((1, 3), (2, 2), (3, 1))  # ranks and micro-batches
EQUAL = (
    *(("vanilla", "local", *cut) for cut in CUTS),
    ("no-mask", "local", 2, 2),
    *(("object-mask-multi-fill", "global", *cut) for cut in CUTS),
    ("random-mask-single-fill", "global", 3, 1),
    ("linear-probe", "local", 2, 1),
    ("l2-sp", "local", 2, 2),
    # the negatives of FLYP's loss are those of the complete batch, on any rank
    ("flyp", "local", 2, 1),
    ("flyp", "local", 3, 1),
    ("flyp-on-counterfactuals", "global", 3, 1),
    ("every-text", "local", 2, 1),
    ("car-ft", "local", 2, 2),
    ("lipsum-ft", "local", 3, 1),
)
# with local donors a fill depends on the split: only recipes without one can be equal
DIFFERENT = ("object-mask-multi-fill", "local", 2, 1)
WHOLE = (1, 1)  # each is compared with the batch in one piece

Gradients = Callable[[str, str, int, int], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> Gradients:
    """Gradients by recipe, donors, ranks and micro-batches; all of so many ranks in one launch."""
    cases = {*EQUAL, DIFFERENT}
    cases |= {(recipe, donors, *WHOLE) for recipe, donors, *_ in cases}

    @functools.cache
    def launch(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{ranks}-ranks")
        mine = sorted(case for case in cases if case[2] == ranks)
        names = [f"{recipe}:{donors}:{accumulate}" for recipe, donors, _, accumulate in mine]
        torchrun(ranks, "tests.ranks.gradients", str(folder), *names)
        return folder

    def load(recipe: str, donors: str, ranks: int, accumulate: int) -> dict[str, torch.Tensor]:
        path = launch(ranks) / f"{recipe}-{donors}-{accumulate}.pt"
        return torch.load(path, weights_only=True)

    return load


def relative_distance(found: dict, expected: dict) -> float:
    """The L2 norm of the difference of two complete gradients, relative to the second's."""
    assert found.keys() == expected.keys()
    ours, theirs = (
        torch.cat([gradient[name].flatten() for name in expected]) for gradient in (found, expected)
    )
    return ((ours - theirs).norm() / theirs.norm()).item()


def largest_difference(found: dict, expected: dict) -> float:
    """The largest difference, relative to the largest entry of its own tensor."""
    assert found.keys() == expected.keys()
    return max(
        ((value - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name, value in found.items()
    )


@pytest.mark.parametrize(("recipe", "donors", "ranks", "accumulate"), EQUAL)
def test_gradients_do_not_depend_on_ranks(gradients, recipe, donors, ranks, accumulate):
    found = gradients(recipe, donors, ranks, accumulate)
    whole = gradients(recipe, donors, *WHOLE)
    assert relative_distance(found, whole) < 1e-6
    # entry by entry other orders of sums show a little more
    assert largest_difference(found, whole) < 5e-6


def test_ranks_choose_the_same_kernels(tmp_path):
    result = torchrun(2, "tests.ranks.choosing", str(tmp_path))
    found = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert found == ["layers compiled, CAM eager; tried"] * 2
    # one line of the main rank names what a different rank found
    says = "CAM compiled cannot be used here (RuntimeError: no compiler on this node); not used"
    assert (result.stdout + result.stderr).count(says) == 1


def test_gradients_lie_in_the_memory_that_ranks_exchange(gradients):
    found = gradients("vanilla", "local", 2, 2)
    # a bucket holds more than this model's gradients
    assert len({gradient.untyped_storage().data_ptr() for gradient in found.values()}) == 1


def test_local_donors_depend_on_ranks(gradients):
    # the donor pool of docs/paper.md, and the reason why the test above can fail
    recipe, donors, ranks, accumulate = DIFFERENT
    found = gradients(recipe, donors, ranks, accumulate)
    assert largest_difference(found, gradients(recipe, donors, *WHOLE)) > 1e-4


SETS = {"imagenet-val": 28, "imagenet-r": 20, "imagenet-a": 12}


def options(checkpoint: Path, data: Path) -> list[str]:
    # batches of 5: ranks get unequal parts and a short last batch
    sizes = ("--batch-size", "5", "--workers", "0")
    return [str(checkpoint), "--data", str(data), *sizes, "--sets", *SETS]


def counts(checkpoint: Path) -> dict[str, tuple[int, int]]:
    found = json.loads(checkpoint.with_suffix(".results.json").read_text())["sets"]
    return {name: (entry["correct"], entry["total"]) for name, entry in found.items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_counts_do_not_depend_on_ranks(tmp_path, tiny_data, monkeypatch, ranks):
    alone, together = tmp_path / "alone.safetensors", tmp_path / "together.safetensors"
    for path in (alone, together):
        save_classifier(
            str(path),
            build_model(classes=len(tiny_world.LABELS.ids)),
            {"step": "0"},
            tiny_world.LABELS.classes,
        )
    monkeypatch.setattr(sys, "argv", ["rft.evaluate", *options(alone, tiny_data)])
    evaluate_command.main()
    torchrun(ranks, "rft.evaluate", *options(together, tiny_data))
    expected = counts(alone)
    assert {name: total for name, (_, total) in expected.items()} == SETS
    assert 0 < sum(correct for correct, _ in expected.values()) < sum(SETS.values())
    assert counts(together) == expected
