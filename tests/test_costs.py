"""Small inputs that would cost much are refused in one line, before memory or time is spent."""

import dataclasses
import gzip
import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import tiny_world
from rft.loading import dataset as loader
from rft.loading.dataset import PackedDataset
from rft.packing import archives
from rft.packing.foreign.index import index_shards
from rft.packing.foreign.rule import Options as Reading
from rft.packing.foreign.samples import shard_size
from rft.packing.own_folder import read_folder
from rft.packing.pack import Options, pack
from rft.packing.verify import check_index, verify
from rft.report import read as runs
from rft.runs import records
from rft.runs.gallery_file import read as read_gallery
from rft.shards.index import INDEX_BYTES, KEY_BYTES, Index
from rft.shards.manifest import Manifest, Shard
from rft.shards.ranges import cut
from rft.storage import files
from tests.report.make_runs import make_gallery

ORIGINAL = Options(workers=1)


@pytest.fixture
def packed(tmp_path) -> Path:
    """A set of eight original images."""
    tiny_world.write_images(tmp_path / "images", "imagenet-r", 2)
    pack("imagenet-r", str(tmp_path / "images"), str(tmp_path / "out"), tiny_world.LABELS, ORIGINAL)
    return tmp_path / "out" / "imagenet-r"


def rewrite(packed: Path, **columns) -> Index:
    """Change columns of an index and update the manifest."""
    manifest = Manifest.load(str(packed))
    index = dataclasses.replace(Index.read(str(packed), manifest), **columns)
    data = index.to_bytes()
    (packed / "index.npz").write_bytes(data)
    dataclasses.replace(manifest, index_sha256=files.sha256_bytes(data)).save(str(packed))
    return index


# --- images -------------------------------------------------------------------------------------


def test_an_image_of_too_many_pixels_is_left_out_by_its_name(tmp_path):
    tiny_world.write_images(tmp_path / "images", "imagenet-r", 2)
    bad = next((tmp_path / "images").rglob("*.*"))
    Image.new("RGB", (200, 100)).save(bad)
    source, out = str(tmp_path / "images"), str(tmp_path / "out")
    few = dataclasses.replace(ORIGINAL, max_pixels=0.019)
    with pytest.raises(ValueError, match=f"{bad} is 200 x 100 pixels, .* --max-bad N leaves out"):
        pack("imagenet-r", source, out, tiny_world.LABELS, few)
    pack("imagenet-r", source, out, tiny_world.LABELS, dataclasses.replace(few, max_bad=1))
    line = json.loads((Path(out) / "imagenet-r" / "quarantine.jsonl").read_text())
    assert line["reason"].startswith("is 200 x 100 pixels, 0.0 million; --max-pixels allows 0.019")
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"--max-pixels is .*; it must be"):
            pack("imagenet-r", source, out, tiny_world.LABELS, Options(max_pixels=wrong))


def test_a_sparse_file_of_gigabytes_is_not_read(tmp_path):
    tiny_world.write_images(tmp_path / "images", "imagenet-r", 2)
    bad = next((tmp_path / "images").rglob("*.*"))
    with bad.open("r+b") as stream:
        stream.truncate(2**35)
    source, out = str(tmp_path / "images"), str(tmp_path / "out")
    with pytest.raises(ValueError, match=f"{bad} has 34,359,738,368 bytes, more than 4 for each"):
        pack("imagenet-r", source, out, tiny_world.LABELS, ORIGINAL)
    pack("imagenet-r", source, out, tiny_world.LABELS, dataclasses.replace(ORIGINAL, max_bad=1))
    assert Manifest.load(f"{out}/imagenet-r").quarantined == 1


def test_readers_have_the_same_limit(packed):
    """It is compared when a set is opened, and again for each file."""
    largest = max(Image.open(path).size for path in (packed.parents[1] / "images").rglob("*.*"))
    millions = largest[0] * largest[1] / 1e6
    PackedDataset(str(packed), max_pixels=0.01).image(0, 16)
    with pytest.raises(ValueError, match=r"its largest image has .* pixels, --max-pixels allows"):
        PackedDataset(str(packed), max_pixels=millions - 1e-6)
    with pytest.raises(ValueError, match=r"has .* bytes, more than 4 for each|largest image"):
        PackedDataset(str(packed), max_pixels=1e-6)
    # an index that understates its files
    index = Index.read(str(packed), Manifest.load(str(packed)))
    rewrite(packed, width=np.ones_like(index.width))
    lying = PackedDataset(str(packed), max_pixels=millions - 1e-6)
    with pytest.raises(ValueError, match=r"000000\.tar, sample .* pixels, .* --max-pixels allows"):
        lying.batch(np.arange(len(lying)), 16)


