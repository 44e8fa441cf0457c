"""Third-party shards: each layout is read unchanged, and each kind of bad shard is named."""

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import re
import shutil
import sys
import tarfile
import unicodedata
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from braceexpand import braceexpand
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import base_plus_ext

from benchmarks.servers.faults import Fault, faulty
from benchmarks.servers.ranges import range_server
from rft import cli
from rft.loading.dataset import PackedDataset
from rft.packing.expected import published_classes
from rft.packing.foreign.class_names import loose_form
from rft.packing.foreign.index import index_shards
from rft.packing.foreign.patterns import as_patterns, count_expanded, expand
from rft.packing.foreign.rule import Options as AllOptions
from rft.packing.foreign.rule import local_labels
from rft.packing.foreign.samples import parent, split_name
from rft.packing.objectnet import objectnet_groups
from rft.packing.verify import verify
from rft.shards.images import clip_pixels, load_image
from rft.shards.index import Index
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import Manifest
from rft.storage import files
from tests.pictures import empty_png
from tests.tiny import unstamped

pytestmark = pytest.mark.slow  # together

MAPPINGS = Path(__file__).parent / "objectnet-mappings"
LABELS = LabelSpace(
    ids=("n01", "n02", "n03"), names=("red fox", "toad", "sloth bear"), templates=("a {c}.",)
)
IMAGENET = LabelSpace.imagenet()
Options = partial(AllOptions, workers=1)  # several processes take a second to start
Members = Sequence[tuple[str, bytes]]


