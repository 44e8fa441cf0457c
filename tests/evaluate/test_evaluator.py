"""Counts of models whose every prediction is known, under each kind of scoring rule."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rft.data.loader import PackedDataset
from rft.dist import World
from rft.evaluate.accuracy import Count
from rft.evaluate.evaluator import count_correct

CPU = torch.device("cpu")
EACH = 5  # images of each of the four classes
# ranks of the four classes' logits, best first
GREEN_FIRST, GREY_FIRST = (1, 2, 3, 0), (3, 0, 1, 2)


class Always(nn.Module):
    """A model that ranks the classes in one order, whatever it sees."""

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
    return count_correct(
        models, packed, image_size=16, world=world, device=CPU, batch_size=7, **options
    )


@pytest.mark.parametrize(
    ("groups", "correct"),
    [
        # top-1 over all classes: green and grey
        (((0,), (1,), (2,), (3,)), (EACH, EACH)),
        # green and grey take no part: the next best, blue and red
        (((0,), (2,)), (EACH, EACH)),
        # one group of grey and red, and blue: right for both of its classes
        (((3, 0), (2,)), (EACH, 2 * EACH)),
    ],
)
def test_each_model_has_its_own_count(tiny_data, groups, correct):
    found = counts(tiny_data, groups, Always(GREEN_FIRST), Always(GREY_FIRST))
    assert found == [Count(number, 4 * EACH) for number in correct]
    assert found[0].share == correct[0] / 20


def test_models_in_one_pass_do_not_share_a_count(tiny_data):
    # nothing is in grey's group but grey; blue is not scored
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
    assert done == [7, 7, 6]
