"""Own photos: which files are found, how the test set is chosen, and that packing works."""

import importlib.util
import io
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rft import cli
from rft.loading.dataset import PackedDataset
from rft.packing.own_folder import UnusableError, choose_test, name_classes, read_folder, same_bytes
from rft.packing.verify import verify
from rft.shards.images import clip_pixels, load_image
from rft.shards.label_space import LabelSpace
from tests.tiny import unstamped

LABELS = LabelSpace(
    ids=("tabby_cat", "dog"), names=("tabby", "a dog"), templates=("a photo of a {c}.",)
)


def write_images(root: Path, *names: str, first_seed: int = 0) -> Path:
    for seed, name in enumerate(names, first_seed):
        rng = np.random.default_rng(seed)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (*rng.integers(20, 40, 2), 3)
        kind = "PNG" if path.suffix == ".png" else "JPEG"
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path, kind)
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images of one class, some in folders below, and six of another."""
    cats = [f"tabby_cat/{'old/' if n % 3 else ''}IMG {n}.JPG" for n in range(10)]
    dogs = [f"dog/IMG {n}.png" for n in range(6)]
    return write_images(tmp_path / "photos", *cats, *dogs)


def paths(source) -> set[str]:
    return {item.path for item in source.items}


# --- what is found ------------------------------------------------------------------------------


def test_a_share_of_each_class_is_held_out(photos: Path) -> None:
    (train, test), labels, *_ = read_folder(photos, None, 0.2, 0)
    assert (train.dataset, test.dataset) == ("train", "test")
    assert labels.ids == ("dog", "tabby_cat")
    assert labels.names == ("dog", "tabby cat")
    assert labels.templates == LabelSpace.imagenet().templates
    assert Counter(item.label for item in train.items) == {0: 5, 1: 8}
    assert Counter(item.label for item in test.items) == {0: 1, 1: 2}
    everything = {p.relative_to(photos).as_posix() for p in photos.rglob("*") if p.is_file()}
    assert paths(train) | paths(test) == everything
    assert not paths(train) & paths(test)
    # `IMG 1` is in both classes: keys are distinct over both sets
    keys = [item.key for item in (*train.items, *test.items)]
    assert len(set(keys)) == 16
    assert train.groups == test.groups == ((0,), (1,))
    again, *_ = read_folder(photos, None, 0.2, 0)
    assert again == [train, test]
    assert paths(read_folder(photos, None, 0.2, 1).sources[1]) != paths(test)


def test_no_test_set_is_asked_for(photos: Path) -> None:
    (train,), *_ = read_folder(photos, LABELS, 0, 0)
    assert len(train.items) == 16
    assert {item.label for item in train.items if item.path.startswith("tabby")} == {0}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "test"), {"train": "train", "test": "test"}),
        (("train", "val"), {"train": "train", "test": "val"}),
        (("train", "val", "test"), {"train": "train", "test": "test", "val": "val"}),
    ],
)
def test_a_test_set_that_is_there_is_taken(photos: Path, folders, expected) -> None:
    root = photos.parent / "split"
    for folder in folders:
        shutil.copytree(photos, root / folder)
    sources, *_ = read_folder(root, None, 0.5, 0)
    assert {source.dataset: source.root.name for source in sources} == expected
    assert all(len(source.items) == 16 for source in sources)


def test_a_class_may_be_called_train(photos: Path) -> None:
    write_images(photos, "train/1.jpg", "train/2.jpg", first_seed=50)
    sources, labels, *_ = read_folder(photos, None, 0.5, 0)
    assert labels.ids == ("dog", "tabby_cat", "train")
    assert [source.dataset for source in sources] == ["train", "test"]


def test_hidden_files_are_passed_over_and_counted(photos: Path) -> None:
    before = read_folder(photos, None, 0.2, 0)
    (photos / ".cache").mkdir()
    (photos / "README.txt").write_text("mine")
    (photos / "dog" / ".DS_Store").write_bytes(b"x")
    (photos / "dog" / "._1.png").write_bytes(b"x")
    (photos / "tabby_cat" / "old" / "Thumbs.db").write_bytes(b"x")
    found = read_folder(photos, None, 0.2, 0)
    assert found.sources == before.sources
    assert before.notes == []
    assert found.notes == [
        "skipped by name: 2 .* (hidden), 1 ._*, 1 Thumbs.db",
        "not read: photos/README.txt",
    ]


MISTAKES = {
    "nothing": (lambda root: shutil.rmtree(root), "no such folder"),
    "no classes": (lambda root: [shutil.rmtree(p) for p in root.iterdir()], "no class folders"),
    "beside": (lambda root: write_images(root, "1.jpg"), "1.jpg is not in a class folder"),
    "other file": (
        lambda root: (root / "dog" / "a.txt").write_text(""),
        r"not a photo: .*a\.txt;",
    ),
    "two others": (
        lambda root: [(root / "dog" / name).write_text("") for name in ("b.gif", "a.bmp")],
        r"^2 files are not photos \(\.jpeg, ",
    ),
    "empty class": (lambda root: (root / "empty").mkdir(), "empty holds no images"),
    "unknown class": (lambda root: write_images(root, "cow/1.jpg"), "unknown class: folder 'cow'"),
    "misspelt class": (
        lambda root: (root / "dog").rename(root / "d\u00f6g"),
        "folder 'd\u00f6g' .*did you mean 'dog', which has no folder",
    ),
    "missing class": (lambda root: shutil.rmtree(root / "dog"), r"1 of 2 .* \(first: dog\)"),
    "loop": (lambda root: (root / "dog" / "again").symlink_to(root / "dog"), "was already read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(photos: Path, mistake: str) -> None:
    make, message = MISTAKES[mistake]
    make(photos)
    with pytest.raises(ValueError, match=message):
        read_folder(photos, LABELS, 0.2, 0)


def test_all_that_cannot_be_used_is_one_error(photos: Path) -> None:
    """With the patterns that exclude it, also if a name contains characters of a pattern."""
    for name in ("dog/a.HEIC", "tabby_cat/b.mov", "heic only/c.HEIC", "dog/read [me]"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).touch()
    write_images(photos, "fo*x/1.jpg", first_seed=90)
    with pytest.raises(
        UnusableError, match=r"^4 files are not photos \(.*\); 2 class folders have too few photos"
    ) as caught:
        read_folder(photos, None, 0.2, 0)
    assert len(caught.value.__notes__) == 6
    assert caught.value.ignore == ("*.heic", "*.mov", "read [[]me]", "fo[*]x", "heic only")
    found = read_folder(photos, None, 0.2, 0, caught.value.ignore)
    assert found.labels.ids == ("dog", "tabby_cat")
    assert found.warnings == []


def test_headers_are_read_where_asked(photos: Path) -> None:
    """An empty file and a damaged header; what only fails in decoding is left to packing."""
    cat = sorted(path for path in (photos / "tabby_cat").rglob("*") if path.is_file())
    cat[0].write_bytes(b"")
    cat[1].write_bytes(cat[1].read_bytes()[:20])
    cat[2].write_bytes(cat[2].read_bytes()[:-30])
    found = read_folder(photos, None, 0.2, 0)
    assert found.warnings == []
    for max_bad in (0, 1):
        with pytest.raises(UnusableError, match=r"^2 photos cannot be read") as caught:
            read_folder(photos, None, 0.2, 0, (), max_bad)
        assert (caught.value.damaged, caught.value.ignore) == (2, ())
    allowed = read_folder(photos, None, 0.2, 0, (), 2)
    assert [one.items for one in allowed.sources] == [one.items for one in found.sources]
    for warning, path in zip(allowed.warnings, cat[:2], strict=True):
        assert warning.startswith(f"{path} ")
        assert warning.endswith("; it is left out (--max-bad)")


def test_a_header_longer_than_the_first_bytes_is_read(photos: Path) -> None:
    """A phone's JPEG may have a preview before its size."""
    path = photos / "dog" / "long.jpg"
    segment = b"\xff\xe2" + (2**16 - 1).to_bytes(2) + bytes(2**16 - 3)
    stream = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stream, "JPEG")
    path.write_bytes(stream.getvalue()[:2] + 3 * segment + stream.getvalue()[2:])
    assert read_folder(photos, None, 0.2, 0, (), 0).warnings == []


