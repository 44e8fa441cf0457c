"""Packing: what is written reads back, the bytes are reproducible, a killed run continues."""

import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.readers.reader_wds import _load_info, _parse_split_info

from rft.data import pack as packing
from rft.data.encode import clip_pixels, load_image
from rft.data.labels import LabelSpace
from rft.data.manifest import Index, Manifest
from rft.data.pack import Options, cut, make_jobs, make_plan, pack, parse_task, shuffle, write_shard
from rft.data.sources import Item, read_source

LABELS = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("a {c}.", "the {c}."))
PIXELS = Options(encoding="pixels", size=16, shard_mb=0.004, workers=1)  # four samples a shard
ORIGINAL = Options(shard_mb=0.004, workers=1)


def write_image(path: Path, seed: int, format_name: str = "JPEG") -> None:
    rng = np.random.default_rng(seed)
    shape = (*rng.integers(12, 40, 2), 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path, format_name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with train/ and val/ of two classes, one image being a PNG in disguise."""
    root = tmp_path_factory.mktemp("imagenet")
    for n in range(14):
        wnid = LABELS.ids[n % 2]
        write_image(root / "train" / wnid / f"{wnid}_{n}.JPEG", n, "PNG" if n == 3 else "JPEG")
    for n, wnid in enumerate(LABELS.ids):
        write_image(root / "val" / wnid / f"ILSVRC2012_val_{n:08d}.JPEG", 100 + n)
    return str(root)


def snapshot(folder: Path) -> dict[str, str]:
    """Return relative path -> sha256 of every file, temporary ones included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_with_webdataset(folder: Path) -> list[dict]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def check_offsets(folder: Path) -> tuple[Manifest, Index]:
    """Hold every row of the index against the tars, as tarfile sees them."""
    manifest = Manifest.load(str(folder))
    index = Index.load(str(folder), manifest)
    row = 0
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getmembers()
        payloads = [member for member in members if not member.name.endswith((".cls", ".json"))]
        assert len(payloads) == shard.samples
        for member in payloads:
            offset, length = int(index.offset[row]), int(index.length[row])
            assert (offset, length) == (member.offset_data, member.size)
            assert zlib.crc32(data[offset : offset + length]) == index.crc32[row]
            assert member.name.split(".")[0] == index.key[row].decode()
            assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "root", 0o444)
            row += 1
        # plain headers where names are short: PAX ones would cost 1 KiB for each member
        if all(len(member.name) <= 100 for member in members):
            blocks = sum(1 + math.ceil(member.size / 512) for member in members)
            assert len(data) == math.ceil((blocks + 2) * 512 / 10240) * 10240
    assert row == manifest.samples == len(index.label)
    return manifest, index


# --- the plan -----------------------------------------------------------------------------------

ITEMS = st.lists(
    st.builds(
        Item,
        key=st.text("abc0_-", min_size=1, max_size=6),
        path=st.just("x"),
        label=st.integers(0, 9),
        bytes=st.integers(0, 50),
    ),
    unique_by=lambda item: item.key,
    max_size=60,
)


@given(ITEMS, st.integers(0, 3), st.integers(1, 100), st.randoms())
def test_plan_holds_every_item_once(items, seed, limit, random) -> None:
    order = shuffle(items, seed)
    assert shuffle(random.sample(items, len(items)), seed) == order
    bounds = cut([item.bytes for item in order], limit)
    shards = [order[start:stop] for start, stop in bounds]
    assert [item for shard in shards for item in shard] == order
    assert sorted(item.key for item in order) == sorted(item.key for item in items)
    for shard in shards:
        assert shard
        assert len(shard) == 1 or sum(item.bytes for item in shard) <= limit