def picture(seed: int, kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    shape = (*rng.integers(20, 48, 2), 3)
    stream = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(stream, kind, **options)
    return stream.getvalue()


def write_tar(path: Path, members: Members) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return str(path)


def copy_of(dataset: str, count: int, **options) -> AllOptions:
    """Options for a small copy of a benchmark."""
    return Options(dataset=dataset, allow_count=(f"{dataset}={count}",), **options)


def plain(key: str, label: int | str, seed: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", picture(seed)), (f"{key}.cls", str(label).encode())]


def write_clip_benchmark(
    folder: Path, labels: Sequence[int], classes: Sequence[str], kind: str = "webp"
) -> str:
    """Write what clip_benchmark_export_wds writes: two shards below test/, text files beside."""
    (folder / "test").mkdir(parents=True)
    half = -(-len(labels) // 2)
    with webdataset.ShardWriter(str(folder / "test" / "%d.tar"), maxcount=half, verbose=0) as sink:
        for number, label in enumerate(labels):
            data = picture(number, "JPEG" if kind == "jpg" else kind.upper())
            sink.write({"__key__": f"s{number:07d}", kind: data, "cls": int(label)})
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    (folder / "test" / "nshards.txt").write_text("2\n")
    return str(folder / "test" / "{0..1}.tar")


def check(out: str, patterns: Sequence[str]) -> tuple[Manifest, Index, PackedDataset]:
    """Compare index and loader with webdataset's reading of the same shards."""
    data = PackedDataset(out)
    border = data.manifest.encoding["crop_border"]
    urls = [url for pattern in patterns for url in webdataset.shardlists.expand_urls(pattern)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [data.key(n) for n in range(len(data))]
    for number, sample in enumerate(samples):
        (payload,) = (sample[s] for s in ("jpg", "jpeg", "png", "webp") if s in sample)
        assert data.payload(number) == payload
        image = load_image(payload)
        assert image.size == (data.index.width[number], data.index.height[number])
        assert np.array_equal(data.image(number, 16), clip_pixels(image, 16, border))
    return data.manifest, data.index, data


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the layouts --------------------------------------------------------------------------------


def test_timm_layout_in_its_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet-train"
    for shard in range(3):
        members = []
        for n in range(4):
            key, label = f"n01440764_{shard}{n}", (shard * 331 + n * 7) % 1000
            members += plain(key, label, seed=shard * 10 + n)
            members += [(f"{key}.json", json.dumps({"label": label, "filename": key}).encode())]
        write_tar(folder / f"imagenet1k-train-{shard:04d}.tar", members)
    pattern = str(folder / "imagenet1k-train-{0000..0002}.tar")
    index_shards([pattern], str(folder), IMAGENET, copy_of("imagenet-train", 12))
    manifest, index, _ = check(str(folder), [pattern])
    assert manifest.dataset == "imagenet-train"
    assert [shard.name for shard in manifest.shards] == [
        f"imagenet1k-train-{n:04d}.tar" for n in range(3)
    ]
    assert manifest.groups == tuple((n,) for n in range(1000))
    assert manifest.classes == IMAGENET.names
    assert index.label.tolist() == [(s * 331 + n * 7) % 1000 for s in range(3) for n in range(4)]
    # relative names: the folder moves as one
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    check(str(moved), [str(moved / "imagenet1k-train-{0000..0002}.tar")])


def test_clip_benchmark_layout_with_global_labels(tmp_path: Path) -> None:
    labels = [999, 0, 657, 744, 3]
    pattern = write_clip_benchmark(tmp_path / "wds_imagenetv2", labels, IMAGENET.names)
    out = str(tmp_path / "imagenet-v2")
    message = "imagenet-v2 has 5 images here, 10,000 were published"
    with pytest.raises(ValueError, match=message):
        index_shards([pattern], out, IMAGENET, Options())
    index_shards([pattern], out, IMAGENET, copy_of("imagenet-v2", 5))
    manifest, index, _ = check(out, [pattern])
    assert index.label.tolist() == labels
    # shards are in a different folder: full names
    assert manifest.shards[0].name == str(tmp_path / "wds_imagenetv2" / "test" / "0.tar")


def test_manifest_above_the_shards_names_them_relatively(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet-val"
    pattern = write_clip_benchmark(folder, [1, 2, 0], LABELS.names, "png")
    index_shards([pattern], str(folder), LABELS, Options())
    manifest, _, _ = check(str(folder), [pattern])
    assert [shard.name for shard in manifest.shards] == ["test/0.tar", "test/1.tar"]


@pytest.mark.parametrize("dataset", ["imagenet-r", "imagenet-a"])
def test_local_labels_of_the_200_class_sets(tmp_path: Path, dataset: str) -> None:
    classes = [IMAGENET.ids.index(wnid) for wnid in published_classes(dataset, IMAGENET) or ()]
    names = [IMAGENET.names[class_id] for class_id in classes]
    # R holds one of the two classes called missile
    local = [0, 199, 57, *[n for n, name in enumerate(names) if name == "missile"]]
    pattern = write_clip_benchmark(tmp_path / f"wds_{dataset}", local, names, "jpg")
    out = str(tmp_path / dataset)
    index_shards([pattern], out, IMAGENET, copy_of(dataset, len(local)))
    manifest, index, _ = check(out, [pattern])
    assert index.label.tolist() == [classes[label] for label in local]
    assert (657 in index.label) == (dataset == "imagenet-r")
    assert manifest.groups == tuple((class_id,) for class_id in sorted(classes))
    assert len(manifest.groups) == 200


def test_200_class_sets_with_global_labels(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "0.tar", plain("a", 1) + plain("b", 657, 1))
    index_shards([url], str(tmp_path / "imagenet-r"), IMAGENET, copy_of("imagenet-r", 2))
    manifest, index, _ = check(str(tmp_path / "imagenet-r"), [url])
    assert index.label.tolist() == [1, 657]
    assert len(manifest.groups) == 200
    url = write_tar(tmp_path / "1.tar", plain("a", 0))
    with pytest.raises(ValueError, match=r"class 0 \(tench\), which this set is not published for"):
        index_shards([url], str(tmp_path / "r"), IMAGENET, Options(dataset="imagenet-r"))


def test_200_class_sets_of_another_label_space(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "0.tar", plain("a", 2) + plain("b", 0, 1))
    manifest = index_shards([url], str(tmp_path / "imagenet-r"), LABELS, Options())
    assert manifest.groups == ((0,), (2,))


def test_objectnet(tmp_path: Path) -> None:
    groups = objectnet_groups(MAPPINGS, 1000)
    label_of_folder = json.loads((MAPPINGS / "folder_to_objectnet_label.json").read_text())
    names = [label_of_folder[folder].lower() for folder in groups]  # sorted by folder
    local = [0, 112, list(groups).index("chair")]
    pattern = write_clip_benchmark(tmp_path / "wds_objectnet", local, names, "png")
    out = str(tmp_path / "objectnet")
    with pytest.raises(ValueError, match="objectnet needs --mappings"):
        index_shards([pattern], out, IMAGENET, Options())
    index_shards([pattern], out, IMAGENET, copy_of("objectnet", 3, mappings=str(MAPPINGS)))
    manifest, index, _ = check(out, [pattern])
    assert manifest.encoding == {"kind": "original", "crop_border": 2}
    assert manifest.groups == tuple(groups.values())
    assert manifest.class_to_group()[index.label].tolist() == local
    # a frame that was removed before stays as it is
    options = copy_of("objectnet", 3, mappings=str(MAPPINGS), crop_border=0)
    manifest = index_shards([pattern], str(tmp_path / "cut"), IMAGENET, options)
    assert manifest.encoding["crop_border"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[:-1], "lists 112 of ObjectNet's 113 classes"),
        (lambda names: [*names[:-1], "spaceship"], "'spaceship' is not one of ObjectNet's 113"),
        (lambda names: [*names[:-1], names[0]], "second name of one of ObjectNet's 113"),
    ],
)
def test_objectnet_names_that_do_not_fit(tmp_path: Path, change, message: str) -> None:
    names = change(list(objectnet_groups(MAPPINGS, 1000)))
    pattern = write_clip_benchmark(tmp_path / "wds", [0, 1], names, "png")
    options = Options(mappings=str(MAPPINGS))
    with pytest.raises(ValueError, match=message):
        index_shards([pattern], str(tmp_path / "objectnet"), IMAGENET, options)


def test_img2dataset_layout(tmp_path: Path) -> None:
    values: list[int | str] = [2, "n01", "toad", "1"]
    members = []
    for n, value in enumerate(values):
        document = {"caption": "x", "class": value, "key": f"{n:09d}", "status": "success"}
        members += [
            (f"{n:09d}.jpg", picture(n)),
            (f"{n:09d}.txt", b"a caption"),
            (f"{n:09d}.json", json.dumps(document).encode()),
        ]
    url = write_tar(tmp_path / "00000.tar", members)
    out = str(tmp_path / "own")
    index_shards([url], out, LABELS, Options(label_field="class"))
    _, index, _ = check(out, [url])
    assert index.label.tolist() == [2, 0, 1, 1]
    hint = r"no \.cls; if its \.json has the class in 'class', pass --label-field class"
    with pytest.raises(ValueError, match=hint):
        index_shards([url], str(tmp_path / "other"), LABELS, Options())
    members = [(name, data.replace(b'"class"', b'"y"')) for name, data in members]
    unusual = write_tar(tmp_path / "unusual.tar", members)
    hint = r"no \.cls; name a field of its \.json with --label-field \(fields: caption, key, stat"
    with pytest.raises(ValueError, match=hint):
        index_shards([unusual], str(tmp_path / "other"), LABELS, Options())
    with pytest.raises(
        ValueError, match=r"no number or string 'label' \(fields: caption, class, key"
    ):
        index_shards([url], str(tmp_path / "other"), LABELS, Options(label_field="label"))


NUMBERED = LabelSpace(  # as folders 0 to 11 are sorted
    ids=tuple(sorted(map(str, range(12)))),
    names=tuple(f"number {name}" for name in sorted(map(str, range(12)))),
    templates=("a {c}.",),
)
WORDS = LabelSpace(ids=("a", "b", "c"), names=("2", "0", "1"), templates=("a {c}.",))
IN_ORDER = LabelSpace(ids=("0", "1", "2"), names=("x", "y", "z"), templates=("a {c}.",))
PADDED = LabelSpace(ids=("001", "002", "003"), names=("x", "y", "z"), templates=("a {c}.",))
AGENT = LabelSpace(ids=("007", "7", "b"), names=("x", "y", "z"), templates=("a {c}.",))
ACCENTS = LabelSpace(
    ids=("caf\u00e9", "b"), names=("caf\u00e9", "\u00fcber"), templates=("a {c}.",)
)
AMBIGUOUS = r"key 'k0': label {} may be a position or .*; choose with --labels-are positions or"
# label space, labels as JSON (None: .cls), what labels are, class ids or the error
NUMBERS: dict[str, tuple[LabelSpace, list, bool, str | None, list[int] | str]] = {
    "ids as texts": (NUMBERED, ["0", "10", "2", "9"], True, None, [0, 2, 4, 11]),
    "ids as numbers": (NUMBERED, [10, 2], True, None, AMBIGUOUS.format(10)),
    "also where both mean the same": (NUMBERED, [0, 1], True, None, AMBIGUOUS.format(0)),
    "no id as text": (NUMBERED, ["12"], True, None, AMBIGUOUS.format(12)),
    "ids in .cls": (NUMBERED, [10, 2], False, None, AMBIGUOUS.format(10)),
    "numbers are names": (NUMBERED, [10, 2], True, "names", [2, 4]),
    "numbers are positions": (NUMBERED, [10, 2], True, "positions", [10, 2]),
    "texts are positions": (NUMBERED, ["10", "2"], True, "positions", [10, 2]),
    ".cls has names": (NUMBERED, [10, 2], False, "names", [2, 4]),
    ".cls has positions": (NUMBERED, [10, 2], False, "positions", [10, 2]),
    "no such name": (
        NUMBERED,
        [12],
        False,
        "names",
        "label '12' is not a class of the label space",
    ),
    "no such position": (
        NUMBERED,
        [12],
        False,
        "positions",
        "label 12 is not one of the 12 classes",
    ),
    "names that are numbers": (WORDS, ["1"], True, None, AMBIGUOUS.format(1)),
    "such names as names": (WORDS, ["1", "b"], True, "names", [2, 1]),
    "ids in order": (IN_ORDER, [2, "1", 0], True, None, [2, 1, 0]),
    "ids in order in .cls": (IN_ORDER, [2, "z", 0], False, None, [2, 2, 0]),
    "padded ids in .cls": (PADDED, ["001", "003"], False, None, [0, 2]),
    "padded ids as names": (PADDED, ["001", "003"], False, "names", [0, 2]),
    "padded ids are no positions": (PADDED, ["001", "2"], False, "positions", [0, 2]),
    "position or padded id": (PADDED, ["2"], False, None, AMBIGUOUS.format(2)),
    "a number and its padded form": (AGENT, ["7", "007", "b"], False, "names", [1, 0, 2]),
    "the padded form alone": (AGENT, ["007", "b"], False, None, [0, 2]),
    "padded positions": (
        LABELS,
        ["001"],
        False,
        None,
        "label '001' is not a class .*; positions count",
    ),
    "padded positions as texts": (
        LABELS,
        ["+1"],
        True,
        None,
        "label '\\+1' is not a class .*; positions",
    ),
    "decomposed in .cls": (ACCENTS, ["cafe\u0301", "u\u0308ber"], False, None, [0, 1]),
    "decomposed in .json": (ACCENTS, ["cafe\u0301", "u\u0308ber"], True, None, [0, 1]),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_labels_that_look_like_positions(tmp_path: Path, kind: str) -> None:
    """A text that is an id is that id; ambiguous ones are refused; verify agrees."""
    labels, values, is_json, labels_are, expected = NUMBERS[kind]
    members = []
    for n, value in enumerate(values):
        label = json.dumps({"y": value}) if is_json else str(value)
        members += [
            (f"k{n}.jpg", picture(n)),
            (f"k{n}.{'json' if is_json else 'cls'}", label.encode()),
        ]
    url, out = write_tar(tmp_path / "0.tar", members), str(tmp_path / "out")
    options = Options(label_field="y" if is_json else None, labels_are=labels_are)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            index_shards([url], out, labels, options)
        return
    index_shards([url], out, labels, options)
    assert PackedDataset(out).index.label.tolist() == expected
    assert verify(out, deep=True, workers=1).problems == []
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan.get("labels_are") == labels_are
    assert ("labels_are" in plan) == (labels_are is not None)  # other plans are as before


def test_positions_in_a_local_list_may_be_ids_too(tmp_path: Path) -> None:
    """Numbers count the lines of classnames.txt, unless a class is called so."""
    url = write_tar(tmp_path / "0.tar", plain("k0", 0))
    (tmp_path / "classnames.txt").write_text("2\n0\n")
    with pytest.raises(ValueError, match=AMBIGUOUS.format(0)):
        index_shards([url], str(tmp_path / "out"), IN_ORDER, Options())
    index_shards([url], str(tmp_path / "out"), IN_ORDER, Options(labels_are="positions"))
    assert PackedDataset(str(tmp_path / "out")).index.label.tolist() == [2]
    assert verify(str(tmp_path / "out"), deep=True, workers=1).problems == []


@pytest.mark.parametrize("version", ["index 0", "index 2"])
def test_verify_reads_labels_of_other_versions_as_they_did(
    tmp_path: Path, monkeypatch, version: str
) -> None:
    """An id that is a number is not a position, just like in a packer's own shards."""
    members = [("k0.jpg", picture(0)), ("k0.json", b'{"y": "10"}')]
    url = write_tar(tmp_path / "0.tar", members)
    monkeypatch.setattr("rft.packing.foreign.index.ALGORITHM", version)
    index_shards([url], str(tmp_path / "out"), NUMBERED, Options(label_field="y"))
    monkeypatch.undo()
    assert verify(str(tmp_path / "out"), deep=True, workers=1).problems == []


def test_verify_reads_labels_as_the_index_did(tmp_path: Path) -> None:
    """A wrong class for a text that is an id is found; an older manifest has no ids."""
    members = [("k0.jpg", picture(0)), ("k0.json", b'{"y": "10"}')]
    url, out = write_tar(tmp_path / "0.tar", members), str(tmp_path / "out")
    index_shards([url], out, NUMBERED, Options(label_field="y"))
    manifest = Manifest.load(out)
    index = Index.load(out, manifest)
    content = replace(index, label=np.array([10], np.int32)).to_bytes()
    (tmp_path / "out" / "index.npz").write_bytes(content)
    replace(manifest, index_sha256=files.sha256_bytes(content)).save(out)
    (problem,) = verify(out, deep=True, workers=1).problems
    assert problem.what == "its .json has '10', the index has class 10"


FRUIT = LabelSpace(ids=("n1", "n2", "n3"), names=("apple", "pear", "plum"), templates=("a {c}.",))
# .cls, .json, whether they contradict each other
BOTH: dict[str, tuple[str, str, bool]] = {
    "another position": ("0", '{"label": 2}', True),
    "another id": ("0", '{"label": "n3"}', True),
    "another name": ("0", '{"class": "plum"}', True),
    "a position as text": ("0", '{"cls": "2"}', True),
    "a name against a position": ("apple", '{"label": 2}', True),
    "in a second field": ("0", '{"label": 0, "class": "plum"}', True),
    "the same position": ("2", '{"label": 2, "width": 0}', False),
    "the same id": ("2", '{"label": "n3", "class": "plum"}', False),
    "no class": ("0", '{"label": "fruit"}', False),
    "no position": ("0", '{"label": 7}', False),
    "a fraction": ("0", '{"label": 2.0}', False),
    "true": ("0", '{"label": true}', False),
    "another field": ("0", '{"width": 2}', False),
    "no object": ("0", "[2]", False),
    "no JSON": ("0", "{", False),
}


@pytest.mark.parametrize("kind", BOTH)
def test_a_cls_and_a_json_that_contradict_each_other(tmp_path: Path, kind: str, capsys) -> None:
    cls, document, differ = BOTH[kind]
    members = [*plain("k0", 1), *plain("k1", cls, seed=1), ("k1.json", document.encode())]
    url, out = write_tar(tmp_path / "0.tar", members), str(tmp_path / "out")
    if differ:
        message = (
            r"0\.tar, key 'k1': its \.json has '.*class 2 \(plum\), and not class 0 .*--ignore json"
        )
        with pytest.raises(ValueError, match=message):
            index_shards([url], out, FRUIT, Options())
        assert not (tmp_path / "out").exists()
    options = Options(ignore=("json",) if differ else ())
    index_shards([url], out, FRUIT, options)
    assert PackedDataset(out).index.label.tolist() == [1, 2 if cls == "2" else 0]
    assert verify(out, deep=True, workers=1).problems == []
    assert "WARNING" not in capsys.readouterr().err


@pytest.mark.parametrize("cls", ["0", "n1", "apple"])
def test_a_field_that_was_named_wins_over_a_cls_and_is_warned_of(
    tmp_path: Path, capsys, cls: str
) -> None:
    members = []
    for n, label in enumerate((2, 2, 0)):
        members += [*plain(f"k{n}", cls, seed=n), (f"k{n}.json", b'{"y": %d}' % label)]
    url, out = write_tar(tmp_path / "0.tar", members), str(tmp_path / "out")
    index_shards([url], out, FRUIT, Options(label_field="y"))
    assert PackedDataset(out).index.label.tolist() == [2, 2, 0]
    warning = capsys.readouterr().err
    assert "WARNING: 2 samples have a .cls that contradicts --label-field" in warning
    assert f"0.tar, key 'k0': its .cls has '{cls}', class 0 (apple), and not class 2" in warning
    index_shards([url], str(tmp_path / "2"), FRUIT, Options(label_field="y", ignore=("cls",)))
    assert "WARNING" not in capsys.readouterr().err


def test_labels_that_count_two_lists_do_not_contradict_each_other(tmp_path: Path) -> None:
    """A .cls may count lines of classnames.txt and the .json the label space."""
    members = [*plain("k0", 0), ("k0.json", b'{"label": 2}')]
    members += [*plain("k1", 0, seed=1), ("k1.json", b'{"label": 0}')]
    url = write_tar(tmp_path / "0.tar", members)
    (tmp_path / "classnames.txt").write_text("plum\npear\n")
    index_shards([url], str(tmp_path / "out"), FRUIT, Options())
    assert PackedDataset(str(tmp_path / "out")).index.label.tolist() == [2, 2]


def test_folders_capitals_and_members_without_a_key(tmp_path: Path, capsys) -> None:
    members = [
        ("README", b"text"),
        ("__meta__/info.json", b"{}"),
        ("n01/a.JPG", picture(1)),
        ("n01/a.cls", b"0\n"),
        ("n02/._a.jpg", b"resource fork"),
        ("n02/a.v1.JPEG", picture(9)),
        ("n02/a.png", picture(2, "PNG")),
        ("n02/a.cls", b" 1 "),
    ]
    url = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=r"unknown suffix \.v1\.jpeg of 'n02/a\.v1\.JPEG'"):
        index_shards([url], str(tmp_path / "out"), LABELS, Options())
    index_shards([url], str(tmp_path / "out"), LABELS, Options(ignore=("v1.JPEG",)))
    data = PackedDataset(str(tmp_path / "out"))
    assert [data.key(n) for n in range(2)] == ["n01/a", "n02/a"]
    assert data.index.label.tolist() == [0, 1]
    assert data.payload(1) == picture(2, "PNG")
    said = capsys.readouterr().out
    assert "skipped: 3 members without a key" in said
    assert "skipped: 1 members with the ignored suffix .v1.jpeg" in said


@given(st.lists(st.sampled_from(["a", "B1", "_", "-", ".", "/", "x/", ".J"]), max_size=6))
def test_keys_are_those_of_webdataset(parts: list[str]) -> None:
    name = "".join(parts)
    key, suffix = base_plus_ext(name)
    base = name.rpartition("/")[2]
    if base.startswith(".") or key is None:  # there webdataset makes the folder the key
        assert split_name(name) is None
    else:
        assert split_name(name) == (key, suffix.lower())


def test_remote_shards_and_remote_index(tmp_path: Path) -> None:
    names = [f"memory://h2/shards/{n}.tar" for n in range(3)]
    fs = fsspec.filesystem("memory")
    try:
        for n, name in enumerate(names):
            path = write_tar(tmp_path / f"{n}.tar", plain(f"a{n}", n, n) + plain(f"b{n}", 0, n))
            fs.put_file(path, name)
        pattern = "memory://h2/shards/{0..2}.tar"
        for out, expected in (("memory://h2/index", names), ("memory://h2/shards", None)):
            manifest = index_shards([pattern], out, LABELS, Options(dataset="own"))
            expected = expected or ["0.tar", "1.tar", "2.tar"]
            assert [shard.name for shard in manifest.shards] == expected
            data = PackedDataset(out)
            for n in range(len(data)):
                image = load_image(picture(n // 2))
                assert np.array_equal(data.image(n, 16), clip_pixels(image, 16))
    finally:
        fs.rm("/h2", recursive=True)


def test_web_server_that_drops_connections(tmp_path: Path) -> None:
    """Like CLIP_benchmark's sets on the Hugging Face hub: text files beside, shards over HTTP."""
    write_clip_benchmark(tmp_path / "wds", list(range(3)) * 4, LABELS.names, "jpg")
    out = str(tmp_path / "set")
    with (
        range_server(tmp_path / "wds") as url,
        faulty(url, Fault(kind="fin", after=2000)) as proxy,
    ):
        pattern = f"{proxy.url}/test/{{0..1}}.tar"
        for workers in (1, 2):
            index_shards([pattern], out, LABELS, AllOptions(workers=workers))
        assert verify(out, deep=True, workers=2).problems == []
        assert proxy.fired["fin"] >= 2
        data = PackedDataset(out)
        assert data.manifest.shards[1].name == f"{proxy.url}/test/1.tar"
        for n in range(12):
            assert np.array_equal(data.image(n, 16), clip_pixels(load_image(picture(n)), 16))
        with pytest.raises(ValueError, match=r"no such shard: .*2\.tar"):
            index_shards([f"{proxy.url}/test/{{1..2}}.tar"], out, LABELS, Options())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/a/0.tar", "s3://bucket/a"),
        ("s3://bucket/0.tar", "s3://bucket"),
        ("s3://bucket", None),
        ("/data/0.tar", "/data"),
        ("/0.tar", "/"),
        ("zip://0.tar::s3://bucket/a.zip", "zip://0.tar::s3://bucket"),
    ],
)
def test_parent(url: str, expected: str | None) -> None:
    assert parent(url) == expected


# --- again --------------------------------------------------------------------------------------


def test_again_changes_nothing_and_another_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "0.tar", plain("a", 0))
    write_tar(tmp_path / "set" / "1.tar", plain("b", 1, 1))
    pattern, out = str(tmp_path / "set" / "{0..1}.tar"), str(tmp_path / "set")
    index_shards([pattern], out, LABELS, Options(workers=1))
    before = snapshot(tmp_path)
    index_shards([pattern], out, LABELS, Options(workers=3))
    assert snapshot(tmp_path) == before
    with pytest.raises(
        ValueError, match=r"already holds a different .* \(in .*shards, samples_sha256\)"
    ):
        index_shards([str(tmp_path / "set" / "0.tar")], out, LABELS, Options())
    assert snapshot(tmp_path) == before
    # a damaged index is rewritten
    (tmp_path / "set" / "index.npz").write_bytes(b"damaged")
    index_shards([pattern], out, LABELS, Options())
    assert (tmp_path / "set" / "index.npz").read_bytes() == before["set/index.npz"][0]


def test_a_rerun_reads_an_index_of_any_size_that_is_allowed(tmp_path: Path, monkeypatch) -> None:
    """ImageNet-21k's has 500 MB; a JSON document has at most 64 MiB."""
    url, out = write_tar(tmp_path / "0.tar", plain("a", 0)), str(tmp_path)
    expected = index_shards([url], out, LABELS, Options())
    before = snapshot(tmp_path)
    size = len(before["index.npz"][0])
    find, limits = files.find_bytes, []

    def find_bytes(url: str, limit: int = size - 1) -> bytes | None:
        limits.append(limit)
        return find(url, limit)

    monkeypatch.setattr(files, "find_bytes", find_bytes)
    assert index_shards([url], out, LABELS, Options()) == expected
    assert size - 1 in limits
    assert snapshot(tmp_path) == before


def test_a_plan_that_an_older_version_left_is_replaced(tmp_path: Path, monkeypatch) -> None:
    url = write_tar(tmp_path / "0.tar", plain("a", 0))
    with monkeypatch.context() as patch:
        patch.setattr("rft.packing.foreign.index.ALGORITHM", "index 0")
        index_shards([url], str(tmp_path), LABELS, Options())
    (tmp_path / "manifest.json").unlink()
    manifest = index_shards([url], str(tmp_path), LABELS, Options())
    assert files.sha256_json(json.loads((tmp_path / "plan.json").read_text())) == manifest.plan_hash


def test_a_folder_that_is_being_packed_is_left_alone(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "0.tar", plain("a", 0))
    (tmp_path / "plan.json").write_text('{"algorithm": 1}')
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="is being packed"):
        index_shards([url], str(tmp_path), LABELS, Options())
    assert snapshot(tmp_path) == before


# --- what is refused ----------------------------------------------------------------------------

BAD_SAMPLES: dict[str, tuple[Members, str]] = {
    "unknown suffix": ([*plain("a", 0), ("a.pyd", b"x")], r"unknown suffix \.pyd of 'a\.pyd'"),
    "second picture": ([*plain("a", 0), ("a.seg.png", b"x")], r"--ignore seg\.png"),
    "array": ([("a.npy", b"x"), ("a.cls", b"0")], r"unknown suffix \.npy"),
    "no image": ([*plain("a", 0), ("b.cls", b"0")], "key 'b': no image"),
    "no label": ([*plain("a", 0), ("b.jpg", picture(1))], "key 'b': no label"),
    "two images": (
        [*plain("a", 0), ("a.png", picture(1, "PNG"))],
        r"2 images \(a\.jpg, a\.png\); drop all but one, such as the last with --ignore png",
    ),
    "same name twice": ([*plain("a", 0), *plain("a", 0)], "two members are named 'a.jpg'"),
    "same name later": (
        [*plain("a", 0), *plain("b", 0), *plain("a", 1)],
        r"bad\.tar: two members are named 'a\.jpg'; rename one$",
    ),
    "same name but for case": (
        [*plain("a", 0), ("a.JPG", b"x")],
        r"two members are named 'a\.jpg', except for case \('a\.JPG'\); rename one$",
    ),
    "same key later": (
        [("a.jpg", picture(0)), *plain("b", 0), ("a.cls", b"0")],
        "key 'a' recurs at byte .*sorted names",
    ),
    "an image that is not read": (
        [("a.gif", b"x"), ("a.cls", b"0")],
        r"unknown suffix \.gif of .*; convert \.gif images to JPEG, PNG or WebP$",
    ),
    "one beside an image": ([*plain("a", 0), ("a.gif", b"x")], r"with --ignore gif$"),
    "two images with one label": (
        [("p0.0.jpg", picture(0)), ("p0.1.jpg", picture(1)), ("p0.cls", b"0")],
        r"shares the label of sample 'p0': keep one image, named p0\.jpg, or give each image its",
    ),
    "number too large": (plain("a", 3), "key 'a': label 3 is not one of the 3 classes"),
    "number below zero": (
        plain("a", -1),
        "label '-1' is not a class of the label space; positions count",
    ),
    "unknown name": (plain("a", "zebra"), "label 'zebra' is not a class"),
    "separators": (plain("a", "Red_Fox"), "of the label space; did you mean 'n01'"),
    "misspelt": (plain("a", "tod"), "of the label space; did you mean 'toad'"),
    "dots in a key": (
        plain("img.v1.0", 0),
        r"unknown suffix \.v1\.0\.jpg of .*\); a key ends at the first dot .* is 'img'; rename",
    ),
    "empty label": (plain("a", ""), "label '' is not a class"),
    "no text": ([("a.jpg", picture(0)), ("a.cls", b"\xff")], r"its \.cls is not readable"),
    "no image data": (
        [("a.jpg", b"GIF89a"), ("a.cls", b"0")],
        "key 'a': the image is not a readable JPEG",
    ),
    "sliver": (
        [("a.png", empty_png(6000, 1)), ("a.cls", b"0")],
        r"key 'a': the image is 6000 x 1 pixels; .* at most 100 times",
    ),
    "no ASCII": (plain("\u00e4", 0), "is not printable ASCII"),
    "a sign that is not printed": (plain("a\x07b", 0), r"key 'a\\x07b' is not printable ASCII"),
    "a key that is too long": (plain("k" * 1025, 0), "key 'k{40}'... has 1,025 letters, more than"),
    "nothing": ([], "holds no samples"),
}


def test_images_that_other_loaders_show_as_stored(tmp_path: Path, capsys) -> None:
    """EXIF orientations and transparency are counted and unchanged."""
    exif = Image.Exif()
    exif[0x0112] = 8
    grey = Image.new("L", (20, 30))
    files = {
        "a.jpg": saved(grey, "JPEG", exif=exif),
        "b.png": saved(grey, "PNG", exif=exif),
        "c.webp": saved(Image.new("RGBA", (20, 30)), "WEBP", exif=exif),
        "d.png": saved(grey, "PNG", transparency=0),
        "e.jpg": picture(0),
    }
    members = [m for name, data in files.items() for m in ((name, data), (f"{name[0]}.cls", b"0"))]
    url = write_tar(tmp_path / "0.tar", members)
    index_shards([url], str(tmp_path / "out"), LABELS, Options())
    said = unstamped(capsys.readouterr().err)
    assert "WARNING: 3 images are stored turned or mirrored (EXIF orientation)" in said
    assert "WARNING: 2 images may be transparent" in said
    _, index, _ = check(str(tmp_path / "out"), [url])
    assert (index.width[:4] == 20).all()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_bad_samples(tmp_path: Path, kind: str) -> None:
    members, message = BAD_SAMPLES[kind]
    url = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(ValueError, match=message) as error:
        index_shards([url], str(tmp_path / "out"), LABELS, Options())
    assert "bad.tar" in str(error.value)
    assert not (tmp_path / "out").exists()


BROKEN: Members = (
    *plain("a", 0),
    ("b.jpg", picture(1)),  # no label
    ("c.cls", b"0"),  # no image
    ("d.jpg", b""),
    ("d.cls", b"0"),
    ("e.jpg", picture(2)[:-300]),  # truncated
    ("e.cls", b"0"),
    *plain("f", 1, 3),
)


def test_not_every_sample_may_be_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", BROKEN[2:3])
    with pytest.raises(ValueError, match=r"none of the 1 samples can be used \(first: key 'b'"):
        index_shards([str(tmp_path / "0.tar")], str(tmp_path / "set"), LABELS, Options(max_bad=9))


def test_broken_samples_are_left_out(tmp_path: Path) -> None:
    out = tmp_path / "set"
    write_tar(out / "0.tar", BROKEN)
    write_tar(out / "1.tar", BROKEN[2:3])  # nothing remains of it
    pattern = str(out / "{0..1}.tar")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"key 'b': no label: .*; --max-bad N leaves out up to N"):
        index_shards([pattern], str(out), LABELS, Options())
    for number in (3, 4):  # more than that in one shard, and in both
        message = (
            rf"more than {number} samples cannot be used \(first: key 'b': no label.*--max-bad"
        )
        with pytest.raises(ValueError, match=message):
            index_shards([pattern], str(out), LABELS, Options(max_bad=number))
    assert snapshot(tmp_path) == before
    for number in (5, 9):  # a rerun changes nothing
        manifest = index_shards([pattern], str(out), LABELS, Options(max_bad=number))
        assert (manifest.samples, manifest.quarantined) == (2, 5)
    assert (tmp_path / "set" / "0.tar").read_bytes() == before["set/0.tar"][0]
    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["shard"], one["path"]) for one in listed] == [
        *(("0.tar", key) for key in "bcde"),
        ("1.tar", "b"),
    ]
    assert [one["reason"].split(";")[0] for one in listed[:2]] == [
        "no label: it has no .cls",
        "no image",
    ]
    assert str(tmp_path) not in (out / "quarantine.jsonl").read_text()
    assert verify(str(out), deep=True, workers=1).problems == []
    (out / "quarantine.jsonl").write_text(
        (out / "quarantine.jsonl").read_text().replace('"c"', '"a"')
    )
    (problem,) = verify(str(out), deep=True, workers=1).problems
    assert str(problem).startswith("0.tar, key 'c'")
    data = PackedDataset(str(out))
    assert [data.key(n) for n in range(len(data))] == ["a", "f"]

    # without the option, images are not decoded: verification finds the truncated one
    url = write_tar(tmp_path / "e.tar", BROKEN[6:])
    index_shards([url], str(tmp_path / "other"), LABELS, Options())
    (problem,) = verify(str(tmp_path / "other"), deep=True, workers=1).problems
    assert "cannot be decoded" in problem.what
    assert "--max-bad N, which leaves such images out" in problem.what


