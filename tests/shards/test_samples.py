"""samples.npz: the output reads back, and invalid content is refused with its position."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.tiny_world import LABELS
from rft.shards.manifest import Manifest, Shard
from rft.shards.samples import HEADERS_BYTES, Samples, source_hash
from rft.storage import files

NAMES = ("fog/1", "fog/2", "snow/1")


def manifest(data: bytes, count: int, domains: tuple[str, ...] = ()) -> Manifest:
    """A manifest with the hash of a samples.npz of so many rows."""
    some = "0" * 64
    return Manifest(
        dataset="own",
        classes=LABELS.names,
        templates=LABELS.templates,
        groups=LABELS.groups,
        encoding={"kind": "original", "crop_border": 0},
        plan_hash=some,
        index_sha256=some,
        shards=(Shard(name="0.tar", bytes=10240, sha256=some, samples=count),),
        samples_sha256=files.sha256_bytes(data),
        domains=domains,
    )


def npz(**columns: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **columns)
    return stream.getvalue()


def load(folder: Path, data: bytes, count: int, domains: tuple[str, ...] = ()) -> Samples:
    (folder / "samples.npz").write_bytes(data)
    return Samples.load(str(folder), manifest(data, count, domains))


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2)), min_size=1, max_size=9))
def test_what_is_written_reads_back(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    source, domain = zip(*rows, strict=True)
    written = Samples(source=np.array(source, np.uint64), domain=np.array(domain, np.int32))
    data = written.to_bytes()
    assert data == written.to_bytes()
    found = load(folder, data, len(rows), NAMES)
    assert found.source.tolist() == [one for one, _ in rows]
    assert found.domain.tolist() == [one for _, one in rows]
    alone = load(folder, Samples(source=written.source).to_bytes(), len(rows))
    assert alone.source.tolist() == found.source.tolist()
    assert alone.domain is None


def test_a_source_is_the_beginning_of_the_files_sha256(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"some image")
    assert f"{source_hash(path.read_bytes()):016x}" == files.sha256_file(path)[:16]


SOURCE = np.arange(3, dtype=np.uint64)


@pytest.mark.parametrize(
    ("columns", "domains", "message"),
    [
        ({}, (), "its columns must be source"),
        ({"source": SOURCE, "more": SOURCE}, (), "its columns must be source"),
        ({"source": SOURCE, "domain": np.zeros(3, np.int32)}, (), "its columns must be source"),
        ({"source": SOURCE}, NAMES, "its columns must be source, domain"),
        ({"source": SOURCE.astype(np.int64)}, (), "source must be 3 of uint64, not int64"),
        ({"source": SOURCE[:2]}, (), "source must be 3 of uint64, not uint64 \\(2,\\)"),
        ({"source": SOURCE.reshape(3, 1)}, (), "source must be 3 of uint64"),
        (
            {"source": SOURCE, "domain": np.array([0, 3, 1], np.int32)},
            NAMES,
            "row 1: domain 3 is not one of the 3 domains",
        ),
        (
            {"source": SOURCE, "domain": np.array([0, 0, -1], np.int32)},
            NAMES,
            "row 2: domain -1 is not one",
        ),
    ],
)
def test_columns_that_cannot_be_right_are_refused(tmp_path, columns, domains, message):
    with pytest.raises(ValueError, match=f"samples.npz: .*{message}.*; pack or index the set"):
        load(tmp_path, npz(**columns), 3, domains)


def test_other_files_are_refused(tmp_path):
    right = Samples(source=SOURCE).to_bytes()
    vouching = manifest(right, 3)
    with pytest.raises(ValueError, match="no such file"):
        Samples.load(str(tmp_path), vouching)
    (tmp_path / "samples.npz").write_bytes(right + b"x")
    with pytest.raises(ValueError, match="does not have the sha256 in its manifest"):
        Samples.load(str(tmp_path), vouching)
    (tmp_path / "samples.npz").write_bytes(right + b"x" * (HEADERS_BYTES + 3 * 12))
    with pytest.raises(ValueError, match=r"larger|more than"):
        Samples.load(str(tmp_path), vouching)
    with pytest.raises(ValueError, match=r"no samples\.npz: it is from an older version"):
        Samples.load(str(tmp_path), replace(vouching, samples_sha256=None))
    with pytest.raises(ValueError, match="is not an archive of columns"):
        load(tmp_path, b"noise", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ("a", "a")}, "domains must be distinct"),
        ({"domains": ("a",), "samples_sha256": None}, "domains need samples_sha256"),
        ({"score": "worst-domain"}, "the set has no domains"),
        ({"domains": ("\x1b[2J",)}, "control characters"),
        ({"score": "best"}, "score"),
        ({"dataset": "imagenet-r", "ood": True}, "imagenet-r is a benchmark"),
        ({"dataset": "imagenet-val", "score": "mean-per-class"}, "imagenet-val is a benchmark"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(manifest(b"", 3), **changes)


def test_manifests_of_older_sets_keep_their_hash():
    """Finished runs identify their data by it."""
    usual = manifest(b"", 3)
    document = replace(usual, samples_sha256=None)._document()
    assert not document.keys() & {"samples_sha256", "domains", "score", "ood", "class_ids"}
    assert usual._document().keys() - document.keys() == {"samples_sha256"}
    declared = replace(usual, domains=NAMES, score="worst-domain", ood=True)
    assert declared._document().keys() - document.keys() == {
        "samples_sha256",
        "domains",
        "score",
        "ood",
    }
    assert len({usual.sha256, declared.sha256, replace(usual, ood=True).sha256}) == 3


def test_the_five_benchmarks_are_ood_by_their_name():
    names = ("imagenet-r", "imagenet-v2", "imagenet-val", "imagenet-train", "own")
    assert [replace(manifest(b"", 3), dataset=name).is_ood for name in names] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert replace(manifest(b"", 3), ood=True).is_ood