def test_a_class_of_one_image(photos: Path) -> None:
    write_images(photos, "fox/1.jpg", first_seed=90)
    with pytest.raises(ValueError, match="class folder 'fox' has one image"):
        read_folder(photos, None, 0.2, 0)
    assert len(read_folder(photos, None, 0, 0)[0][0].items) == 17


@pytest.mark.parametrize("share", ["-0.1", "1.0", "nan"])
def test_bad_shares(photos: Path, tmp_path: Path, share: str, run) -> None:
    code, _, err = run("--source", str(photos), "--out", str(tmp_path / "o"), "--test-share", share)
    assert (code, err.startswith(f"error: --test-share is {share}; it must")) == (2, True)


def test_a_test_set_without_a_class(photos: Path) -> None:
    root = photos.parent / "split"
    shutil.copytree(photos, root / "train")
    write_images(root, "test/dog/1.jpg")
    with pytest.raises(ValueError, match=r"missing in .*test \(first: tabby_cat\)"):
        read_folder(root, None, 0.2, 0)


# --- the choice ---------------------------------------------------------------------------------

NAMES = st.lists(st.text("ab0_ /", min_size=1, max_size=6), min_size=2, max_size=40, unique=True)


@pytest.mark.slow
@given(NAMES, st.floats(0.01, 0.99), st.integers(0, 3), st.randoms())
def test_choice(names: list[str], share: float, seed: int, random) -> None:
    held = choose_test(names, share, seed)
    assert 1 <= len(held) < len(names)
    assert abs(len(held) - share * len(names)) <= 1
    assert held <= set(names)
    assert choose_test(random.sample(names, len(names)), share, seed) == held
    # a larger share takes a superset
    assert held <= choose_test(names, min(share + 0.1, 0.99), seed)


