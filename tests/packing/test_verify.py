"""Verification: an intact set passes, and each kind of damage is named with its position."""

import importlib.util
import io
import json
import shutil
import sys
import tarfile
import uuid
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rft import cli
from rft.loading.dataset import PackedDataset
from rft.packing.commands.verify import say
from rft.packing.foreign.index import index_shards
from rft.packing.foreign.rule import Options as Reading
from rft.packing.pack import Options, pack
from rft.packing.verify import Problem, Report, verify
from rft.shards import tar
from rft.shards.index import Index
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import Manifest
from rft.storage import files

LABELS = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("a {c}.",))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 10 images in original, jpeg and pixels, each in several shards."""
    root = tmp_path_factory.mktemp("healthy")
    rng = np.random.default_rng(0)
    for n in range(10):
        wnid = LABELS.ids[n % 2]
        path = root / "source" / "val" / wnid / f"image_{n}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (*rng.integers(20, 40, 2), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    for kind in ("original", "jpeg", "pixels"):
        shard_mb = 0.001 if kind == "jpeg" else 0.003
        options = Options(encoding=kind, size=16, shard_mb=shard_mb, workers=1)
        pack("imagenet-val", str(root / "source"), str(root / kind), LABELS, options)
    return root


@pytest.fixture
def packed(healthy: Path, tmp_path: Path) -> Path:
    """A copy of the original set, to be damaged."""
    shutil.copytree(healthy / "original" / "imagenet-val", tmp_path / "set")
    return tmp_path / "set"


def check(folder: Path | str, *, deep: bool = True) -> Report:
    return verify(str(folder), deep=deep, workers=1)


def lines(folder: Path | str, *, deep: bool = True) -> list[str]:
    return [str(problem) for problem in check(folder, deep=deep).problems]


def change(path: Path, position: int, data: bytes | None = None) -> None:
    """Overwrite bytes, or flip one bit."""
    content = bytearray(path.read_bytes())
    data = bytes([content[position] ^ 1]) if data is None else data
    content[position : position + len(data)] = data
    path.write_bytes(content)


def rewrite(folder: Path, change: Callable[[Index], Index]) -> None:
    """Change the index and update the manifest."""
    manifest = Manifest.load(str(folder))
    content = change(Index.load(str(folder), manifest)).to_bytes()
    (folder / "index.npz").write_bytes(content)
    replace(manifest, index_sha256=files.sha256_bytes(content)).save(str(folder))


def rewrite_tar(
    folder: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]
) -> None:
    """Rewrite the first shard with other members, and update the manifest."""
    manifest = Manifest.load(str(folder))
    path = folder / manifest.shards[0].name
    with tarfile.open(path) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]
    with tarfile.open(path, "w") as archive:
        for name, data in change(members):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    shard = replace(manifest.shards[0], bytes=path.stat().st_size, sha256=files.sha256_file(path))
    replace(manifest, shards=(shard, *manifest.shards[1:])).save(str(folder))


def first_row(folder: Path, row: int = 0) -> tuple[Path, str, int, int]:
    """Return shard, key, offset and length of one row of the first shard."""
    manifest = Manifest.load(str(folder))
    index = Index.load(str(folder), manifest)
    assert row < manifest.shards[0].samples
    shard = folder / manifest.shards[0].name
    return shard, index.key[row].decode(), int(index.offset[row]), int(index.length[row])


# --- what is whole passes -----------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["original", "jpeg", "pixels"])
def test_a_whole_set_has_no_problems(healthy: Path, kind: str, deep: bool) -> None:
    report = check(healthy / kind / "imagenet-val", deep=deep)
    assert report.problems == []
    document = report.to_json()
    assert document["ok"]
    assert document["counts"]["per_class"] == [5, 5]
    assert document["counts"]["samples"] == 10
    assert document["counts"]["shards"] > 2
    manifest = Manifest.load(str(healthy / kind / "imagenet-val"))
    assert document["manifest_sha256"] == manifest.sha256
    assert document["counts"]["bytes"] == sum(shard.bytes for shard in manifest.shards)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["original", "jpeg", "pixels", "indexed", "no words", "one class"])
def test_a_set_from_before_manifests_had_ids(
    healthy: Path, tmp_path: Path, kind: str, deep: bool
) -> None:
    """Nor were there today's rules for names, some of which it may break."""
    folder = healthy / (kind if kind in ("jpeg", "pixels") else "original") / "imagenet-val"
    if kind == "indexed":
        local = tmp_path / "local.txt"
        local.write_text("one\ntwo\n")
        options = Reading(workers=1, local_classes=str(local), dataset="own")
        patterns = [str(folder / shard.name) for shard in Manifest.load(str(folder)).shards]
        index_shards(patterns, str(tmp_path / "set"), LABELS, options)
    else:
        shutil.copytree(folder, tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    document = json.loads(path.read_text())
    del document["class_ids"]
    if kind == "no words":
        document["classes"] = ["_", "two\x07"]
    path.write_text(json.dumps(document))
    if kind == "one class":
        rewrite(tmp_path / "set", lambda index: replace(index, label=np.zeros_like(index.label)))
        manifest = Manifest.load(str(tmp_path / "set"))
        replace(manifest, classes=("one",), groups=((0,),)).save(str(tmp_path / "set"))
    found = lines(tmp_path / "set", deep=deep)
    if kind == "one class" and deep:  # the labels in the shards are still those of two
        assert len(found) == 5
        assert all("label 1 is not one of the 1 classes" in line for line in found)
    else:
        assert found == []


def test_a_remote_set(healthy: Path) -> None:
    url = f"memory://verify-{uuid.uuid4().hex}"
    fs, path = fsspec.core.url_to_fs(url)
    try:
        fs.put(f"{healthy}/original/imagenet-val/", path, recursive=True)
        assert lines(url) == []
        shard = Manifest.load(url).shards[1].name
        fs.pipe_file(f"{path}/{shard}", fs.cat_file(f"{path}/{shard}")[:-1])
        assert any(line.startswith(f"{shard}: has ") for line in lines(url, deep=False))
        fs.rm_file(f"{path}/{shard}")
        assert lines(url) == [f"{shard}: no such shard: {url}/{shard}"]
    finally:
        fs.rm(path, recursive=True)


def test_an_index_of_shards_made_elsewhere(healthy: Path, packed: Path, tmp_path: Path) -> None:
    pattern = str(packed / "{000000..000009}.tar")
    count = len(Manifest.load(str(packed)).shards)
    pattern = pattern.replace("000009", f"{count - 1:06d}")
    # labels that count lines of a file, and are not the index's own
    local = tmp_path / "local.txt"
    local.write_text("two\none\n")
    options = Reading(workers=1, local_classes=str(local), dataset="own")
    index_shards([pattern], str(tmp_path / "local"), LABELS, options)
    assert lines(tmp_path / "local") == []
    (tmp_path / "local" / "plan.json").unlink()  # it records which numbers mean which class
    assert any(
        "its .cls has '0', the index has class 1" in line for line in lines(tmp_path / "local")
    )
    index_shards([pattern], str(tmp_path / "plain"), LABELS, Reading(workers=1, dataset="own"))
    assert lines(tmp_path / "plain") == []
    # a label from a json field, as a number and as text
    members = []
    for n, label in enumerate((1, "n01", "two")):
        image = next((healthy / "source" / "val" / "n01").iterdir()).read_bytes()
        members += [(f"{n}.jpg", image), (f"{n}.json", json.dumps({"class": label}).encode())]
        members += [(f"{n}.seg.png", b"not looked at")]
    url = tmp_path / "fields.tar"
    with tarfile.open(url, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    options = Reading(workers=1, label_field="class", ignore=("seg.png",), dataset="own")
    index_shards([str(url)], str(tmp_path / "fields"), LABELS, options)
    assert lines(tmp_path / "fields") == []


# --- damage -------------------------------------------------------------------------------------


def test_a_flipped_header_byte(packed: Path) -> None:
    shard, key, offset, _ = first_row(packed, 1)
    change(shard, offset - tar.BLOCK + 20)
    assert lines(packed, deep=False) == []  # the quick check does not read it
    found = lines(packed)
    assert any(line.startswith(f"{shard.name}: sha256 is") for line in found)
    assert any(f"{shard.name}, offset" in line and "damaged header" in line for line in found)
    # later bytes are still compared with the index: they are intact
    assert not any(key in line for line in found)


def test_a_flipped_payload_byte(packed: Path) -> None:
    shard, key, offset, length = first_row(packed, 1)
    change(shard, offset + length // 2)
    found = lines(packed)
    place = f"{shard.name}, key {key!r}, offset {offset:,}"
    assert f"{place}: damaged bytes: their crc32 differs from the index" in found
    assert len(found) == 2  # that, and the sha256


def test_a_flipped_label_byte(packed: Path) -> None:
    shard, key, *_ = first_row(packed)
    with shard.open("rb") as stream:
        offset = next(m.offset for m in tar.walk(stream, "x") if m.name == f"{key}.cls")
    change(shard, offset)
    assert any(f"key {key!r}" in line and "its .cls has" in line for line in lines(packed))


def test_a_flipped_index_byte(packed: Path) -> None:
    path = packed / "index.npz"
    change(path, path.stat().st_size // 2)
    for deep in (False, True):
        (line,) = lines(packed, deep=deep)
        assert line.startswith("index.npz cannot be used")
        assert "sha256" in line


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**9))
def test_every_flipped_byte_of_a_shard_is_found(packed: Path, position: int) -> None:
    shard = packed / Manifest.load(str(packed)).shards[0].name
    change(shard, position % shard.stat().st_size)
    try:
        assert any(problem.shard == shard.name for problem in check(packed).problems)
    finally:
        change(shard, position % shard.stat().st_size)


@pytest.mark.parametrize("where", ["anywhere", "member boundary", "empty"])
def test_a_truncated_shard(packed: Path, where: str) -> None:
    shard, key, offset, _ = first_row(packed, 1)
    size = {"anywhere": offset + 100, "member boundary": offset - tar.BLOCK, "empty": 0}[where]
    with shard.open("r+b") as stream:
        stream.truncate(size)
    (line,) = lines(packed, deep=False)
    assert line.startswith(f"{shard.name}: has {size:,} bytes, the manifest says")
    found = lines(packed)
    assert any(f"{shard.name}, key {key!r}, offset {offset:,}: truncated" in line for line in found)
    assert any(line.startswith(f"{shard.name}, offset") for line in found)  # what the tar walk says


def test_the_quick_check_sees_a_shard_that_has_grown(packed: Path) -> None:
    shard = first_row(packed, 1)[0]
    before = shard.stat().st_size
    with shard.open("ab") as stream:
        stream.write(b"\0")
    expected = f"{shard.name}: has {before + 1:,} bytes, the manifest says {before:,}"
    assert lines(packed, deep=False) == [expected]


def test_a_missing_shard(packed: Path) -> None:
    shard = first_row(packed)[0]
    shard.unlink()
    for deep in (False, True):
        assert lines(packed, deep=deep) == [f"{shard.name}: no such shard: {shard}"]


def test_swapped_shards(packed: Path) -> None:
    names = [shard.name for shard in Manifest.load(str(packed)).shards[:2]]
    paths = [packed / name for name in names]
    paths[0].rename(packed / "x")
    paths[1].rename(paths[0])
    (packed / "x").rename(paths[1])
    found = lines(packed)
    assert f"{names[0]}: holds the bytes of {names[1]}" in found
    assert f"{names[1]}: holds the bytes of {names[0]}" in found


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: {"groups": m.groups[::-1]},
        lambda m: {"groups": ((*m.groups[0], *m.groups[1]), *m.groups[2:])},
        lambda m: {"classes": m.classes[::-1]},
        lambda m: {"class_ids": m.class_ids[::-1]},
        lambda m: {"templates": ("a {c}?",)},
    ],
)
def test_an_edited_label_space_or_scoring_rule(packed: Path, edit) -> None:
    """Plausible values that differ from those with which the set was packed."""
    manifest = Manifest.load(str(packed))
    replace(manifest, **edit(manifest)).save(str(packed))
    assert "classes, prompts or groups differ from plan.json" in lines(packed, deep=False)[0]