def test_other_faults_are_not_left_out(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "0.tar", plain("a", 0) + plain("b", 7))
    with pytest.raises(ValueError, match=r"label 7 is not one of the 3 classes$"):
        index_shards([url], str(tmp_path / "out"), LABELS, Options(max_bad=9))


def test_numbers_that_are_probably_not_imagenets(tmp_path: Path, capsys) -> None:
    members = [member for n in range(4) for member in plain(f"k{n}", n, n)]
    url = write_tar(tmp_path / "0.tar", members)
    warned = "(0 is 'tench', 1 is 'goldfish', 2 is 'great white shark'), of which 4 occur; for"

    def said(name: str, urls: Sequence[str], labels: LabelSpace, **options) -> bool:
        index_shards(urls, str(tmp_path / name), labels, Options(**options))
        return warned in capsys.readouterr().err

    four = LabelSpace(ids=tuple("abcd"), names=tuple("wxyz"), templates=("a {c}.",))
    assert said("mine", [url], IMAGENET)
    assert not said("theirs", [url], four)
    assert not said("imagenet-val", [url], IMAGENET, allow_count=("imagenet-val=4",))
    ids = [member for n in range(4) for member in plain(f"k{n}", IMAGENET.ids[n], n)]
    assert not said("ids", [write_tar(tmp_path / "1.tar", ids)], IMAGENET)
    assert not said("spread", [write_tar(tmp_path / "2.tar", plain("z", 999))], IMAGENET)
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in IMAGENET.ids[:4]))
    assert not said("local", [url], IMAGENET, local_classes=str(tmp_path / "names.txt"))


