"""`--loader.shots`: K images per class, chosen by id from those that are not held out."""

from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tiny_world import COUNTS, LABELS
from rft import recipes
from rft.config import Config
from rft.loading.batches import TrainingBatches, fingerprint, plan_training
from rft.loading.dataset import PackedDataset
from rft.loading.split import few_shot
from rft.packing.pack import Options, pack
from rft.shards.packed import PackedSet
from tests.reference import few_shot as reference

SET = "imagenet-train"
OTHER = Options(encoding="original", shard_mb=0.005, workers=1)


@pytest.fixture(scope="module")
def sets(tiny_data, tmp_path_factory) -> dict[str, PackedDataset]:
    """The same images in four shards of pixels, and in more shards of files."""
    root = tmp_path_factory.mktemp("original")
    pack(SET, str(tiny_data.parent / "images"), str(root), LABELS, OTHER)
    found = {
        "pixels": PackedDataset(f"{tiny_data}/{SET}"),
        "original": PackedDataset(f"{root}/{SET}"),
    }
    assert len(found["original"].manifest.shards) > len(found["pixels"].manifest.shards)
    return found


def config(shots: int, held_out: int = 8, seed: int = 0, **loader: int) -> Config:
    default = recipes.build("vanilla", scale="miniature", data="-", run="-")
    changed = {"batch_size": 4, "shots": shots, "held_out": held_out, **loader}
    return replace(default, seed=seed, loader=replace(default.loader, **changed))


def ids(packed: PackedSet, samples: np.ndarray) -> set[str]:
    return {packed.key(int(sample)) for sample in samples}


def parts(packed: PackedSet, *options: int) -> tuple[set[str], set[str]]:
    _, samples, held_out = plan_training(packed, config(*options))
    return ids(packed, samples), ids(packed, held_out)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_ids_in_any_packing(sets, seed):
    train, held_out = parts(sets["pixels"], 4, 8, seed)
    assert parts(sets["original"], 4, 8, seed) == (train, held_out)
    assert not train & held_out
    packed = sets["original"]
    everything = range(len(packed))
    left = {
        packed.key(n): int(packed.index.label[n])
        for n in everything
        if packed.key(n) not in held_out
    }
    assert train == reference.choose(left, 4, seed)
    assert len(train) == 4 * len(LABELS)


def test_seeds_differ_and_the_split_seed_decides(sets):
    packed = sets["pixels"]
    assert parts(packed, 4, 8, 0) != parts(packed, 4, 8, 1)
    assert parts(packed, 4, 0, 0)[0] != parts(packed, 4, 0, 1)[0]
    fixed = replace(config(4, seed=1), split_seed=0)
    _, samples, held_out = plan_training(packed, fixed)
    assert (ids(packed, samples), ids(packed, held_out)) == parts(packed, 4, 8, 0)
    ordered = replace(config(4), order_seed=1)
    assert np.array_equal(plan_training(packed, ordered)[1], plan_training(packed, config(4))[1])


def test_more_shots_add_to_fewer_and_hold_out_the_same(sets):
    found = {shots: parts(sets["pixels"], shots) for shots in (1, 2, 4, 8, 16)}
    train, held_out = zip(*found.values(), strict=True)
    assert all(fewer < more for fewer, more in pairwise(train))
    everything = parts(sets["pixels"], 0)
    assert train[-1] < everything[0]
    assert all(one == everything[1] for one in held_out)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 3), st.integers(0, 2**40)
)
@settings(max_examples=60)
def test_any_classes_in_any_order(classes, shots, seed):
    label_N = np.array(classes, np.int32)
    key_N = np.array([f"n{label}_{n}" for n, label in enumerate(classes)], "S")
    enough = np.flatnonzero(np.bincount(label_N)[label_N] >= shots)
    chosen = set(few_shot(key_N, label_N, enough, shots, seed).tolist())
    expected = reference.choose(
        {key_N[n].decode(): classes[n] for n in enough.tolist()}, shots, seed
    )
    assert {key_N[n].decode() for n in chosen} == expected
    # without a class, and stored in reverse order
    others = enough[label_N[enough] > 0]
    assert set(few_shot(key_N, label_N, others, shots, seed).tolist()) == chosen & set(
        others.tolist()
    )
    turned = few_shot(key_N[::-1], label_N[::-1], np.sort(len(label_N) - 1 - enough), shots, seed)
    assert {len(label_N) - 1 - n for n in turned.tolist()} == chosen


@pytest.mark.parametrize(("streams", "block_shards"), [(1, 0), (2, 2)])
def test_an_epoch_has_each_of_them_once(sets, streams, block_shards):
    """With so few images, most shards hold one or none."""
    packed, few = sets["original"], config(1, streams=streams, block_shards=block_shards)
    plan, samples, _ = plan_training(packed, few)
    assert 0 in plan.shard_sizes
    ranks = [
        TrainingBatches(packed, samples, plan, image_size=16, rank=rank, world_size=2)
        for rank in range(2)
    ]
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        read = [one.samples_of(step).tolist() for one in ranks for step in steps]
        assert sorted(chain.from_iterable(read)) == samples.tolist()


def test_the_cache_gets_no_shard_without_a_sample(sets, monkeypatch):
    packed = sets["original"]
    plan, samples, _ = plan_training(packed, config(1))
    asked = []
    monkeypatch.setattr(packed.shards, "cache", object())
    monkeypatch.setattr(packed.shards, "look_ahead", asked.extend)
    TrainingBatches(packed, samples, plan, image_size=16, rank=0, world_size=1).samples_of(0)
    assert sorted(asked) == sorted({packed.shard_of(int(sample)) for sample in samples})


def test_a_class_with_too_few_is_named(sets):
    per_class = COUNTS[SET]
    with pytest.raises(ValueError, match="class 'red' has 17 training images") as caught:
        plan_training(sets["pixels"], config(per_class - 1))
    assert str(caught.value) == (
        "--loader.shots is 18, but class 'red' has 17 training images besides those of the 8 held "
        "out, and 3 more classes have too few; choose fewer shots or a smaller --loader.held-out, "
        "or add images"
    )
    with pytest.raises(
        ValueError, match=r"class 'red' has 19 training images besides .* 0 held out"
    ):
        plan_training(sets["pixels"], config(per_class + 1, 0))
    assert len(plan_training(sets["pixels"], config(per_class, 0))[1]) == len(sets["pixels"])


def test_a_batch_larger_than_the_choice(sets):
    with pytest.raises(
        ValueError, match=r"a batch of 9 is larger than the 8 training samples that"
    ):
        plan_training(sets["pixels"], config(2, batch_size=9))
    assert plan_training(sets["pixels"], config(2, batch_size=8))[0].steps_per_epoch == 1


def test_the_fingerprint_names_the_choice(sets):
    packed = sets["pixels"]

    def of(shots: int) -> dict:
        plan, _, _ = plan_training(packed, config(shots))
        return fingerprint(packed, plan, 8, 0, shots)

    assert of(2)["shots"] == 2
    # that of runs of earlier versions
    assert set(of(0)) == set(of(2)) - {"shots"}


def test_it_is_part_of_the_identity():
    assert config(4).identity() != config(2).identity()
    with pytest.raises(ValueError, match=r"loader.shots is -1"):
        config(-1)