PHOTOS = {"orientation": "exif", "alpha": "white"}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"photos": PHOTOS}, {"photos": None}, "photos is 'absent', not {'orientation'"),
        ({}, {"photos": PHOTOS}, "(photos is {'orientation': 'exif', 'alpha': 'white'}, not"),
        ({}, {"crop_border": 2}, "encoding differs from plan.json (crop_border is 2, not 0)"),
        ({}, {"dataset": "imagenet-r"}, "its dataset is 'imagenet-r', but 'imag"),
    ],
)
def test_an_edited_encoding(
    packed: Path, before: dict[str, Any], after: dict[str, Any], message: str, deep: bool
) -> None:
    """The payloads are intact, but a reader would show other pixels."""
    plan = json.loads((packed / "plan.json").read_text())
    plan["encoding"] |= before
    (packed / "plan.json").write_text(json.dumps(plan))
    manifest = Manifest.load(str(packed))
    edited = replace(manifest, encoding=plan["encoding"], plan_hash=files.sha256_json(plan))
    edited.save(str(packed))
    assert lines(packed, deep=deep) == []
    encoding = {key: value for key, value in {**plan["encoding"], **after}.items() if value}
    encoding = {"crop_border": 0, **encoding}
    dataset = encoding.pop("dataset", manifest.dataset)
    replace(edited, encoding=encoding, dataset=dataset).save(str(packed))
    (line,) = lines(packed, deep=deep)
    assert message in line
    assert line.endswith(": the manifest was edited")


