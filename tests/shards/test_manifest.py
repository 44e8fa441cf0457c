"""Manifest and index: invalid ones are refused by every reader, with the position."""

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rft.data.show
import rft.evaluate.command
from benchmarks.servers.ranges import range_server
from rft import recipes
from rft.evaluate.count import score
from rft.loading.dataset import PackedDataset
from rft.packing.foreign.index import index_shards
from rft.packing.foreign.rule import Options as Reading
from rft.packing.pack import Options, pack
from rft.packing.verify import verify
from rft.shards.images import encoding_parameters, to_npy
from rft.shards.index import Index
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import Manifest, Shard, group_faults
from rft.storage import files
from tests.packing.test_foreign import write_tar

LABELS = LabelSpace(ids=("n1", "n2", "n3"), names=("one", "two", "three"), templates=("a {c}.",))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("healthy")
    rng = np.random.default_rng(0)
    for n in range(6):
        path = root / "source" / "val" / LABELS.ids[n % 3] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    options = Options(encoding="pixels", size=16, workers=1)
    pack("imagenet-val", str(root / "source"), str(root), LABELS, options)
    return root / "imagenet-val"


@pytest.fixture
def packed(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "data" / "set"))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a set's manifest.json by hand."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def rewrite(folder: Path, **columns: np.ndarray | None) -> None:
    """Change, add or (None) remove columns of index.npz, and update the manifest."""
    manifest = Manifest.load(str(folder))
    old = Index.load(str(folder), manifest)
    new = {**vars(old), **columns}
    np.savez(folder / "index.npz", **{n: c for n, c in new.items() if c is not None})
    sha256 = files.sha256_file(folder / "index.npz")
    edit(folder, lambda document: document.update(index_sha256=sha256))


