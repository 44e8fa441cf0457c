"""Packing: the output reads back, bytes are reproducible, a killed run continues."""

import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from timm.data.readers.reader_wds import _load_info, _parse_split_info

from benchmarks.waiting import until
from rft import progress
from rft.loading.dataset import PackedDataset
from rft.packing import pack as packing
from rft.packing.encode import to_jpeg
from rft.packing.layouts import read_source
from rft.packing.pack import Options, make_jobs, make_plan, pack, parse_task, shuffle
from rft.packing.shard import Commit, write_shard
from rft.packing.shard_writer import ShardWriter
from rft.packing.source import Item, Source
from rft.packing.verify import verify
from rft.shards.images import Kind, clip_pixels, clip_square, load_image
from rft.shards.index import Index
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import Manifest
from rft.shards.ranges import cut
from tests.tiny import unstamped

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
    """Return relative path -> sha256 of every file, including temporary ones."""
    return {
        str(path.relative_to(folder)): digest(path.name, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def digest(name: str, data: bytes) -> str:
    """Return the sha256 of a file; for a commit record, without the time it took."""
    if re.fullmatch(r"\d{6}\.json", name):
        data = re.sub(rb'"seconds":[\d.]+', b"", data)
    return hashlib.sha256(data).hexdigest()


def read_with_webdataset(folder: Path) -> list[dict]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def check_offsets(folder: Path) -> tuple[Manifest, Index]:
    """Compare every row of the index with the tars, as tarfile reads them."""
    manifest = Manifest.load(str(folder))
    index = Index.load(str(folder), manifest)
    row = 0
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getmembers()
        payloads = [
            member for member in members if not member.name.endswith((".cls", ".json", ".txt"))
        ]
        assert len(payloads) == shard.samples
        for member in payloads:
            offset, length = int(index.offset[row]), int(index.length[row])
            assert (offset, length) == (member.offset_data, member.size)
            assert zlib.crc32(data[offset : offset + length]) == index.crc32[row]
            assert member.name.split(".")[0] == index.key[row].decode()
            assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "root", 0o444)
            row += 1
        # plain headers for short names: PAX ones would cost 1 KiB per member
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


@pytest.mark.slow
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
    def plan(labels: LabelSpace = LABELS, **options) -> packing.PackPlan:
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
    """The shuffle is part of the format: packed sets are compared across machines and years."""
    items = [Item(key=f"k{n}", path="x", label=0, bytes=1) for n in range(8)]
    assert " ".join(item.key for item in shuffle(items, 0)) == "k0 k5 k1 k4 k3 k6 k7 k2"


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/b", "0/0", "1/2/3", "\u0661/\u0662"])
def test_task_errors(text: str) -> None:
    with pytest.raises(ValueError, match="--task must be I/N"):
        parse_task(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "--size"),
        ({"shard_mb": 0}, "--shard-mb"),
        ({"workers": 0}, "--workers"),
        ({"quality": 0}, "--quality"),
        ({"max_bad": -1}, "--max-bad"),
        ({"task": ""}, "--task must be I/N"),  # a variable that a script left unset
        ({"finalize": True, "task": "0/2"}, "--finalize"),
    ],
)
def test_option_errors(source: str, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack("imagenet-val", source, str(tmp_path), LABELS, Options(**options))
    assert not snapshot(tmp_path)


KEPT = "k" * 200  # a file's name has at most 255 letters, so long keys come from deep folders


def deep_items(folders: int) -> tuple[Item, ...]:
    path = f"n01/{f'{KEPT}/' * folders}1.JPEG"
    key = path.removesuffix(".JPEG").replace("/", "_")
    return (
        Item(key=key, path=path, label=0, bytes=9),
        Item(key="n02_1", path="n02/1.JPEG", label=1, bytes=9),
    )


def refused_before_packing(tmp_path: Path, folders: int, labels: LabelSpace = LABELS) -> str:
    """Pack images that do not exist: opening any of them gives a different error."""
    found = Source(
        dataset="own", root=tmp_path / "in", items=deep_items(folders), groups=labels.groups
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its text is returned
        packing.pack_source(found, str(tmp_path / "out"), labels, ORIGINAL)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_keys_that_no_reader_takes_are_refused_before_packing(tmp_path: Path) -> None:
    said = refused_before_packing(tmp_path, 6)
    assert said.startswith(f"{tmp_path}/in/n01/{KEPT}/")
    assert "1.JPEG would have a key of 1,211 letters, more than the limit of 1,024; shorten" in said


def test_an_index_that_no_reader_takes_is_refused_before_packing(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(packing, "INDEX_BYTES", 400)
    said = refused_before_packing(tmp_path, 1)
    assert said.startswith("the index of 2 images with keys of up to 206 letters would have more")


def test_a_manifest_that_no_reader_takes_is_refused_before_packing(tmp_path: Path) -> None:
    """Readers accept at most 1,000 prompts, but a label space has no limit."""
    many = tuple(f"{n} {{c}}" for n in range(1001))
    labels = LabelSpace(ids=LABELS.ids, names=LABELS.names, templates=many)
    said = refused_before_packing(tmp_path, 1, labels)
    assert said.startswith("own: a manifest cannot hold its label space (templates is ")
    assert said.endswith("; it must have at most 1000 elements); change --classes")


# --- reading back -------------------------------------------------------------------------------


def test_long_keys_read_back(tmp_path: Path) -> None:
    """Their members have PAX headers, which webdataset, tar and our own readers support."""
    for n in range(4):
        name = f"{n}{'x' * (149 if n % 2 else 94)}"
        write_image(tmp_path / "in" / "train" / LABELS.ids[n // 2] / f"{name}.JPEG", n)
    assert pack("imagenet-train", str(tmp_path / "in"), str(tmp_path), LABELS, ORIGINAL)
    folder = tmp_path / "imagenet-train"
    _, index = check_offsets(folder)
    assert sorted(map(len, index.key.tolist())) == [95, 95, 150, 150]
    data = PackedDataset(str(folder))
    samples = read_with_webdataset(folder)
    assert [sample["__key__"] for sample in samples] == [data.key(n) for n in range(4)]
    for row, sample in enumerate(samples):
        original = (tmp_path / "in" / "train" / json.loads(sample["json"])["path"]).read_bytes()
        assert data.payload(row) == sample["jpg"] == original
    assert verify(str(folder), deep=True, workers=1).problems == []
    shards = sorted(folder.glob("*.tar"))
    listings = [
        subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True).stdout
        for path in shards
    ]
    names = {line.split(".")[0] for listing in listings for line in listing.splitlines()}
    assert names == {key.decode() for key in index.key}


@pytest.mark.parametrize("letters", [5, 95, 96, 150])
def test_headers_of_long_names_alone_differ_from_ustar(letters: int) -> None:
    key, written, ustar = "k" * letters, io.BytesIO(), io.BytesIO()
    with ShardWriter(written) as shard:
        shard.add(key, {"json": b"{}"}, "jpg", b"image")
    with tarfile.open(fileobj=ustar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        # a key of the same length that USTAR still accepts
        for name, data in ((f"{key[:95]}.json", b"{}"), (f"{key[:95]}.jpg", b"image")):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o444
            member.uname = member.gname = "root"
            archive.addfile(member, io.BytesIO(data))
    assert (written.getvalue() == ustar.getvalue()) == (letters <= 95)
    first_type = written.getvalue()[156:157]
    assert first_type == (tarfile.REGTYPE if letters <= 95 else tarfile.XHDTYPE)


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


def test_t10_imagenet_a_names_round_trip(tmp_path: Path) -> None:
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


def test_jpeg_reads_back(source: str, tmp_path: Path) -> None:
    options = Options(encoding="jpeg", size=16, quality=80, shard_mb=0.001, workers=1)
    assert pack("imagenet-train", source, str(tmp_path), LABELS, options)
    folder = tmp_path / "imagenet-train"
    manifest, index = check_offsets(folder)
    assert len(manifest.shards) > 2
    assert (manifest.encoding["kind"], manifest.encoding["quality"]) == ("jpeg", 80)
    for row, sample in enumerate(read_with_webdataset(folder)):
        meta = json.loads(sample["json"])
        image = load_image((Path(source) / "train" / meta["path"]).read_bytes())
        assert sample["jpg"] == to_jpeg(clip_square(image, 16), 80)
        assert load_image(sample["jpg"]).size == (16, 16)
        assert meta["size"] == list(image.size) == [index.width[row], index.height[row]]


@given(
    st.lists(
        st.tuples(st.text("ab0_-", min_size=1, max_size=130), st.binary(max_size=1500)),
        min_size=1,
        unique_by=lambda sample: sample[0],
    )
)
@example([("a" * 96, b""), ("a" * 97, b"x"), ("b" * 300, b"y" * 20_000)])
def test_payloads_lie_where_the_writer_says(samples: list[tuple[str, bytes]]) -> None:
    stream = io.BytesIO()
    with ShardWriter(stream) as writer:
        members = {"cls": b"0", "txt": b"x"}
        offsets = [writer.add(key, members, "jpg", data) for key, data in samples]
    whole = stream.getvalue()
    assert (len(whole), hashlib.sha256(whole).hexdigest()) == (writer.size, writer.sha256)
    for offset, (_, data) in zip(offsets, samples, strict=True):
        assert whole[offset : offset + len(data)] == data
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        found = archive.getmembers()
    assert [member.offset_data for member in found[2::3]] == offsets
    assert {(member.mtime, member.mode, member.uname, member.gname) for member in found} == {
        (0, 0o444, "root", "root")
    }


def test_shards_are_those_of_webdataset(source: str, tmp_path: Path) -> None:
    """Byte for byte like its TarWriter with the same samples."""
    assert pack("imagenet-train", source, str(tmp_path), LABELS, ORIGINAL)
    for path in sorted((tmp_path / "imagenet-train").glob("*.tar")):
        stream = io.BytesIO()
        options = {"encoder": False, "mtime": 0, "user": "root", "group": "root", "mode": 0o444}
        with webdataset.TarWriter(stream, **options) as writer:
            for sample in webdataset.WebDataset(str(path), shardshuffle=False):
                entries = {name: data for name, data in sample.items() if name[0] != "_"}
                image = next(name for name in entries if name not in ("cls", "json", "txt"))
                payload = entries.pop(image)
                writer.write({"__key__": sample["__key__"], **entries})
                writer.write({"__key__": sample["__key__"], image: payload})
        assert path.read_bytes() == stream.getvalue()


def test_archives_give_the_same_shards(
    source: str, tmp_path: Path, reference: dict[str, str]
) -> None:
    """The official tar of tars, never extracted, compared with the class folders."""
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as archive:
        for wnid in LABELS.ids:
            inner = tmp_path / f"{wnid}.tar"
            with tarfile.open(inner, "w") as images:
                for path in sorted((Path(source) / "train" / wnid).iterdir(), reverse=True):
                    images.add(path, path.name)
            archive.add(inner, inner.name)
            inner.unlink()
    assert pack("imagenet-train", str(tmp_path), str(tmp_path / "out"), LABELS, PIXELS)
    assert snapshot(tmp_path / "out") == reference


def test_commit_records_tell_what_was_packed(source: str, tmp_path: Path) -> None:
    assert pack("imagenet-train", source, str(tmp_path), LABELS, ORIGINAL)
    folder = tmp_path / "imagenet-train"
    commits = [json.loads(path.read_text()) for path in sorted(folder.glob("commit/*.json"))]
    for commit, shard in zip(commits, Manifest.load(str(folder)).shards, strict=True):
        assert commit["shard"] == vars(shard)
        statistics = commit["statistics"]
        assert statistics["seconds"] >= 0
        assert statistics["classes"] == len(set(commit["columns"]["label"]))
        assert statistics["source_bytes"] == sum(commit["columns"]["length"])
        assert sum(statistics["modes"].values()) == shard.samples
    formats = sum((Counter(commit["statistics"]["formats"]) for commit in commits), Counter())
    assert formats == {"JPEG": 13, "PNG": 1}


def test_progress_in_plain_lines(source: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    assert pack("imagenet-train", source, str(tmp_path), LABELS, ORIGINAL)
    lines = unstamped(capsys.readouterr().out).splitlines()
    assert lines[0] == f"imagenet-train: 14 images in 2 folders of {source}/train"
    count = len(Manifest.load(str(tmp_path / "imagenet-train")).shards)
    number = r"[\d,]+(\.\d)?"
    pattern = (
        rf"imagenet-train: \d+ of 14 samples, {number} MiB, {number} samples/s, {number} MiB/s, "
        r"\d+:\d\d:\d\d left"
    )
    assert all(re.fullmatch(pattern, line) for line in lines[1:-1])
    assert len(lines) == count + 2
    assert lines[-2].endswith("0:00:00 left")


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


@pytest.mark.slow
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
    options = with_options(workers=1)  # no other process sees this store
    assert pack("imagenet-train", source, "memory://rft-pack", LABELS, options)
    fs = fsspec.filesystem("memory")
    found = {
        name.removeprefix("/rft-pack/"): digest(Path(name).name, fs.cat_file(name))
        for name in fs.find("/rft-pack")
    }
    fs.rm("/rft-pack", recursive=True)
    assert found == reference


@pytest.mark.parametrize("encoding", ["original", "jpeg"])
def test_remote_and_local_are_the_same(source: str, tmp_path: Path, encoding: Kind) -> None:
    options = with_options(encoding=encoding)
    assert pack("imagenet-val", source, "memory://rft-pack-2", LABELS, options)
    assert pack("imagenet-val", source, str(tmp_path), LABELS, options)
    fs = fsspec.filesystem("memory")
    found = {
        name.removeprefix("/rft-pack-2/"): digest(Path(name).name, fs.cat_file(name))
        for name in fs.find("/rft-pack-2")
    }
    fs.rm("/rft-pack-2", recursive=True)
    assert found == snapshot(tmp_path)


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
    """A stray record, such as one from a copied folder, must not make a shard look finished."""
    pack("imagenet-train", source, str(tmp_path), LABELS, with_options(task="0/2"))
    commit = tmp_path / "imagenet-train" / "commit" / "000000.json"
    document = json.loads(commit.read_text())
    commit.write_text(json.dumps({**document, "plan_hash": "0" * 64}))
    assert pack("imagenet-train", source, str(tmp_path), LABELS, PIXELS)
    assert snapshot(tmp_path) == reference


RECORDS: dict[str, tuple[Callable[[dict], object], str]] = {
    "a list": (lambda r: [], "it is .*; it must be an object"),
    "deep": (lambda r: functools.reduce(lambda inner, _: [inner], range(500), []), "valid JSON"),
    "no shard": (lambda r: {**r, "shard": None}, "shard is None; it must be an object"),
    "no columns": (lambda r: {**r, "columns": {}}, "columns.offset is missing"),
    "a column less": (
        lambda r: {**r, "columns": {**r["columns"], "label": r["columns"]["label"][1:]}},
        "columns have different lengths",
    ),
    "a row less": (
        lambda r: {**r, "columns": {name: column[1:] for name, column in r["columns"].items()}},
        r"columns have \d+ rows, the shard \d+ samples",
    ),
    "a label below zero": (
        lambda r: {**r, "columns": {**r["columns"], "label": [-1] * len(r["columns"]["label"])}},
        r"columns.label\[0\] is -1; it must be greater than or equal to 0",
    ),
    "a key of two lines": (
        lambda r: {**r, "columns": {**r["columns"], "key": ["a\nb"] * len(r["columns"]["key"])}},
        r"columns.key\[0\] is .*; it must match pattern",
    ),
    "the shard of another": (
        lambda r: {**r, "shard": {**r["shard"], "name": "../000001.tar"}},
        r"shard.name is \.\./000001.tar, not 000000.tar",
    ),
    "no hash": (lambda r: {**r, "plan_hash": "0"}, "plan_hash is '0'; it must be 64 hex digits"),
    "more": (lambda r: {**r, "more": 1}, "more is an unknown field"),
    "statistics": (lambda r: {**r, "statistics": {"turned": 1}}, "statistics.seconds is missing"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_record_is_named(half_packed: Path, tmp_path: Path, kind: str, source) -> None:
    change, message = RECORDS[kind]
    shutil.copytree(half_packed, tmp_path / "out")
    record = tmp_path / "out" / "imagenet-train" / "commit" / "000000.json"
    record.write_text(json.dumps(change(json.loads(record.read_text()))))
    before = snapshot(tmp_path / "out")
    with pytest.raises(ValueError, match=message) as raised:
        pack("imagenet-train", source, str(tmp_path / "out"), LABELS, with_options(task="0/2"))
    assert str(raised.value).startswith(str(record))
    assert str(raised.value).endswith("; delete it and rerun the same command")
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("text", ["[]", "{", "[" * 10_000, "3", ""])
def test_a_damaged_plan_is_named(half_packed: Path, tmp_path: Path, text: str, source) -> None:
    shutil.copytree(half_packed, tmp_path / "out")
    plan = tmp_path / "out" / "imagenet-train" / "plan.json"
    plan.write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(plan))}"):
        pack("imagenet-train", source, str(tmp_path / "out"), LABELS, with_options(task="0/2"))


@pytest.fixture(scope="module")
def half_packed(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half")
    assert not pack("imagenet-train", source, str(out), LABELS, with_options(task="0/2"))
    return out


KILLED = """
import os, signal, sys
from rft.shards.ranges import cut
from rft.storage import files
from rft.packing import pack, shard
from rft.shards.label_space import LabelSpace

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
        die_at(shard, "write_sample", 6)
    case "before a commit":
        die_at(files, "write_bytes", 3)  # plan.json, the first commit, the second
    case "before the manifest":
        die_at(pack.Manifest, "save", 1)
labels = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("a {c}.", "the {c}."))
options = pack.Options(encoding="pixels", size=16, shard_mb=0.004, workers=1)
pack.pack("imagenet-train", source, out, labels, options)
"""


@pytest.mark.slow
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
    assert kept.items() <= reference.items()  # existing files are complete
    assert pack("imagenet-train", source, str(tmp_path), LABELS, PIXELS)
    assert snapshot(tmp_path) == reference


LIGHT = """
import sys
from rft.packing import pack
from rft.shards.label_space import LabelSpace

labels = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("a {c}.", "the {c}."))
pack.pack("imagenet-train", *sys.argv[1:], labels, pack.Options(workers=1))
sys.exit("torch" in sys.modules)
"""


@pytest.mark.slow
def test_packing_needs_no_torch(source: str, tmp_path: Path) -> None:
    """Every process that packs would need seconds and hundreds of megabytes for it."""
    command = [sys.executable, "-c", LIGHT, source, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == 0


STUCK = """
import signal, sys
from rft import log
from rft.packing import pack, pool as workers
from rft.shards.label_space import LabelSpace

log.setup()

def stuck(futures):
    next(iter(futures)).result()
    print("ready", flush=True)
    signal.pause()

workers.as_completed = stuck
labels = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("a {c}.", "the {c}."))
options = pack.Options(encoding="pixels", size=16, shard_mb=0.004, workers=2)
pack.pack("imagenet-train", *sys.argv[1:], labels, options)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_workers_end_with_their_parent(source: str, tmp_path: Path) -> None:
    def session_members(session: int) -> list[str]:
        members = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, owner = stat.read_text().rsplit(") ", 1)[1].split()[:4]
            except OSError:  # ended between listing and reading
                continue
            if int(owner) == session and state != "Z":
                members.append(stat.parent.name)
        return members

    command = [sys.executable, "-c", STUCK, source, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert b"images in" in process.stdout.readline()
        assert process.stdout.readline() == b"ready\n"
        assert len(session_members(process.pid)) >= 3
        process.kill()
    until(lambda: not session_members(process.pid), "the workers' end")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"different plan \(seed: 0 -> 1\)"),
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


def test_finalize_of_nothing_writes_nothing(source: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is packed at .*imagenet-val yet"):
        pack("imagenet-val", source, str(tmp_path), LABELS, with_options(finalize=True))
    assert not list(tmp_path.iterdir())


def test_a_plan_that_came_to_nothing_gives_way(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture
) -> None:
    found = read_source("imagenet-val", Path(source), LABELS)
    first = make_plan(found, LABELS, with_options(seed=1))
    url = tmp_path / "imagenet-val"
    packing.claim(first, str(url))
    (url / "commit").mkdir()
    (url / "commit" / f".000000.json.{'0' * 32}.tmp").write_text("half")
    with pytest.raises(ValueError, match="holds a different plan"):
        pack("imagenet-val", source, str(tmp_path), LABELS, with_options(finalize=True))
    assert pack("imagenet-val", source, str(tmp_path), LABELS, PIXELS)
    assert (
        "held a different plan (seed: 1 -> 0) but no shard yet: replaced" in capsys.readouterr().out
    )
    before = snapshot(tmp_path)
    # and the first one, which may still be at its first shard, must not spoil it
    for job in make_jobs(first, str(url)):
        with pytest.raises(ValueError, match="was taken over by a run with a different plan"):
            write_shard(job)
    assert snapshot(tmp_path) == before


# --- images that cannot be decoded --------------------------------------------------------------

BAD = {
    "n01/4.jpg": "cannot be decoded: image file is truncated (N bytes not processed)",
    "n01/7.jpg": "is not a readable JPEG, PNG or WebP image",
    "n02/2.jpg": "is not a readable JPEG, PNG or WebP image",
}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Return a folder with ImageNet-R of 18 images, three of which are BAD."""
    root = tmp_path / "broken"
    for wnid in LABELS.ids:
        for n in range(9):
            write_image(root / "imagenet-r" / wnid / f"{n}.jpg", n)
    truncated = root / "imagenet-r" / "n01" / "4.jpg"
    os.truncate(truncated, truncated.stat().st_size - 40)
    (root / "imagenet-r" / "n01" / "7.jpg").write_bytes(b"<html>")
    (root / "imagenet-r" / "n02" / "2.jpg").write_bytes(b"")
    return root


def pack_broken(broken: Path, out: Path, **changes) -> bool:
    return pack("imagenet-r", str(broken), str(out), LABELS, with_options(**changes))


@pytest.mark.parametrize("encoding", ["original", "pixels"])
def test_bad_images_are_left_out_and_listed(broken: Path, tmp_path: Path, encoding: Kind) -> None:
    out = tmp_path / "out"
    assert pack_broken(broken, out, encoding=encoding, max_bad=3)
    manifest, _ = check_offsets(out / "imagenet-r")
    assert (manifest.samples, manifest.quarantined) == (15, 3)
    lines = (out / "imagenet-r" / "quarantine.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert {entry["path"] for entry in entries} == set(BAD)
    for entry in entries:
        assert re.sub(r"\d+", "N", entry["reason"]) == BAD[entry["path"]]
        commit = out / "imagenet-r" / "commit" / f"{Path(entry['shard']).stem}.json"
        recorded = {(e["path"], e["reason"]) for e in json.loads(commit.read_text())["quarantined"]}
        assert (entry["path"], entry["reason"]) in recorded
    packed = {
        json.loads(sample["json"])["path"] for sample in read_with_webdataset(out / "imagenet-r")
    }
    listed = {str(path.relative_to(broken / "imagenet-r")) for path in broken.rglob("*.jpg")}
    assert packed == listed - set(BAD)


@pytest.mark.slow
def test_bad_images_do_not_depend_on_who_packs(broken: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("one", "two", "tasks", "more")]
    assert pack_broken(broken, outs[0], max_bad=3)
    assert pack_broken(broken, outs[1], max_bad=3, workers=2)
    for n in (1, 2, 0):
        pack_broken(broken, outs[2], max_bad=3, task=f"{n}/3")
    assert pack_broken(broken, outs[3], max_bad=1000)
    reference = snapshot(outs[0])
    assert "imagenet-r/manifest.json" in reference
    assert all(snapshot(out) == reference for out in outs[1:])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_more_bad_images_than_allowed(broken: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    fault = r"3 images cannot be read, --max-bad allows 2 \(n0\d/.*or pass --max-bad 3 or more;"
    with pytest.raises(ValueError, match=fault):
        pack_broken(broken, out, max_bad=2, workers=workers)
    assert not (out / "imagenet-r" / "manifest.json").exists()
    # the count is over the complete set, in any task
    for task in ("0/2", "1/2"):
        with suppress(ValueError):
            pack_broken(broken, out, max_bad=2, task=task)
    with pytest.raises(ValueError, match=r"--max-bad allows 2|are not packed yet"):
        pack_broken(broken, out, max_bad=2, finalize=True)
    assert not (out / "imagenet-r" / "manifest.json").exists()
    # with a larger number the run continues
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert pack_broken(broken, out, max_bad=3)
    assert times.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}.items()
    fresh = tmp_path / "fresh"
    assert pack_broken(broken, fresh, max_bad=3)
    assert snapshot(out) == snapshot(fresh)


def test_finalize_counts_over_all_tasks(broken: Path, tmp_path: Path) -> None:
    """Each task is below the limit; their sum is not."""
    (broken / "imagenet-r" / "n01" / "7.jpg").unlink()
    plan = make_plan(read_source("imagenet-r", broken, LABELS), LABELS, PIXELS)
    packing.claim(plan, str(tmp_path / "imagenet-r"))
    jobs = make_jobs(plan, str(tmp_path / "imagenet-r"), max_bad=1)
    for job in jobs:
        write_shard(job)
    commits = [Commit.load(job) for job in jobs]
    with pytest.raises(ValueError, match=r"2 images cannot be read, --max-bad allows 1 \(n0"):
        packing.finalize(plan, str(tmp_path / "imagenet-r"), commits, max_bad=1)
    manifest = packing.finalize(plan, str(tmp_path / "imagenet-r"), commits, max_bad=2)
    assert manifest.quarantined == 2


def test_repaired_images_are_tried_again(broken: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "out", broken / "imagenet-r" / "n01" / "4.jpg"
    for name in ("n01/7.jpg", "n02/2.jpg"):
        (broken / "imagenet-r" / name).unlink()
    write_image(bad, 4)
    whole = bad.read_bytes()
    bad.write_bytes(whole[:30].ljust(len(whole), b"\0"))  # of the same length: the same plan
    with pytest.raises(ValueError, match=r"n01/4\.jpg .*--max-bad N leaves out up to N such"):
        pack_broken(broken, out)
    assert not pack_broken(broken, out, max_bad=1, task="0/2")
    pack_broken(broken, out, max_bad=1, task="1/2")
    with pytest.raises(ValueError, match=r"is packed without 1 image, --max-bad allows 0"):
        pack_broken(broken, out)
    (out / "imagenet-r" / "manifest.json").unlink()
    bad.write_bytes(whole)
    assert pack_broken(broken, out)
    assert Manifest.load(str(out / "imagenet-r")).quarantined == 0


def test_a_shard_of_bad_images_only(broken: Path, tmp_path: Path) -> None:
    """It stays, empty: the other shards' names do not depend on it."""
    assert pack_broken(broken, tmp_path / "out", max_bad=3, encoding="original", shard_mb=1e-6)
    packed = PackedDataset(str(tmp_path / "out" / "imagenet-r"))
    assert sorted(shard.samples for shard in packed.manifest.shards) == [0] * 3 + [1] * 15
    check_offsets(tmp_path / "out" / "imagenet-r")
    for sample in range(15):
        assert packed.image(sample, 16).shape == (3, 16, 16)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
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
