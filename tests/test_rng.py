"""Addresses of random numbers: the same numbers in every version, on every machine.

Masks, fills, sample order and random heads depend on them: other numbers are other results.
"""

import pytest
import torch

from rft import rng


@pytest.mark.parametrize(
    ("address", "seed"),
    [
        ((0,), 2631537505891389924),
        (("0",), 9180095682402304423),
        ((0, "order", 1, "global"), 2315780354292966840),
        ((3, "mask", 2, 1, 0), 997537031020279147),
    ],
)
def test_seeds_are_frozen(address, seed):
    assert rng.derive(*address) == seed


def test_numpys_numbers_are_frozen():
    address = (0, "order", 1, "global")
    assert rng.numpy_generator(*address).permutation(8).tolist() == [1, 3, 0, 6, 5, 2, 7, 4]
    found = rng.numpy_generator(*address).integers(1000, size=6).tolist()
    assert found == [102, 413, 130, 262, 355, 879]


def test_torchs_numbers_are_frozen():
    found = torch.randint(1000, (6,), generator=rng.torch_generator(3, "mask", 2, 1, 0))
    assert found.tolist() == [975, 883, 236, 93, 725, 107]
    found = torch.randperm(8, generator=rng.torch_generator(3, "fill", 2, 1, 0))
    assert found.tolist() == [4, 1, 3, 2, 7, 5, 0, 6]