def test_different_options_are_refused_before_reading(tmp_path: Path, monkeypatch) -> None:
    members = [*plain("a", 0), ("a.json", b'{"y": 0}'), ("a.txt", b"x")]
    url, out = write_tar(tmp_path / "0.tar", members), str(tmp_path / "set")
    index_shards([url], out, LABELS, Options())
    before = snapshot(tmp_path)
    monkeypatch.setattr("rft.packing.foreign.index.read_shard", None)
    for labels, options, differs in (
        (replace(LABELS, names=("x", "y", "z")), {}, "--classes"),
        (LABELS, {"label_field": "y"}, "--label-field"),
        (LABELS, {"ignore": ("txt",), "ood": True}, "--ignore and --ood"),
        (LABELS, {"labels_are": "positions"}, "--labels-are"),
        (LABELS, {"crop_border": 1, "dataset": "x"}, "--dataset and --crop-border"),
    ):
        message = f"already indexed with a different {differs}; delete its manifest.json or"
        with pytest.raises(ValueError, match=message):
            index_shards([url], out, labels, Options(**options))
    assert snapshot(tmp_path) == before


def test_json_that_is_none(tmp_path: Path) -> None:
    for text, message in {
        "{": "its .json is not readable",
        "[1]": r"no number or string 'y' \(fields: none\)",
        '{"y": null}': r"no number or string 'y' \(fields: y\)",
        '{"y": [0]}': "no label: 'y' of its .json holds a list; it must be a number or a string",
        '{"y": {"z": 0}}': "no label: 'y' of its .json holds an object, and nested fields are not",
        '{"y": true}': "label true of its .json is true or false; write class numbers as integers",
        '{"y": 0.0}': "label 0.0 of its .json is a number with a fraction; write class numbers as",
        '{"y": 1, "y": 0}': "its .json has 'y' 2 times; keep one of them",
        '{"y": 0, "x": 1, "\\u0079": 0}': "its .json has 'y' 2 times",
        '{"y": NaN}': "label NaN of its .json is a number with a fraction",
        '{"y": "1.0"}': "label '1.0' is not a class of the label space; class numbers are integers",
    }.items():
        members = [("a.jpg", picture(0)), ("a.json", text.encode())]
        url = write_tar(tmp_path / "0.tar", members)
        with pytest.raises(ValueError, match=message):
            index_shards([url], str(tmp_path / "out"), LABELS, Options(label_field="y"))


