"""Label spaces and the official folder layouts: what is found, and what is refused."""

import dataclasses
import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import scipy.io
import timm.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rft.packing.archives import tar_members
from rft.packing.expected import (
    check_count,
    parse_allowed_counts,
    published_classes,
)
from rft.packing.layouts import read_source
from rft.packing.objectnet import objectnet_groups
from rft.packing.pack import Options, pack
from rft.packing.source import Source, read_item
from rft.sets import BENCHMARKS
from rft.shards.keys import make_keys
from rft.shards.label_space import LabelSpace, is_imagenet
from rft.storage import local
from tests.packing.test_photo_folders import SPECIAL
from tests.tiny import unstamped

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


@pytest.mark.slow
def test_packing_starts_without_torch() -> None:
    code = (
        "import sys, rft.packing.pack; from rft.shards.label_space import LabelSpace\n"
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
        ('{"ids": ["a"]}', "names is missing"),
        ('{"ids": ["a"], "names": "a", "templates": ["{c}"]}', "names is 'a'; it must be a list"),
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
    with pytest.raises(ValueError, match="maps 1000 classes, but the label space has 3"):
        objectnet_groups(MAPPINGS, 3)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ({"clock": "dial"}, ["one", "two", "three"], "maps to 'dial', which is not a single class"),
        ({"clock": "one"}, ["one", "one", "three"], "maps to 'one', which is not a single class"),
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


@pytest.mark.parametrize("sign", ["\x0c", "\x1c", "\x85", "\u2028", "\r"])
def test_objectnet_ids_count_line_feeds_alone(tmp_path: Path, sign: str) -> None:
    names = ["one", "two", f"th{sign}ree"]  # the file has the last one first
    write_mappings(tmp_path / "mappings", {"clock": "two"}, names)
    before = objectnet_groups(tmp_path / "mappings", 3)
    path = tmp_path / "mappings" / "imagenet_to_label_2012_v2"
    path.write_bytes(b"three\r\ntwo\r\none\r\n")
    assert objectnet_groups(tmp_path / "mappings", 3) == before == {"clock": (1,)}


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


def test_a_broken_link_in_place_of_a_class_folder_is_refused(tmp_path: Path) -> None:
    """In a set of some classes nothing else would reveal a missing one."""
    touch(tmp_path, "n01/a.jpg", "n03/a.jpg")
    (tmp_path / ".#README").symlink_to("nowhere")
    read_source("imagenet-r", tmp_path, LABELS)
    (tmp_path / "n02").symlink_to("nowhere")
    with pytest.raises(ValueError, match="n02 is a broken link; remove it, or restore its target"):
        read_source("imagenet-r", tmp_path, LABELS)


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
        ("imagenet-train", [], "no images of imagenet-train"),
        ("imagenet-train", ["train/n01/a.JPEG", "train/n02/b.JPEG"], "1 of 3 classes are"),
        ("imagenet-r", ["n01/a.jpg", "n09/b.jpg"], "unknown class: 'n09'"),
        ("imagenet-r", ["n01/a.jpg", "n01/notes.txt"], "not an image: .*notes.txt"),
        ("imagenet-r", ["n01/deep/a.jpg"], "not an image: .*deep"),
        ("imagenet-r", ["n01/a.jpg", "b.jpg"], "is not in a class folder"),
        ("imagenet-r", ["README.txt"], "holds no class folders"),
        ("imagenet-v2", ["0/a.jpeg", "01/b.jpeg", "2/c.jpeg"], "unknown class: '01'"),
        ("objectnet", ["images/clock/a.png"], "no such file: .*folder_to_objectnet_label"),
        # folders of other sets where the benchmark's should be
        (
            "imagenet-v2",
            ["imagenet/n01/a.jpg"],
            "no folder of imagenet-v2 .*; looked for: imagenet",
        ),
        ("imagenet-r", ["r/n01/a.jpg"], "no folder of imagenet-r .*; looked for: imagenet-r, "),
        ("imagenet-sketch", ["imagenet-r/n01/a.jpg"], "no folder of imagenet-sketch .*; looked"),
        ("objectnet", ["imagenet-r/n01/a.jpg"], "no folder of objectnet .*; looked for: objectnet"),
        ("objectnet", ["objectnet/mappings/a.csv"], "no such file: .*folder_to_objectnet_label"),
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
    with pytest.raises(ValueError, match=r"1 of 2 classes are missing .*chair"):
        read_source("objectnet", tmp_path, LABELS)


# --- archives -----------------------------------------------------------------------------------

TRAINING = {
    "n01": {"n01_5.JPEG": b"five" * 300, "n01_40.JPEG": b"forty"},
    "n02": {"n02_7.JPEG": b"seven"},
    "n03": {"n03_2.JPEG": b"", "n03_1.JPEG": b"one" * 999},
}
# image number -> class: unsorted, like the real ones
TRUTH = {1: "n03", 2: "n01", 3: "n01", 4: "n02"}
ILSVRC_IDS = {"n02": 1, "n03": 2, "n01": 3}


def validation_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def validation_image(number: int) -> bytes:
    return b"validation" * number * 60


def make_tar(path: Path, entries: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(entries))
    return path


def tar_bytes(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def write_devkit(folder: Path, compressed: bool = False) -> Path:
    """Write the files of the devkit that rft reads, in the devkit's own formats."""
    synsets = np.zeros(
        len(ILSVRC_IDS) + 1,
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")],
    )
    for row, (wnid, number) in enumerate(ILSVRC_IDS.items()):
        synsets[row] = (float(number), wnid, f"words of {wnid}", 0.0)
    synsets[-1] = (4.0, "n00", "an inner node", 3.0)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    truth = "".join(f"{ILSVRC_IDS[TRUTH[number]]}\n" for number in sorted(TRUTH))
    entries = {
        "ILSVRC2012_devkit_t12/readme.txt": b"read me",
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
    }
    if compressed:
        path = folder / "ILSVRC2012_devkit_t12.tar.gz"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(tar_bytes(entries)))
        return path
    for name, data in entries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder / "ILSVRC2012_devkit_t12"


def class_tars() -> dict[str, bytes]:
    return {f"{wnid}.tar": tar_bytes(images) for wnid, images in TRAINING.items()}


def train_folders(root: Path) -> None:
    for wnid, images in TRAINING.items():
        for name, data in images.items():
            path = root / "imagenet" / "train" / wnid / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def train_archive(root: Path) -> None:
    make_tar(root / "ILSVRC2012_img_train.tar", class_tars())


def train_class_tars(root: Path) -> None:
    for name, data in class_tars().items():
        (root / "train").mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_bytes(data)


def train_class_tars_in_the_source(root: Path) -> None:
    for name, data in class_tars().items():
        (root / name).write_bytes(data)


def val_folders(root: Path) -> None:
    for number, wnid in TRUTH.items():
        path = root / "val_in_folder" / wnid / validation_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(validation_image(number))


def val_flat(root: Path) -> None:
    for number in TRUTH:
        path = root / "ILSVRC2012" / "val" / validation_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(validation_image(number))
    write_devkit(root / "ILSVRC2012", compressed=True)


def val_archive(root: Path) -> None:
    images = {validation_name(number): validation_image(number) for number in TRUTH}
    make_tar(root / "imagenet" / "ILSVRC2012_img_val.tar", images)
    write_devkit(root)


def contents(source: Source) -> list[tuple]:
    return [
        (item.key, item.path, item.label, item.bytes, read_item(source.root, item))
        for item in source.items
    ]


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        (train_archive, "3 tars in {}/ILSVRC2012_img_train.tar, which is not extracted"),
        (train_class_tars, "3 tars of {}/train"),
        (train_class_tars_in_the_source, "3 tars of {}"),
    ],
)
def test_forms_of_the_training_set(
    tmp_path: Path, form: Callable[[Path], None], layout: str
) -> None:
    train_folders(tmp_path / "folders")
    expected = read_source("imagenet-train", tmp_path / "folders", LABELS)
    assert expected.layout == f"3 folders of {tmp_path}/folders/imagenet/train"
    form(tmp_path)
    source = read_source("imagenet-train", tmp_path, LABELS)
    assert contents(source) == contents(expected)
    assert source.groups == expected.groups
    assert source.layout == layout.format(tmp_path)
    assert [row[4] for row in contents(source)] == [
        TRAINING[row[1].split("/")[0]][row[1].split("/")[1]] for row in contents(source)
    ]


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        (
            val_flat,
            "flat files of {0}/ILSVRC2012/val with the classes of "
            "{0}/ILSVRC2012/ILSVRC2012_devkit_t12.tar.gz",
        ),
        (
            val_archive,
            "{0}/imagenet/ILSVRC2012_img_val.tar, which is not extracted, with the classes of "
            "{0}/ILSVRC2012_devkit_t12",
        ),
    ],
)
def test_forms_of_the_validation_set(
    tmp_path: Path, form: Callable[[Path], None], layout: str
) -> None:
    val_folders(tmp_path / "folders")
    expected = read_source("imagenet-val", tmp_path / "folders", LABELS)
    form(tmp_path)
    source = read_source("imagenet-val", tmp_path, LABELS)
    assert contents(source) == contents(expected)
    assert [(item.key, item.path.split("/")[0]) for item in source.items] == sorted(
        ((validation_name(number)[:-5], wnid) for number, wnid in TRUTH.items()),
        key=lambda row: (row[1], row[0]),
    )
    assert source.layout == layout.format(tmp_path)


