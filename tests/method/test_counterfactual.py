"""Random choices for a batch's counterfactuals: addressed, and independent of the split."""

from dataclasses import replace

import pytest
import torch

from rft import recipes, rng
from rft.config import MethodConfig
from rft.method.counterfactual import StepAddress, draw

ADDRESS = StepAddress(seed=0, step=3, rank=0, micro=0)


def method_of(recipe: str) -> MethodConfig:
    return recipes.build(recipe).method


def test_an_address_replays_its_draws():
    method = method_of("random-mask-multi-fill")
    first, again = (draw(method, range(6), 16, 6, ADDRESS) for _ in range(2))
    other = draw(method, range(6), 16, 6, StepAddress(0, 4, 0, 0))
    assert torch.equal(first.source_BP, again.source_BP)
    assert torch.equal(first.mask_BP, again.mask_BP)
    assert not torch.equal(first.source_BP, other.source_BP)
    assert not torch.equal(first.mask_BP, other.mask_BP)


def test_every_part_of_an_address_counts():
    here = {"seed": 1, "step": 2, "rank": 3, "micro": 4}
    seeds = [StepAddress(**here).generator(purpose).initial_seed() for purpose in ("mask", "fill")]
    for name, value in here.items():
        seeds.append(StepAddress(**{**here, name: value + 5}).generator("mask").initial_seed())
    assert len(set(seeds)) == 6
    # unlike the part names: (step 2, rank 3) is not (step 3, rank 2)
    seeds.append(StepAddress(seed=1, step=3, rank=2, micro=4).generator("mask").initial_seed())
    assert len(set(seeds)) == 7


@pytest.mark.parametrize("pool", [4, 9])
def test_masks_and_fills_are_drawn_from_addresses_of_their_own(pool):
    address = StepAddress(seed=5, step=2, rank=1, micro=3)
    method = replace(method_of("random-mask-multi-fill"), rate=0.3)
    found = draw(method, range(pool), 16, pool, address)
    mask = torch.rand((pool, 16), generator=rng.torch_generator(5, "mask", 2, 1, 3)) < 0.3
    assert torch.equal(found.mask_BP, mask)
    fill = rng.torch_generator(5, "fill", 2, 1, 3)
    shift = torch.randint(1, pool, (pool, 16), generator=fill)
    assert torch.equal(found.source_BP, (torch.arange(pool)[:, None] + shift) % pool)
    single = draw(replace(method, fill="single"), range(pool), 16, pool, address)
    fill = rng.torch_generator(5, "fill", 2, 1, 3)
    assert torch.equal(single.source_BP[:, 0], torch.randperm(pool, generator=fill))


@pytest.mark.parametrize(("rate", "kept"), [(0.25, 12), (0.75, 4)])
def test_a_fixed_count_follows_the_rate(rate, kept):
    method = replace(method_of("random-mask-no-fill"), rate=rate)
    found = draw(method, range(5), 16, 5, ADDRESS)
    assert found.kept == kept
    assert ((~found.mask_BP).sum(dim=1) == kept).all()


@pytest.mark.parametrize("name", ["random-mask-single-fill", "random-mask-multi-fill"])
def test_parts_of_a_pool_draw_what_the_whole_draws(name):
    method = method_of(name)
    whole = draw(method, range(12), 16, 12, ADDRESS)
    parts = [draw(method, range(n, n + 4), 16, 12, ADDRESS) for n in (0, 4, 8)]
    for field in ("mask_BP", "source_BP", "own_B1"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(p, field) for p in parts]))


@pytest.mark.parametrize("fill", ["single", "multi"])
def test_donors_with_replacement_and_unlike_ones_are_drawn_for_each_image(fill):
    method = replace(method_of("random-mask-multi-fill"), fill=fill)
    pool, columns = 40, 1 if fill == "single" else 16
    if fill == "single":
        again = replace(method, single_fill="replacement")
        source = draw(again, range(pool), 16, pool, ADDRESS).source_BP
        assert source.shape == (pool, 1)
        # never the image itself, and some image for two of the forty: not a permutation
        assert (source != torch.arange(pool)[:, None]).all()
        assert len(source.unique()) < pool
    unlike = replace(method, donor_choice="unlike")
    rank = draw(unlike, range(pool), 16, pool, ADDRESS).source_BP
    assert rank.shape == (pool, columns)
    # from the half of 39 others; a part of the pool has its own part of the draws
    assert 0 <= rank.min() <= rank.max() < 19
    part = draw(unlike, range(10, 20), 16, pool, ADDRESS)
    assert torch.equal(part.source_BP, rank[10:20])
