"""New images: which files are read, and the read-ahead."""

import os
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft.predict.images import AHEAD, find_images, read_squares


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(root: Path, found) -> list[str]:
    return [path.relative_to(root).as_posix() for path in found.paths]


def test_a_folder_is_searched_at_any_depth_and_sorted(tmp_path):
    touch(tmp_path, "b.JPG", "a/2.png", "a/10.webp", "a/b/c/d.jpeg", "z.jpg")
    found = find_images([tmp_path])
    assert listed(tmp_path, found) == ["a/10.webp", "a/2.png", "a/b/c/d.jpeg", "b.JPG", "z.jpg"]
    assert not found.refused
    assert not found.others
    assert not found.passed


def test_what_packing_passes_over_is_passed_over_and_counted(tmp_path):
    touch(tmp_path, "a.jpg", "@eaDir/a.jpg", ".hidden.jpg", "sub/Thumbs.db", "sub/thumbs/b.jpg")
    touch(tmp_path, "clip.mov", "sub/other.MOV")
    found = find_images([tmp_path], ["*.mov"])
    assert listed(tmp_path, found) == ["a.jpg"]
    assert found.passed == {"@eaDir": 1, ".*": 1, "Thumbs.db": 1, "thumbs": 1, "*.mov": 2}
    assert not found.refused
    assert not found.others


def test_other_files_in_a_folder_are_listed_and_named_ones_are_tried(tmp_path):
    touch(tmp_path, "a.jpg", "b.HEIC", "sub/README")
    found = find_images([tmp_path])
    assert listed(tmp_path, found) == ["a.jpg"]
    assert found.others == {"*.heic": [tmp_path / "b.HEIC"], "README": [tmp_path / "sub/README"]}
    assert find_images([tmp_path, tmp_path / "sub"]).others == found.others
    named = find_images([tmp_path / "b.HEIC", tmp_path / "none.jpg"])
    assert listed(tmp_path, named) == ["b.HEIC", "none.jpg"]


def test_a_file_counts_once_and_links_in_a_circle_end(tmp_path):
    touch(tmp_path, "a/1.jpg", "2.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    found = find_images([tmp_path / "2.jpg", tmp_path, tmp_path / "a" / "1.jpg"])
    assert listed(tmp_path, found) == ["2.jpg", "a/1.jpg"]


def test_images_come_in_their_order_without_those_that_cannot_be_read(tmp_path):
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(10)]
    refused = {}
    images[3] = tmp_path / "none.jpg"
    images[9] = Image.new("LAB", (4, 4))
    parts = list(read_squares(images, 4, 4, max_pixels=1, refuse=refused.setdefault))
    assert [part.numbers for part in parts] == [[0, 1, 2, 4], [5, 6, 7, 8]]
    for part in parts:
        assert part.images_BCHW[:, 0, 0, 0].tolist() == part.numbers
    assert sorted(refused) == [3, 9]
    assert "none.jpg cannot be read: No such file" in str(refused[3])
    assert "image 9 cannot be read: unsupported pixel mode LAB" in str(refused[9])


def test_one_opened_image_may_be_given_many_times(tmp_path):
    noise_HWC = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise_HWC).save(tmp_path / "x.jpg")
    given = [Image.open(tmp_path / "x.jpg")] * 50 + [tmp_path / "x.jpg"]
    (squares,) = read_squares(given, 16, 64, max_pixels=1)
    assert (squares.images_BCHW == squares.images_BCHW[-1]).all()


def test_no_more_is_read_ahead_than_two_batches():
    taken = count()
    images = (Image.new("RGB", (4, 4)) for _ in iter(lambda: next(taken) < 1000, False))
    stream = read_squares(images, 4, 8, max_pixels=1)
    next(stream)
    stream.close()
    # the batch, those started beside its last image, and the one that the counter names now
    assert next(taken) <= 8 + AHEAD * 8 + 1


@pytest.mark.parametrize("kind", ["fifo", "large", "many pixels", "folder"])
def test_files_that_must_not_be_read_are_refused(tmp_path, kind):
    path = tmp_path / "x.png"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "large":
            with path.open("wb") as stream:
                stream.truncate(2**40)
        case "many pixels":
            Image.fromarray(np.zeros((1100, 1000), np.uint8)).save(path)
        case _:
            path.mkdir()
    reasons = {
        "fifo": "is a FIFO",
        "large": "has 1,099,511,627,776 bytes, more than",
        "many pixels": "--max-pixels allows 1 million",
        "folder": "is a folder",
    }
    with pytest.raises(ValueError, match=rf"x\.png .*{reasons[kind]}"):
        next(read_squares([path], 4, 4, max_pixels=1))