def linked_in(tmp_path: Path, place: str) -> Path:
    """Move a file or folder out of a source, and replace it by a link."""
    path, elsewhere = tmp_path / "in" / place, tmp_path / "elsewhere" / place
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return path


@pytest.mark.parametrize(
    ("form", "place"),
    [
        (train_folders, "imagenet"),
        (train_folders, "imagenet/train"),
        (train_folders, "imagenet/train/n02"),
        (train_archive, "ILSVRC2012_img_train.tar"),
        (train_class_tars, "train"),
        (train_class_tars, "train/n02.tar"),
        (val_folders, "val_in_folder/n01"),
        (val_flat, "ILSVRC2012/val"),
        (val_flat, f"ILSVRC2012/val/{validation_name(1)}"),
        (val_archive, "imagenet/ILSVRC2012_img_val.tar"),
    ],
)
def test_a_link_that_leads_out_of_the_source_is_counted(
    tmp_path: Path, form: Callable[[Path], None], place: str
) -> None:
    (tmp_path / "in").mkdir()
    form(tmp_path / "in")
    dataset = f"imagenet-{form.__name__.split('_')[0]}"
    expected = read_source(dataset, tmp_path / "in", LABELS)
    assert expected.links == ""
    path = linked_in(tmp_path, place)
    source = read_source(dataset, tmp_path / "in", LABELS)
    assert source.items == expected.items
    named = f"a link leads out of {tmp_path}/in, and the targets are packed: {path}"
    assert source.links.startswith(named)