@pytest.mark.parametrize("given", ["{}/./0.tar", "file://{}/./0.tar", "file://{}//0.tar"])
@pytest.mark.parametrize("out", ["{}", "{}/.", "file://{}/./"])
def test_a_path_with_a_dot_gives_the_name_without(tmp_path: Path, given: str, out: str) -> None:
    write_tar(tmp_path / "0.tar", plain("a", 0))
    where = out.format(tmp_path)
    index_shards([given.format(tmp_path)], where, LABELS, Options(dataset="own"))
    assert [shard.name for shard in Manifest.load(str(tmp_path)).shards] == ["0.tar"]


def test_json_that_is_not_ours_may_repeat_other_fields(tmp_path: Path) -> None:
    text = '{"x": 1, "y": 1, "x": NaN, "in": {"y": 0, "y": 0, "z": [{"y": 3}]}, "s": "\\ud800"}'
    members = [("a.jpg", picture(0)), ("a.json", text.encode())]
    url, out = write_tar(tmp_path / "0.tar", members), str(tmp_path / "out")
    index_shards([url], out, LABELS, Options(label_field="y"))
    assert PackedDataset(out).index.label.tolist() == [1]
    assert verify(out, deep=True, workers=1).problems == []


def test_each_of_repeated_fields_may_contradict_a_cls(tmp_path: Path) -> None:
    members = [*plain("a", 0), ("a.json", b'{"label": 1, "label": 0}')]
    url = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=r"its \.json has 'label': 1, class 1 .*, and not class 0"):
        index_shards([url], str(tmp_path / "out"), LABELS, Options())


