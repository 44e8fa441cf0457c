"""The manifest: its scoring rule, and that its hash is the identity of the data."""

from dataclasses import replace

import pytest

from rft.data.manifest import Manifest


@pytest.fixture
def manifest(tiny_data) -> Manifest:
    return Manifest.load(f"{tiny_data}/imagenet-val")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (((0,), (1,), (2,), (3,)), [0, 1, 2, 3]),
        # R and A: their classes alone take part
        (((1,), (3,)), [-1, 0, -1, 1]),
        # ObjectNet: one group may have several classes
        (((3, 0), (2,)), [0, -1, 1, 0]),
    ],
)
def test_classes_score_in_their_group_and_others_take_no_part(manifest, groups, expected):
    assert replace(manifest, groups=groups).class_to_group().tolist() == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "imagenet-v2"},
        {"classes": ("red", "green", "grey", "blue")},
        {"templates": ("{c}", "a {c} square")},
        {"groups": ((0,), (1,), (2,))},
        {"encoding": {"kind": "original", "crop_border": 0}},
        {"plan_hash": "0"},
        {"index_sha256": "0"},
        {"shards": ()},
        {"quarantined": 1},
    ],
)
def test_the_hash_covers_everything(manifest, changes):
    assert replace(manifest, **changes).sha256 != manifest.sha256
    assert replace(manifest).sha256 == manifest.sha256