def test_links_out_of_a_benchmark_are_noted(tmp_path: Path, capsys) -> None:
    for n, wnid in enumerate(LABELS.ids):
        picture = tmp_path / "in" / "sketch" / wnid / "x.png"
        picture.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (n, n, n)).save(picture)
    for wnid in ("n01", "n02"):
        linked_in(tmp_path, f"sketch/{wnid}/x.png")
    options = Options(encoding="original", workers=1)
    assert pack("imagenet-sketch", str(tmp_path / "in"), str(tmp_path / "out"), LABELS, options)
    said = unstamped(capsys.readouterr().err)
    (note,) = (line for line in said.splitlines() if "link" in line)
    assert note.startswith(f"imagenet-sketch: 2 links lead out of {tmp_path}/in, and the")
    assert note.endswith(f"are packed: {tmp_path}/in/sketch/n01/x.png, ...")


def test_flat_files_may_be_the_source_itself(tmp_path: Path) -> None:
    val_flat(tmp_path)
    source = read_source("imagenet-val", tmp_path / "ILSVRC2012" / "val", LABELS)
    assert source.items == read_source("imagenet-val", tmp_path, LABELS).items


def test_folders_go_before_archives(tmp_path: Path) -> None:
    train_folders(tmp_path)
    train_archive(tmp_path)
    train_class_tars(tmp_path)
    source = read_source("imagenet-train", tmp_path, LABELS)
    assert source.root == tmp_path / "imagenet" / "train"
    archive = tmp_path / "ILSVRC2012_img_train.tar"
    assert source.layout == f"3 folders of {source.root}; {archive} is not read"


