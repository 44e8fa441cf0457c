"""The order in which files reach the disk: after a power cut or a kill, nothing is inconsistent."""

import contextlib
import os
from pathlib import Path

import pytest

from benchmarks import tiny_world
from rft.packing.foreign.index import index_shards
from rft.packing.foreign.rule import Options as Reading
from rft.packing.pack import Options, pack
from rft.storage import files


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append(("synced", os.fstat(descriptor).st_size))
        sync(descriptor)

    def rename(path: Path, target) -> Path:
        events.append(("named", path.stat().st_size))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    files.write_bytes(str(tmp_path / "file"), b"12345")
    assert events == [("synced", 5), ("named", 5)]
    assert (tmp_path / "file").read_bytes() == b"12345"


def test_what_raises_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with files.publish(str(path)) as temporary:
            temporary.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The names given to files, in order."""
    names = []
    publish = files.publish

    @contextlib.contextmanager
    def spy(url: str, *rest):
        with publish(url, *rest) as path:
            yield path
        names.append(url.rsplit("/", 1)[-1])

    monkeypatch.setattr(files, "publish", spy)
    return names


def test_packing_names_a_set_when_all_of_it_is_there(tmp_path, written):
    tiny_world.write_images(tmp_path / "images", "imagenet-r", 2)
    options = Options(encoding="pixels", size=tiny_world.SIZE, shard_mb=0.004, workers=1)
    pack("imagenet-r", str(tmp_path / "images"), str(tmp_path / "out"), tiny_world.LABELS, options)
    assert written[0] == "plan.json"
    assert written[-1] == "manifest.json"
    assert written.count("manifest.json") == 1
    assert "index.npz" in written
    for number in range(sum(name.endswith(".tar") for name in written)):
        tar, record = f"{number:06d}.tar", f"{number:06d}.json"
        assert written.index(tar) < written.index(record) < written.index("index.npz")


def test_indexing_names_a_set_when_all_of_it_is_there(tmp_path, written):
    images = tmp_path / "images"
    tiny_world.write_images(images, "imagenet-r", 2)
    pack("imagenet-r", str(images), str(tmp_path / "out"), tiny_world.LABELS, Options(workers=1))
    written.clear()
    pattern = str(tmp_path / "out" / "imagenet-r" / "000000.tar")
    index_shards([pattern], str(tmp_path / "mine"), tiny_world.LABELS, Reading(dataset="mine"))
    assert written[-1] == "manifest.json"
    assert "index.npz" in written[:-1]