@pytest.mark.parametrize("position", [0, 700, -10240])
def test_damaged_tar_is_named_with_the_byte(tmp_path: Path, position: int) -> None:
    url = write_tar(tmp_path / "x.tar", plain("a", 0) + plain("b", 1))
    data = bytearray(Path(url).read_bytes())
    if position == 700:
        del data[position:]
    else:
        header = data.index(b"b.jpg") if position else 0
        data[header + 100] ^= 1
    Path(url).write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.tar.*byte"):
        index_shards([url], str(tmp_path / "out"), LABELS, Options())


NO_TAR: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a complete tar"),
    "junk": (b"junk" * 300, "is not a complete tar"),
    "gzip": (
        gzip.compress(bytes(10240)),
        "not a plain tar but compressed by gzip; unpack .* gunzip",
    ),
    "bzip2": (bz2.compress(bytes(10240)), "not a plain tar but compressed by bzip2; .* bunzip2"),
    "xz": (
        lzma.compress(bytes(10240)),
        "not a plain tar but compressed by xz; unpack it with unxz",
    ),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(99), "not a plain tar but compressed by zstd; .* unzstd"),
    "zip": (b"PK\x03\x04" + bytes(99), "not a plain tar but a zip archive; unpack it and pack"),
}


@pytest.mark.parametrize("kind", NO_TAR)
def test_what_is_no_tar(tmp_path: Path, kind: str) -> None:
    data, message = NO_TAR[kind]
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.tar.* {message}"):
        index_shards([str(tmp_path / "x.tar")], str(tmp_path / "out"), LABELS, Options())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "name the shards"),
        (["{0..1.tar"], "braces do not match"),
        (["*.tar"], r"'\*' is not expanded; .*, such as 'folder/\{000\.\.127\}\.tar'"),
        (["https://host/*.tar"], r"'\*' is not expanded"),
        (["{0-5}.tar"], r"'\{0-5\}\.tar': '\{' is not expanded"),
        (["{0...5}.tar"], r"'\{' is not expanded"),
        (["{}.tar"], r"'\{' is not expanded"),
        (["{0..x}.tar"], r"'\{' is not expanded"),
        (["{a,b*}.tar"], r"'\{a,b\*\}\.tar': '\*' is not expanded"),
        (["{0..1}.tar", "1.tar"], "1.tar is named twice"),
        (["gone-{0..1}.tar"], "no such shard: .*gone-0.tar"),
        (["https://user:secret@host/0.tar"], r"https://\*{3} was given with a user, password"),
        (["pipe:cat 0.tar"], "is neither a URL of pipe nor a local path"),
        (["nonsense://0.tar"], "cannot be opened; rft opens local paths and URLs of file, http"),
    ],
)
def test_bad_patterns(tmp_path: Path, monkeypatch, patterns: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        index_shards(patterns, str(tmp_path / "out"), LABELS, Options())
    assert "secret" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_is_no_shard(tmp_path: Path, remote: bool) -> None:
    for n in range(12):
        write_tar(tmp_path / "set" / f"{n:04d}.tar", plain("a", 0))
    folder = str(tmp_path / "set")
    fs = fsspec.filesystem("memory")
    if remote:
        fs.put(f"{folder}/", "/folder/set/", recursive=True)
        folder = "memory://folder/set"
    message = (
        "/set is a folder, not a shard; name its shards: "
        f"'{folder}/{{0000..0011}}.tar' (docs/data.md#third-party-shards)"
    )
    try:
        with pytest.raises(ValueError, match=re.escape(message)):
            index_shards([folder], str(tmp_path / "out"), LABELS, Options())
    finally:
        if remote:
            fs.rm("/folder", recursive=True)


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ([f"train-{n:03d}.tar" for n in range(101)], ["train-{000..100}.tar"]),
        ([f"{n}.tar" for n in range(12)], ["{0..11}.tar"]),
        (["a-0.tar", "a-1.tar", "a-3.tar", "b-0.tar"], ["a-3.tar", "a-{0..1}.tar", "b-0.tar"]),
        (["v2-09.tar", "v2-10.tar", "train.tar"], ["train.tar", "v2-{09..10}.tar"]),
        (["a-1-of-2.tar", "a-2-of-2.tar"], ["a-1-of-2.tar", "a-2-of-2.tar"]),
        ([], []),
    ],
)
def test_names_as_patterns(names: list[str], patterns: list[str]) -> None:
    assert as_patterns(names) == patterns
    assert sorted(expand(patterns) if patterns else []) == sorted(names)


def test_a_file_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "*.tar", plain("a", 0))
    assert index_shards([url], str(tmp_path / "own"), LABELS, Options()).samples == 1


@pytest.mark.parametrize("first", ["jpg", "cls"])
def test_members_apart_are_named_as_that(tmp_path: Path, first: str) -> None:
    """All images and then all labels, or the reverse: not "no label" or "no image"."""
    members = plain("a", 0) + plain("b", 1, 1)
    members.sort(key=lambda member: (not member[0].endswith(first), member[0]))
    url = write_tar(tmp_path / "0.tar", members)
    message = r"0\.tar: key 'a' recurs at byte .* must be neighbours: .*tar --sort=name"
    with pytest.raises(ValueError, match=message):
        index_shards([url], str(tmp_path / "out"), LABELS, Options())


def test_the_same_shard_under_two_names(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "0.tar", plain("a", 0))
    shutil.copy(url, tmp_path / "1.tar")
    with pytest.raises(ValueError, match=r"0\.tar and .*1\.tar hold the same bytes"):
        index_shards([str(tmp_path / "{0..1}.tar")], str(tmp_path), LABELS, Options())


def test_keys_that_come_back_in_another_shard_are_told(tmp_path: Path, capsys) -> None:
    for n in range(2):
        write_tar(tmp_path / f"{n}.tar", plain("a", n, n) + plain(f"b{n}", 0, n + 5))
    index_shards([str(tmp_path / "{0..1}.tar")], str(tmp_path), LABELS, Options())
    said = capsys.readouterr().err
    assert "1 of the keys occur in more than one shard, such as 'a'; this is allowed" in said
    assert verify(str(tmp_path), deep=True, workers=1).problems == []


def test_the_folder_names_the_set(tmp_path: Path, monkeypatch) -> None:
    write_tar(tmp_path / "own" / "0.tar", plain("a", 0))
    monkeypatch.chdir(tmp_path / "own")
    manifest = index_shards(["0.tar"], ".", LABELS, Options())
    assert (manifest.dataset, manifest.shards[0].name) == ("own", "0.tar")


def test_wrong_number_of_shards(tmp_path: Path) -> None:
    write_clip_benchmark(tmp_path, [0, 1], LABELS.names)
    with pytest.raises(
        ValueError, match=r"nshards\.txt says 2 shards, but 1 of that folder are named"
    ):
        index_shards([str(tmp_path / "test" / "0.tar")], str(tmp_path / "out"), LABELS, Options())


LOCAL: dict[str, tuple[list[str], str]] = {
    "none": ([], "classnames.txt names no class"),
    "unknown": (["toad", "zebra"], "'zebra' is not a class of the label space"),
    "twice": (["toad", "Toad"], "'Toad' and 'toad' are the same class"),
}


@pytest.mark.parametrize("kind", LOCAL)
def test_local_names_that_do_not_fit(tmp_path: Path, kind: str) -> None:
    names, message = LOCAL[kind]
    pattern = write_clip_benchmark(tmp_path / "wds", [0, 1], names)
    with pytest.raises(ValueError, match=message):
        index_shards([pattern], str(tmp_path / "out"), LABELS, Options())


