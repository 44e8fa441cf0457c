"""The inputs of OUT: the same command passes, others are refused in its own words."""

from pathlib import Path

import pytest

from rft.packing.own_folder import read_folder
from rft.photos import record
from tests.photos.photo_folders import write

OPTIONS = {"--model.clip": "ViT-B-32-quickgelu", "--epochs": "10", "--seed": "0"}


def of(root: Path, **options: str) -> record.MadeFrom:
    named = {f"--{name}": value for name, value in options.items()}
    return record.made_from(read_folder(root, None, 0.2, 0), OPTIONS | named)


@pytest.fixture
def begun(tmp_path) -> tuple[Path, Path]:
    """A folder of photos, and an OUT whose sets are packed and trained on."""
    root, out = write(tmp_path / "photos", [6, 6]), tmp_path / "out"
    record.write(out, of(root))
    for name in ("train", "test"):
        (out / "shards" / name).mkdir(parents=True)
        (out / "shards" / name / "000000.tar").touch()
    (out / "runs").mkdir()
    return root, out


def test_the_same_photos_in_a_different_place_pass(begun, tmp_path):
    root, out = begun
    record.agree(out, of(root))
    record.agree(out, of(root.rename(tmp_path / "moved")))


def test_other_options_are_named_as_they_were(begun):
    root, out = begun
    with pytest.raises(
        ValueError,
        match=r"out was made with --epochs 10 --seed 0 \(given or the default\): pass the same",
    ):
        record.agree(out, of(root, epochs="3", seed="1"))


def test_photos_that_came_are_counted_with_what_to_delete(begun):
    root, out = begun
    write(root, [0, 9], first=6)
    with pytest.raises(ValueError, match=r"photos changed since .*out was made") as refused:
        record.agree(out, of(root))
    assert "(10 -> 17 files to train on, 2 -> 4 files to test with): choose another --out" in str(
        refused.value
    )
    assert str(refused.value).endswith(f"or delete {out}/shards, {out}/runs")


def test_a_photo_that_was_exchanged_is_a_change(begun):
    root, out = begun
    path = root / "c000" / "0.png"
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(
        ValueError, match=r"\(\d+ files to t[a-z ]+ as before, but different ones\)"
    ):
        record.agree(out, of(root))


def test_classes_are_compared(begun):
    root, out = begun
    write(root, [3], ["fox"])
    with pytest.raises(ValueError, match=r"\(2 -> 3 classes, 10 -> 12 files to train on, "):
        record.agree(out, of(root))
    for path in (root / "fox").iterdir():
        path.unlink()
    (root / "fox").rmdir()
    (root / "c001").rename(root / "d001")
    with pytest.raises(ValueError, match="different names or prompts of the classes"):
        record.agree(out, of(root))


def test_a_set_that_is_not_packed_yet_may_change(begun):
    """As if packing had named a broken photo, which was then repaired or removed."""
    root, out = begun
    (out / "runs").rmdir()
    (out / "shards" / "train" / "000000.tar").unlink()
    now = of(root)
    in_train = sorted({*root.rglob("*.png")} - {root / path for path in held_out(root)})
    in_train[0].unlink()
    changed = of(root)
    assert (changed.sets["test"], changed.sets["train"] != now.sets["train"]) == (
        now.sets["test"],
        True,
    )
    record.agree(out, changed)
    record.write(out, changed)
    record.agree(out, changed)


def held_out(root: Path) -> list[str]:
    (test,) = [one for one in read_folder(root, None, 0.2, 0).sources if one.dataset == "test"]
    return [item.path for item in test.items]


def test_after_deleting_what_was_named_the_record_is_new(begun):
    root, out = begun
    (out / "runs").rmdir()
    for path in out.glob("shards/*/*.tar"):
        path.unlink()
    write(root, [2], first=6)
    record.agree(out, of(root, epochs="3"))
    record.write(out, of(root, epochs="3"))
    (out / "runs").mkdir()
    record.agree(out, of(root, epochs="3"))


def test_results_without_a_record_get_none(tmp_path):
    root, out = write(tmp_path / "photos", [4, 4]), tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    record.agree(out, of(root))
    record.write(out, of(root))
    assert not (out / record.NAME).exists()
