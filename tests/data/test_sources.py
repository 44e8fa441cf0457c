"""Label spaces and the official folder layouts: what is found, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm.data
from hypothesis import given
from hypothesis import strategies as st

from rft.data.labels import LabelSpace, objectnet_groups
from rft.data.sources import make_keys, read_source

MAPPINGS = Path(__file__).parent / "objectnet-mappings"
LABELS = LabelSpace(ids=("n01", "n02", "n03"), names=("one", "two", "three"), templates=("a {c}.",))


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    return root


def write_mappings(folder: Path, labels: dict[str, str], classes: list[str]) -> None:
    """Write ObjectNet's four files for folders named like their labels, in reversed line order."""
    folder.mkdir(parents=True)
    order = list(reversed(range(len(classes))))
    documents = {
        "folder_to_objectnet_label.json": {name: name.title() for name in [*labels, "other"]},
        "objectnet_to_imagenet_1k.json": {name.title(): text for name, text in labels.items()},
        "pytorch_to_imagenet_2012_id.json": {str(n): order.index(n) for n in range(len(classes))},
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    lines = "\n".join(classes[class_id] for class_id in order)
    (folder / "imagenet_to_label_2012_v2").write_text(lines)


# --- label spaces -------------------------------------------------------------------------------


def test_imagenet_equals_the_public_lists() -> None:
    labels = LabelSpace.imagenet()
    assert list(labels.ids) == timm.data.ImageNetInfo().label_names()
    assert labels.names == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert len(labels) == 1000
    filled = [template.replace("{c}", "zebra") for template in labels.templates]
    assert filled == [template("zebra") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_packing_starts_without_torch() -> None:
    code = (
        "import sys, rft.data.pack; from rft.data.labels import LabelSpace\n"
        "LabelSpace.imagenet(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_label_space_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    document = {"ids": LABELS.ids, "names": LABELS.names, "templates": LABELS.templates}
    path.write_text(json.dumps(document))
    assert LabelSpace.load(str(path)) == LABELS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"ids": ["a"]}', "exactly the keys"),
        ('{"ids": ["a"], "names": "a", "templates": ["{c}"]}', "'names' must be a list"),
        ('{"ids": ["a"], "names": [], "templates": ["{c}"]}', "1 class ids but 0 class names"),
        ('{"ids": ["a", "a"], "names": ["x", "y"], "templates": ["{c}"]}', "'a' occurs more"),
        ('{"ids": ["a"], "names": ["x"], "templates": ["photo"]}', "has no {c}"),
        ('{"ids": [], "names": [], "templates": ["{c}"]}', "at least one class"),
    ],
)
def test_label_space_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        LabelSpace.load(str(path))
    assert str(path) in str(error.value)


def test_real_objectnet_mappings() -> None:
    groups = objectnet_groups(MAPPINGS, 1000)
    classes = [class_id for group in groups.values() for class_id in group]
    assert (len(groups), len(classes), len(set(classes))) == (113, 125, 125)
    assert list(groups) == sorted(groups)
    assert {folder: group for folder, group in groups.items() if len(group) > 1} == {
        "alarm_clock": (409, 530),
        "bicycle": (444, 671),
        "chair": (423, 559, 765),
        "helmet": (518, 560),
        "pen": (418, 563, 749),
        "skirt": (601, 655, 689),
        "still_camera": (732, 759),
        "tie": (457, 906),
        "wheel": (479, 694),
    }


def test_objectnet_mappings_of_another_label_space() -> None:
    with pytest.raises(ValueError, match="maps 1000 classes, the label space has 3"):
        objectnet_groups(MAPPINGS, 3)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ({"clock": "dial"}, ["one", "two", "three"], "maps to 'dial', not one class"),
        ({"clock": "one"}, ["one", "one", "three"], "maps to 'one', not one class"),
        ({"a": "one; two", "b": "two"}, ["one", "two", "three"], "'b' and 'a' share class 1"),
        ({}, ["one", "two", "three"], "maps no folder"),
    ],
)
def test_objectnet_mapping_errors(
    tmp_path: Path, labels: dict[str, str], classes: list[str], message: str
) -> None:
    write_mappings(tmp_path / "mappings", labels, classes)
    with pytest.raises(ValueError, match=message):
        objectnet_groups(tmp_path / "mappings", 3)


def test_objectnet_mapping_file_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder_to_objectnet_label"):
        objectnet_groups(tmp_path, 3)


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [
        ("imagenet-train", "train"),
        ("imagenet-train", "imagenet/train"),
        ("imagenet-train", "ILSVRC2012/train"),
        ("imagenet-val", "val"),
        ("imagenet-val", "imagenet/val_in_folder"),
        ("imagenet-val", "ILSVRC2012/val_dirs"),
        ("imagenet-sketch", "sketch"),
        ("imagenet-sketch", "."),
    ],
)
def test_complete_sets_by_wnid(tmp_path: Path, dataset: str, folder: str) -> None:
    names = ["n01/n01_5.JPEG", "n02/n02_7.JPEG", "n02/n02_1.png", "n03/n03_2.jpeg"]
    touch(tmp_path / folder, *names, "README.txt")
    source = read_source(dataset, tmp_path, LABELS)
    assert [(item.key, item.path, item.label, item.bytes) for item in source.items] == [
        ("n01_5", "n01/n01_5.JPEG", 0, 5),
        ("n02_1", "n02/n02_1.png", 1, 5),
        ("n02_7", "n02/n02_7.JPEG", 1, 5),
        ("n03_2", "n03/n03_2.jpeg", 2, 5),
    ]
    assert source.root == tmp_path / folder
    assert source.groups == ((0,), (1,), (2,))
    assert source.crop_border == 0


