"""Which seed determines what: the held-out split, the sample order, and a checkpoint's record."""

import itertools

import numpy as np
import pytest

from rft import recipes
from rft.config import Config
from rft.loading import order
from rft.loading.batches import fingerprint, plan_training
from rft.loading.dataset import PackedDataset
from rft.loading.order import EpochOrder
from rft.storage import documents


@pytest.fixture(scope="module")
def packed(tiny_data) -> PackedDataset:
    return PackedDataset(f"{tiny_data}/imagenet-train")


def config(**changes) -> Config:
    default = recipes.build("vanilla", scale="miniature", data="-", run="-")
    loader = {
        **default.to_dict()["loader"],
        "batch_size": 6,
        "held_out": 16,
        **changes.pop("loader", {}),
    }
    return documents.convert({**default.to_dict(), "loader": loader, **changes}, Config, "config")


def chosen(packed, **changes) -> tuple[list[int], list[int]]:
    """The held-out samples, and the order of the first epoch as positions of the others."""
    plan, samples, held_out = plan_training(packed, config(**changes))
    first = EpochOrder(plan, 0)
    places = np.concatenate([first.batch(step) for step in range(plan.steps_per_epoch)])
    assert sorted([*samples, *held_out]) == list(range(len(packed)))
    return held_out.tolist(), places.tolist()


def test_one_seed_decides_both_and_each_has_its_own(packed):
    split, places = chosen(packed, seed=1)
    other_split, other_places = chosen(packed, seed=2)
    assert split != other_split
    assert places != other_places
    # each option alone, and with the run's seed unchanged
    assert chosen(packed, seed=1, split_seed=2) == (other_split, places)
    assert chosen(packed, seed=1, order_seed=2) == (split, other_places)
    assert chosen(packed, seed=2, split_seed=1, order_seed=1) == (split, places)


def test_the_plan_is_the_configurations(packed):
    plan, samples, held_out = plan_training(
        packed, config(loader={"streams": 2, "block_shards": 1})
    )
    assert (plan.batch_size, plan.streams, plan.block_shards) == (6, 2, 1)
    assert sum(plan.shard_sizes) == len(samples) == len(packed) - 16
    assert len(held_out) == 16
    starts = np.cumsum([0, *(shard.samples for shard in packed.manifest.shards)])
    expected = [
        sum(start <= sample < end for sample in samples)
        for start, end in itertools.pairwise(starts)
    ]
    assert list(plan.shard_sizes) == expected
    assert 0 < min(expected) < max(expected)


def test_a_sample_is_in_the_shard_that_holds_it(packed):
    number = 0
    for place, shard in enumerate(packed.manifest.shards):
        for _ in range(shard.samples):
            assert packed.shard_of(number) == place
            number += 1
    assert number == len(packed)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"split_seed": 1},
        {"order_seed": 1},
        {"loader": {"batch_size": 4}},
        {"loader": {"held_out": 12}},
        {"loader": {"streams": 2}},
        {"loader": {"block_shards": 1}},
    ],
)
def test_whatever_changes_the_batches_is_in_the_fingerprint(packed, changes):
    def of(changed: Config) -> dict:
        plan, _, _ = plan_training(packed, changed)
        return fingerprint(packed, plan, changed.loader.held_out, changed.held_out_seed)

    assert of(config(**changes)) != of(config())
    assert of(config())["algorithm"] == order.ALGORITHM
    assert of(config())["manifest_sha256"] == packed.manifest.sha256