def rewrite(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip_inner_header(data: bytearray) -> bytearray:
    """Damage the second image's header inside the first class's tar."""
    data[data.index(b"n01_40.JPEG") + 3] ^= 1
    return data


def with_classes(**changes: dict[str, bytes] | None) -> bytes:
    classes = {**TRAINING, **changes}
    return tar_bytes(
        {f"{wnid}.tar": tar_bytes(images) for wnid, images in classes.items() if images is not None}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_inner_header, "img_train.tar: n01.tar: damaged header or foreign bytes after byte"),
        (lambda data: data[: data.index(b"n02.tar")], "img_train.tar is cut off at byte"),
        (lambda data: data[: data.index(b"n02.tar") + 600], "img_train.tar is cut off at byte"),
        (lambda data: with_classes(n03=None), r"1 of 3 classes are missing .*first: n03"),
        (lambda data: with_classes(n09={"a.JPEG": b"a"}), "unknown class: 'n09'"),
        (lambda data: with_classes(n02={}), "img_train.tar: n02.tar is empty"),
        (lambda data: with_classes(n02={"notes.txt": b"a"}), "not an image: notes.txt"),
        (lambda data: with_classes(n02={"deep/a.JPEG": b"a"}), "not an image: deep/a.JPEG"),
        (lambda data: with_classes(n02={"a.JPEG": b"a", "./a.JPEG": b"b"}), "holds a.JPEG twice"),
    ],
)
def test_training_archive_errors(
    tmp_path: Path, change: Callable[[bytearray], bytes], message: str
) -> None:
    train_archive(tmp_path)
    rewrite(tmp_path / "ILSVRC2012_img_train.tar", change)
    with pytest.raises(ValueError, match=message):
        read_source("imagenet-train", tmp_path, LABELS)


def drop_line(data: bytearray) -> bytes:
    return b"\n".join(bytes(data).split(b"\n")[:-2]) + b"\n"


DEVKIT = "ILSVRC2012_devkit_t12"


@pytest.mark.parametrize(
    ("compressed", "name", "change", "message"),
    [
        (True, f"{DEVKIT}.tar.gz", lambda data: data[:-9], "devkit_t12.tar.gz is damaged"),
        (True, f"{DEVKIT}.tar.gz", lambda data: b"text", "devkit_t12.tar.gz is damaged"),
        (
            True,
            f"{DEVKIT}.tar.gz",
            lambda data: gzip.compress(tar_bytes({"other.txt": b""})),
            "devkit_t12.tar.gz holds no ILSVRC2012_devkit_t12/data/",
        ),
        (False, f"{DEVKIT}/data/meta.mat", lambda data: data[:100], "meta.mat cannot be read"),
        (
            False,
            f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt",
            lambda data: data.replace(b"3", b"4", 1),  # the id of an inner node
            r"devkit_t12: image 2 has class '4', not in meta\.mat",
        ),
        (
            False,
            f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt",
            drop_line,
            "ILSVRC2012_val_00000004.JPEG of .* is not one of the 3 in",
        ),
    ],
)
def test_devkit_errors(
    tmp_path: Path,
    compressed: bool,
    name: str,
    change: Callable[[bytearray], bytes],
    message: str,
) -> None:
    val_flat(tmp_path)
    (tmp_path / "ILSVRC2012" / f"{DEVKIT}.tar.gz").unlink()
    write_devkit(tmp_path, compressed)
    rewrite(tmp_path / name, change)
    with pytest.raises(ValueError, match=message):
        read_source("imagenet-val", tmp_path, LABELS)


def test_devkit_is_needed_whole(tmp_path: Path) -> None:
    val_flat(tmp_path)
    (tmp_path / "ILSVRC2012" / f"{DEVKIT}.tar.gz").unlink()
    with pytest.raises(ValueError, match=r"put ILSVRC2012_devkit_t12\.tar\.gz, .* beside them"):
        read_source("imagenet-val", tmp_path, LABELS)
    devkit = write_devkit(tmp_path)
    shutil.rmtree(devkit / "data")
    with pytest.raises(ValueError, match=r"no such file: .*ground_truth\.txt"):
        read_source("imagenet-val", tmp_path, LABELS)


def test_a_stranger_among_the_flat_files(tmp_path: Path) -> None:
    val_flat(tmp_path)
    touch(tmp_path / "ILSVRC2012" / "val", "readme.txt")
    assert len(read_source("imagenet-val", tmp_path, LABELS).items) == len(TRUTH)
    touch(tmp_path / "ILSVRC2012" / "val", "holiday.jpg")
    with pytest.raises(ValueError, match=r"holiday\.jpg of .* is not one of the 4 in"):
        read_source("imagenet-val", tmp_path, LABELS)


def test_flat_validation_images_of_fewer_classes(tmp_path: Path) -> None:
    val_flat(tmp_path)
    (tmp_path / "ILSVRC2012" / "val" / validation_name(4)).unlink()
    with pytest.raises(ValueError, match=r"1 of 3 classes are missing .*n02"):
        read_source("imagenet-val", tmp_path, LABELS)


