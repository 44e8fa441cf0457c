"""Masks and fills obey their definitions for every shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rft.method import masking, refill
from tests.reference import textbook

seeds = st.integers(0, 2**31)
batches = st.integers(2, 9)
patch_counts = st.integers(1, 30)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mask(seed: int, batch: int, patches: int) -> torch.Tensor:
    return torch.rand(batch, patches, generator=generator(seed)) < 0.5


@given(seeds, batches, patch_counts, st.floats(0, 1))
def test_context_is_what_object_is_not(seed, batch, patches, threshold):
    relevance = torch.rand(batch, patches, generator=generator(seed))
    objects = masking.object_mask(relevance, threshold)
    assert (objects ^ masking.context_mask(relevance, threshold)).all()
    assert (relevance[objects] > threshold).all()


def test_threshold_is_strict():
    assert masking.object_mask(torch.tensor([[0.3, 0.30001]]), 0.3).tolist() == [[False, True]]


def test_no_relevance_masks_no_object_and_all_context():
    zero = torch.zeros(2, 4)
    assert not masking.object_mask(zero, 0.3).any()
    assert masking.context_mask(zero, 0.3).all()


@pytest.mark.parametrize(("rate", "kept"), [(0.25, 36), (0.5, 24), (0.75, 12)])
def test_fixed_count_keeps_what_the_released_code_keeps(rate, kept):
    mask = masking.fixed_count_mask((8, 49), rate, generator(0))
    assert (~mask).sum(dim=1).tolist() == [kept] * 8
    assert len({tuple(row) for row in mask.tolist()}) > 1


def test_bernoulli_rate():
    share = masking.bernoulli_mask((400, 100), 0.3, generator(3)).float().mean()
    assert abs(share - 0.3) < 0.01


@given(seeds, batches, patch_counts)
def test_every_fill_keeps_what_is_not_masked(seed, batch, patches):
    mask = random_mask(seed, batch, patches)
    own = torch.arange(batch)[:, None].expand_as(mask)
    for donors in (
        refill.no_fill(mask),
        refill.single_fill(mask, generator(seed)),
        refill.multi_fill(mask, generator(seed)),
    ):
        assert (donors[~mask] == own[~mask]).all()


@given(seeds, batches, patch_counts)
def test_no_fill_drops(seed, batch, patches):
    mask = random_mask(seed, batch, patches)
    assert ((refill.no_fill(mask) == refill.DROP) == mask).all()


@given(seeds, batches, patch_counts)
def test_single_fill_is_one_permutation_of_the_batch(seed, batch, patches):
    donors = refill.single_fill(torch.ones(batch, patches, dtype=torch.bool), generator(seed))
    assert (donors == donors[:, :1]).all()
    assert sorted(donors[:, 0].tolist()) == list(range(batch))


@given(seeds, batches, patch_counts)
def test_multi_fill_never_takes_the_image_itself(seed, batch, patches):
    donors = refill.multi_fill(torch.ones(batch, patches, dtype=torch.bool), generator(seed))
    assert (donors != torch.arange(batch)[:, None]).all()
    assert ((donors >= 0) & (donors < batch)).all()


def test_multi_fill_is_uniform_over_the_others():
    donors = refill.multi_fill(torch.ones(5, 20000, dtype=torch.bool), generator(0))
    counts = torch.bincount(donors[0], minlength=5)
    assert counts[0] == 0
    assert (counts[1:] / 20000 - 0.25).abs().max() < 0.02


@given(seeds, st.integers(2, 5))
def test_filling_patches_equals_filling_pixels(seed, batch):
    grid, patch = 3, 2
    images = torch.rand(batch, 3, grid * patch, grid * patch, generator=generator(seed))
    donors = refill.multi_fill(random_mask(seed, batch, grid * grid), generator(seed))
    pixels = textbook.refill_pixels(images, donors, patch)

    def patches(x):
        return torch.nn.functional.unfold(x, patch, stride=patch).transpose(1, 2)

    assert torch.equal(refill.apply_donors(patches(images), donors), patches(pixels))