def test_local_names_by_folder_name_and_for_a_subset(tmp_path: Path) -> None:
    pattern = write_clip_benchmark(tmp_path / "wds", [1, 0, 1], ["n03", "RED FOX"])
    manifest = index_shards([pattern], str(tmp_path / "out"), LABELS, Options())
    assert manifest.groups == ((0,), (2,))
    assert PackedDataset(str(tmp_path / "out")).index.label.tolist() == [0, 2, 0]


def test_ambiguous_local_names_are_refused_by_name(tmp_path: Path) -> None:
    pattern = write_clip_benchmark(tmp_path / "wds", [0, 1], ["zebra", "missile"])
    with pytest.raises(ValueError, match="'missile' is the name of several classes") as error:
        index_shards([pattern], str(tmp_path / "some"), IMAGENET, Options())
    assert IMAGENET.ids[657] in str(error.value)
    (tmp_path / "wds" / "classnames.txt").write_text(f"zebra\n{IMAGENET.ids[744]}\n")
    index_shards([pattern], str(tmp_path / "some"), IMAGENET, Options())
    assert PackedDataset(str(tmp_path / "some")).index.label.tolist() == [340, 744]


@pytest.mark.parametrize("meant", [657, 744])
def test_a_name_of_two_classes_means_the_one_that_the_set_has(meant: int) -> None:
    names = ["zebra", "missile"]
    assert local_labels(names, "names.txt", IMAGENET, (340, meant)) == (340, meant)
    for subset in ((340,), (340, 657, 744)):
        with pytest.raises(ValueError, match="'missile' is the name of several classes"):
            local_labels(names, "names.txt", IMAGENET, subset)


def test_names_in_another_order_are_not_taken_for_class_ids(tmp_path: Path) -> None:
    names = list(reversed(LABELS.names))
    pattern = write_clip_benchmark(tmp_path / "wds", [0, 1, 2], names)
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="'sloth bear' at index 0, the label space at index 2"):
        index_shards([pattern], out, LABELS, Options())
    path = str(tmp_path / "wds" / "classnames.txt")
    index_shards([pattern], out, LABELS, Options(local_classes=path))
    assert PackedDataset(out).index.label.tolist() == [2, 1, 0]


def words(*names: str) -> LabelSpace:
    return LabelSpace(ids=names, names=names, templates=("a {c}.",))


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), ("a", None), ("a/test", "b/test")])
def test_a_list_beside_some_shards_says_nothing_of_others(
    tmp_path: Path, order: tuple[str | None, ...]
) -> None:
    """A folder without classnames.txt may count other classes, so an option must decide."""
    labels = words("apple", "bread", "cake", "dates")
    top = f"memory://wds-{uuid.uuid4().hex}"
    urls = []
    for number, folder in enumerate(order):
        url = f"{top}/{folder}/0.tar" if folder else f"{top}.tar"
        path = write_tar(tmp_path / f"{number}.tar", plain(f"k{number}", 0, seed=number))
        files.write_bytes(url, Path(path).read_bytes())
        urls.append(url)
    names = f"{top}/a/classnames.txt"
    files.write_bytes(names, b"cake\nbread\n")
    other = re.escape(next((f"{top}/{f}" for f in order if f and f[0] == "b"), "the top of"))
    options = f"--local-classes {re.escape(names)} .* or --skip-beside"
    try:
        with pytest.raises(ValueError, match=f"{re.escape(names)} .*, but {other}.* {options}"):
            index_shards(urls, str(tmp_path / "out"), labels, Options())
        assert not (tmp_path / "out").exists()
        for given, expected in ((Options(local_classes=names), 2), (Options(skip_beside=True), 0)):
            out = str(tmp_path / f"out{expected}")
            index_shards(urls, out, labels, given)
            assert PackedDataset(out).index.label.tolist() == [expected] * 2
        # the label space's own list changes nothing
        files.write_bytes(names, "\n".join(labels.names).encode())
        index_shards(urls, str(tmp_path / "out"), labels, Options())
        assert PackedDataset(str(tmp_path / "out")).index.label.tolist() == [0, 0]
    finally:
        fs = fsspec.filesystem("memory")
        for place in (top, f"{top}.tar"):
            if fs.exists(place):
                fs.rm(place, recursive=True)


ANIMALS = words("cat", "dog", "bird", "horse", "cow")
# the file's bytes, and the class of label 2 or the error
LISTS: dict[str, tuple[str, str]] = {
    "blank line": ("cat\n\ndog\nbird\ncow\n", "line 2 is blank; .* the name of class 1 there"),
    "blank first line": ("\ncat\ndog\nbird", "line 1 is blank"),
    "spaces": ("cat\ndog\n \t\nbird\n", "line 3 is blank"),
    "CRLF and a blank line": ("cat\r\n\r\ndog\r\nbird\r\n", "line 2 is blank"),
    "two at the end": ("cat\ndog\ncow\n\n \n", "cow"),
    "CRLF": ("cat\r\ndog\r\ncow\r\n", "cow"),
    "no line break at the end": ("cat\ndog\ncow", "cow"),
    **{
        f"{sign!a} in a name": (f"cat\ndog{sign}bird\ncow\n", r"'dog.*bird' is not a class")
        for sign in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r"
    },
    "a form feed beside a name": ("cat\x0c\ndog\ncow\n", "cow"),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", LISTS)
def test_labels_count_the_lines_of_a_list(tmp_path: Path, kind: str, given: bool) -> None:
    """No line is dropped or split: later classes would shift."""
    text, expected = LISTS[kind]
    url = write_tar(tmp_path / "wds" / "0.tar", plain("k", 2))
    path = tmp_path / ("names.txt" if given else "wds/classnames.txt")
    path.write_bytes(text.encode())
    options = Options(local_classes=str(path) if given else None)
    out = str(tmp_path / "out")
    if expected not in ANIMALS.names:
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{expected}"):
            index_shards([url], out, ANIMALS, options)
        return
    index_shards([url], out, ANIMALS, options)
    assert PackedDataset(out).index.label.tolist() == [ANIMALS.names.index(expected)]


SWAPPED = [
    (("A+", "A-", "B+", "B-"), ("A-", "A+", "B-", "B+")),
    (("\u0915\u093f", "\u0915\u0940"), ("\u0915\u0940", "\u0915\u093f")),  # vowel signs
    (("c", "c++", "c#"), ("c++", "c", "c#")),
    (("\N{RED APPLE}", "\N{LEMON}"), ("\N{LEMON}", "\N{RED APPLE}")),
    (("caf\u00e9", "cafe"), ("cafe", "cafe\u0301")),
    (("a b", "a-b"), ("a-b", "a b")),
    (("1.5", "15"), ("15", "1.5")),
]


@pytest.mark.parametrize(("known", "listed"), SWAPPED)
def test_names_that_differ_in_symbols_or_marks_are_not_taken_for_each_other(
    tmp_path: Path, known: tuple[str, ...], listed: tuple[str, ...]
) -> None:
    pattern = write_clip_benchmark(tmp_path / "wds", [0, 1], listed)
    with pytest.raises(ValueError, match="at index 0, the label space at index 1"):
        index_shards([pattern], str(tmp_path / "out"), words(*known), Options())
    shorter = local_labels(listed[:2], "names.txt", words(*known), None)
    assert shorter == (1, 0)  # each is a class's exact name


@pytest.mark.parametrize(
    ("known", "listed"),
    [
        (("c++", "d", "e"), ("c#", "d")),
        (("\N{RED APPLE}", "b", "c"), ("\N{LEMON}", "b")),
        (("A+", "A-", "b"), ("A", "b")),
        (("\u0915\u093f", "b", "c"), ("\u0915", "b")),
        (("1.5", "b", "c"), ("15", "b")),
        (("-1", "b", "c"), ("1", "b")),
        ((".", "b", "c"), ("-", "b")),
    ],
)
def test_a_name_with_other_symbols_is_no_class(
    known: tuple[str, ...], listed: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(repr(listed[0]))} is not a class"):
        local_labels(listed, "names.txt", words(*known), None)


def test_a_loose_match_must_be_the_only_one(tmp_path: Path) -> None:
    labels = words("polar bear", "polar-bear", "toad")
    with pytest.raises(ValueError, match="'Polar Bear' is the name of several classes"):
        local_labels(["Polar Bear", "toad"], "names.txt", labels, None)
    listed = ["Polar Bear", "polar-bear", "toad"]
    pattern = write_clip_benchmark(tmp_path / "wds", [0, 1], listed)
    with pytest.raises(ValueError, match="at index 0, which may be class polar bear or polar-bear"):
        index_shards([pattern], str(tmp_path / "out"), labels, Options())
    swapped = LabelSpace(ids=("a", "b", "c"), names=("b", "a", "toad"), templates=("a {c}.",))
    with pytest.raises(ValueError, match=r"'a' is the name of several .* the folder name of one"):
        local_labels(["a"], "names.txt", swapped, None)
    (tmp_path / "wds" / "classnames.txt").write_text("b\na\ntoad\n")  # its own names, in order
    index_shards([pattern], str(tmp_path / "out"), swapped, Options())
    assert PackedDataset(str(tmp_path / "out")).index.label.tolist() == [0, 1]


def test_imagenets_names_in_small_letters_are_its_own_order(tmp_path: Path) -> None:
    listed = [name.lower().replace(" ", "_") for name in IMAGENET.names]
    listed[0] = f"\ufeff{listed[0]}"  # as written by some editors
    pattern = write_clip_benchmark(tmp_path / "wds", [657, 744], listed)
    options = copy_of("imagenet-val", 2)
    index_shards([pattern], str(tmp_path / "imagenet-val"), IMAGENET, options)
    data = PackedDataset(str(tmp_path / "imagenet-val"))
    assert data.index.label.tolist() == [657, 744]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Binder (closed)", "binder_closed"),
        ("Mixing / Salad Bowl", "mixing_salad_bowl"),
        ("jack-o'-lantern", "Jack_o_lantern"),
        ("St. Bernard", "st_bernard"),
        ("potter\u2019s wheel", "potter's wheel"),
        ("B-52", "b 52"),
        ("CAFE\u0301", "caf\u00e9"),
    ],
)
def test_case_and_separators_make_no_other_name(one: str, other: str) -> None:
    assert loose_form(one) == loose_form(other) != ""


