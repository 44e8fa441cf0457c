"""Sets with domains, in folders or named by a table: packed correctly, or refused."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.tiny_world import LABELS
from rft.packing.domains import (
    is_corrupted,
    missing_corruptions,
    only_present,
    read_domains,
    require_known,
)
from rft.packing.pack import Options, pack_source
from rft.packing.source import Source
from rft.packing.table import Table, read_table
from rft.packing.verify import verify
from rft.sets import CORRUPTIONS
from rft.shards.index import Index
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import Manifest
from rft.shards.samples import Samples, source_hash
from rft.storage import files

OPTIONS = Options(shard_mb=0.004, workers=1)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory) -> Path:
    """Some of ImageNet-C in its layout: in each domain the same file names, as there."""
    root = tmp_path_factory.mktemp("imagenet-c")
    domains = ("fog/1", "fog/3", "snow/5")
    for number, domain in enumerate(domains):
        for place, wnid in enumerate(LABELS.ids):
            for n in range(2):
                name = f"ILSVRC2012_val_{place:04d}{n:04d}.JPEG"
                write_image(root / domain / wnid / name, 100 * number + 10 * place + n)
    return root


def packed(out: Path, source: Source, options: Options = OPTIONS) -> tuple[Manifest, list]:
    """Pack a source; return the manifest and, of each sample, label, domain and source hash."""
    assert pack_source(source, str(out), LABELS, options)
    url = str(out / source.dataset)
    manifest = Manifest.load(url)
    samples = Samples.load(url, manifest)
    names = [manifest.domains[number] for number in samples.domain]
    label = Index.load(url, manifest).label
    assert verify(url, deep=True, workers=1).problems == []
    return manifest, sorted(zip(names, label.tolist(), samples.source.tolist(), strict=True))


def test_imagenet_c_is_packed_with_its_domains(corrupted, tmp_path):
    found = read_domains("imagenet-c", corrupted, 2, LABELS)
    assert found.labels == LABELS
    source = replace(found.source, score="mean-over-domains")
    manifest, rows = packed(tmp_path, source)
    assert (manifest.score, manifest.ood, manifest.is_ood) == ("mean-over-domains", False, False)
    assert manifest.domains == ("fog/1", "fog/3", "snow/5")
    assert manifest.encoding == {"kind": "original", "crop_border": 0}
    expected = [
        (domain, label, source_hash(path.read_bytes()))
        for domain in manifest.domains
        for label, wnid in enumerate(LABELS.ids)
        for path in (corrupted / domain / wnid).iterdir()
    ]
    assert rows == sorted(expected)
    whole, *parts = found.notes
    assert whole.startswith("missing corruptions of ImageNet-C: gaussian_noise, ")
    assert "fog" not in whole.split(": ")[1].split(", ")
    assert parts == ["missing severities: " + ", ".join(parts[0].split(": ")[1].split(", "))]
    assert set(parts[0].split(": ")[1].split(", ")) == {
        *("fog/2", "fog/4", "fog/5"),
        *("snow/1", "snow/2", "snow/3", "snow/4"),
    }


@pytest.mark.slow
def test_bytes_are_the_same_for_any_number_of_workers(corrupted, tmp_path):
    source = read_domains("imagenet-c", corrupted, 2, LABELS).source
    for workers in (1, 2):
        options = replace(OPTIONS, encoding="pixels", size=16, workers=workers)
        assert pack_source(source, str(tmp_path / str(workers)), LABELS, options)
    for name in ("samples.npz", "index.npz", "manifest.json"):
        one, two = ((tmp_path / str(n) / "imagenet-c" / name).read_bytes() for n in (1, 2))
        assert one == two
    # the hashes are of the images, in every encoding
    packed(tmp_path / "original", source)
    pixels, originals = (
        Samples.load(url, Manifest.load(url))
        for url in (f"{tmp_path}/1/imagenet-c", f"{tmp_path}/original/imagenet-c")
    )
    assert sorted(pixels.source.tolist()) == sorted(originals.source.tolist())


def test_another_declaration_is_another_plan(corrupted, tmp_path):
    source = read_domains("own", corrupted, 2, LABELS).source
    packed(tmp_path, source)
    assert pack_source(source, str(tmp_path), LABELS, OPTIONS)
    for changed, field in (
        (replace(source, ood=True), "ood"),
        (replace(source, score="worst-domain"), "score"),
        (
            replace(source, items=tuple(replace(one, domain="x") for one in source.items)),
            "items",
        ),
    ):
        with pytest.raises(ValueError, match=f"holds a different plan .*{field}"):
            pack_source(changed, str(tmp_path), LABELS, OPTIONS)


def test_a_declaration_that_was_edited_is_found(corrupted, tmp_path):
    source = read_domains("own", corrupted, 2, LABELS).source
    manifest, _ = packed(tmp_path, source)
    replace(manifest, score="worst-domain").save(str(tmp_path / "own"))
    (problem,) = verify(str(tmp_path / "own"), deep=False, workers=1).problems
    assert "score" in problem.what
    assert "plan.json" in problem.what


def test_one_level_and_none(corrupted, tmp_path):
    shallow = read_domains("own", corrupted / "fog", 1, None)
    assert shallow.source.domains == ("1", "3")
    assert shallow.notes == []
    plain = read_domains("own", corrupted / "fog" / "1", 0, None)
    assert plain.source.domains == ()
    # named as their folders, because not all of them are ImageNet's
    assert plain.labels.ids == LABELS.ids
    with pytest.raises(ValueError, match="is not in a class folder"):
        read_domains("own", corrupted, 4, None)


def test_imagenets_classes_are_recognised(tmp_path):
    wnids = LabelSpace.imagenet().ids[3:5]
    for number, wnid in enumerate(wnids):
        write_image(tmp_path / "fog/1" / wnid / "a.jpg", number)
    with pytest.raises(ValueError, match="fog/1 has 2 images, 50,000 were published"):
        read_domains("imagenet-c", tmp_path, 2, None)
    with pytest.raises(ValueError, match="--allow-count says 3; it must be the exact"):
        read_domains("imagenet-c", tmp_path, 2, None, 3)
    found = read_domains("imagenet-c", tmp_path, 2, None, 2)
    assert found.labels == LabelSpace.imagenet()
    assert len(found.source.groups) == 1000
    assert only_present(found.source).groups == ((3,), (4,))


def test_a_class_that_is_unknown_is_refused(corrupted):
    labels = LabelSpace(ids=LABELS.ids[:3], names=LABELS.names[:3], templates=LABELS.templates)
    with pytest.raises(ValueError, match=f"unknown class: {LABELS.ids[3]!r}"):
        read_domains("own", corrupted, 2, labels)


def test_a_folder_with_the_name_of_a_class_is_answered_with_its_id(corrupted):
    labels = LabelSpace(
        ids=("sea_lion", "n02"), names=("eared seal", "toad"), templates=LABELS.templates
    )
    for folder in ("Sea Lion", "eared seal", "Eared_Seal", "sea_lions"):
        with pytest.raises(ValueError, match=r"; did you mean 'sea_lion'\? Folders must have the"):
            require_known(corrupted, [folder], labels)
    with pytest.raises(ValueError, match="; remove it or add it to --classes"):
        require_known(corrupted, ["zzz"], labels)


def test_an_empty_class_of_a_domain_is_refused(corrupted, tmp_path):
    shutil.copytree(corrupted, tmp_path / "c")
    shutil.rmtree(tmp_path / "c/fog/3" / LABELS.ids[1])
    (tmp_path / "c/fog/3" / LABELS.ids[1]).mkdir()
    with pytest.raises(ValueError, match=f"class folder .*fog/3/{LABELS.ids[1]} is empty"):
        read_domains("imagenet-c", tmp_path / "c", 2, LABELS)


def test_which_domains_are_imagenet_cs():
    assert is_corrupted(("fog/1", "saturate/5"))
    assert not is_corrupted(("fog/1", "mist/1"))
    assert not is_corrupted(("fog/6",))
    assert not is_corrupted(())
    every = [f"{name}/{severity}" for name in CORRUPTIONS for severity in range(1, 6)]
    assert missing_corruptions(every) == []
    assert len(every) == 95


# --- tables --------------------------------------------------------------------------------------

HEADER = ["split", "filename", "y", "location_remapped"]
ROWS = [
    ["train", "a.jpg", "10", "5"],
    ["test", "b.jpg", "2", "7"],
    ["test", "c.jpg", "10", "8"],
    ["val", "a.jpg", "2", "5"],
    ["test", "deep/d.jpg", "2", "7"],
]
TABLE = {"file": "images/{filename}", "domain": "{location_remapped}", "split": "test"}


@pytest.fixture
def wilds(tmp_path) -> Path:
    """A set like iWildCam: files, and a table of them."""
    for number, name in enumerate(("a.jpg", "b.jpg", "c.jpg", "deep/d.jpg")):
        write_image(tmp_path / "images" / name, number)
    write_table(tmp_path, HEADER, ROWS)
    return tmp_path


def write_table(folder: Path, header: list[str], rows: list[list[str]]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def read(folder: Path, labels: LabelSpace | None = None, **changes: str):
    table = Table(metadata=str(folder / "metadata.csv"), **{**TABLE, **changes})
    return read_table("own", folder, table, labels)


def of(found) -> list[tuple]:
    return sorted((item.path, item.label, item.domain) for item in found.source.items)


def test_the_rows_of_a_split_are_packed(wilds, tmp_path):
    found = read(wilds)
    # numbers in their order, of all splits
    assert found.labels.ids == ("2", "10")
    assert of(found) == [
        ("images/b.jpg", 0, "7"),
        ("images/c.jpg", 1, "8"),
        ("images/deep/d.jpg", 0, "7"),
    ]
    assert "3 of the 5 rows" in found.source.layout
    source = replace(found.source, score="worst-domain")
    assert pack_source(source, str(tmp_path / "out"), found.labels, OPTIONS)
    url = str(tmp_path / "out/own")
    assert Manifest.load(url).domains == ("7", "8")
    assert verify(url, deep=True, workers=1).problems == []


def test_the_label_space_may_be_given(wilds):
    labels = LabelSpace(ids=("10", "0", "2"), names=("ten", "none", "two"), templates=("a {c}.",))
    assert [label for _, label, _ in of(read(wilds, labels))] == [2, 0, 2]
    labels = LabelSpace(ids=("10", "0"), names=("ten", "none"), templates=("a {c}.",))
    with pytest.raises(
        ValueError, match=r"metadata.csv line 3: y is '2', which is not one of the 2"
    ):
        read(wilds, labels)


def test_files_may_be_named_by_the_number_of_their_row(tmp_path):
    """Like FMoW's, whose labels are texts."""
    rows = [["test", "airport", "FRA"], ["train", "zoo", "FRA"], ["test", "zoo", "DEU"]]
    for number in range(3):
        write_image(tmp_path / f"images/rgb_img_{number}.jpg", number)
    write_table(tmp_path, ["split", "category", "country_code"], rows)
    changes = {"file": "images/rgb_img_{row}.jpg", "label": "category", "domain": "{country_code}"}
    found = read(tmp_path, **changes)
    assert found.labels.ids == ("airport", "zoo")
    assert of(found) == [("images/rgb_img_0.jpg", 0, "FRA"), ("images/rgb_img_2.jpg", 1, "DEU")]
    assert len(read(tmp_path, **{**changes, "split_column": "", "split": ""}).source.items) == 3