def test_foldered_validation_copy_goes_before_the_flat_one(tmp_path: Path) -> None:
    touch(tmp_path / "val", "ILSVRC2012_val_00000001.JPEG")
    touch(tmp_path / "val_dirs", "n01/a.JPEG", "n02/b.JPEG", "n03/c.JPEG")
    assert read_source("imagenet-val", tmp_path, LABELS).root == tmp_path / "val_dirs"


def test_v2_folders_are_numbers(tmp_path: Path) -> None:
    ids = tuple(f"n{n:02d}" for n in range(12))
    labels = LabelSpace(ids=ids, names=ids, templates=("{c}",))
    root = tmp_path / "imagenetv2-matched-frequency-format-val"
    touch(root, *(f"{n}/{n:03x}.jpeg" for n in range(12)))
    source = read_source("imagenet-v2", tmp_path, labels)
    assert {item.path.split("/")[0]: item.label for item in source.items} == {
        str(n): n for n in range(12)
    }
    assert read_source("imagenet-v2", root, labels).items == source.items


def test_subsets_are_scored_among_their_own_classes(tmp_path: Path) -> None:
    touch(tmp_path / "imagenet-r", "n01/art_0.jpg", "n03/art_0.jpg", "README.txt")
    source = read_source("imagenet-r", tmp_path, LABELS)
    assert source.groups == ((0,), (2,))
    assert [item.key for item in source.items] == ["n01_art_0", "n03_art_0"]


def test_imagenet_a_names_become_safe_keys(tmp_path: Path) -> None:
    touch(
        tmp_path / "imagenet-a",
        "n01/0.000116_digital clock _ digital clock_0.865662.jpg",
        "n01/0.000116_digital clock _ digital clock_0.865663.jpg",
        "n02/0.5_x_0.1.jpg",
    )
    source = read_source("imagenet-a", tmp_path, LABELS)
    assert [item.key for item in source.items] == [
        "0_000116_digital_clock___digital_clock_0_865662",
        "0_000116_digital_clock___digital_clock_0_865663",
        "0_5_x_0_1",
    ]


def test_objectnet_groups_and_unmapped_folders(tmp_path: Path) -> None:
    root = tmp_path / "objectnet-1.0"
    write_mappings(root / "mappings", {"clock": "three; one", "chair": "two"}, list(LABELS.names))
    touch(root / "images", "clock/a1.png", "chair/a1.png", "other/a2.png")
    source = read_source("objectnet", tmp_path, LABELS)
    assert source.groups == ((1,), (0, 2))  # folders in sorted order: chair, clock
    assert [(item.path, item.label) for item in source.items] == [
        ("chair/a1.png", 1),
        ("clock/a1.png", 0),
    ]
    assert source.root == root / "images"
    assert source.crop_border == 2


@pytest.mark.parametrize(
    ("dataset", "names", "message"),
    [
        ("imagenet-train", [], "no folder of imagenet-train"),
        ("imagenet-train", ["train/n01/a.JPEG", "train/n02/b.JPEG"], "1 of 3 class folders are"),
        ("imagenet-r", ["n01/a.jpg", "n09/b.jpg"], "unknown class: folder 'n09'"),
        ("imagenet-r", ["n01/a.jpg", "n01/notes.txt"], "not an image: .*notes.txt"),
        ("imagenet-r", ["n01/deep/a.jpg"], "not an image: .*deep"),
        ("imagenet-r", ["n01/a.jpg", "b.jpg"], "lies in no class folder"),
        ("imagenet-r", ["README.txt"], "holds no class folders"),
        ("imagenet-v2", ["0/a.jpeg", "01/b.jpeg", "2/c.jpeg"], "unknown class: folder '01'"),
        ("objectnet", ["images/clock/a.png"], "no such file: .*folder_to_objectnet_label"),
        ("imagenet-x", [], "did you mean 'imagenet-"),
    ],
)
def test_layout_errors(tmp_path: Path, dataset: str, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_source(dataset, touch(tmp_path, *names), LABELS)


def test_empty_class_folder(tmp_path: Path) -> None:
    touch(tmp_path, "n01/a.jpg")
    (tmp_path / "n02").mkdir()
    with pytest.raises(ValueError, match="n02 is empty"):
        read_source("imagenet-r", tmp_path, LABELS)


def test_mapped_objectnet_folder_missing(tmp_path: Path) -> None:
    write_mappings(tmp_path / "mappings", {"clock": "one", "chair": "two"}, list(LABELS.names))
    touch(tmp_path / "images", "clock/a.png")
    with pytest.raises(ValueError, match=r"1 of 2 class folders are missing .*chair"):
        read_source("objectnet", tmp_path, LABELS)


# --- keys ---------------------------------------------------------------------------------------


def test_keys_of_one_stem_twice_in_a_folder() -> None:
    keys = make_keys(["a/x.jpg", "a/x.png", "b/y.jpg"])
    assert len(set(keys)) == 3
    assert all(key.startswith(("a_x-", "b_y-")) for key in keys)


NAMES = st.text(st.sampled_from("ab01._ -\u00e9"), min_size=1, max_size=4)


@given(st.lists(st.tuples(NAMES, NAMES), unique=True, max_size=30), st.randoms())
def test_keys_are_safe_distinct_and_independent_of_order(pairs, random) -> None:
    paths = [f"{folder}/{stem}.jpg" for folder, stem in pairs]
    keys = make_keys(paths)
    assert len(set(keys)) == len(keys)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for key in keys)
    shuffled = random.sample(paths, len(paths))
    assert dict(zip(shuffled, make_keys(shuffled), strict=True)) == dict(
        zip(paths, keys, strict=True)
    )