@given(st.text(alphabet="aB1+#-_ .,'/()\u0301\u093f\N{LEMON}", max_size=12))
def test_symbols_marks_and_words_stay_in_a_loose_form(name: str) -> None:
    separators = str.maketrans("", "", " _-.,'/()")
    left = unicodedata.normalize("NFC", name.casefold().translate(separators))
    form = unicodedata.normalize("NFC", loose_form(name).translate(separators))
    # a mark after a separator combines with the preceding letter once the separator is gone
    assert form == left


def test_as_many_names_are_not_the_same_classes(tmp_path: Path, capsys) -> None:
    """Equal length proves nothing: most names must be in the label space."""
    pattern = write_clip_benchmark(tmp_path / "wds", [0, 1, 2], ["car", "bus", LABELS.names[2]])
    with pytest.raises(
        ValueError, match=r"2 of the 3 names .* \(first: 'car' at index 0"
    ) as caught:
        index_shards([pattern], str(tmp_path / "out"), LABELS, Options())
    assert "--classes" in str(caught.value)
    assert not (tmp_path / "out").exists()
    # a different word for one class; an id in place of a name is not a different word
    names = [LABELS.ids[0], "badger", LABELS.names[2]]
    (tmp_path / "wds" / "classnames.txt").write_text("\n".join(names))
    index_shards([pattern], str(tmp_path / "out"), LABELS, Options())
    warning = capsys.readouterr().err
    assert "WARNING: 1 of the 3 names" in warning
    assert f"'badger' at index 1, which is {LABELS.names[1]!r} there" in warning
    assert PackedDataset(str(tmp_path / "out")).index.label.tolist() == [0, 1, 2]


def test_r_with_another_set_of_classes(tmp_path: Path) -> None:
    names = [IMAGENET.names[n] for n in range(200)]
    pattern = write_clip_benchmark(tmp_path / "wds", [0, 1], names)
    with pytest.raises(ValueError, match="local classes of imagenet-r differ from the 200"):
        index_shards([pattern], str(tmp_path / "imagenet-r"), IMAGENET, Options())


# --- the command --------------------------------------------------------------------------------


def run_tool(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    path = Path(__file__).parents[2] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        cli.run(module.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_command(tmp_path: Path, monkeypatch, capsys) -> None:
    classes = tmp_path / "classes.json"
    document = {"ids": LABELS.ids, "names": LABELS.names, "templates": LABELS.templates}
    classes.write_text(json.dumps(document))
    for n in range(2):
        write_tar(tmp_path / f"{n}.tar", plain(f"a{n}", n, n))
    out = tmp_path / "imagenet-val"
    arguments = [str(tmp_path / "{0..1}.tar"), "--out", str(out), "--classes", str(classes)]
    assert run_tool(monkeypatch, "index_shards", *arguments) == 0
    said = capsys.readouterr()
    assert "imagenet-val: 2 samples in 2 shards, 3 classes scored" in said.out
    assert said.err == ""
    assert Manifest.load(str(out)).samples == 2
    (tmp_path / "1.tar").unlink()
    assert run_tool(monkeypatch, "index_shards", *arguments) == 2
    assert capsys.readouterr().err == f"error: no such shard: {tmp_path / '1.tar'}\n"


# --- patterns -----------------------------------------------------------------------------------

LITERALS = st.text("a1-.", max_size=3)
RANGES = st.builds(
    "{{{}..{}{}}}".format, st.integers(-9, 9), st.integers(-9, 9), st.sampled_from(["", "..2"])
) | st.sampled_from(["{a..e}", "{e..a..2}", "{08..11}", "{3..3}", "{x}", "{}", "{a,}", "{,}"])
PATTERNS = st.recursive(
    LITERALS | RANGES,
    lambda inner: (
        st.lists(inner, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"{{{','.join(parts)}}}")
    ),
    max_leaves=6,
)


@given(PATTERNS)
def test_patterns_are_counted_without_expanding_them(pattern: str) -> None:
    assume(len(pattern) < 100)
    count = count_expanded(pattern)
    if count < 10_000:
        assert count == len(list(braceexpand(pattern, escape=False)))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..99999999}.tar", r"'{0..99999999}.tar' names 100,000,000 shards; a set has at most"),
        ("{0..9999999999999999999999}.tar", "names 10,000,000,000,000,000,000,000 shards"),
        (f"{20 * '{a,b}'}.tar", "names 1,048,576 shards; a set has at most 1,000,000"),
        (f"{{{30 * '{a,b}'},x}}.tar", "names 1,073,741,825 shards"),
        (f"{600 * '{a..z}'}.tar", "names uncounted shards; a set has at most"),
        (f"{500_000 * '{'}{500_000 * '}'}", "a shard pattern has 1,000,000 letters"),
        (f"{1000 * '{'}{1000 * '}'}", "braces are nested more than 32 deep"),
        (f"{{1..999999}}{'x' * 1000}", "names 999,999 shards"),
        ("}{", "braces do not match"),
        ("{0..3}}.tar", "braces do not match"),
    ],
)
def test_patterns_that_cost_more_than_memory_has(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand([pattern])
    assert expand(["{0..3}.tar", "{a,b{1..2}}.tar"]) == [
        *("0.tar", "1.tar", "2.tar", "3.tar"),
        *("a.tar", "b1.tar", "b2.tar"),
    ]


def test_a_nested_field_is_not_a_label(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "0.tar", [("a.jpg", picture(0)), ("a.json", b'{"m": {"label": 0}}')])
    with pytest.raises(ValueError, match=r"'m' of its \.json holds an object, and nested fields"):
        index_shards([url], str(tmp_path / "out"), LABELS, Options(label_field="m.label"))


def test_a_shard_that_was_not_written_completely(tmp_path: Path) -> None:
    """Cut off, or with zeros in place of its last samples."""
    url = write_tar(tmp_path / "0.tar", [one for n in range(9) for one in plain(f"{n}", 0)])
    data = Path(url).read_bytes()
    for cut in (data[:2000], data[:3072].ljust(len(data), b"\0")):
        Path(url).write_bytes(cut)
        with pytest.raises(ValueError, match="download or write it again, or leave this shard out"):
            index_shards([url], str(tmp_path / "out"), LABELS, Options())
    assert not (tmp_path / "out").exists()