def test_a_wrong_label(packed: Path) -> None:
    _, key, offset, _ = first_row(packed)

    def flip(index: Index) -> Index:
        label = index.label.copy()
        label[0] = 1 - label[0]
        return replace(index, label=label)

    rewrite(packed, flip)
    assert lines(packed, deep=False) == []
    (line,) = lines(packed)
    assert f"key {key!r}, offset {offset:,}: its .cls has" in line


COLUMNS: dict[str, tuple[str, int, str]] = {
    "label beyond the classes": ("label", 7, "its label is not one of the 2 classes"),
    "label below zero": ("label", -1, "its label is not one of the 2 classes"),
    "offset beyond the shard": ("offset", 2**40, "reaches beyond the shard"),
    "offset that would wrap": ("offset", 2**64 - 512, "reaches beyond the shard"),
    "offset between blocks": ("offset", 1537, "a payload of a tar cannot start here"),
    "no width": ("width", 0, "width or height is 0"),
    "no height": ("height", 0, "width or height is 0"),
    "length over the next": ("length", 5000, "overlaps the sample before it"),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_an_index_that_cannot_be_right(packed: Path, kind: str) -> None:
    column, value, message = COLUMNS[kind]

    def spoil(index: Index) -> Index:
        values = getattr(index, column).copy()
        values[0] = value
        return replace(index, **{column: values})

    rewrite(packed, spoil)
    found = lines(packed, deep=False)
    assert any(message in line for line in found)
    assert lines(packed)  # and the deep check survives it


def test_a_shard_under_two_names(packed: Path) -> None:
    """Each of its samples would count twice."""
    document = json.loads((packed / "manifest.json").read_text())
    name = document["shards"][0]["name"]
    document["shards"].insert(1, {**document["shards"][0], "name": str(packed / name)})
    (packed / "manifest.json").write_text(json.dumps(document))
    says = f"'{name}' and '{packed / name}' hold the same bytes, so samples would count twice"
    assert says in lines(packed, deep=False)[0]
    with pytest.raises(ValueError, match=r"manifest\.json: shards: .* would count twice"):
        PackedDataset(str(packed))


def test_other_wrong_rows(packed: Path) -> None:
    def other_key(index: Index) -> Index:
        return replace(index, key=np.where(np.arange(10) == 0, b"other", index.key))

    key = first_row(packed)[1]
    rewrite(packed, other_key)
    found = lines(packed)
    assert any("key 'other'" in line and "no member of this key" in line for line in found)
    assert any(f"key {key!r}" in line and "the index does not list" in line for line in found)
    rewrite(packed, lambda index: replace(index, key=np.full(10, b"same")))
    assert any("its key occurs more than once" in line for line in lines(packed, deep=False))
    rewrite(packed, lambda index: replace(index, width=index.width[:-1]))
    (line,) = lines(packed, deep=False)
    assert "column width has 9 samples, the manifest 10" in line


def test_a_wrong_size(packed: Path) -> None:
    rewrite(packed, lambda index: replace(index, width=index.width + 1))
    found = lines(packed)
    assert len(found) == 10
    assert all("the image has" in line for line in found)


Members = list[tuple[str, bytes]]
MEMBERS: dict[str, tuple[Callable[[Members], Members], str]] = {
    "one more sample": (
        lambda m: [*m, ("new.jpg", b"x"), ("new.cls", b"0")],
        "does not list new",
    ),
    "one more member": (
        lambda m: [*m, (m[-1][0].replace(".jpg", ".pyd"), b"x")],
        "the index does not list",
    ),
    "one more image": (lambda m: [*m, (m[-1][0].replace(".jpg", ".png"), b"x")], " is at byte "),
    "the same member": (lambda m: [*m, m[-1]], "a second member is named"),
    "no label": (lambda m: [x for x in m if x != m[0]], "it has no .cls with a label"),
    "no number": (
        lambda m: [(m[0][0], b"zebra"), *m[1:]],
        "its .cls: label 'zebra' is not a class",
    ),
    "no text": (lambda m: [(m[0][0], b"\xff"), *m[1:]], "its .cls is not readable"),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_members_that_do_not_fit(packed: Path, kind: str) -> None:
    edit, message = MEMBERS[kind]
    rewrite_tar(packed, edit)
    assert any(message in line for line in lines(packed))


def test_an_image_that_was_packed_damaged(packed: Path) -> None:
    """Index and bytes agree, but it is not an image."""
    shard, key, offset, length = first_row(packed)
    change(shard, offset, b"\0" * length)
    manifest = Manifest.load(str(packed))
    first = replace(manifest.shards[0], sha256=files.sha256_file(shard))
    replace(manifest, shards=(first, *manifest.shards[1:])).save(str(packed))

    def accept(index: Index) -> Index:
        crc32 = index.crc32.copy()
        crc32[0] = zlib.crc32(b"\0" * length)
        return replace(index, crc32=crc32)

    rewrite(packed, accept)
    (line,) = lines(packed)
    assert f"key {key!r}" in line
    assert "the payload is not a readable JPEG" in line


def test_pixels_of_another_size(healthy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(healthy / "pixels" / "imagenet-val", folder)
    manifest = Manifest.load(str(folder))
    replace(manifest, encoding={**manifest.encoding, "size": 17}).save(str(folder))
    first, *found = lines(folder)
    assert "(size is 17, not 16)" in first
    assert len(found) == 10
    assert "the payload is not an array of pixels of the set's size" in found[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "manifest.json is missing"),
        ("{", "not valid JSON"),
        ('{"schema": 99}', "schema is 99; it must be 1"),
        ('{"schema": 1}', "manifest.json cannot be used"),
    ],
)
def test_a_bad_manifest(packed: Path, text: str | None, message: str) -> None:
    if text is None:
        (packed / "manifest.json").unlink()
    else:
        (packed / "manifest.json").write_text(text)
    (line,) = lines(packed)
    assert message in line


def test_labels_that_never_score(packed: Path) -> None:
    replace(Manifest.load(str(packed)), groups=((0,),)).save(str(packed))
    assert sum("its label is in no group" in line for line in lines(packed, deep=False)) == 5


def test_another_plan(packed: Path) -> None:
    (packed / "plan.json").write_text('{"seed": 3}')
    assert lines(packed, deep=False) == ["plan.json does not have the hash in the manifest"]


def test_images_that_were_left_out_are_listed(packed: Path) -> None:
    replace(Manifest.load(str(packed)), quarantined=2).save(str(packed))
    assert lines(packed) == ["quarantine.jsonl lists 0 images, the manifest says 2"]
    (packed / "quarantine.jsonl").write_text('{"path": "a"}\n{"path": "b"}\n')
    assert lines(packed) == []


def test_a_list_that_cannot_be_read_hides_no_other_problem(packed: Path) -> None:
    replace(Manifest.load(str(packed)), quarantined=2).save(str(packed))
    (packed / "quarantine.jsonl").mkdir()
    (packed / "000001.tar").unlink()
    first, second = lines(packed, deep=False)
    assert first == f"cannot read {packed}/quarantine.jsonl: it is a folder"
    assert second.startswith("000001.tar: no such shard")


def test_how_a_problem_reads() -> None:
    problem = Problem(shard="0.tar", key="n01_1", offset=1536, what="cut off")
    assert str(problem) == "0.tar, key 'n01_1', offset 1,536: cut off"
    assert str(Problem(what="groups share a class")) == "groups share a class"


# --- the command --------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    path = Path(__file__).parents[2] / "tools" / "verify_shards.py"
    spec = importlib.util.spec_from_file_location("verify_shards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "verify_shards", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["verify_shards", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(module.main)
    return int(stop.value.code or 0)


def test_command(packed: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    report = tmp_path / "report.json"
    arguments = [str(packed), "--deep", "--report", str(report), "--workers", "1"]
    assert run(monkeypatch, *arguments) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "imagenet-val: 10 samples in " in said.out
    assert "2 classes of 5 samples" in said.out
    assert "the set matches its manifest (every byte was read)" in said.out
    assert json.loads(report.read_text())["ok"] is True
    shard, key, offset, _ = first_row(packed)
    change(shard, offset)
    assert run(monkeypatch, *arguments) == 1
    said = capsys.readouterr().out
    assert f"{shard.name}, key {key!r}, offset {offset:,}: damaged bytes" in said
    assert said.splitlines()[-1] == "2 problems (every byte was read)"
    document = json.loads(report.read_text())
    assert document["ok"] is False
    assert {"shard": shard.name, "key": key, "offset": offset} == {
        name: document["problems"][1][name] for name in ("shard", "key", "offset")
    }
    assert run(monkeypatch, str(packed)) == 0
    assert "quick check" in capsys.readouterr().out
    assert run(monkeypatch, str(packed), "--workers", "0") == 2


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(packed: Path) -> None:
    shard, _, offset, _ = first_row(packed)
    change(shard, offset)
    (packed / Manifest.load(str(packed)).shards[1].name).unlink()
    assert verify(str(packed), deep=True, workers=2) == check(packed)


def test_a_data_root_is_answered_with_its_sets(packed, monkeypatch, capsys) -> None:
    root = packed.parent
    assert run(monkeypatch, str(root)) == 2
    said = capsys.readouterr()
    one = root / packed.name
    line = f"error: {root} is a data root, with {packed.name}; name one set, as in {one}\n"
    assert (said.out, said.err) == ("", line)


def test_one_problem_is_no_problems(packed, monkeypatch, capsys) -> None:
    (packed / "samples.npz").unlink()
    assert run(monkeypatch, str(packed)) == 1
    assert "\n1 problem (quick check" in capsys.readouterr().out


def test_a_set_that_does_not_exist_is_named_by_path(packed, monkeypatch, capsys) -> None:
    """Without options of other commands, and without a count of what was not read."""
    absent = packed.parent / "nosuch"
    assert run(monkeypatch, str(absent), "--deep") == 1
    assert capsys.readouterr().out == (
        f"manifest.json cannot be used: no packed dataset at {absent}: manifest.json is missing; "
        f"the packed sets there are {packed}; name one of them\n"
    )
    similar = packed.with_name(f"{packed.name}s")
    assert run(monkeypatch, str(similar)) == 1
    assert f"; did you mean {packed}?" in capsys.readouterr().out


def test_a_moved_folder_is_no_page_of_lines(capsys) -> None:
    absent = [Problem(what=f"no such shard: /x/{n}.tar", shard=f"{n}.tar") for n in range(9)]
    other = Problem(what="damaged", shard="a.tar")
    report = Report(url="x", deep=False, dataset="x", shards=10, samples=10, per_class=[1, 1])
    report.problems = [*absent, other]
    say(report)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "x: 10 samples in 10 shards, 0.1 MiB, 2 classes of 1 sample"
    assert said[1:5] == [*map(str, absent[:3]), str(other)]
    assert said[5] == "... and 6 more; --report FILE has them all"
    assert said[6].startswith("absent: 9 of 10 shards; if they were moved, pack or index")
    assert said[7].startswith("10 problems")
