"""Counts of models with known predictions, under each kind of scoring rule."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from benchmarks.tiny_world import LABELS
from rft.clip.classifier import save_classifier
from rft.dist import World
from rft.evaluate import localisation
from rft.evaluate.count import Count, count_correct, predict, score
from rft.loading.dataset import PackedDataset
from tests.conftest import build_model
from tests.tiny import torchrun

CPU = torch.device("cpu")
EACH = 5  # images of each of the four classes
# ranks of the four classes' logits, best first
GREEN_FIRST, GREY_FIRST = (1, 2, 3, 0), (3, 0, 1, 2)


def is_correct(logits_BK: Tensor, labels_B: Tensor, class_to_group_K: Tensor) -> list[bool]:
    return (score(logits_BK, labels_B, class_to_group_K).rank_B == 0).tolist()


def test_plain_top_1():
    logits = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1]])
    assert is_correct(logits, torch.tensor([1, 2]), torch.arange(3)) == [True, False]


def test_classes_outside_the_subset_take_no_part():
    # class 1 has the highest logit but is not in the benchmark
    groups = torch.tensor([0, -1, 1])
    assert is_correct(torch.tensor([[0.5, 0.9, 0.1]]), torch.tensor([0]), groups) == [True]


@pytest.mark.parametrize("ties", [False, True])
def test_classes_that_are_their_own_groups_are_scored_as_any_groups(ties):
    """Sets whose classes are groups take a shortcut, which groups in a different order do not."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 8, generator=generator), torch.arange(50) % 8
    # class 3 is not in the set; no label is
    labels[labels == 3] = 4
    logits = logits.round() if ties else logits
    own = torch.tensor([0, 1, 2, -1, 3, 4, 5, 6])
    other = torch.tensor([6, 0, 5, -1, 2, 4, 1, 3])
    short, long = score(logits, labels, own), score(logits, labels, other)
    class_of = {group: number for number, group in enumerate(own.tolist())}
    predicted = [other[class_of[group]] for group in short.prediction_B.tolist()]
    assert long.prediction_B.tolist() == predicted
    assert long.rank_B.tolist() == short.rank_B.tolist()
    for name in ("confidence_B", "log_likelihood_B"):
        assert getattr(long, name).tolist() == pytest.approx(
            getattr(short, name).tolist(), rel=1e-14
        )


@given(st.integers(0, 2**31), st.booleans())
def test_groups_equal_the_maximum_over_each_category(seed, ties):
    # wise-ft's rule: the maximum logit of each ObjectNet category, then the best category
    generator = torch.Generator().manual_seed(seed)
    members = [[0, 5], [2], [3, 7, 8], [9]]
    class_to_group = torch.full((10,), -1)
    for group, classes in enumerate(members):
        class_to_group[classes] = group
    logits = torch.randn(20, 10, generator=generator)
    if ties:
        logits = logits.round()
    group_of_image = torch.randint(4, (20,), generator=generator)
    labels = torch.tensor([members[group][0] for group in group_of_image.tolist()])
    found = score(logits, labels, class_to_group)
    for row, group in enumerate(group_of_image.tolist()):
        own = [
            (float(logits[row, classes].max()), group_) for group_, classes in enumerate(members)
        ]
        # of equal categories, the one with the first of the best classes wins
        first = {g: min(c for c in members[g] if logits[row, c] == high) for high, g in own}
        order = [g for _, g in sorted(own, key=lambda one: (-one[0], first[one[1]]))]
        assert int(found.prediction_B[row]) == order[0]
        assert int(found.rank_B[row]) == order.index(group)
        scores = np.array([high for high, _ in own], np.float64)
        probability = np.exp(scores - np.logaddexp.reduce(scores))
        assert float(found.confidence_B[row]) == pytest.approx(probability.max(), rel=1e-12)
        assert float(found.log_likelihood_B[row].exp()) == pytest.approx(
            probability[group], rel=1e-12
        )


def test_rows_are_in_the_order_of_the_samples(tiny_data):
    packed = PackedDataset(f"{tiny_data}/imagenet-r")
    packed.manifest = replace(packed.manifest, groups=((0, 1), (3, 2)))
    world = World(rank=0, size=1, local_rank=0)
    samples = np.array([3, 17, 0])
    (found,) = predict(
        [Always(GREEN_FIRST)], packed, image_size=16, world=world, device=CPU, samples=samples
    )
    rows = found.predictions
    assert rows.key.tolist() == [packed.key(sample) for sample in samples]
    # categories are called by their first class: 0 of red and green, 2 of blue and grey
    assert rows.label.tolist() == [[0, 0, 2, 2][label] for label in packed.index.label[samples]]
    assert rows.prediction.tolist() == [0, 0, 0]
    assert rows.right.tolist() == (rows.label == 0).tolist()
    assert found.logits_NK is None


class Always(nn.Module):
    """A model that ranks the classes in one order for every image."""

    def __init__(self, best_first: tuple[int, ...]) -> None:
        super().__init__()
        self.logits_K = torch.zeros(len(best_first))
        for place, class_id in enumerate(best_first):
            self.logits_K[class_id] = -float(place)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.logits_K.expand(len(images_BCHW), -1)


