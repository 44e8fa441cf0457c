"""The guard: no OOD image is used for training or selection, whatever its set is called."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.tiny_world import LABELS, SIZE
from rft.merge import command as merging
from rft.packing.layouts import read_source
from rft.packing.pack import Options, pack_source
from rft.shards.guard import Seen, find_set, require_no_test_images, seen_images, shared_keys
from rft.shards.index import Index
from rft.shards.manifest import Manifest
from rft.shards.samples import Samples
from rft.train import command as training
from tests import tiny
from tests.shards.test_samples import manifest

PIXELS = Options(encoding="pixels", size=SIZE, shard_mb=0.02, workers=1)


def pack_as(data: Path, benchmark: str, root: Path, name: str, options=PIXELS, **changes) -> None:
    """Pack the images of a benchmark of the tiny world under a name of the user's own."""
    found = read_source(benchmark, data.parent / "images", LABELS)
    assert pack_source(replace(found, dataset=name, **changes), str(root), LABELS, options)


def copy(data: Path, root: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(data / name, root / name)


def forget(folder: Path) -> None:
    """Turn a set into one of an older version, which wrote no samples.npz."""
    (folder / "samples.npz").unlink()
    manifest = Manifest.load(str(folder))
    replace(manifest, samples_sha256=None).save(str(folder))


def guard(root: Path, name: str) -> None:
    manifest = Manifest.load(str(root / name))
    index = Index.load(str(root / name), manifest)
    require_no_test_images(str(root), name, manifest, index.key)


def warnings(capsys) -> list[str]:
    return tiny.complaints(capsys.readouterr().err)


def test_different_images_pass(tiny_data, capsys):
    guard(tiny_data, "imagenet-train")
    assert warnings(capsys) == []


def test_the_id_test_set_is_refused_under_any_name(tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"is a test set \(imagenet-val\)"):
        guard(tiny_data, "imagenet-val")
    shutil.copytree(tiny_data / "imagenet-val", tmp_path / "mine")
    with pytest.raises(ValueError, match=r"mine is a test set \(imagenet-val\)"):
        guard(tmp_path, "mine")
    copy(tiny_data, tmp_path, "imagenet-val")
    pack_as(tiny_data, "imagenet-val", tmp_path, "packed-again")
    with pytest.raises(ValueError, match="packed-again holds 28 images of imagenet-val, mine"):
        guard(tmp_path, "packed-again")


def test_an_evaluation_knows_which_images_were_trained_on(tiny_data, tmp_path, capsys):
    """Complete sets, copies under a different name, and single images."""
    copy(tiny_data, tmp_path, "imagenet-train", "imagenet-r")
    pack_as(tiny_data, "imagenet-train", tmp_path, "copy", replace(PIXELS, encoding="original"))
    found = read_source("imagenet-train", tiny_data.parent / "images", LABELS)
    some = replace(found, dataset="some", items=found.items[::3])
    assert pack_source(some, str(tmp_path), LABELS, PIXELS)
    tests = {
        name: Manifest.load(str(tmp_path / name))
        for name in ("imagenet-train", "imagenet-r", "copy", "some")
    }

    def seen(name: str = "imagenet-train", sha256: str = tests["imagenet-train"].sha256):
        found = find_set([str(tmp_path)], name, sha256)
        return seen_images(str(tmp_path), {(name, sha256): found}, tests)

    known = {"imagenet-train": Seen(76), "imagenet-r": Seen(), "copy": Seen(76)}
    assert seen() == {**known, "some": Seen(len(some.items))}
    # a different set of that name, and a missing one: only ImageNet's sets are known to be disjoint
    unknown = {"imagenet-train": None, "imagenet-r": Seen(), "copy": None, "some": None}
    assert seen(sha256="0" * 64) == unknown
    absent = {**unknown, "imagenet-r": None, "copy": Seen(76)}
    assert seen("absent", tests["copy"].sha256) == absent
    assert warnings(capsys) == []
    forget(tmp_path / "some")
    tests["some"] = Manifest.load(str(tmp_path / "some"))
    assert seen() == {**known, "some": None}
    (warning,) = warnings(capsys)
    assert "some: cannot compare its images with those of imagenet-train (" in warning
    # a deleted file does not prevent an evaluation
    (tmp_path / "imagenet-train" / "samples.npz").unlink()
    assert seen() == {"imagenet-train": Seen(76), "imagenet-r": None, "copy": None, "some": None}
    assert "cannot compare its images with those of the evaluated sets" in warnings(capsys)[0]


def of_hashes(root: Path, name: str, values: Iterable[int]) -> Manifest:
    """Write the files of a packed set that the guard reads, for images with these hashes."""
    source_N = np.array(list(values), np.uint64)
    data = Samples(source=source_N).to_bytes()
    (root / name).mkdir()
    (root / name / "samples.npz").write_bytes(data)
    replace(manifest(data, len(source_N)), dataset=name).save(str(root / name))
    return Manifest.load(str(root / name))


def test_a_model_of_two_trainings_has_seen_what_either_has(tmp_path):
    trained_on = [
        (name, of_hashes(tmp_path, name, values).sha256)
        for name, values in (("a", range(30)), ("b", range(20, 50)))
    ]
    tests = {"test": of_hashes(tmp_path, "test", range(25, 80))}
    root = str(tmp_path)
    for order in (trained_on, trained_on[::-1]):
        sets = {pair: find_set([root], *pair) for pair in order}
        assert seen_images(root, sets, tests) == {"test": Seen(25)}
    # a lower bound is better than nothing, but 0 of one set is not
    assert seen_images(root, {**sets, ("c", "0" * 64): None}, tests) == {"test": Seen(25)}
    tests = {"new": of_hashes(tmp_path, "new", range(90, 95))}
    assert seen_images(root, sets, tests) == {"new": Seen()}
    assert seen_images(root, {**sets, ("c", "0" * 64): None}, tests) == {"new": None}


def test_images_with_different_labels_in_training_and_test_are_counted(tiny_data, tmp_path):
    """An image with both labels in training has the test's label there."""
    found = read_source("imagenet-train", tiny_data.parent / "images", LABELS)
    of_test = found.items[:6]
    others = [replace(one, label=1 - min(one.label, 1)) for one in of_test]
    training = [*of_test[:4], *others[3:5], *found.items[6:]]
    for name, items in (("mine", training), ("tests", of_test)):
        numbered = [replace(one, key=f"{n}") for n, one in enumerate(items)]
        source = replace(found, dataset=name, items=numbered)
        assert pack_source(source, str(tmp_path), LABELS, PIXELS)
    tests = {"tests": Manifest.load(str(tmp_path / "tests"))}
    pair = ("mine", Manifest.load(str(tmp_path / "mine")).sha256)
    trained_on = {pair: find_set([str(tmp_path)], *pair)}
    assert seen_images(str(tmp_path), trained_on, tests) == {"tests": Seen(5, 1)}
    assert [len(keys) for keys in shared_keys(str(tmp_path), ["mine"], "tests")] == [4, 1]
    (tmp_path / "mine" / "index.npz").unlink()
    assert seen_images(str(tmp_path), trained_on, tests) == {"tests": Seen(5)}


@pytest.mark.parametrize(("images", "refused"), [(3, False), (5, True)])
def test_a_few_copies_in_imagenets_own_training_set_are_a_warning(
    tmp_path, capsys, images, refused
):
    train = of_hashes(tmp_path, "imagenet-train", range(4000))
    of_hashes(tmp_path, "imagenet-val", range(4000 - images, 9000))
    keys = np.array([f"k{n}".encode() for n in range(4000)])
    arguments = (str(tmp_path), "imagenet-train", train, keys)
    if refused:
        with pytest.raises(ValueError, match="holds 5 images of imagenet-val"):
            require_no_test_images(*arguments)
    else:
        require_no_test_images(*arguments)
        assert "holds 3 images of imagenet-val (first: 'k3997')" in warnings(capsys)[0]


@pytest.mark.parametrize("encoding", ["original", "pixels"])
def test_a_copy_under_another_name_is_found(tiny_data, tmp_path, encoding):
    """In any encoding: the source files are compared."""
    copy(tiny_data, tmp_path, "imagenet-r", "imagenet-val")
    options = replace(PIXELS, encoding=encoding)
    pack_as(tiny_data, "imagenet-r", tmp_path, "mine", options)
    index = Index.load(str(tmp_path / "mine"), Manifest.load(str(tmp_path / "mine")))
    with pytest.raises(ValueError, match="mine holds 20 images of imagenet-r") as caught:
        guard(tmp_path, "mine")
    assert f"(first: {index.key[0].decode()!r})" in str(caught.value)
    shutil.rmtree(tmp_path / "imagenet-r")
    guard(tmp_path, "mine")


HASHES = st.lists(st.sampled_from([0, 1, 2, 3, 2**63, 2**64 - 1]), min_size=1, max_size=4)


@pytest.mark.slow
@given(HASHES, HASHES)
def test_refused_exactly_where_a_hash_is_common(tmp_path_factory, train, test):
    root = tmp_path_factory.getbasetemp() / "hashes"
    for name, values in (("train", train), ("test", test)):
        (root / name).mkdir(parents=True, exist_ok=True)
        data = Samples(source=np.array(values, np.uint64)).to_bytes()
        (root / name / "samples.npz").write_bytes(data)
        replace(manifest(data, len(values)), ood=name == "test").save(str(root / name))
    keys = np.array([f"k{n}".encode() for n in range(len(train))])
    common = [n for n, value in enumerate(train) if value in test]
    document = Manifest.load(str(root / "train"))
    if not common:
        require_no_test_images(str(root), "train", document, keys)
        return
    images = "1 image" if len(common) == 1 else f"{len(common)} images"
    said = rf"holds {images} of test \(first: 'k{common[0]}'\)"
    with pytest.raises(ValueError, match=said):
        require_no_test_images(str(root), "train", document, keys)


def test_one_image_among_others_is_found(tiny_data, tmp_path):
    copy(tiny_data, tmp_path, "imagenet-a")
    found = read_source("imagenet-train", tiny_data.parent / "images", LABELS)
    stolen = read_source("imagenet-a", tiny_data.parent / "images", LABELS).items[0]
    # through a link, as users mix folders
    folder = tmp_path / "images" / LABELS.ids[0]
    folder.mkdir(parents=True)
    for item in found.items[:5]:
        shutil.copy(found.root / item.path, folder)
    (folder / "renamed.png").symlink_to(tiny_data.parent / "images/imagenet-a" / stolen.path)
    for name in LABELS.ids[1:]:
        shutil.copytree(found.root / name, tmp_path / "images" / name)
    mixed = read_source("imagenet-sketch", tmp_path / "images", LABELS)
    assert pack_source(replace(mixed, dataset="mixed"), str(tmp_path), LABELS, PIXELS)
    with pytest.raises(ValueError, match=r"mixed holds 1 image of imagenet-a \(first: 'renamed'"):
        guard(tmp_path, "mixed")


def test_ood_sets_are_refused_by_what_their_manifest_says(tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"out-of-distribution test set \(imagenet-r\)"):
        guard(tiny_data, "imagenet-r")
    shutil.copytree(tiny_data / "imagenet-r", tmp_path / "renamed")
    with pytest.raises(ValueError, match=r"renamed is an out-of-distribution .*\(imagenet-r\)"):
        guard(tmp_path, "renamed")
    pack_as(tiny_data, "imagenet-val", tmp_path, "own", ood=True)
    with pytest.raises(ValueError, match=r"out-of-distribution test set \(own\)"):
        guard(tmp_path, "own")


def test_declared_sets_are_compared_as_the_benchmarks_are(tiny_data, tmp_path):
    pack_as(tiny_data, "imagenet-val", tmp_path, "declared", ood=True)
    pack_as(tiny_data, "imagenet-val", tmp_path, "train")
    with pytest.raises(ValueError, match="train holds 28 images of declared"):
        guard(tmp_path, "train")
    pack_as(tiny_data, "imagenet-val", tmp_path / "second", "test")
    pack_as(tiny_data, "imagenet-val", tmp_path / "second", "train")
    guard(tmp_path / "second", "train")


def test_sets_without_hashes_are_named_in_one_warning(tiny_data, tmp_path, capsys):
    copy(tiny_data, tmp_path, "imagenet-train", "imagenet-r", "imagenet-a")
    forget(tmp_path / "imagenet-r")
    guard(tmp_path, "imagenet-train")
    (warning,) = warnings(capsys)
    assert f"{tmp_path}/imagenet-r: cannot compare its images with those of" in warning
    assert "pack or index the set again" in warning
    forget(tmp_path / "imagenet-train")
    guard(tmp_path, "imagenet-train")
    (warning,) = warnings(capsys)
    assert f"{tmp_path}/imagenet-train: cannot compare its images with those of" in warning
    assert "imagenet-a, imagenet-r" in warning


def test_damaged_hashes_of_the_training_set_are_an_error(tiny_data, tmp_path, capsys):
    copy(tiny_data, tmp_path, "imagenet-train", "imagenet-r")
    (tmp_path / "imagenet-train/samples.npz").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"imagenet-train/samples\.npz does not have the sha256"):
        guard(tmp_path, "imagenet-train")
    # nothing is compared if no OOD set is beside it
    shutil.rmtree(tmp_path / "imagenet-r")
    guard(tmp_path, "imagenet-train")
    copy(tiny_data, tmp_path, "imagenet-r")
    (tmp_path / "imagenet-r/manifest.json").write_bytes(b"noise")
    guard(tmp_path, "imagenet-train")
    (warning,) = warnings(capsys)
    assert "imagenet-r/manifest.json" in warning