def test_choice_is_frozen() -> None:
    """A version of rft must not move images between the sets."""
    names = [f"dog/{n}.jpg" for n in range(10)]
    assert sorted(choose_test(names, 0.3, 0)) == ["dog/1.jpg", "dog/3.jpg", "dog/9.jpg"]


def test_the_same_image_on_two_sides(photos: Path) -> None:
    root = photos.parent / "split"
    shutil.copytree(photos, root / "train")
    write_images(root, "test/dog/9.jpg", "test/tabby_cat/9.jpg", first_seed=100)
    assert same_bytes(read_folder(root, None, 0.2, 0).sources) == ([], [], [])
    train, test = root / "train" / "dog", root / "test" / "dog"
    shutil.copy(train / "IMG 0.png", test / "copy.png")
    # twice in one class of one set: useless, but no fault of the test
    shutil.copy(train / "IMG 1.png", train / "own copy.png")
    same = same_bytes(read_folder(root, None, 0.2, 0).sources)
    assert same == ([], [(str(train / "IMG 0.png"), str(test / "copy.png"))], [])


def test_the_same_image_in_two_classes_and_two_sets(photos: Path, tmp_path, run) -> None:
    root = photos.parent / "split"
    shutil.copytree(photos, root / "train")
    write_images(root, "test/dog/9.jpg", "test/tabby_cat/9.jpg", first_seed=100)
    shutil.copy(root / "train" / "dog" / "IMG 0.png", root / "test" / "tabby_cat" / "copy.png")
    code, _, err = run("--source", str(root), "--out", str(tmp_path / "out"), "--workers", "1")
    assert code == 0
    first, pair = unstamped(err).splitlines()
    assert first == (
        "WARNING: 1 pair of equal images in two classes and in two sets; one label is wrong, and "
        "testing on them is meaningless:"
    )
    assert pair.endswith("copy.png")


def test_names() -> None:
    labels = name_classes(["red_fox", "Ape"])
    assert labels.ids == ("Ape", "red_fox")
    assert labels.names == ("Ape", "red fox")


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd):
    path = Path(__file__).parents[2] / "tools" / "shard_folder.py"

    def run(*arguments: str) -> tuple[int, str, str]:
        spec = importlib.util.spec_from_file_location("shard_folder", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "shard_folder", module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["shard_folder", *arguments])
        capfd.readouterr()
        try:
            cli.run(module.main)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capfd.readouterr())

    return run


def test_command(photos: Path, tmp_path: Path, run) -> None:
    classes = tmp_path / "classes.json"
    document = {"ids": LABELS.ids, "names": LABELS.names, "templates": LABELS.templates}
    classes.write_text(json.dumps(document))
    out = tmp_path / "out"
    arguments = ["--source", str(photos), "--out", str(out), "--classes", str(classes)]
    arguments += ["--workers", "1", "--shard-mb", "0.004"]
    code, said, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "class tabby_cat (tabby): 8 train, 2 test" in said
    assert "class dog (a dog): 5 train, 1 test" in said
    assert "prompts: 1, such as 'a photo of a {c}.'" in said
    assert "warning" not in said
    first, second = said.splitlines()[-3:-1]
    # the training derives its numbers: nothing to copy, nothing to become stale
    assert first.endswith(f"--data {out} --train-set train --scale small --run-dir runs/first")
    assert second.endswith(f"rft.evaluate runs/first --data {out} --sets test")
    seen = []
    for name, count in (("train", 13), ("test", 3)):
        data = PackedDataset(str(out / name))
        assert data.manifest.dataset == name
        assert data.manifest.classes == LABELS.names
        assert len(data) == count
        assert verify(str(out / name), deep=True, workers=1).problems == []
        seen += [(int(data.index.label[n]), data.image(n, 16).tobytes()) for n in range(count)]
    expected = []
    for label, folder in enumerate(LABELS.ids):
        for path in (photos / folder).rglob("*.*"):
            image = load_image(path.read_bytes())
            expected.append((label, clip_pixels(image, 16).tobytes()))
    assert sorted(seen) == sorted(expected)
    assert run(*arguments)[1].count("nothing to do") == 2


