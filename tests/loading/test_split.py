"""The held-out split is by image id and stratified."""

import numpy as np
import pytest

from rft.loading.split import held_out_split


def world(samples=600, classes=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=samples).astype(np.int32)
    keys = np.array([f"n{label:08d}_{n}" for n, label in enumerate(labels)], dtype="S")
    return keys, labels


def test_parts_are_disjoint_whole_and_stratified():
    keys, labels = world()
    train, held = held_out_split(keys, labels, 120, seed=0)
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(600))
    assert len(held) == 120
    share = np.bincount(labels[held]) / np.bincount(labels)
    assert np.abs(share - 0.2).max() < 0.02


def test_packing_order_does_not_matter():
    keys, labels = world()
    shuffled = np.random.default_rng(1).permutation(len(keys))
    _, held = held_out_split(keys, labels, 120, seed=3)
    _, held_again = held_out_split(keys[shuffled], labels[shuffled], 120, seed=3)
    assert set(keys[held]) == set(keys[shuffled][held_again])
    _, other = held_out_split(keys, labels, 120, seed=4)
    assert set(keys[held]) != set(keys[other])


def test_equals_the_released_codes_split():
    # data/base.py of the released code: indices into the class- and name-sorted list
    from sklearn.model_selection import train_test_split

    keys, labels = world()
    order = sorted(range(len(keys)), key=lambda n: (labels[n], keys[n]))
    sorted_labels = labels[order]
    _, expected = train_test_split(
        range(len(keys)), train_size=len(keys) - 120, random_state=2, stratify=sorted_labels
    )
    _, held = held_out_split(keys, labels, 120, seed=2)
    assert set(held.tolist()) == {order[n] for n in expected}


def test_nothing_held_out_and_too_much():
    keys, labels = world()
    train, held = held_out_split(keys, labels, 0, seed=0)
    assert (len(train), len(held)) == (600, 0)
    with pytest.raises(ValueError, match=r"--loader.held-out is 599, but 600 .* allow 6 to 594"):
        held_out_split(keys, labels, 599, seed=0)
