"""Published ways to compute a wrong number (docs/evaluation.md), and the correct one.

Each test compares the faulty computation with ours, on data on which they differ.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rft.evaluate.count import score
from rft.evaluate.forward import TOGETHER
from rft.loading.batches import rank_part
from rft.packing.expected import check_count
from rft.packing.layouts import read_source
from rft.report import tables
from rft.runs.records import SetCount
from rft.sets import OOD_SETS
from rft.shards.label_space import LabelSpace


def test_objectnet_has_18574_images():
    """Trap 1: all 23.7 thousand images of the mapped folders with others."""
    imagenet = LabelSpace.imagenet()
    check_count("objectnet", 18_574, imagenet)
    with pytest.raises(ValueError, match=r"has 23,736 images here, 18,574 were published"):
        check_count("objectnet", 23_736, imagenet)


def test_a_subset_is_scored_over_its_own_classes():
    """Trap 4: R and A over 1,000 classes; a class outside the set takes the prediction."""
    logits_BK = torch.tensor([[0.2, 0.9, 0.1], [0.2, 0.1, 0.7]])
    labels_B = torch.tensor([0, 2])
    in_set_K = torch.tensor([0, -1, 1])
    faulty = (logits_BK.argmax(dim=1) == labels_B).tolist()
    assert faulty == [False, True]
    found = score(logits_BK, labels_B, in_set_K)
    assert (found.rank_B == 0).tolist() == [True, True]
    # nor does it take any of the probability
    assert found.confidence_B[0] == pytest.approx(1 / (1 + np.exp(-0.1)), rel=1e-6)


@given(st.integers(1, 1000), st.integers(1, 8))
def test_no_image_counts_twice_on_several_ranks(images, ranks):
    """Trap 7: a padding sampler gives all ranks equally many images, some of them twice."""
    parts = [rank_part(images, rank, ranks, TOGETHER) for rank in range(ranks)]
    assert [image for part in parts for image in range(images)[part]] == list(range(images))


def test_a_padded_count_is_another_number():
    """The images of four ranks with a padding sampler, and the correct ones."""
    right_N = np.arange(130) < 64
    padded = np.resize(right_N, 4 * 33)
    parts = [rank_part(len(right_N), rank, 4, TOGETHER) for rank in range(4)]
    ours = np.concatenate([right_N[part] for part in parts])
    assert ours.mean() == right_N.mean()
    assert padded.mean() != right_N.mean()


def test_an_average_is_over_all_five_sets_or_absent():
    """Trap 9: an average over four shifts in the column of averages over five."""

    def run(accuracies: dict[str, int]) -> Any:
        counts = {
            name: SetCount(correct=right, total=100, manifest_sha256="0" * 64)
            for name, right in accuracies.items()
        }
        return SimpleNamespace(counts=counts)

    four = {name: 50 for name in OOD_SETS if name != "objectnet"}
    assert np.mean(list(four.values())) == 50
    assert tables.ood_average(run(four)) is None
    assert tables.ood_average(run({**four, "objectnet": 0})) == pytest.approx(40)


def test_v2s_folders_are_numbers(tmp_path):
    """Trap 5: sorted as text, folder 10 comes before 2."""
    ids = tuple(f"n{n:02d}" for n in range(12))
    labels = LabelSpace(ids=ids, names=ids, templates=("{c}",))
    root = tmp_path / "imagenetv2-matched-frequency-format-val"
    for number in range(12):
        (root / str(number)).mkdir(parents=True)
        (root / str(number) / f"{number}.jpeg").touch()
    faulty = {name: place for place, name in enumerate(sorted(map(str, range(12))))}
    found = {
        item.path.split("/")[0]: item.label
        for item in read_source("imagenet-v2", tmp_path, labels).items
    }
    assert found == {str(n): n for n in range(12)} != faulty


def test_no_alpha_is_chosen_by_its_accuracy():
    """Trap 6: of a WiSE family the table shows the middle model, whatever the others reach."""
    names = [f"wise-ft-{alpha:g}" for alpha in (0.1, 0.4, 0.6, 0.9)]
    assert tables.shown_recipes(names) == {"wise-ft-0.4"}