def test_verify_has_the_same_limit(packed):
    assert verify(str(packed), deep=True, workers=1).problems == []
    problems = verify(str(packed), deep=True, workers=1, max_pixels=0.0002).problems
    assert all("--max-pixels allows" in str(problem) for problem in problems)
    assert len(problems) == 8


def test_huge_files_of_a_batch_are_read_some_at_a_time(packed, monkeypatch):
    data = PackedDataset(str(packed))
    expected = data.batch(np.arange(8), 16).images_BCHW
    read, whole = [], PackedDataset.payloads

    def payloads(self, samples: np.ndarray) -> list[bytes]:
        read.append(len(samples))
        return whole(self, samples)

    monkeypatch.setattr(PackedDataset, "payloads", payloads)
    assert data.batch(np.arange(8), 16).images_BCHW.equal(expected)
    monkeypatch.setattr(loader, "PAYLOAD_BYTES", int(data.index.length.max()) * 2)
    assert data.batch(np.arange(8), 16).images_BCHW.equal(expected)
    assert read[0] == 8
    assert sum(read[1:]) == 8
    assert len(read) > 2
    assert cut([5, 5, 20, 1, 1], 10) == [(0, 2), (2, 3), (3, 5)]


# --- shards and indexes -------------------------------------------------------------------------


def test_lengths_beyond_the_file_are_not_allocated(packed):
    """The manifest agrees with the size of the shard."""
    manifest = Manifest.load(str(packed))
    long = dataclasses.replace(manifest.shards[0], bytes=2**40)
    dataclasses.replace(manifest, shards=(long,)).save(str(packed))
    index = rewrite(packed, length=np.full(8, 2**32 - 1, np.uint32))
    with pytest.raises(ValueError, match="its largest file has 4,294,967,295 bytes, more than 4"):
        PackedDataset(str(packed))
    problems = [str(one) for one in verify(str(packed), deep=True, workers=1).problems]
    size = (packed / "000000.tar").stat().st_size - int(index.offset[0])
    assert any(f"truncated: {size:,} of 4,294,967,295 bytes exist" in one for one in problems)


def test_an_index_is_no_larger_than_its_manifest_allows(packed, monkeypatch):
    with (packed / "index.npz").open("r+b") as stream:
        stream.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match=r"index\.npz: it has more than 24,768 bytes, too many"):
        PackedDataset(str(packed))
    manifest = dataclasses.replace(
        Manifest.load(str(packed)),
        shards=(Shard(name="0.tar", bytes=2**50, sha256=64 * "0", samples=2**40),),
    )
    with pytest.raises(ValueError, match=f"it has more than {INDEX_BYTES:,} bytes"):
        Index.read(str(packed), manifest)


def test_an_index_that_readers_refuse_is_not_written(packed, monkeypatch):
    index = Index.read(str(packed), Manifest.load(str(packed)))
    long = dataclasses.replace(index, key=index.key.astype(f"S{KEY_BYTES + 1}"))
    with pytest.raises(ValueError, match="a key has 1,025 letters, more than the limit of 1,024"):
        long.to_bytes()
    monkeypatch.setattr("rft.shards.index.INDEX_BYTES", 100)
    with pytest.raises(ValueError, match="split them into several sets"):
        index.to_bytes()


