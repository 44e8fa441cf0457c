"""Counting rules: subsets and ObjectNet's groups."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rft.evaluate.accuracy import is_correct


def test_plain_top_1():
    logits = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1]])
    assert is_correct(logits, torch.tensor([1, 2]), torch.arange(3)).tolist() == [True, False]


def test_classes_outside_the_subset_take_no_part():
    # class 1 has the highest logit but is not in the benchmark
    groups = torch.tensor([0, -1, 1])
    assert is_correct(torch.tensor([[0.5, 0.9, 0.1]]), torch.tensor([0]), groups).tolist() == [True]


@given(st.integers(0, 2**31))
def test_groups_equal_the_maximum_over_each_category(seed):
    # wise-ft's rule: the maximum logit of each ObjectNet category, then the best category
    generator = torch.Generator().manual_seed(seed)
    members = [[0, 5], [2], [3, 7, 8], [9]]
    class_to_group = torch.full((10,), -1)
    for group, classes in enumerate(members):
        class_to_group[classes] = group
    logits = torch.randn(20, 10, generator=generator)
    group_of_image = torch.randint(4, (20,), generator=generator)
    labels = torch.tensor([members[group][0] for group in group_of_image.tolist()])
    best = torch.stack([logits[:, classes].amax(dim=1) for classes in members], dim=1).argmax(dim=1)
    assert (is_correct(logits, labels, class_to_group) == (best == group_of_image)).all()