@pytest.mark.parametrize("kind", ["a FIFO", "a broken link", "a device"])
@pytest.mark.parametrize("form", [val_flat, train_class_tars])
def test_what_is_no_regular_file_among_flat_files_and_tars(
    tmp_path: Path, form: Callable[[Path], None], kind: str
) -> None:
    form(tmp_path)
    place = tmp_path / (
        f"ILSVRC2012/val/{validation_name(1)}" if form is val_flat else "train/n02.tar"
    )
    place.unlink()
    SPECIAL[kind](place)
    with pytest.raises(ValueError, match=f"{place} is {kind}"):
        read_source("imagenet-val" if form is val_flat else "imagenet-train", tmp_path, LABELS)


def test_a_flat_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    val_flat(tmp_path)
    touch(tmp_path / "ILSVRC2012" / "val", os.fsdecode(b"caf\xe9.JPEG"))
    with pytest.raises(ValueError, match=r"the name b'caf\\xe9\.JPEG' in .*val is not UTF-8"):
        read_source("imagenet-val", tmp_path, LABELS)


@pytest.mark.parametrize("form", [train_archive, train_class_tars])
def test_a_name_in_an_archive_that_is_not_utf8_is_refused(
    tmp_path: Path, form: Callable[[Path], None]
) -> None:
    form(tmp_path)
    path = next(tmp_path.rglob("*n02.tar" if form is train_class_tars else "*.tar"))
    image = os.fsdecode(b"caf\xe9.JPEG")
    path.write_bytes(
        tar_bytes({image: b"x"}) if form is train_class_tars else with_classes(n02={image: b"x"})
    )
    said = r"the name b'caf\\xe9\.JPEG' in .*n02\.tar is not UTF-8; rename it"
    with pytest.raises(ValueError, match=said):
        read_source("imagenet-train", tmp_path, LABELS)


def test_other_digits_are_no_number_of_a_validation_image(tmp_path: Path) -> None:
    val_flat(tmp_path)
    path = tmp_path / "ILSVRC2012" / "val" / validation_name(1)
    path.rename(path.with_name(validation_name(1).replace("1.J", "\N{BENGALI DIGIT ONE}.J")))
    with pytest.raises(ValueError, match="is not one of the 4 in"):
        read_source("imagenet-val", tmp_path, LABELS)


def test_class_tars_of_other_classes(tmp_path: Path) -> None:
    """They are refused like class folders; archives and system files are not classes."""
    train_class_tars_in_the_source(tmp_path)
    touch(tmp_path, "ILSVRC2012_img_val.tar", "imagenet-r.tar", "._n09.tar", "n09.zip")
    (tmp_path / "n10.tar").mkdir()
    assert read_source("imagenet-train", tmp_path, LABELS).layout == f"3 tars of {tmp_path}"
    make_tar(tmp_path / "n09.tar", {"n09_1.JPEG": b"x"})
    with pytest.raises(ValueError, match=r"unknown class: 'n09' in .* not one of the 3 classes"):
        read_source("imagenet-train", tmp_path, LABELS)


@pytest.mark.parametrize("form", [val_folders, val_flat])
def test_a_file_that_grew_after_the_listing(tmp_path: Path, form: Callable[[Path], None]) -> None:
    form(tmp_path)
    source = read_source("imagenet-val", tmp_path, LABELS)
    with next(tmp_path.rglob(validation_name(2))).open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ValueError, match=r"00000002\.JPEG has more bytes, 1200 when it was listed"):
        contents(source)


