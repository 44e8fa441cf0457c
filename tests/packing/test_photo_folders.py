"""Photo folders as users have them: spellings of splits, levels, system files, odd names."""

import json
import os
import re
import socket
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rft.packing.layouts import read_source
from rft.packing.names import SYSTEM_NAMES, passed_over
from rft.packing.own_folder import Photos, UnusableError, choose_test, read_folder, same_bytes
from rft.packing.own_splits import role
from rft.packing.pack import Options, pack
from rft.packing.source import require_apart
from rft.shards.label_space import LabelSpace, choose_labels, doubts
from rft.text import printable

pytestmark = pytest.mark.slow  # together

COMPOSED, APART = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
PROMPT = ("a photo of a {c}.",)


def fill(root: Path, *names: str) -> Path:
    """Write files with different bytes; a listing does not decode them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
    return root


def classes(root: Path, *names: str, below: str = "") -> Path:
    return fill(root, *(f"{name}/{below}{n}.jpg" for name in names for n in range(4)))


def space(*ids: str) -> LabelSpace:
    return LabelSpace(ids=ids, names=ids, templates=PROMPT)


def read(root: Path, labels: LabelSpace | None = None, *ignore: str, share: float = 0.25) -> Photos:
    return read_folder(root, labels, share, 0, ignore)


def found(photos: Photos) -> dict[str, str]:
    """Return the folder of each set."""
    return {source.dataset: source.root.name for source in photos.sources}


# --- splits -------------------------------------------------------------------------------------

SPELLINGS = [
    ("Train", "Test", "test"),
    ("TRAIN", "TEST", "test"),
    ("training_set", "test_set", "test"),
    ("Training", "Validation", "test"),
    ("train-images", "test images", "test"),
    ("Training Set", "Testing Set", "test"),
    ("trainset", "valset", "test"),
    ("data_train", "data_dev", "test"),
    ("train_set", "eval", "test"),
    ("train", "hold-out", "test"),
    ("train", "valid", "test"),
]


@pytest.mark.parametrize(("train", "test", "name"), SPELLINGS)
def test_splits_are_recognised_in_any_spelling(tmp_path: Path, train, test, name) -> None:
    for split in (train, test):
        classes(tmp_path / split, "cat", "dog")
    photos = read(tmp_path)
    assert found(photos) == {"train": train, name: test}
    assert photos.labels.ids == ("cat", "dog")
    assert (photos.notes, photos.warnings) == ([], [])


def test_a_test_split_goes_before_a_validation_split(tmp_path: Path) -> None:
    for split in ("Validation", "Training", "Testing"):
        classes(tmp_path / split, "cat", "dog")
    assert found(read(tmp_path)) == {"train": "Training", "test": "Testing", "val": "Validation"}


@pytest.mark.parametrize("name", ["trains", "trainer", "tester", "devil", "contest", "invalid"])
def test_words_that_only_begin_like_splits(name: str) -> None:
    assert role(name) == ""


UNCLEAR = {
    "two training splits": (["Train", "train", "test"], "'Train' and 'train': which is the train"),
    "two test splits": (["train", "test", "test_set"], "'test' and 'test_set': which is the test"),
    "two validation splits": (["train", "val", "valid"], "'val' and 'valid': which is the val"),
    "no test": (["train", "unsorted"], "'train', which looks like a split, but no test or valid"),
    "train alone": (["Training"], "'Training', which looks like a split, but no test or valid"),
    "no train": (["test"], "'test', which looks like a split, but no training split"),
    "prefixes": (["seg_train", "seg_test", "seg_pred"], "'seg_train' and 'seg_test' .* look like"),
    "camels": (["trainA", "testA"], "'trainA' and 'testA' .* look like splits"),
    "another language": (["Übung", "Prüfung"], "'Prüfung' and 'Übung' .* same names .'cat', 'dog'"),
}


def test_a_stray_image_makes_no_class_of_a_split(tmp_path: Path) -> None:
    for split in ("my_train", "my_test"):
        classes(tmp_path / split, "cat", "dog")
        fill(tmp_path / split, "contact sheet.jpg")
    with pytest.raises(ValueError, match=r"'my_train' and 'my_test' .* look like splits"):
        read(tmp_path)


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_looks_like_splits_and_is_unclear_is_refused(tmp_path: Path, case: str) -> None:
    folders, message = UNCLEAR[case]
    for folder in folders:
        classes(tmp_path / folder, "cat", "dog")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
    # explicit --classes are respected
    if len(folders) > 1 and len({name.casefold() for name in folders}) == len(folders):
        photos = read(tmp_path, space(*folders))
        assert photos.labels.ids == tuple(folders)
        assert found(photos) == {"train": tmp_path.name, "test": tmp_path.name}


def test_a_test_split_without_labels_is_refused(tmp_path: Path) -> None:
    classes(tmp_path / "train", "cat", "dog")
    fill(tmp_path, "test/1.jpg", "test/2.jpg")
    with pytest.raises(
        ValueError, match=r"test is named like a split, .* no class folders.*--ignore"
    ):
        read(tmp_path)
    classes(tmp_path / "val", "cat", "dog")
    assert found(read(tmp_path, None, "test")) == {"train": "train", "test": "val"}


def test_splits_of_each_class_are_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        classes(tmp_path / name, "Train", "Test")
    with pytest.raises(ValueError, match=r"cat holds splits .'Train', 'Test'.*Train/cat"):
        read(tmp_path, space("cat", "dog"))


@pytest.mark.parametrize("name", ["train", "test", "Validation"])
def test_a_class_may_be_called_like_a_split(tmp_path: Path, name: str) -> None:
    photos = read(classes(tmp_path, "bus", name))
    assert set(photos.labels.ids) == {"bus", name}
    assert photos.warnings == [f"the folder '{name}' in {tmp_path} is packed as a class"]


def test_classes_in_the_label_space_may_be_called_like_splits_within_splits(tmp_path) -> None:
    for split in ("train", "test"):
        classes(tmp_path / split, "bus", "train")
    assert found(read(tmp_path, space("bus", "train"))) == {"train": "train", "test": "test"}


def test_what_lies_beside_the_splits_is_named_and_counted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        classes(tmp_path / split, "cat", "dog")
    classes(tmp_path / "unsorted", "cat", "cow")
    fill(tmp_path, "readme.md", "9.jpg", "notes/a.txt", "@eaDir/9.jpg", "test/labels.csv")
    assert read(tmp_path).notes == [
        "skipped by name: 1 @eaDir",
        "not read: notes/ (0 images), unsorted/ (8 images), 9.jpg, readme.md, test/labels.csv",
    ]


def test_images_beside_the_splits_are_counted_to_the_depth_that_is_packed(tmp_path: Path) -> None:
    """Python 3.11 walks folders by recursion: below about a thousand it raises RecursionError."""
    for split in ("train", "test"):
        classes(tmp_path / split, "cat", "dog")
    fill(tmp_path / "other", "a/" * 63 + "1.jpg", "a/" * 64 + "1.jpg")
    assert read(tmp_path).notes == ["not read: other/ (1 image)"]


def test_a_training_split_given_alone(tmp_path: Path) -> None:
    for split in ("train", "test"):
        classes(tmp_path / split, "cat", "dog")
    (warning,) = read(tmp_path / "train").warnings
    assert warning.startswith("'test' beside ")


# --- levels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", ["animals", "animals/images", "a/b/c"])
def test_a_level_too_high_is_refused_with_the_right_one(tmp_path: Path, above: str) -> None:
    classes(tmp_path / above, "cat", "dog")
    fill(tmp_path, "__MACOSX/animals/._cat", ".DS_Store", "@eaDir/1.jpg")
    with pytest.raises(
        ValueError, match=f"holds a single folder.*name the folder {tmp_path}/{above}$"
    ):
        read(tmp_path)
    with pytest.raises(ValueError, match="holds a single folder"):
        read(tmp_path, space("cat", "dog"))
    read(tmp_path / above)


def test_a_level_above_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        classes(tmp_path / "animals" / split, "cat", "dog")
    with pytest.raises(ValueError, match=f"name the folder {tmp_path}/animals$"):
        read(tmp_path)


def test_a_level_too_many_inside_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        classes(tmp_path / split / "images", "cat", "dog")
    with pytest.raises(ValueError, match=r"seem to be in .*train/images; move them up"):
        read(tmp_path)


def test_a_circle_of_links_above_the_classes(tmp_path: Path) -> None:
    (tmp_path / "round").mkdir()
    (tmp_path / "round" / "again").symlink_to(tmp_path / "round")
    with pytest.raises(ValueError, match="one class is too few"):
        read(tmp_path)


@pytest.mark.parametrize("below", ["", "old/"])
def test_a_single_class_is_refused(tmp_path: Path, below: str) -> None:
    with pytest.raises(ValueError, match="holds a single folder, 'cat'; one class is too few"):
        read(classes(tmp_path, "cat", below=below))


def test_a_single_class_in_a_label_space_is_refused() -> None:
    with pytest.raises(ValueError, match="'cat' is the only class"):
        space("cat")


def test_a_level_too_low(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="if cat is a class itself, name the folder above it"):
        read(fill(tmp_path / "cat", "1.jpg", "old/2.jpg"))


def test_groups_of_classes_are_warned_of(tmp_path: Path) -> None:
    classes(tmp_path / "animals", "cat", "dog")
    classes(tmp_path / "plants", "rose", "fern")
    animals, plants = read(tmp_path).warnings
    assert "class 'animals'" in animals
    assert "only folders ('cat', 'dog')" in animals
    assert f"name the folder {tmp_path}/plants" in plants
    assert read(tmp_path, space("animals", "plants")).warnings == []


def test_folders_in_class_folders_belong_to_them(tmp_path: Path) -> None:
    classes(tmp_path, "cat", "dog", below="images/")
    classes(tmp_path, "cat", below="old/")
    photos = read(tmp_path, share=0)
    assert len(photos.sources[0].items) == 12


# folders with images, the message, and what --source it names
TOO_HIGH = {
    "years": (
        [f"{year}/photos/{name}" for year in (2023, 2024) for name in ("cat", "dog")],
        "'2023/photos' and '2024/photos' .* hold folders with the same names .'cat', 'dog'",
        "2023/photos",
    ),
    "years, deeper": (
        [f"{year}/a/b/{name}" for year in (2023, 2024) for name in ("cat", "dog", "cow")],
        "hold folders with the same names .'cat', 'cow', 'dog'",
        "2023/a/b",
    ),
    "a chain each": (
        ["2023/photos/cat", "2023/photos/dog", "2024/pics/cat", "2024/pics/dog"],
        "'2023/photos' and '2024/pics' .* hold folders with the same names",
        "2023/photos",
    ),
    "other folders in each": (
        ["x/photos/cat", "x/photos/dog", "y/photos/rose", "y/photos/fern"],
        "every folder in .* holds only 'photos' with further folders",
        "x/photos",
    ),
    "a training split in each": (
        [f"set{n}/train/{name}" for n in (1, 2) for name in "ab"],
        "'set1/train' and 'set2/train' .* hold folders with the same names",
        "set1/train",
    ),
    "of a single class": (
        ["a/train/x", "b/train/x"],
        "every folder in .* named like a split .a/train",
        "a/train",
    ),
    "splits of the classes": (["a/train", "b/train"], "named like a split .a/train", "a/train"),
    "a split each": (["a/train", "b/Testing"], "named like a split .a/train", "a/train"),
    "two splits": (["a/test", "a/val", "b/test"], "named like a split .a/test", "a/test"),
    "a split below a folder": (["a/x/train", "b/x/train"], "split .a/x/train", "a/x/train"),
    "a split of one set": (
        ["data/train/a", "data/train/b", "readme/x", "readme/y"],
        "'data' in .* named like a split .data/train",
        "data/train",
    ),
}


@pytest.mark.parametrize("case", TOO_HIGH)
def test_a_level_too_high_below_several_folders(tmp_path: Path, case: str) -> None:
    """Folders in between are never classes, whatever their names; the correct source is named."""
    folders, message, better = TOO_HIGH[case]
    classes(tmp_path, *folders)
    fill(tmp_path, "@eaDir/1.jpg", f"{folders[0]}/.DS_Store")
    with pytest.raises(ValueError, match=f"{message}.*name the folder {tmp_path}/{better}[,; ]"):
        read(tmp_path)
    # explicit --classes are respected
    named = sorted({folder.split("/")[0] for folder in folders})
    assert read(tmp_path, space(*named)).labels.ids == tuple(named)
    if len([folder for folder in folders if folder.startswith(f"{better}/")]) > 1:
        read(tmp_path / better)


def test_splits_deep_in_a_class_are_refused(tmp_path: Path) -> None:
    classes(tmp_path, "a/x/train", "a/x/test", "b")
    with pytest.raises(ValueError, match=r"a/x holds splits .'train', 'test'.*train/a/x"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["cat/train", "dog"], "'train' in {}/cat is named"),
        (["cat", "cat/test", "dog"], "'test' in {}/cat is named"),
        (["cat", "cat/test", "dog", "dog/val"], "'test' in {}/cat .and in 1 more. is named"),
        (["cat/x/dev", "cat/y", "dog"], "'dev' in {}/cat is named"),
        (["cat/val", "cat/test", "dog"], "'test', 'val' in {}/cat is named"),
    ],
)
def test_a_split_in_one_class_is_warned_of(tmp_path: Path, folders: list[str], named: str) -> None:
    classes(tmp_path, *folders)
    warnings = [line for line in read(tmp_path).warnings if "like a split" in line]
    assert len(warnings) == 1
    assert re.match(named.format(tmp_path), warnings[0])
    assert read(tmp_path, space("cat", "dog")).warnings == []


def test_groups_of_classes_below_a_folder_are_warned_of(tmp_path: Path) -> None:
    classes(tmp_path, "animals/photos/cat", "animals/photos/dog", "rose")
    (warning,) = read(tmp_path).warnings
    assert warning.startswith("class 'animals'")
    assert warning.endswith(
        f"only folders ('cat', 'dog'); if those are the classes, name the folder "
        f"{tmp_path}/animals/photos"
    )


@pytest.mark.parametrize(
    "folders",
    [
        ["cat/images", "dog/images"],  # as in tiny-imagenet
        ["cat/2023/images", "dog/2023/images"],
        ["cat/images/a", "dog/images/b"],
        ["cat", "cat/old", "dog/old"],
        ["cat/trained", "dog/contest"],
    ],
)
def test_ordinary_folders_in_classes_are_not_refused(tmp_path: Path, folders: list[str]) -> None:
    photos = read(classes(tmp_path, *folders), share=0)
    assert photos.labels.ids == ("cat", "dog")
    assert len(photos.sources[0].items) == 4 * len(folders)
    assert photos.warnings == []


# --- system files and --ignore ------------------------------------------------------------------


@pytest.mark.parametrize("change", [str, str.upper, str.lower, str.swapcase])
def test_system_names_in_any_case(change) -> None:
    hidden = (".DS_Store", "._1.jpg", ".@__thumb", "1.jpg:Zone.Identifier", "found.000")
    for name in (*SYSTEM_NAMES, *hidden):
        assert passed_over(change(name)), name


@pytest.mark.parametrize("name", ["1.jpg", "icon", "thumbs", "recycle", "snapshot", "found", "@1"])
def test_other_names_are_not_passed_over(name: str) -> None:
    assert passed_over(name) == ""


def cats_and_dogs(root: Path, place: str) -> None:
    """Two classes, in splits if the location is in one; one class has a folder `old`."""
    if place.startswith(("train/", "test/")):
        classes(root / "train", "cat", "dog")
        classes(root / "test", "cat", "dog")
    else:
        classes(classes(root, "cat", "dog"), "cat", below="old/")


PLACES = ("", "cat/", "cat/old/", "train/", "train/cat/")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name", ["@eaDir", "@EADIR", "#recycle", "@Recycle", "__MACOSX", "$RECYCLE.BIN", "lost+found"]
)
def test_system_folders_are_passed_over_at_any_depth(tmp_path: Path, place: str, name: str) -> None:
    cats_and_dogs(tmp_path, place)
    before = read(tmp_path)
    fill(tmp_path, f"{place}{name}/1.jpg/SYNOPHOTO_THUMB_M.jpg", f"{place}{name}/2.jpg")
    after = read(tmp_path)
    assert (after.sources, after.labels) == (before.sources, before.labels)
    (note,) = after.notes
    assert note.casefold() == f"skipped by name: 1 {name.casefold()}"


THUMBS = ["thumbs", "thumb", "Thumbnails", "thumbnail", "_thumb", "_thumbs", ".thumbs", "THUMBS_"]


@pytest.mark.parametrize("place", ["cat/", "cat/old/", "train/cat/", "test/cat/"])
@pytest.mark.parametrize("name", THUMBS)
def test_thumbnails_in_class_folders_are_passed_over(tmp_path: Path, place: str, name: str) -> None:
    """They would be a second copy of each photo, perhaps on the other side of the split."""
    cats_and_dogs(tmp_path, place)
    before = read(tmp_path)
    fill(tmp_path, *(f"{place}{name}/{n}.jpg" for n in range(4)), f"{place}{name}/size.txt")
    after = read(tmp_path)
    assert (after.sources, after.labels) == (before.sources, before.labels)
    counted = ".* (hidden)" if name.startswith(".") else name.casefold()
    assert after.notes == [f"skipped by name: 1 {counted}"]


@pytest.mark.parametrize("name", ["thumbs", "Thumbnails", "_thumb"])
def test_a_class_may_be_called_thumbs(tmp_path: Path, name: str) -> None:
    photos = read(classes(tmp_path, "fingers", name))
    assert set(photos.labels.ids) == {"fingers", name}
    assert photos.notes == []
    for split in ("train", "test"):
        classes(tmp_path / "set" / split, "fingers", name)
    assert set(read(tmp_path / "set").labels.ids) == {"fingers", name}


@pytest.mark.parametrize("name", ["thumbs up", "thumbtack", "greenthumb", "tom thumb"])
def test_other_folders_belong_to_their_class(tmp_path: Path, name: str) -> None:
    classes(tmp_path, "cat", "dog")
    fill(tmp_path, f"cat/{name}/9.jpg")
    photos = read(tmp_path, share=0)
    assert len(photos.sources[0].items) == 9


def test_a_class_of_thumbnails_alone_is_refused(tmp_path: Path) -> None:
    classes(classes(tmp_path, "cat", "dog"), "cow", below="thumbs/")
    with pytest.raises(ValueError, match="cow holds no images but thumbnails"):
        read(tmp_path)


def test_thumbnails_make_no_groups_of_classes(tmp_path: Path) -> None:
    """Each class holds folders with the same names here, one of which counts."""
    classes(tmp_path, "cat", "dog", below="large/")
    before = read(tmp_path)
    classes(tmp_path, "cat", "dog", below="thumbs/")
    assert read(tmp_path).sources == before.sources


@pytest.mark.parametrize("name", ["thumbs.db", "EHTHUMBS.DB", "Desktop.ini", "Icon\r", "._1.jpg"])
def test_system_files_are_passed_over(tmp_path: Path, name: str) -> None:
    before = read(classes(tmp_path, "cat", "dog"))
    fill(tmp_path, f"cat/{name}", name)
    after = read(tmp_path)
    assert after.sources == before.sources
    assert after.notes[0].startswith("skipped by name: 2 ")
    assert after.notes[0].isprintable()


def test_ignore(tmp_path: Path) -> None:
    before = read(classes(tmp_path, "cat", "dog"))
    fill(tmp_path, "cat/1.MOV", "cat/2.mov", "dog/deep/1.aae", "dog/raw/1.jpg", "unsorted/1.jpg")
    with pytest.raises(UnusableError, match=r"^3 files are not photos") as caught:
        read(tmp_path)
    assert caught.value.ignore == ("*.aae", "*.mov", "unsorted")
    after = read(tmp_path, None, "*.mov", "*.AAE", "RAW", "unsorted", "*.heic")
    assert after.sources == before.sources
    assert after.notes == [
        "skipped by name: 2 *.mov (--ignore), 1 *.AAE (--ignore), 1 RAW (--ignore), "
        "1 unsorted (--ignore)"
    ]
    assert after.warnings == ["--ignore '*.heic' matches nothing"]
    with pytest.raises(ValueError, match="without folders"):
        read(tmp_path, None, "cat/*.mov")


def test_system_folders_beside_official_classes(tmp_path: Path) -> None:
    labels = space("n01", "n02")
    before = read_source("imagenet-train", classes(tmp_path, "train/n01", "train/n02"), labels)
    fill(tmp_path, "train/@eaDir/1.jpg", "train/#recycle/1.jpg", "train/README.txt")
    after = read_source("imagenet-train", tmp_path, labels)
    assert after.items == before.items
    assert after.layout.endswith("(2 system folders skipped: #recycle, @eaDir)")
    fill(tmp_path, "train/n01/Thumbs.db")
    with pytest.raises(ValueError, match=r"not an image: .*Thumbs\.db"):
        read_source("imagenet-train", tmp_path, labels)


# --- equal images -------------------------------------------------------------------------------


def test_equal_images_in_two_classes_are_named(tmp_path: Path) -> None:
    classes(tmp_path, "cat", "cow", "dog")
    for name in ("cow/a.jpg", "dog/b.jpg", "cat/c.jpg"):
        (tmp_path / name).write_bytes((tmp_path / "cat/0.jpg").read_bytes())
    paths = {name: str(tmp_path / name) for name in ("cat/0.jpg", "cow/a.jpg", "dog/b.jpg")}
    same = same_bytes(read(tmp_path, share=0).sources)
    assert same.between_classes == [
        (paths["cat/0.jpg"], paths["cow/a.jpg"]),
        (paths["cat/0.jpg"], paths["dog/b.jpg"]),
    ]
    assert same.between_sets == []


def test_files_that_end_alike_are_not_equal(tmp_path: Path) -> None:
    classes(tmp_path, "cat", "dog")
    (tmp_path / "cat/0.jpg").write_bytes(b"a" + bytes(100_000))
    (tmp_path / "dog/0.jpg").write_bytes(b"b" + bytes(100_000))
    assert same_bytes(read(tmp_path).sources) == ([], [], [])


SPOTS = st.tuples(st.sampled_from(["train", "test"]), st.integers(0, 2), st.integers(0, 3))


@given(st.lists(SPOTS, min_size=1, max_size=12))
def test_every_equal_image_is_named(tmp_path_factory, spots) -> None:
    root = tmp_path_factory.mktemp("equal")
    by_content: dict[int, set] = {}
    for split in ("train", "test"):
        classes(root / split, "0", "1", "2")
    for number, (split, label, content) in enumerate(spots):
        fill(root, f"{split}/{label}/more {number}.jpg")
        (root / split / str(label) / f"more {number}.jpg").write_bytes(bytes([content]) * 9)
        by_content.setdefault(content, set()).add((split, label))
    # the files of `classes` are all different: each holds its own path in its split
    for split in ("train", "test"):
        for path in (root / split).rglob("?.jpg"):
            path.write_text(str(path))
    same = same_bytes(read(root).sources)
    for one, other in same.between_both:
        (split, label), (other_split, other_label) = (
            Path(path).relative_to(root).parts[:2] for path in (one, other)
        )
        assert split != other_split
        assert label != other_label
    assert bool(same.between_classes or same.between_both) == any(
        len({label for _, label in places}) > 1 for places in by_content.values()
    )
    assert bool(same.between_sets) == any(
        len({split for split, label in places if label == one}) > 1
        for places in by_content.values()
        for one in range(3)
    )


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["sea lion", "Sea_Lion", "SEA  lion"])
def test_classes_of_the_same_words_are_named(tmp_path: Path, other: str) -> None:
    photos = read(classes(tmp_path, "sea_lion", other, "dog"))
    (warning,) = photos.warnings
    assert repr(other) in warning
    assert "'sea_lion'" in warning
    assert "the same words" in warning


@pytest.mark.parametrize("name", ["_", "__ _", "\u200b", "\N{NO-BREAK SPACE}"])
def test_a_folder_without_words_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"the name of class '.*' is '.*', which has no words"):
        read(classes(tmp_path, name, "dog"))


@pytest.mark.parametrize("words", ["", " ", "_", "\u200b"])
def test_a_class_without_words_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=r"the name of class 'b' is .* no words"):
        LabelSpace(ids=("a", "b"), names=("x", words), templates=PROMPT)


@pytest.mark.parametrize("words", ["a\nb", "a\u2028b", "a\x1b[31m"])
def test_texts_that_cannot_be_one_line_of_a_class_list(words: str) -> None:
    with pytest.raises(ValueError, match=r"the name of class 'b' .* control characters"):
        LabelSpace(ids=("a", "b"), names=("x", words), templates=PROMPT)
    with pytest.raises(ValueError, match="a template is"):
        LabelSpace(ids=("a", "b"), names=("x", "y"), templates=("{c}" + words,))


def test_a_text_that_is_no_unicode() -> None:
    with pytest.raises(ValueError, match=r"^names\[1\] is '\\ud800'; it must be a valid string"):
        LabelSpace(ids=("a", "b"), names=("x", "\ud800"), templates=PROMPT)


def test_prompts_that_no_clip_reads_are_warned_of() -> None:
    long = LabelSpace(ids=("a", "b"), names=("x", "y " * 74), templates=("{c}", "two of {c}"))
    (warning,) = doubts(long)
    assert "class 'b' has 76 words" in warning


def test_doubts_of_a_file_are_printed(tmp_path: Path, capsys) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"ids": ["a", "b"], "names": ["x", "X"], "templates": ["{c}"]}))
    assert choose_labels(str(path)).names == ("x", "X")
    assert "classes 'a' and 'b' have the same words" in capsys.readouterr().err
    assert choose_labels(None) == LabelSpace.imagenet()
    assert capsys.readouterr().err == ""


# --- Unicode ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "test"), [(COMPOSED, APART), (APART, COMPOSED)])
def test_names_are_compared_in_one_unicode_form(tmp_path: Path, train: str, test: str) -> None:
    classes(tmp_path / "train", train, "dog")
    classes(tmp_path / "test", test, "dog")
    for labels in (None, space("dog", train), space("dog", test)):
        photos = read(tmp_path, labels)
        assert set(photos.labels.ids) == {"dog", COMPOSED}
        for source, folder in zip(photos.sources, (train, test), strict=True):
            label = photos.labels.ids.index(COMPOSED)
            named = [item.path for item in source.items if item.label == label]
            assert named == [f"{folder}/{n}.jpg" for n in range(4)]
            assert all((source.root / path).is_file() for path in named)


def test_two_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    message = r"different Unicode forms: 'cafe\\u0301' and 'caf\\xe9'"
    with pytest.raises(ValueError, match=message):
        read(classes(tmp_path, COMPOSED, APART))
    with pytest.raises(ValueError, match=message):
        read_source("imagenet-r", tmp_path, space(COMPOSED, "dog"))


def test_two_ids_of_one_name_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"class ids 'caf\\xe9' and 'cafe\\u0301' are the same name"
    ):
        space(COMPOSED, APART)


def test_official_folders_in_another_unicode_form(tmp_path: Path) -> None:
    classes(tmp_path, APART, "dog")
    source = read_source("imagenet-sketch", tmp_path, space("dog", COMPOSED))
    assert {(item.path.split("/")[0], item.label) for item in source.items} == {
        ("dog", 0),
        (APART, 1),
    }
    assert read_source("imagenet-r", tmp_path, space("dog", COMPOSED)).groups == ((0,), (1,))


@given(st.lists(st.text("aeé ü", min_size=1, max_size=5), min_size=2, unique=True))
def test_the_choice_does_not_depend_on_the_unicode_form(names: list[str]) -> None:
    def held(form: str) -> set[str]:
        chosen = choose_test([unicodedata.normalize(form, n) for n in names], 0.4, 0)
        return {unicodedata.normalize("NFC", name) for name in chosen}

    assert held("NFC") == held("NFD")


# --- files that are none ------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    # the path of a socket is limited to about 100 bytes
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


SPECIAL = {
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a broken link": lambda path: path.symlink_to("nowhere"),
    "a device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    classes(tmp_path, "n01", "n02")
    SPECIAL[kind](tmp_path / "n01" / "x.jpg")
    with pytest.raises(ValueError, match=f"n01/x.jpg is {kind}"):
        read(tmp_path)
    with pytest.raises(ValueError, match=f"n01/x.jpg is {kind}"):
        read_source("imagenet-r", tmp_path, space("n01", "n02"))


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    classes(tmp_path / "photos", "cat", "dog")
    fill(tmp_path, "elsewhere.jpg")
    (tmp_path / "photos" / "cat" / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    photos = read(tmp_path / "photos", share=0)
    assert len(photos.sources[0].items) == 9
    first = tmp_path / "photos" / "cat" / "link.jpg"
    rest = f"out of {tmp_path}/photos, and the targets are packed: {first}"
    assert photos.notes == [f"a link leads {rest}"]
    for number in range(2):
        first.with_name(f"z{number}.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    assert read(tmp_path / "photos", share=0).notes == [f"3 links lead {rest}, ..."]


def test_a_link_within_the_source_is_silent(tmp_path: Path) -> None:
    classes(tmp_path / "photos", "train/cat", "train/dog", "test/cat", "store/cow")
    (tmp_path / "photos" / "test" / "dog").symlink_to(tmp_path / "photos" / "train" / "dog")
    (tmp_path / "photos" / "train" / "cat" / "x.jpg").symlink_to("cat0.jpg")
    (tmp_path / "photos" / "train" / "cat" / "cat0.jpg").write_bytes(b"x")
    (tmp_path / "photos" / "train" / "cat" / "more").symlink_to("../../store/cow")
    (tmp_path / "link").symlink_to(tmp_path / "photos")  # the source that was named
    (note,) = read(tmp_path / "link").notes
    assert note.startswith("not read: ")


@pytest.mark.parametrize("name", ["train", "test", "train/cat", "test/cat", "train/cat/below"])
def test_a_folder_that_lies_elsewhere_is_named(tmp_path: Path, name: str) -> None:
    classes(tmp_path / "photos", "train/cat", "train/dog", "test/cat", "test/dog")
    classes(tmp_path / "photos", "train/cat/below")
    place = tmp_path / "photos" / name
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    (note,) = read(tmp_path / "photos").notes
    assert note.startswith("a link leads out of ")
    assert note.endswith(f"are packed: {place}")


def test_a_broken_link_in_place_of_a_class_is_refused(tmp_path: Path) -> None:
    classes(tmp_path, "cat", "dog")
    (tmp_path / "cow").symlink_to("nowhere")
    with pytest.raises(ValueError, match="cow is a broken link"):
        read(tmp_path)


@pytest.mark.parametrize("path", [b"caf\xe9/1.jpg", b"cat/caf\xe9.jpg", b"cat/caf\xe9/1.jpg"])
def test_names_that_are_not_utf8_are_refused(tmp_path: Path, path: bytes) -> None:
    classes(tmp_path, "cat", "dog")
    fill(tmp_path, os.fsdecode(path))
    with pytest.raises(ValueError, match=r"the name b'caf\\xe9.*' in .* is not UTF-8"):
        read(tmp_path)


def test_official_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    fill(classes(tmp_path, "n01"), os.fsdecode(b"n01/caf\xe9.jpg"))
    with pytest.raises(ValueError, match=r"the name b'caf\\xe9\.jpg' in .*n01 is not UTF-8"):
        read_source("imagenet-r", tmp_path, space("n01", "n02"))


@given(st.text())
def test_printable(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


# --- where shards go ----------------------------------------------------------------------------

TARGETS = {
    "equal": ".",
    "inside": "shards",
    "deep inside": "cat/a/b",
    "through a link": "../link/shards",
    "a set around it": "../..",
}


@pytest.mark.parametrize("case", TARGETS)
def test_shards_among_the_images_are_refused(tmp_path: Path, case: str) -> None:
    source = classes(tmp_path / "train" / "photos", "cat", "dog")
    (tmp_path / "train" / "link").symlink_to(source)
    with pytest.raises(ValueError, match="choose an --out beside it"):
        require_apart([source], str(source / TARGETS[case]), ["train", "test"])


@pytest.mark.parametrize("out", ["../shards", "..", "memory://photos/shards"])
def test_shards_elsewhere(tmp_path: Path, out: str) -> None:
    source = classes(tmp_path / "photos", "cat", "dog")
    where = out if "://" in out else str(source / out)
    require_apart([source], where, ["train", "test"])


@pytest.mark.parametrize(("dataset", "folder"), [("imagenet-r", "."), ("imagenet-val", "val")])
def test_official_sets_are_not_packed_into_their_source(tmp_path: Path, dataset, folder) -> None:
    classes(tmp_path / folder, "n01", "n02")
    with pytest.raises(ValueError, match="choose an --out beside it"):
        pack(dataset, str(tmp_path), str(tmp_path / folder), space("n01", "n02"), Options())
    assert not (tmp_path / folder / dataset).exists()
