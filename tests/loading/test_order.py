"""The plan's invariants for any shards, streams, blocks and world sizes, and its frozen numbers."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rft.loading.order import ALGORITHM, EpochOrder, Plan, rank_slice


@st.composite
def plans(draw) -> Plan:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda s: sum(s) > 0))
    streams = draw(st.integers(1, 4))
    share = draw(st.integers(1, 6))
    batch = streams * share
    if batch > sum(sizes):
        streams, batch = 1, 1
    block = draw(st.integers(0, 4))
    seed = draw(st.integers(0, 1000))
    return Plan(
        shard_sizes=tuple(sizes), batch_size=batch, seed=seed, streams=streams, block_shards=block
    )


def epoch_ids(plan: Plan, epoch: int) -> np.ndarray:
    order = EpochOrder(plan, epoch)
    return np.concatenate([order.batch(step) for step in range(plan.steps_per_epoch)])


@pytest.mark.slow
@given(plans(), st.integers(0, 3))
def test_an_epoch_has_each_sample_at_most_once_and_drops_only_the_tail(plan, epoch):
    ids = epoch_ids(plan, epoch)
    assert len(ids) == plan.steps_per_epoch * plan.batch_size
    assert plan.samples - len(ids) < plan.batch_size
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() >= 0
    assert ids.max() < plan.samples


@pytest.mark.slow
@given(plans(), st.data())
def test_any_step_can_be_asked_for_first(plan, data):
    whole = EpochOrder(plan, 1)
    expected = [whole.batch(step) for step in range(plan.steps_per_epoch)]
    step = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    assert (EpochOrder(plan, 1).batch(step) == expected[step]).all()
    backwards = EpochOrder(plan, 1)
    for number in reversed(range(plan.steps_per_epoch)):
        assert (backwards.batch(number) == expected[number]).all()


@given(st.integers(1, 8), st.integers(1, 5))
def test_ranks_cut_one_global_batch(world_size, share):
    batch = np.arange(world_size * share)
    slices = [rank_slice(batch, rank, world_size) for rank in range(world_size)]
    assert (np.concatenate(slices) == batch).all()


@pytest.mark.slow
@given(plans(), st.integers(1, 3), st.integers(0, 2), st.integers(0, 500))
# a batch that spans three blocks
@example(Plan(shard_sizes=(1, 1, 1), batch_size=3, seed=0, block_shards=1), 1, 0, 0)
def test_the_shards_ahead_hold_every_sample_of_the_next_batches(plan, world_size, rank, step):
    world_size = world_size if plan.batch_size % world_size == 0 else 1
    rank, step = rank % world_size, step % plan.steps_per_epoch
    order = EpochOrder(plan, 0)
    ends = np.cumsum(plan.shard_sizes)
    mine = rank_slice(order.batch(step), rank, world_size)
    needed = set(np.searchsorted(ends, mine, side="right").tolist())
    ahead = order.shards_ahead(step, [rank], world_size)
    assert needed <= set(ahead)
    assert len(ahead) == len(set(ahead))


@pytest.mark.parametrize("block_shards", [0, 2])
def test_epochs_and_seeds_differ(block_shards):
    def ids(seed, epoch):
        plan = Plan(
            shard_sizes=(50,) * 8, batch_size=40, seed=seed, streams=4, block_shards=block_shards
        )
        return epoch_ids(plan, epoch).tolist()

    orders = [ids(0, 0), ids(0, 1), ids(1, 0)]
    assert orders[0] == ids(0, 0)
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_blocks_read_few_shards_at_a_time():
    plan = Plan(shard_sizes=(100,) * 64, batch_size=64, seed=0, streams=4, block_shards=2)
    order = EpochOrder(plan, 0)
    for step in range(plan.steps_per_epoch):
        shards = np.unique(order.batch(step) // 100)
        # at most two blocks of two shards, and a split shard, in each of the four streams
        assert len(shards) <= 4 * 5
        # and one more block is requested ahead
        assert len(order.shards_ahead(step, [0], 1)) <= 4 * 7


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="larger than the 5 training samples"):
        Plan(shard_sizes=(5,), batch_size=6, seed=0)


# small enough to verify by reading: three shards, and two streams of blocks of one shard
WHOLE = Plan(shard_sizes=(4, 3, 5), batch_size=4, seed=0)
BLOCKS = Plan(shard_sizes=(4, 3, 5, 4), batch_size=4, seed=0, streams=2, block_shards=1)
LARGER = {
    "everything at once": Plan(shard_sizes=(7, 0, 9, 5) * 4, batch_size=12, seed=3),
    "one stream": Plan(shard_sizes=(9,) * 12, batch_size=10, seed=1, block_shards=3),
    "four streams": Plan(
        shard_sizes=(13, 8, 11, 5) * 5, batch_size=16, seed=2, streams=4, block_shards=2
    ),
    "small shards": Plan(shard_sizes=(1, 2) * 40, batch_size=24, seed=5, streams=3, block_shards=4),
}
# ALGORITHM -> the batches of two epochs, and digests of those of LARGER and of the read-ahead
FROZEN = {
    1: {
        "whole": [
            [[4, 6, 3, 1], [10, 7, 5, 9], [11, 0, 8, 2]],
            [[9, 0, 5, 1], [7, 8, 11, 3], [2, 6, 10, 4]],
        ],
        "blocks": [
            [[1, 0, 10, 9], [3, 2, 8, 11], [4, 6, 13, 14], [5, 7, 12, 15]],
            [[2, 3, 11, 8], [0, 1, 9, 7], [12, 14, 10, 5], [15, 13, 6, 4]],
        ],
        "everything at once": "06faeede59aca53e",
        "one stream": "a505ef1efa01feaf",
        "four streams": "6b3c80731f887c68",
        "small shards": "94682295b1a7b704",
        "ahead": {
            "everything at once": "40ae1f248ab1aab9",
            "one stream": "3461f9c025361cbc",
            "four streams": "da472f5ceffc0ff3",
            "small shards": "c72d221fd497614c",
        },
    }
}
RAISE = (
    "the same plan gives other batches now, so a run that is resumed would see samples twice: "
    "raise ALGORITHM in rft/loading/order.py, and record the new numbers here under it"
)


def digest(numbers) -> str:
    return hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]


def batches(plan: Plan, epoch: int) -> list[list[int]]:
    order = EpochOrder(plan, epoch)
    return [order.batch(step).tolist() for step in range(plan.steps_per_epoch)]


def read_ahead(plan: Plan, epoch: int) -> list[list[int]]:
    """The read-ahead of two ranks of two, together and alone, in each step."""
    order, steps = EpochOrder(plan, epoch), range(plan.steps_per_epoch)
    return [order.shards_ahead(step, ranks, 2) for step in steps for ranks in ([0], [1], [0, 1])]


def test_the_order_is_frozen():
    assert ALGORITHM in FROZEN, "a new ALGORITHM: record its numbers here"
    frozen = FROZEN[ALGORITHM]
    found = {
        "whole": [batches(WHOLE, epoch) for epoch in (0, 1)],
        "blocks": [batches(BLOCKS, epoch) for epoch in (0, 1)],
        **{name: digest([batches(p, epoch) for epoch in (0, 1, 9)]) for name, p in LARGER.items()},
    }
    assert found == {name: frozen[name] for name in found}, RAISE


def test_what_is_read_ahead_is_frozen():
    # it changes no batch, but a shard missing from it is fetched sample by sample
    found = {name: digest([read_ahead(p, epoch) for epoch in (0, 1)]) for name, p in LARGER.items()}
    assert found == FROZEN[ALGORITHM]["ahead"]


def test_ranks_take_neighbouring_slots():
    assert rank_slice(np.arange(12), 1, 3).tolist() == [4, 5, 6, 7]
