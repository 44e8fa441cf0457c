"""The plan's invariants, for any shards, streams, blocks and world sizes."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rft.data.order import EpochOrder, Plan, rank_slice


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
    assert all(a != b for a, b in itertools.pairwise(orders))


def test_blocks_read_few_shards_at_a_time():
    plan = Plan(shard_sizes=(100,) * 64, batch_size=64, seed=0, streams=4, block_shards=2)
    order = EpochOrder(plan, 0)
    for step in range(plan.steps_per_epoch):
        shards = np.unique(order.batch(step) // 100)
        # at most two blocks of two shards, and a cut shard, in each of the four streams
        assert len(shards) <= 4 * 5
        # and one block more is asked for ahead
        assert len(order.shards_ahead(step, [0], 1)) <= 4 * 7


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="larger than the 5 training samples"):
        Plan(shard_sizes=(5,), batch_size=6, seed=0)
