"""Masks and fills satisfy their definitions for every shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rft.clip import vit
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


def own(batch: int) -> torch.Tensor:
    return torch.arange(batch)[:, None]


@given(seeds, batches, patch_counts, st.booleans())
def test_every_fill_keeps_what_is_not_masked(seed, batch, patches, derange):
    mask = random_mask(seed, batch, patches)
    for source in (
        torch.tensor([[refill.DROP]]),
        refill.single_sources(batch, generator(seed), derange=derange),
        refill.multi_sources(batch, patches, generator(seed)),
    ):
        donors = refill.donors(mask, source, own(batch))
        assert (donors[~mask] == own(batch).expand_as(mask)[~mask]).all()
        assert (donors[mask] == source.expand_as(mask)[mask]).all()


@given(seeds, batches)
def test_single_fill_is_one_permutation_of_the_pool(seed, batch):
    source = refill.single_sources(batch, generator(seed))
    assert sorted(source[:, 0].tolist()) == list(range(batch))


@given(seeds, batches)
def test_a_derangement_is_a_permutation_without_fixed_points(seed, batch):
    source = refill.single_sources(batch, generator(seed), derange=True)
    assert sorted(source[:, 0].tolist()) == list(range(batch))
    assert (source != own(batch)).all()


def test_permutations_have_one_fixed_point_on_average_and_derangements_are_uniform():
    draws = generator(1)
    fixed = [(refill.single_sources(20, draws) == own(20)).sum().item() for _ in range(2000)]
    assert abs(sum(fixed) / 2000 - 1) < 0.1
    # three images have two derangements
    found = [refill.single_sources(3, draws, derange=True)[0].item() for _ in range(2000)]
    assert abs(found.count(1) / 2000 - 0.5) < 0.05


@given(seeds, batches, patch_counts)
def test_multi_fill_never_takes_the_image_itself(seed, batch, patches):
    source = refill.multi_sources(batch, patches, generator(seed))
    assert (source != own(batch)).all()
    assert ((source >= 0) & (source < batch)).all()


def test_multi_fill_is_uniform_over_the_others():
    source = refill.multi_sources(5, 20000, generator(0))
    counts = torch.bincount(source[0], minlength=5)
    assert counts[0] == 0
    assert (counts[1:] / 20000 - 0.25).abs().max() < 0.02


@given(seeds, st.integers(2, 5), st.integers(0, 2))
def test_filling_patches_equals_filling_pixels(seed, batch, first):
    # the last images of a larger pool, like a rank's part of a global batch
    grid, patch, pool = 3, 2, batch + first
    images = torch.rand(pool, 3, grid * patch, grid * patch, generator=generator(seed))
    mask = random_mask(seed, batch, grid * grid)
    source = refill.multi_sources(pool, grid * grid, generator(seed))[first:]
    donors = refill.donors(mask, source, own(pool)[first:])
    pixels = textbook.refill_pixels(images, donors, patch, first)
    filled = refill.apply_donors(vit.cut_patches(images, patch), donors, own(pool)[first:])
    assert torch.equal(filled, vit.cut_patches(pixels, patch))


def test_dropped_patches_keep_their_own_pixels():
    patches = torch.arange(12.0).reshape(2, 3, 2)
    donors = torch.full((2, 3), refill.DROP)
    assert torch.equal(refill.apply_donors(patches, donors, own(2)), patches)


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_patches_are_cut_as_unfold_cuts_them(seed, batch, grid, side):
    images = torch.rand(batch, 3, grid * side, grid * side, generator=generator(seed))
    expected = torch.nn.functional.unfold(images, side, stride=side).transpose(1, 2)
    assert torch.equal(vit.cut_patches(images, side), expected)


@given(seeds, batches)
def test_unlike_donors_are_of_the_half_of_the_others_that_is_least_like(seed, batch):
    draws = generator(seed)
    # few values, so that some are equal
    likeness_BZ = torch.randint(4, (batch, batch), generator=draws).float()
    rank_BP = torch.randint(refill.unlike_others(batch), (batch, 5), generator=draws)
    source_BP = refill.unlike_sources(rank_BP, likeness_BZ, own(batch))
    assert (source_BP != own(batch)).all()
    for n in range(batch):
        others = [z for z in range(batch) if z != n]
        # Python's sort is stable: of equal ones the first in the pool comes first
        others.sort(key=lambda z: float(likeness_BZ[n, z]))
        assert source_BP[n].tolist() == [others[rank] for rank in rank_BP[n].tolist()]
    assert refill.unlike_others(batch) == max(1, (batch - 1) // 2)