def test_command_in_tasks(photos: Path, tmp_path: Path, run) -> None:
    arguments = ["--source", str(photos), "--workers", "1", "--shard-mb", "0.004"]
    assert run(*arguments, "--out", str(tmp_path / "at once"))[0] == 0
    code, said, _ = run(*arguments, "--out", str(tmp_path / "tasks"), "--task", "1/2")
    assert code == 0
    assert "next:" not in said
    code, said, _ = run(*arguments, "--out", str(tmp_path / "tasks"), "--task", "0/2")
    assert code == 0
    assert "next:" in said
    for name in ("train", "test"):
        for file_name in ("manifest.json", "index.npz", "000000.tar"):
            one, other = (tmp_path / out / name / file_name for out in ("at once", "tasks"))
            assert one.read_bytes() == other.read_bytes()


def test_command_warns_and_refuses(photos: Path, tmp_path: Path, run) -> None:
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train")
    shutil.copytree(photos, root / "val")
    arguments = ["--source", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]
    code, _, err = run(*arguments)
    assert code == 0
    assert "16 pairs of equal images in two sets" in err
    assert err.count(" = ") == 16
    (root / "val" / "dog" / "IMG 0.png").write_bytes(b"damaged")
    code, _, err = run(*arguments[:2], "--out", str(tmp_path / "other"), "--workers", "1")
    assert code == 2
    assert "IMG 0.png" in err.splitlines()[-1]


def test_command_names_what_it_passes_over_and_equal_images(photos: Path, tmp_path, run) -> None:
    shutil.copytree(photos / "dog", photos / "dog" / "@eaDir" / "dog")
    (photos / "tabby_cat" / "IMG 0.mov").write_bytes(b"film")
    shutil.copy(photos / "dog" / "IMG 0.png", photos / "tabby_cat" / "copy.png")
    arguments = ["--source", str(photos), "--out", str(tmp_path / "out"), "--workers", "1"]
    code, said, err = run(*arguments)
    assert (code, said) == (2, "")
    assert "--ignore '*.mov'" in err
    (photos / "dog" / "IMG.HEIC").touch()
    code, _, err = run(*arguments)
    assert code == 2
    head, *below = err.splitlines()
    assert head == "error: 2 files are not photos (.jpeg, .jpg, .png, .webp)"
    assert below == [
        f"  not a photo: {photos}/dog/IMG.HEIC",
        f"  not a photo: {photos}/tabby_cat/IMG 0.mov",
        "  to skip them: --ignore '*.heic' '*.mov'",
    ]
    (photos / "dog" / "IMG.HEIC").unlink()
    (photos / "dog" / "notes").touch()
    # a repeated option adds to the first
    code, said, err = run(*arguments, "--ignore", "*.MOV", "--ignore", "notes")
    assert code == 0
    assert "skipped by name: 1 *.MOV (--ignore), 1 @eaDir, 1 notes (--ignore)\n" in said
    assert "class dog (dog): 5 train, 1 test" in said
    first, second = unstamped(err).splitlines()
    assert first.startswith("WARNING: 1 pair of equal images in two classes")
    assert second.count(str(photos)) == 2


@pytest.mark.parametrize("out", [".", "shards", "link/shards"])
def test_command_does_not_write_among_the_images(photos: Path, tmp_path, run, out: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(photos / "dog", elsewhere)
    (photos / "dog").symlink_to(elsewhere)
    (photos / "dog" / "no image.txt").write_text("a listing would refuse it")
    before = sorted(tmp_path.rglob("*"))
    code, said, err = run("--source", str(photos), "--out", str(photos / out), "--workers", "1")
    assert (code, said) == (2, "")
    assert "choose an --out beside it" in err
    (photos / "dog" / "no image.txt").unlink()
    code, said, err = run("--source", str(photos), "--out", str(elsewhere / out), "--workers", "1")
    assert (code, said) == (2, "")
    assert "choose an --out beside it" in err
    assert set(tmp_path.rglob("*")) < set(before)


@pytest.mark.parametrize("name", [b"caf\xe9", b"IMG caf\xe9.jpg"])
def test_command_writes_nothing_for_names_it_cannot_keep(photos, tmp_path, run, name) -> None:
    shutil.move(photos / "dog" / "IMG 0.png", photos / "dog" / os.fsdecode(name))
    if name == b"caf\xe9":
        shutil.move(photos / "dog", photos / os.fsdecode(name))
    code, _, err = run("--source", str(photos), "--out", str(tmp_path / "out"), "--workers", "1")
    assert code == 2
    assert "is not UTF-8" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