def counts(data, groups, *models: nn.Module, **options) -> list[Count]:
    packed = PackedDataset(f"{data}/imagenet-r")
    packed.manifest = replace(packed.manifest, groups=groups)
    world = World(rank=0, size=1, local_rank=0)
    # a set holds no image of a class that it does not score (rft.shards.index)
    scored = np.flatnonzero(np.isin(packed.index.label, [c for group in groups for c in group]))
    options = {"samples": scored, "batch_size": 7, **options}
    return count_correct(models, packed, image_size=16, world=world, device=CPU, **options)


@pytest.mark.parametrize(
    ("groups", "correct"),
    [
        # top-1 over all classes: green and grey
        (((0,), (1,), (2,), (3,)), (EACH, EACH)),
        # green and grey are not scored: the next best are blue and red
        (((0,), (2,)), (EACH, EACH)),
        # one group of grey and red, and blue: right for both of its classes
        (((3, 0), (2,)), (EACH, 2 * EACH)),
    ],
)
def test_each_model_has_its_own_count(tiny_data, groups, correct):
    found = counts(tiny_data, groups, Always(GREEN_FIRST), Always(GREY_FIRST))
    total = EACH * sum(len(group) for group in groups)
    assert found == [Count(number, total) for number in correct]
    assert found[0].share == correct[0] / total


def test_models_in_one_pass_do_not_share_a_count(tiny_data):
    # grey's group has only grey; blue is not scored
    groups = ((0, 1), (3,))
    found = counts(tiny_data, groups, Always(GREEN_FIRST), Always(GREY_FIRST))
    assert [count.correct for count in found] == [2 * EACH, EACH]


def test_some_samples_alone(tiny_data):
    packed = PackedDataset(f"{tiny_data}/imagenet-r")
    green = (packed.index.label == 1).nonzero()[0]
    groups = ((0,), (1,), (2,), (3,))
    assert counts(tiny_data, groups, Always(GREEN_FIRST), samples=green) == [Count(EACH, EACH)]
    assert counts(tiny_data, groups, Always(GREY_FIRST), samples=green) == [Count(0, EACH)]


def test_every_image_is_reported_once(tiny_data):
    done: list[int] = []
    counts(tiny_data, ((0,), (1,), (2,), (3,)), Always(GREEN_FIRST), progress=done.append)
    assert done == [20]


class Broken(Always):
    """A model with one non-finite logit, of the last class, on some images of a batch."""

    def __init__(self, value: float, images: int) -> None:
        super().__init__(GREEN_FIRST)
        self.value, self.images = value, images

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK = super().forward(images_BCHW).clone()
        logits_BK[: self.images, -1] = self.value
        return logits_BK


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("groups", [((0,), (1,), (2,), (3,)), ((0,), (2,))])
def test_logits_that_are_not_finite_count_as_nothing(tiny_data, value, groups):
    models = (Always(GREY_FIRST), Broken(value, 0), Broken(value, 2))
    names = ["good", "fine", "bad"]
    with pytest.raises(
        ValueError, match=r"^bad: the logits of 2 of [12]0 images of .*/imagenet-r are"
    ):
        counts(tiny_data, groups, *models, names=names)
    assert len(counts(tiny_data, groups, *models[:2], names=names[:2])) == 2
    # without names
    with pytest.raises(ValueError, match=r"^the model: the logits of 2 of [12]0 images"):
        counts(tiny_data, groups, models[2])


def overflowing(path: Path) -> Path:
    """Finite weights with non-finite features."""
    model = build_model(classes=len(LABELS.ids))
    nn.init.constant_(model.visual.proj, 3e38)
    save_classifier(str(path), model, {"step": "1"}, LABELS.classes)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_whose_logits_overflow_are_refused(tiny_data, tmp_path, ranks):
    bad, good = overflowing(tmp_path / "bad.safetensors"), tmp_path / "good.safetensors"
    model = build_model(classes=len(LABELS.ids))
    save_classifier(str(good), model, {"step": "1"}, LABELS.classes)
    before = sorted(tmp_path.iterdir())
    options = ("--data", str(tiny_data), "--workers", "0", "--device", "cpu")
    sets = ("--sets", "imagenet-val", "imagenet-a")
    result = torchrun(ranks, "rft.evaluate", str(good), str(bad), *options, *sets)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    expected = (
        f"{bad}: the logits of 28 of 28 images of {tiny_data}/imagenet-val are NaN or infinite"
    )
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {expected}")
    assert sorted(tmp_path.iterdir()) == before


def test_maps_of_weights_whose_logits_overflow_are_refused(tiny_data, tmp_path, refused):
    bad = overflowing(tmp_path / "bad.safetensors")
    packed = PackedDataset(f"{tiny_data}/imagenet-a")
    for sample in range(len(packed)):
        mask = Image.fromarray(np.eye(16, dtype=np.uint8))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{packed.key(sample)}.png")
    options = ("--data", tiny_data, "--set", "imagenet-a", "--masks", tmp_path / "masks")
    rest = ("--classes", "all", "--workers", "0", "--device", "cpu")
    line = refused(localisation, bad, *options, *rest)
    assert f"{bad}: the logits of 12 of 12 images of {tiny_data}/imagenet-a are NaN" in line
    assert not list(tmp_path.glob("*.json"))