def test_what_a_cell_holds_is_no_pattern(wilds):
    write_image(wilds / "images/{y}.jpg", 1)
    write_table(wilds, HEADER, [*ROWS, ["odd", "{y}.jpg", "2", "1"]])
    assert of(read(wilds, split="odd")) == [("images/{y}.jpg", 0, "1")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "images/{name}"}, "no column 'name', which --file names; it has 'split', "),
        ({"domain": "{place}"}, "no column 'place', which --domain names"),
        ({"label": "class"}, "no column 'class', which --label names"),
        ({"split_column": "fold"}, "no column 'fold', which --split-column names"),
        ({"file": "a.jpg"}, "--file is 'a.jpg', which names no column; write it as {column}"),
        ({"domain": "location"}, "--domain is 'location', which names no column"),
        ({"split": ""}, "choose the rows to pack with --split"),
        (
            {"split": "tset"},
            "has no row with 'tset' as its split; --split must be one of 'test', 't",
        ),
        ({"file": "gone/{filename}"}, "metadata.csv line 3: no such image: .*gone/b.jpg"),
    ],
)
def test_options_that_do_not_fit_the_table(wilds, changes, message):
    with pytest.raises(ValueError, match=message):
        read(wilds, **changes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["test", "b.jpg", "2"], "line 7 has 3 cells, but the header has 4 columns"),
        (["test", "../images/../../x.jpg", "2", "7"], "line 7: .* is not a path below --source"),
        (["test", "b.txt", "2", "7"], "line 7: 'images/b.txt' does not have a suffix of JPEG"),
        (["test", "b.jpg", " ", "7"], "line 7 has no label in column 'y'"),
        (["test", "a.jpg", "2", ""], "line 7 has no domain"),
        (["test", "a.jpg", "2", "\x1b[2J"], "line 7: a domain needs a printable name"),
        (["test", "a.jpg", "2", "x" * 1001], "line 7: a domain needs a printable name"),
        (["test", "b.jpg", "10", "7"], "image images/b.jpg is listed twice"),
        (["test", "x" * 200_000, "2", "7"], "line 7 cannot be read: field larger than field limit"),
    ],
)
def test_rows_that_cannot_be_an_images(wilds, row, message):
    write_table(wilds, HEADER, [*ROWS, row])
    with pytest.raises(ValueError, match=message):
        read(wilds)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no column 'y'"),
        (b"split,split,y,filename\n", "has two columns named 'split'"),
        (
            b"split,filename,y,location_remapped\n\xff\xfe,a,b,c\n",
            "is not UTF-8 .invalid start byte",
        ),
        (b"x" * (2**20 + 1), "has a line of 1,048,576 letters or more"),
        (b'split,"', "cannot be read: unexpected end of data"),
    ],
)
def test_files_that_are_no_table(wilds, data, message):
    (wilds / "metadata.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(wilds)


def test_tables_of_spreadsheets_are_read(wilds):
    """They begin with a byte order mark, have Windows line ends, and may have empty lines."""
    text = (wilds / "metadata.csv").read_text()
    (wilds / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert len(read(wilds).source.items) == 3


@pytest.mark.slow
def test_a_set_of_an_older_version_stays_as_it_is(corrupted, tmp_path):
    source = read_domains("own", corrupted / "fog", 1, None).source
    plain = replace(source, items=tuple(replace(one, domain="") for one in source.items))
    assert pack_source(plain, str(tmp_path), LABELS, OPTIONS)
    folder = tmp_path / "own"
    manifest = Manifest.load(str(folder))
    (folder / "samples.npz").unlink()
    older = replace(manifest, samples_sha256=None)
    older.save(str(folder))
    for path in (folder / "commit").iterdir():
        record = json.loads(path.read_text())
        del record["columns"]["source"]
        path.write_text(json.dumps(record))
    assert pack_source(plain, str(tmp_path), LABELS, OPTIONS)
    assert Manifest.load(str(folder)) == older
    assert not (folder / "samples.npz").exists()
    # one started by an older version is completed with hashes: its shards are rewritten
    (folder / "manifest.json").unlink()
    shards = {path: path.read_bytes() for path in folder.glob("*.tar")}
    assert pack_source(plain, str(tmp_path), LABELS, OPTIONS)
    assert Manifest.load(str(folder)) == manifest
    assert {path: path.read_bytes() for path in folder.glob("*.tar")} == shards


@pytest.mark.slow
def test_a_samples_file_that_is_gone_is_made_again(corrupted, tmp_path):
    source = read_domains("own", corrupted, 2, LABELS).source
    manifest, rows = packed(tmp_path, source)
    (tmp_path / "own/samples.npz").unlink()
    (problem,) = verify(str(tmp_path / "own"), deep=False, workers=1).problems
    assert "samples.npz cannot be used" in problem.what
    assert packed(tmp_path, source) == (manifest, rows)


def test_a_hash_of_another_image_is_found(corrupted, tmp_path):
    source = read_domains("own", corrupted, 2, LABELS).source
    manifest, _ = packed(tmp_path, source)
    url = str(tmp_path / "own")
    samples = Samples.load(url, manifest)
    wrong = samples.source.copy()
    wrong[4] += np.uint64(1)
    data = replace(samples, source=wrong).to_bytes()
    (tmp_path / "own/samples.npz").write_bytes(data)
    replace(manifest, samples_sha256=files.sha256_bytes(data)).save(url)
    assert verify(url, deep=False, workers=1).problems == []
    (problem,) = verify(url, deep=True, workers=1).problems
    assert problem.what == "its hash in samples.npz is of a different image"
    assert problem.key == Index.load(url, manifest).key[4].decode()