SHA256 = "0" * 64
MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no group": ({"groups": []}, "groups must name at least one group"),
    "null": ({"groups": None}, "groups is None; it must be a list"),
    "an empty group": ({"groups": [[0], []]}, r"groups\[1\] must name at least one class"),
    "no list": (
        {"groups": [[0], 1]},
        r"groups\[1\] is 1; it must be a list",
    ),
    "overlap": (
        {"groups": [[0, 1], [2, 1]]},
        r"groups\[1\]\[1\]: class 1 is already in groups\[0\]",
    ),
    "twice": ({"groups": [[0, 0]]}, r"groups\[0\]\[1\]: class 0 is already in groups\[0\]"),
    "below": ({"groups": [[0], [-1]]}, r"groups\[1\]\[0\] must be a class id from 0 to 2, not -1"),
    "above": ({"groups": [[0, 3]]}, r"groups\[0\]\[1\] must be a class id from 0 to 2, not 3"),
    "float": ({"groups": [[1.0]]}, "is 1.0; it must be a whole number"),
    "bool": ({"groups": [[True]]}, "is True; it must be a whole number"),
    "text": ({"groups": [["0"]]}, "is '0'; it must be a whole number"),
    "no classes": ({"classes": []}, r"classes is \[\]; it must have 1 or more elements"),
    "classes that are one text": ({"classes": "abc"}, "classes is 'abc'; it must be a list"),
    "a class that is none": ({"classes": ["a", 1, "b"]}, r"classes\[1\] is 1; it must be a text"),
    "fewer ids": ({"class_ids": ["n1"]}, "class_ids must be as many as classes"),
    "equal ids": ({"class_ids": ["n1", "n1", "n2"]}, "class_ids must be as many .* distinct"),
    "no prompts": ({"templates": []}, r"templates is \[\]; it must have 1 or more elements"),
    "index hash": (
        {"index_sha256": "../../x"},
        "index_sha256 is '../../x'; it must be 64 hex digits",
    ),
    "left out": ({"quarantined": -1}, "quarantined is -1; it must be greater than or equal to 0"),
    "left out, maybe": ({"quarantined": True}, "quarantined is True; it must be a whole number"),
    "no encoding": ({"encoding": "pixels"}, "encoding is 'pixels'; it must be an object"),
    "no shards": ({"shards": []}, "the shards hold no samples"),
    "shards": ({"shards": {}}, r"shards is \{\}; it must be a list"),
    "name": ({"dataset": 3}, "dataset is 3; it must be a text"),
}
SHARDS: dict[str, tuple[dict[str, Any], str]] = {
    "bytes below zero": (
        {"bytes": -1},
        r"shards\[0\].bytes is -1; it must be greater than or equal to 0",
    ),
    "half a byte": ({"bytes": 1.5}, r"shards\[0\].bytes is 1.5; it must be a whole number"),
    "samples below zero": (
        {"samples": -6},
        r"shards\[0\].samples is -6; it must be greater than or equal to 0",
    ),
    "samples as text": ({"samples": "6"}, r"shards\[0\].samples is '6'; it must be a whole number"),
    "no samples": ({"samples": 0}, "the shards hold no samples"),
    "a path": ({"sha256": "../0"}, r"shards\[0\].sha256 is '../0'; it must be 64 hex digits"),
    "too long": ({"sha256": SHA256 + "0"}, r"shards\[0\].sha256 is .*; it must be 64 hex digits"),
    "a line more": (
        {"sha256": SHA256 + "\n"},
        r"shards\[0\].sha256 is .*; it must be 64 hex digits",
    ),
    "no name": ({"name": ""}, r"shards\[0\].name is ''; it must have at least 1 character"),
    "more": ({"url": "x"}, r"shards\[0\].url is an unknown field"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_cannot_be_right(packed: Path, kind: str) -> None:
    values, message = MANIFESTS[kind]
    edit(packed, lambda document: document.update(values))
    check(packed, "manifest.json", message)


@pytest.mark.parametrize("kind", SHARDS)
def test_a_shard_that_cannot_be_right(packed: Path, kind: str) -> None:
    values, message = SHARDS[kind]
    edit(packed, lambda document: document["shards"][0].update(values))
    check(packed, "manifest.json", message)


def test_a_shard_that_is_named_twice(packed: Path) -> None:
    edit(packed, lambda document: document["shards"].append(document["shards"][0]))
    check(packed, "manifest.json", r"shards: '000000.tar' is named more than once")


def check(folder: Path, name: str, message: str) -> None:
    """Check that reading fails in one line that names the file, and that verify finds it too."""
    with pytest.raises(ValueError, match=message) as caught:
        PackedDataset(str(folder))
    assert str(caught.value).startswith(str(folder / name))
    assert str(caught.value).endswith("; pack or index the set again")
    assert "\n" not in str(caught.value)
    assert verify(str(folder), deep=False, workers=1).problems


ROW = r"index.npz, row 2, key '.*': "
INDEXES: dict[str, tuple[Callable[[Index], dict[str, np.ndarray | None]], str]] = {
    "label above": (
        lambda i: {"label": put(i.label, 3)},
        ROW + "its label is not one of the 3 classes",
    ),
    "label below": (lambda i: {"label": put(i.label, -1)}, ROW + "its label is not one of the 3"),
    "beyond": (lambda i: {"offset": put(i.offset, 2**20)}, ROW + "its payload reaches beyond"),
    "wraps": (lambda i: {"offset": put(i.offset, 2**64 - 512)}, ROW + "its payload reaches beyond"),
    "too long": (
        lambda i: {"length": put(i.length, 2**32 - 1)},
        ROW + "its payload reaches beyond",
    ),
    "fewer rows": (lambda i: {"width": i.width[1:]}, "column width has 5 samples, the manifest 6"),
    "no label": (lambda i: {"label": None}, "its columns must be offset, .*, they are"),
    "one more": (lambda i: {"more": i.label}, "its columns must be offset, .*, they are .* more"),
    "another type": (
        lambda i: {"label": i.label.astype(float)},
        "label must be a list of int32, not",
    ),
    "objects": (lambda i: {"key": i.key.astype(object)}, "index.npz is not an archive of columns"),
    "texts": (lambda i: {"key": i.key.astype(str)}, "column key must be a list of .*, not <U"),
    "a table": (
        lambda i: {"label": i.label[None]},
        r"label must be a list of int32, not int32 \(1, 6",
    ),
}


def put(column: np.ndarray, value: int) -> np.ndarray:
    changed = column.copy()
    changed[2] = value
    return changed


def test_an_index_of_another_hash_says_what_to_do(packed: Path) -> None:
    with (packed / "index.npz").open("ab") as stream:
        stream.write(b"x")
    said = r"index\.npz does not have the sha256 in its manifest; pack or index the set again$"
    with pytest.raises(ValueError, match=said):
        Index.load(str(packed), Manifest.load(str(packed)))


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_cannot_be_right(packed: Path, kind: str) -> None:
    change, message = INDEXES[kind]
    rewrite(packed, **change(Index.load(str(packed), Manifest.load(str(packed)))))
    check(packed, "index.npz", message)


def test_every_label_is_scored(packed: Path) -> None:
    """A label in no group would count as correct with any prediction that is in no group."""
    edit(packed, lambda document: document.update(groups=[[0], [2]]))
    check(packed, "index.npz", "its label is in no group, so it never scores")
    report = verify(str(packed), deep=False, workers=1)
    edited, *labels = [problem.what for problem in report.problems]
    assert "groups differ from plan.json" in edited
    assert labels == 2 * ["its label is in no group, so it never scores"]


def test_a_healthy_set_is_read_and_keeps_its_hash(packed: Path) -> None:
    manifest = Manifest.load(str(packed))
    assert manifest.class_ids == LABELS.ids
    assert len(PackedDataset(str(packed))) == 6
    # manifests written before there were ids do not change
    edit(packed, lambda document: document.pop("class_ids"))
    older = Manifest.load(str(packed))
    assert older == replace(manifest, class_ids=())
    assert older.sha256 == files.sha256_json(json.loads((packed / "manifest.json").read_text()))


def test_commands_refuse_emptied_scoring(packed: Path, refused, tmp_path: Path) -> None:
    """All of them read a set as a PackedDataset or through its manifest."""
    edit(packed, lambda document: document.update(groups=[]))
    root, name = packed.parent, packed.name
    (weights := tmp_path / "weights.safetensors").touch()
    config = recipes.build("no-mask", scale="miniature", data=str(root), run=str(tmp_path))
    files.write_json(str(tmp_path / "config.json"), {**config.to_dict(), "train_set": name})
    for line in (
        refused(rft.evaluate.command, weights, "--data", root, "--sets", name),
        refused(rft.data.show, tmp_path, "--step", 0),
    ):
        what = "groups must name at least one group of class ids; pack or index the set again"
        assert line == f"error: {packed}/manifest.json: {what}"


# --- scoring by hand ----------------------------------------------------------------------------


def test_classes_in_no_group_take_no_part(healthy: Path) -> None:
    """Five classes in the groups {1} and {4, 2}: by hand, the table and what it counts as right."""
    manifest = replace(
        Manifest.load(str(healthy)), classes=tuple("abcde"), class_ids=(), groups=((1,), (4, 2))
    )
    assert manifest.class_to_group().tolist() == [-1, 0, 1, -1, 1]
    logits = torch.tensor(
        [
            [9.0, 2.0, 1.0, 9.0, 0.0],  # the largest are not scored: 1
            [9.0, 0.0, 1.0, 9.0, 2.0],  # 4, of the group of 2
            [0.0, 0.0, 3.0, 9.0, 2.0],  # 2
            [9.0, 0.0, 3.0, 9.0, 2.0],  # 2, where the label is 1
        ]
    )
    found = score(logits, torch.tensor([1, 2, 2, 1]), torch.from_numpy(manifest.class_to_group()))
    assert found.rank_B.tolist() == [0, 0, 0, 1]


def test_group_faults_are_all_named() -> None:
    assert list(group_faults(((0, 1), (2,)), 3)) == []
    assert len(list(group_faults(((0, 5), (), (0, -1)), 3))) == 4


# --- payloads -----------------------------------------------------------------------------------


@contextlib.contextmanager
def at(folder: Path, place: str) -> Iterator[str]:
    """Yield a folder's path, or a URL of a server for it."""
    if place == "local":
        yield str(folder)
    else:
        with range_server(folder) as url:
            yield url


@pytest.mark.parametrize("place", ["local", "remote"])
@pytest.mark.parametrize("shape", [(16, 16, 3), (3, 16, 15), (3, 16, 17), (3, 2, 2)])
def test_pixels_of_another_shape_are_named(packed: Path, shape: tuple, place: str) -> None:
    """A payload with the crc32 of the index that is not a square of pixels."""
    index = Index.load(str(packed), Manifest.load(str(packed)))
    payload = to_npy(np.zeros(shape, np.uint8))
    offset = int(index.offset[2])
    with (packed / "000000.tar").open("r+b") as stream:
        stream.seek(offset)
        stream.write(payload)
    crc32, length = put(index.crc32, zlib.crc32(payload)), put(index.length, len(payload))
    rewrite(packed, crc32=crc32, length=length)
    with at(packed, place) as url:
        data = PackedDataset(url)
        with pytest.raises(ValueError, match="3 x 16 x 16") as caught:
            data.batch(np.arange(6), 16)
        assert data.image(1, 16).shape == (3, 16, 16)
    assert str(caught.value) == (
        f"{url}/000000.tar, sample {data.key(2)!r}, offset {offset} is not the array "
        "of 3 x 16 x 16 pixels that its manifest declares; pack the set again"
    )


@pytest.mark.parametrize("place", ["local", "remote"])
@pytest.mark.parametrize("kind", ["original", "jpeg"])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, kind: str, place: str) -> None:
    """Keys repeat in third-party shards, so a key alone does not identify an image."""
    photo = BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photo, "JPEG")
    whole, cut = photo.getvalue(), photo.getvalue()[:1000]
    for number, second in enumerate((whole, cut)):
        members = [("a.jpg", whole), ("a.cls", b"0"), ("b.jpg", second), ("b.cls", b"1")]
        write_tar(
            tmp_path / f"{number}.tar",
            [*members, (f"{number}.jpg", whole), (f"{number}.cls", b"2")],
        )
    index_shards([str(tmp_path / "{0..1}.tar")], str(tmp_path), LABELS, Reading(workers=1))
    if kind == "jpeg":  # the reader's way for squares that are stored as JPEG
        encoding = encoding_parameters("jpeg", 16, 0)
        edit(tmp_path, lambda document: document.update(encoding=encoding))
    with at(tmp_path, place) as url:
        data = PackedDataset(url)
        with pytest.raises(ValueError, match="cannot be decoded") as caught:
            data.batch(np.arange(6), 16)
    expected = f"{url}/1.tar, sample 'b', offset {data.index.offset[4]} cannot be decoded: "
    assert str(caught.value).startswith(expected)