def test_order_and_plan_hash_follow_their_inputs(source: str) -> None:
    def plan(labels: LabelSpace = LABELS, **options) -> packing.Plan:
        found = read_source("imagenet-train", Path(source), labels)
        return make_plan(found, labels, Options(**options))

    base = plan()
    assert base.hash == plan(workers=3, task="1/2", size=99).hash
    others = [
        plan(seed=1),
        plan(shard_mb=1),
        plan(encoding="pixels"),
        plan(encoding="pixels", size=32),
        plan(LabelSpace(ids=LABELS.ids, names=LABELS.names, templates=("{c}",))),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 6
    assert others[0].shards != base.shards


def test_order_is_frozen() -> None:
    """The shuffle is part of the format: packed sets are compared over machines and years."""
    items = [Item(key=f"k{n}", path="x", label=0, bytes=1) for n in range(8)]
    assert " ".join(item.key for item in shuffle(items, 0)) == "k0 k5 k1 k4 k3 k6 k7 k2"


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/b", "0/0", "1/2/3"])
def test_task_errors(text: str) -> None:
    with pytest.raises(ValueError, match="--task must be I/N"):
        parse_task(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "--size"),
        ({"shard_mb": 0}, "--shard-mb"),
        ({"workers": 0}, "--workers"),
        ({"finalize": True, "task": "0/2"}, "--finalize"),
    ],
)
def test_option_errors(source: str, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack("imagenet-val", source, str(tmp_path), LABELS, Options(**options))
    assert not snapshot(tmp_path)


# --- reading back -------------------------------------------------------------------------------


def test_original_reads_back(source: str, tmp_path: Path) -> None:
    assert pack("imagenet-train", source, str(tmp_path), LABELS, ORIGINAL)
    folder = tmp_path / "imagenet-train"
    manifest, index = check_offsets(folder)
    assert len(manifest.shards) > 2
    assert manifest.encoding == {"kind": "original", "crop_border": 0}
    assert manifest.classes == LABELS.names
    assert manifest.groups == ((0,), (1,))
    samples = read_with_webdataset(folder)
    assert [sample["__key__"].encode() for sample in samples] == index.key.tolist()
    assert [int(sample["cls"]) for sample in samples] == index.label.tolist()
    for row, sample in enumerate(samples):
        meta = json.loads(sample["json"])
        original = (Path(source) / "train" / meta["path"]).read_bytes()
        disguised = sample["__key__"] == "n02_3"
        assert sample["png" if disguised else "jpg"] == original
        assert meta["format"] == ("PNG" if disguised else "JPEG")
        assert meta["mode"] == "RGB"
        assert meta["size"] == list(load_image(original).size)
        assert meta["size"] == [index.width[row], index.height[row]]
        assert meta["path"].startswith(LABELS.ids[int(sample["cls"])])
    assert len({sample["__key__"] for sample in samples}) == 14


def test_pixels_read_back(source: str, tmp_path: Path) -> None:
    assert pack("imagenet-train", source, str(tmp_path), LABELS, PIXELS)
    folder = tmp_path / "imagenet-train"
    _, index = check_offsets(folder)
    assert len(set(index.length.tolist())) == 1
    for sample in read_with_webdataset(folder):
        path = Path(source) / "train" / json.loads(sample["json"])["path"]
        expected = clip_pixels(load_image(path.read_bytes()), 16)
        np.testing.assert_array_equal(np.load(io.BytesIO(sample["npy"])), expected)


def test_imagenet_a_round_trip_and_long_names(tmp_path: Path) -> None:
    """Dotted names, and names over the 100 bytes of a plain tar header."""
    stems = ["0.000116_digital clock _ digital clock_0.865662", "0.5_" + "long " * 30 + "_0.1"]
    for n, stem in enumerate([*stems, "x.y"]):
        write_image(tmp_path / "imagenet-a" / LABELS.ids[n % 2] / f"{stem}.jpg", n)
    assert pack("imagenet-a", str(tmp_path), str(tmp_path / "out"), LABELS, Options(workers=1))
    folder = tmp_path / "out" / "imagenet-a"
    check_offsets(folder)
    samples = {
        json.loads(sample["json"])["path"]: sample for sample in read_with_webdataset(folder)
    }
    assert sorted(samples) == sorted([f"n01/{stems[0]}.jpg", f"n02/{stems[1]}.jpg", "n01/x.y.jpg"])
    for path, sample in samples.items():
        assert sample["jpg"] == (tmp_path / "imagenet-a" / path).read_bytes()
        assert sample["__key__"] == Path(path).stem.replace(".", "_").replace(" ", "_")


def test_objectnet(tmp_path: Path) -> None:
    """Several classes a folder, folders outside ImageNet, and the red frame."""
    root = tmp_path / "objectnet-1.0"
    documents = {
        "folder_to_objectnet_label.json": {"clock": "Clock", "spoon": "Spoon"},
        "objectnet_to_imagenet_1k.json": {"Clock": "two; one"},
        "pytorch_to_imagenet_2012_id.json": {"0": 0, "1": 1},
    }
    (root / "mappings").mkdir(parents=True)
    for name, document in documents.items():
        (root / "mappings" / name).write_text(json.dumps(document))
    (root / "mappings" / "imagenet_to_label_2012_v2").write_text("one\ntwo\n")
    write_image(root / "images" / "clock" / "a.png", 1, "PNG")
    write_image(root / "images" / "spoon" / "b.png", 2, "PNG")
    for options in (PIXELS, ORIGINAL):
        out = tmp_path / options.encoding
        assert pack("objectnet", str(tmp_path), str(out), LABELS, options)
        manifest, index = check_offsets(out / "objectnet")
        assert manifest.groups == ((0, 1),)
        assert manifest.encoding["crop_border"] == 2
        assert index.key.tolist() == [b"a"]
        (sample,) = read_with_webdataset(out / "objectnet")
        data = (root / "images" / "clock" / "a.png").read_bytes()
        if options is PIXELS:
            expected = clip_pixels(load_image(data), 16, border=2)
            np.testing.assert_array_equal(np.load(io.BytesIO(sample["npy"])), expected)
        else:
            assert sample["png"] == data


def test_peers_find_their_side_files(source: str, tmp_path: Path) -> None:
    for dataset, split in [("imagenet-train", "train"), ("imagenet-val", "validation")]:
        pack(dataset, source, str(tmp_path), LABELS, PIXELS)
        folder = tmp_path / dataset
        manifest = Manifest.load(str(folder))
        info = _parse_split_info(split, _load_info(str(folder)))
        assert info.num_samples == manifest.samples
        assert list(info.filenames) == [path.name for path in sorted(folder.glob("*.tar"))]
        assert list(info.shard_lengths) == [shard.samples for shard in manifest.shards]
        sizes = json.loads((folder / "sizes.json").read_text())  # open_clip: base name -> samples
        assert sizes == {shard.name: shard.samples for shard in manifest.shards}
        assert int((folder / "nshards.txt").read_text()) == len(manifest.shards)
        assert (folder / "classnames.txt").read_text().splitlines() == ["one", "two"]
        templates = (folder / "zeroshot_classification_templates.txt").read_text()
        assert templates.splitlines() == ["a {c}.", "the {c}."]


# --- the same bytes, whoever does the work ------------------------------------------------------


@pytest.fixture(scope="module")
def reference(source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the snapshot of one undisturbed run."""
    out = tmp_path_factory.mktemp("reference")
    assert pack("imagenet-train", source, str(out), LABELS, PIXELS)
    return snapshot(out)


def with_options(**changes) -> Options:
    return Options(**{**vars(PIXELS), **changes})


def test_several_workers(source: str, tmp_path: Path, reference: dict[str, str]) -> None:
    assert pack("imagenet-train", source, str(tmp_path), LABELS, with_options(workers=2))
    assert snapshot(tmp_path) == reference


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_tasks(source: str, tmp_path: Path, reference: dict[str, str], order: tuple) -> None:
    complete = [
        pack("imagenet-train", source, str(tmp_path), LABELS, with_options(task=f"{n}/3"))
        for n in order
    ]
    assert complete == [False, False, True]  # the last one writes the manifest
    assert snapshot(tmp_path) == reference


def test_finalize_waits_for_all_shards(
    source: str, tmp_path: Path, reference: dict[str, str]
) -> None:
    def run(**changes) -> bool:
        return pack("imagenet-train", source, str(tmp_path), LABELS, with_options(**changes))

    run(task="0/2")
    with pytest.raises(ValueError, match=r"shards of .* are not packed yet \(first: 000001\)"):
        run(finalize=True)
    assert not (tmp_path / "imagenet-train" / "manifest.json").exists()
    run(task="1/2")
    (tmp_path / "imagenet-train" / "manifest.json").unlink()
    assert run(finalize=True)
    assert snapshot(tmp_path) == reference


def test_remote_store(source: str, reference: dict[str, str]) -> None:
    assert pack("imagenet-train", source, "memory://rft-pack", LABELS, PIXELS)
    fs = fsspec.filesystem("memory")
    found = {
        name.removeprefix("/rft-pack/"): hashlib.sha256(fs.cat_file(name)).hexdigest()
        for name in fs.find("/rft-pack")
    }
    fs.rm("/rft-pack", recursive=True)
    assert found == reference


# --- again, after a kill, over other data -------------------------------------------------------


def test_second_run_does_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def run() -> bool:
        return pack("imagenet-val", source, str(tmp_path), LABELS, PIXELS)

    run()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.delattr(packing, "write_shard")
    monkeypatch.delattr(packing, "finalize")
    capsys.readouterr()
    assert run()
    assert "already packed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


@pytest.mark.parametrize("damage", ["lost", "short"])
def test_lost_shards_are_written_again(
    source: str, tmp_path: Path, reference: dict[str, str], damage: str
) -> None:
    pack("imagenet-train", source, str(tmp_path), LABELS, PIXELS)
    shard = tmp_path / "imagenet-train" / "000001.tar"
    if damage == "lost":
        shard.unlink()
    else:
        os.truncate(shard, 1000)
    assert pack("imagenet-train", source, str(tmp_path), LABELS, PIXELS)
    assert snapshot(tmp_path) == reference


def test_commits_of_another_plan_do_not_count(
    source: str, tmp_path: Path, reference: dict[str, str]
) -> None:
    """A stray record, such as a copied folder's, must not make a shard look finished."""
    pack("imagenet-train", source, str(tmp_path), LABELS, with_options(task="0/2"))
    commit = tmp_path / "imagenet-train" / "commit" / "000000.json"
    commit.write_text(commit.read_text().replace('"plan_hash":"', '"plan_hash":"other-'))
    assert pack("imagenet-train", source, str(tmp_path), LABELS, PIXELS)
    assert snapshot(tmp_path) == reference


KILLED = """
import os, signal, sys
from rft import files
from rft.data import pack
from rft.data.labels import LabelSpace

where, source, out = sys.argv[1:]

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(owner, name, call):
    original, calls = getattr(owner, name), []
    def wrapper(*args, **kwargs):
        calls.append(name)
        return die() if len(calls) == call else original(*args, **kwargs)
    setattr(owner, name, wrapper)

match where:
    case "in a tar":
        die_at(pack, "write_sample", 6)
    case "before a commit":
        die_at(files, "write_bytes", 3)  # plan.json, the first commit, the second
    case "before the manifest":
        die_at(pack.Manifest, "save", 1)
labels = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("a {c}.", "the {c}."))
options = pack.Options(encoding="pixels", size=16, shard_mb=0.004, workers=1)
pack.pack("imagenet-train", source, out, labels, options)
"""


@pytest.mark.parametrize("where", ["in a tar", "before a commit", "before the manifest"])
def test_killed_run_continues(
    source: str, tmp_path: Path, reference: dict[str, str], where: str
) -> None:
    command = [sys.executable, "-c", KILLED, where, source, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = snapshot(tmp_path)
    assert "imagenet-train/commit/000000.json" in left
    assert "imagenet-train/manifest.json" not in left
    assert any(name.endswith(".tmp") for name in left) == (where == "in a tar")
    kept = {name: digest for name, digest in left.items() if not name.endswith(".tmp")}
    assert kept.items() <= reference.items()  # what is there is whole
    assert pack("imagenet-train", source, str(tmp_path), LABELS, PIXELS)
    assert snapshot(tmp_path) == reference


STUCK = """
import sys, time
from rft.data import pack
from rft.data.labels import LabelSpace

def stuck(futures):
    futures[0].result()
    print("ready", flush=True)
    time.sleep(60)

pack.as_completed = stuck
labels = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("a {c}.", "the {c}."))
options = pack.Options(encoding="pixels", size=16, shard_mb=0.004, workers=2)
pack.pack("imagenet-train", *sys.argv[1:], labels, options)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_workers_end_with_their_parent(source: str, tmp_path: Path) -> None:
    def session_members(session: int) -> list[str]:
        members = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, owner = stat.read_text().rsplit(") ", 1)[1].split()[:4]
            except OSError:  # it ended between listing and reading
                continue
            if int(owner) == session and state != "Z":
                members.append(stat.parent.name)
        return members

    command = [sys.executable, "-c", STUCK, source, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert len(session_members(process.pid)) >= 3
        process.kill()
    deadline = time.monotonic() + 20
    while session_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert session_members(process.pid) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"another plan \(seed: 0 -> 1\)"),
        ({"encoding": "original"}, "encoding.kind: 'pixels' -> 'original'"),
        ({"shard_mb": 1}, "shard_bytes: 4194 -> 1048576"),
    ],
)
def test_another_plan_is_refused(source: str, tmp_path: Path, changes: dict, message: str) -> None:
    pack("imagenet-val", source, str(tmp_path), LABELS, PIXELS)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message):
        pack("imagenet-val", source, str(tmp_path), LABELS, with_options(**changes))
    assert snapshot(tmp_path) == before


def test_foreign_folder_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "imagenet-val").mkdir()
    (tmp_path / "imagenet-val" / "000000.tar").write_bytes(b"somebody's")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"is not empty and was not packed by rft .*000000\.tar"):
        pack("imagenet-val", source, str(tmp_path), LABELS, PIXELS)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_image_stops_with_its_name(tmp_path: Path, workers: int) -> None:
    for n in range(8):
        write_image(tmp_path / "imagenet-r" / "n01" / f"{n}.jpg", n)
    out, bad = tmp_path / "out", tmp_path / "imagenet-r" / "n01" / "5.jpg"
    os.truncate(bad, bad.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"^{re.escape(str(bad))} cannot be decoded"):
        pack("imagenet-r", str(tmp_path), str(out), LABELS, with_options(workers=workers))
    left = snapshot(out / "imagenet-r")
    assert "manifest.json" not in left
    tars = {Path(name).stem for name in left if name.endswith(".tar")}
    assert tars == {Path(name).stem for name in left if name.startswith("commit/")}
    assert not any(name.endswith(".tmp") for name in left)


def test_source_that_changes_while_packing(tmp_path: Path) -> None:
    write_image(tmp_path / "imagenet-r" / "n01" / "a.jpg", 0)
    plan = make_plan(read_source("imagenet-r", tmp_path, LABELS), LABELS, ORIGINAL)
    write_image(tmp_path / "imagenet-r" / "n01" / "a.jpg", 1)
    (job,) = make_jobs(plan, str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"a\.jpg has .* when it was listed"):
        write_shard(job)
    assert not snapshot(tmp_path / "out")