def tar_of(path: Path, **members: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for suffix, content in members.items():
            member = tarfile.TarInfo(f"a.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_label_is_short(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (20, 20)).save(stream, "PNG")
    tar_of(tmp_path / "0.tar", png=stream.getvalue(), cls=b"0".ljust(2**20 + 1))
    with pytest.raises(ValueError, match=r"'a\.cls' has 1,048,577 bytes, too many for a label"):
        index_shards(
            [str(tmp_path / "0.tar")], str(tmp_path / "set"), tiny_world.LABELS, Reading(workers=1)
        )


def test_a_folder_in_place_of_a_shard(tmp_path):
    (tmp_path / "0.tar").mkdir()
    with pytest.raises(ValueError, match=r"0\.tar is a folder, not a shard; it has no \.tar"):
        shard_size(str(tmp_path / "0.tar"))


@pytest.mark.slow
def test_many_thousand_shards(tmp_path):
    """No reader of a set compares each shard with all others: here are 30,000."""
    count, began = 30_000, time.process_time()
    shards = tuple(
        Shard(name=f"{n:06d}.tar", bytes=10240, sha256=f"{n:064x}", samples=2) for n in range(count)
    )
    rows = np.arange(2 * count)
    index = Index(
        offset=(1536 + 2048 * (rows % 2)).astype(np.uint64),
        length=np.full(2 * count, 100, np.uint32),
        crc32=np.zeros(2 * count, np.uint32),
        label=np.full(2 * count, 10**6, np.int32),  # each row is wrong
        width=np.ones(2 * count, np.uint16),
        height=np.ones(2 * count, np.uint16),
        key=np.char.mod(b"%06d", rows),
    )
    data = index.to_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "index.npz").write_bytes(data)
    manifest = Manifest(
        dataset="mine",
        classes=("a", "b"),
        templates=("{c}",),
        groups=((0,), (1,)),
        encoding={"kind": "original", "crop_border": 0},
        plan_hash=64 * "0",
        index_sha256=files.sha256_bytes(data),
        shards=shards,
    )
    manifest.save(str(tmp_path / "set"))
    with pytest.raises(ValueError, match="its label is not one of the 2 classes"):
        PackedDataset(str(tmp_path / "set"))
    assert sum(1 for _ in check_index(manifest, index)) == 2 * count
    assert time.process_time() - began < 30


# --- folders, devkits, runs ---------------------------------------------------------------------


def test_a_devkit_that_unpacks_to_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "DEVKIT_BYTES", 10**5)
    path = tmp_path / f"{archives.DEVKIT}.tar.gz"
    path.write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(ValueError, match="unpacks to more than 100,000 bytes; download it again"):
        archives.validation_classes(path)


def test_a_folder_without_bottom(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "0.png")
        deep = tmp_path / name / "/".join(80 * "x")
        deep.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(deep / "1.png")
    with pytest.raises(ValueError, match="is more than 64 folders deep; move its images up"):
        read_folder(tmp_path, None, 0.5, 0)


def test_runs_below_a_folder_have_an_end(tmp_path, monkeypatch):
    deep = tmp_path / "/".join(40 * "x")
    deep.mkdir(parents=True)
    with pytest.raises(ValueError, match="is nested too deep for a run folder"):
        runs.find_runs([tmp_path])
    for name in "abc":
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").touch()
    monkeypatch.setattr(runs, "RUNS", 2)
    with pytest.raises(ValueError, match="found 3 run folders; the limit of a report is 2"):
        runs.find_runs([tmp_path / "runs"])


def test_metrics_of_gigabytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 has more than"):
        next(records.read_metrics(path))


HOSTILE = {
    "many images": ({"batch": 17}, {}),
    "large images": ({}, {"images_BCHW": np.zeros((1, 3, 1032, 1032), np.uint8)}),
    "many columns": ({}, {f"donor/{n}": np.zeros((6, 36), np.int64) for n in range(30)}),
    "more than the limit": ({}, {"x": np.zeros(2**26, np.uint8)}),
    "no images": ({}, {"images_BCHW": np.zeros(3, np.uint8)}),
    "no texts": ({}, {"class_names": np.zeros(3)}),
    "many steps": ({"frames": 3}, {"steps_S": np.arange(2**16)}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_gallery_costs_little(tmp_path, kind):
    made, columns = HOSTILE[kind]
    path = make_gallery(tmp_path / "gallery.npz", **made, **columns)
    with pytest.raises(ValueError, match=r"gallery\.npz is not a gallery of rft\.train: [^\n]+$"):
        read_gallery(path)