def test_a_devkit_that_may_not_be_read_is_not_damaged(tmp_path: Path, monkeypatch) -> None:
    val_flat(tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(local, "reader", refuse)
    with pytest.raises(PermissionError, match=rf"Permission denied: .*{DEVKIT}\.tar\.gz"):
        read_source("imagenet-val", tmp_path, LABELS)


def test_a_source_that_is_no_folder(tmp_path: Path) -> None:
    train_archive(tmp_path)
    with pytest.raises(ValueError, match="is a file; name the folder that holds it"):
        read_source("imagenet-train", tmp_path / "ILSVRC2012_img_train.tar", LABELS)


def test_an_item_that_changed_in_its_archive(tmp_path: Path) -> None:
    train_archive(tmp_path)
    source = read_source("imagenet-train", tmp_path, LABELS)
    os.truncate(tmp_path / "ILSVRC2012_img_train.tar", source.items[-1].offset + 1)
    with pytest.raises(ValueError, match=r"img_train\.tar: n03/n03_1\.JPEG has 0 bytes"):
        contents(source)


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.text("ab0", min_size=1, max_size=150), st.binary(max_size=1500)),
        unique_by=lambda entry: entry[0],
        max_size=8,
    )
)
def test_members_lie_where_tar_members_says(tmp_path_factory, entries) -> None:
    """A tar inside a tar, long names (PAX headers) included."""
    inner = tar_bytes(dict(entries))
    path = tmp_path_factory.mktemp("tars") / "outer.tar"
    make_tar(path, {"before": b"x" * 700, "inner.tar": inner, "after": b""})
    data = path.read_bytes()
    _, part, _ = tar_members(path)
    assert data[part.offset : part.offset + part.size] == inner
    found = {m.name: data[m.offset : m.offset + m.size] for m in tar_members(path, part)}
    assert found == dict(entries)


# --- what was published -------------------------------------------------------------------------


def test_is_imagenet() -> None:
    imagenet = LabelSpace.imagenet()
    assert is_imagenet(imagenet)
    assert is_imagenet(dataclasses.replace(imagenet, templates=("{c}",)))
    assert not is_imagenet(dataclasses.replace(imagenet, ids=imagenet.ids[::-1]))
    assert not is_imagenet(LABELS)


@pytest.mark.parametrize("dataset", sorted(BENCHMARKS))
def test_counts(dataset: str) -> None:
    imagenet, count = LabelSpace.imagenet(), BENCHMARKS[dataset].images
    check_count(dataset, count, imagenet)
    check_count(dataset, 3, LABELS)  # a user's own world
    check_count(dataset, count - 1, imagenet, allowed=count - 1)
    message = f"{dataset} has {count - 1:,} images here, {count:,} were published"
    with pytest.raises(ValueError, match=f"{message}.*--allow-count {dataset}={count - 1}"):
        check_count(dataset, count - 1, imagenet)
    for found in (count, count - 2):
        with pytest.raises(ValueError, match=f"--allow-count says {count - 1:,}"):
            check_count(dataset, found, imagenet, allowed=count - 1)


def test_allowed_counts() -> None:
    names = ["imagenet-r", "imagenet-a"]
    assert parse_allowed_counts(["imagenet-a=7"], names) == {"imagenet-a": 7}
    with pytest.raises(ValueError, match="must be SET=N"):
        parse_allowed_counts(["7"], names)
    with pytest.raises(ValueError, match="must be SET=N"):
        parse_allowed_counts(["imagenet-a=\N{ARABIC-INDIC DIGIT SEVEN}"], names)
    with pytest.raises(ValueError, match="did you mean 'imagenet-a'"):
        parse_allowed_counts(["imagenet-aa=7"], names)


@pytest.mark.parametrize("dataset", ["imagenet-r", "imagenet-a"])
def test_sets_of_200_classes_are_whole(tmp_path: Path, dataset: str) -> None:
    labels = LabelSpace.imagenet()
    published = published_classes(dataset, labels)
    assert published is not None
    assert len(set(published)) == 200
    touch(tmp_path / dataset, *(f"{wnid}/a.jpg" for wnid in published))
    source = read_source(dataset, tmp_path, labels)
    assert len(source.groups) == 200
    assert [labels.ids[group[0]] for group in source.groups] == sorted(published)
    extra = next(wnid for wnid in labels.ids if wnid not in published)
    touch(tmp_path / dataset, f"{extra}/a.jpg")
    with pytest.raises(ValueError, match=f"unknown class: '{extra}' .* not one of the 200 classes"):
        read_source(dataset, tmp_path, labels)
    shutil.rmtree(tmp_path / dataset / extra)
    shutil.rmtree(tmp_path / dataset / published[17])
    with pytest.raises(ValueError, match=f"1 of 200 classes are missing .*{published[17]}"):
        read_source(dataset, tmp_path, labels)


# --- keys ---------------------------------------------------------------------------------------


def test_keys_of_one_stem_twice_in_a_folder() -> None:
    keys = make_keys(["a/x.jpg", "a/x.png", "b/y.jpg"])
    assert len(set(keys)) == 3
    assert all(key.startswith(("a_x-", "b_y-")) for key in keys)


NAMES = st.text(st.sampled_from("ab01._ -\u00e9"), min_size=1, max_size=4)


@pytest.mark.slow
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