def test_a_store_without_a_list_is_asked_for_the_benchmarks(tiny_data, tmp_path, monkeypatch):
    """Like a web server, which cannot list its folders."""
    copy(tiny_data, tmp_path, "imagenet-r")
    pack_as(tiny_data, "imagenet-r", tmp_path, "mine")

    def refuse(*_: object) -> list[str]:
        raise ValueError("no list")

    monkeypatch.setattr("rft.storage.files.folders", refuse)
    with pytest.raises(ValueError, match="mine holds 20 images of imagenet-r"):
        guard(tmp_path, "mine")


def test_training_is_refused_before_it_starts(refused, tiny_data, tiny_clip, tmp_path):
    root = tmp_path / "shards"
    copy(tiny_data, root, "imagenet-r")
    pack_as(tiny_data, "imagenet-r", root, "mine")
    words = tiny.training("vanilla", root, tiny_clip, tmp_path / "run", "--train-set", "mine")
    for more in ([], ["--dry-run"]):
        assert "mine holds 20 images of imagenet-r" in refused(training, *words, *more)
    words = tiny.training("vanilla", root, tiny_clip, tmp_path / "run", "--train-set", "imagenet-r")
    assert "is an out-of-distribution test set" in refused(training, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_greedy_soup_selects_by_no_test_images(refused, tiny_data, tiny_clip, tmp_path):
    root = tmp_path / "shards"
    copy(tiny_data, root, "imagenet-train")
    runs = [
        tiny.train("vanilla", root, tiny_clip, tmp_path / f"run{n}", "--seed", n, "--split-seed", 0)
        for n in (0, 1)
    ]
    # its training images are test images
    pack_as(tiny_data, "imagenet-train", root, "found-later", ood=True)
    said = refused(merging, "greedy-soup", *runs, "--data", root, "--out", tmp_path / "soup")
    assert "imagenet-train holds 76 images of found-later" in said
    assert not (tmp_path / "soup").exists()