@pytest.fixture
def tiny_manifest(tiny_data) -> Manifest:
    return Manifest.load(f"{tiny_data}/imagenet-val")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (((0,), (1,), (2,), (3,)), [0, 1, 2, 3]),
        # R and A: only their classes are scored
        (((1,), (3,)), [-1, 0, -1, 1]),
        # ObjectNet: one group may have several classes
        (((3, 0), (2,)), [0, -1, 1, 0]),
    ],
)
def test_classes_score_in_their_group_and_others_take_no_part(tiny_manifest, groups, expected):
    assert replace(tiny_manifest, groups=groups).class_to_group().tolist() == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "imagenet-v2"},
        {"classes": ("red", "green", "grey", "blue")},
        {"templates": ("{c}", "a {c} square")},
        {"groups": ((0,), (1,), (2,))},
        {"encoding": {"kind": "original", "crop_border": 0}},
        {"plan_hash": "1" * 64},
        {"index_sha256": "1" * 64},
        {"shards": (Shard(name="x.tar", bytes=1, sha256=SHA256, samples=4),)},
        {"quarantined": 1},
        {"class_ids": ("a", "b", "c", "d")},
    ],
)
def test_the_hash_covers_everything(tiny_manifest, changes):
    assert replace(tiny_manifest, **changes).sha256 != tiny_manifest.sha256
    assert replace(tiny_manifest).sha256 == tiny_manifest.sha256
