"""Shard contents are frozen: packed sets are compared across machines, versions and years."""

import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from rft.loading.dataset import PackedDataset
from rft.packing.pack import ALGORITHM, Options, make_plan, pack, shuffle
from rft.packing.source import Item, Source
from rft.shards.label_space import LabelSpace
from rft.shards.ranges import cut

LABELS = LabelSpace(
    ids=("n01440764", "n01443537"), names=("tench", "goldfish"), templates=("a {c}.",)
)
# ALGORITHM -> digests of two orders of a thousand keys, cuts, and the shards of a small set
FROZEN = {
    2: {"seed 0": "a9a5234d0303545e", "seed 7": "8379d69506db6620", "shards": "e8b4b7892040c9a0"},
}
RAISE = (
    "the same source is packed to other bytes now, so a set that was begun cannot be completed: "
    "raise ALGORITHM in rft/packing/pack.py, and record the new digests here under it"
)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def png(red: int, side: int) -> bytes:
    """A square PNG of one colour, written without a library that may change; chunks are stored."""
    line = b"\0" + bytes((red, 20, 30)) * side
    data = line * side
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(data), len(data) ^ 0xFFFF) + data
    stored += struct.pack(">I", zlib.adler32(data))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", stored)]
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in [*chunks, (b"IEND", b"")]:
        content += struct.pack(">I", len(body)) + name + body
        content += struct.pack(">I", zlib.crc32(name + body))
    return content


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("frozen")
    for number in range(9):
        wnid = LABELS.ids[number % 2]
        path = root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(20 * number, 4 + number))
    return root


def keys_in_order(seed: int) -> str:
    items = [Item(key=f"n0{n % 10}_{n}", path="x", label=0, bytes=1) for n in range(1000)]
    return " ".join(item.key for item in shuffle(items, seed))


def frozen() -> dict[str, str]:
    assert ALGORITHM in FROZEN, "a new ALGORITHM: record its digests here"
    return FROZEN[ALGORITHM]


def test_the_shuffle_is_frozen():
    found = {f"seed {seed}": digest(keys_in_order(seed).encode()) for seed in (0, 7)}
    assert found == {name: frozen()[name] for name in found}, RAISE


def test_the_cut_is_frozen():
    # at most 10 bytes per shard: exactly 10 fit, and a larger file is alone
    assert cut([4, 6, 1, 9, 1, 12, 3, 7, 10, 0], 10) == [
        (0, 2), (2, 4), (4, 5), (5, 6), (6, 8), (8, 10),
    ], RAISE  # fmt: skip
    assert cut([], 10) == []


def test_the_shards_are_frozen(source, tmp_path):
    options = Options(shard_mb=0.001, workers=1, seed=3)
    assert pack("imagenet-val", str(source), str(tmp_path), LABELS, options)
    shards = sorted((tmp_path / "imagenet-val").glob("*.tar"))
    assert len(shards) > 2
    assert digest(b"".join(path.read_bytes() for path in shards)) == frozen()["shards"], RAISE


def test_the_plan_names_the_algorithm(tmp_path):
    item = Item(key="a", path="x/a", label=0, bytes=1)
    groups = ((0,), (1,))
    plan = make_plan(
        Source(dataset="d", root=tmp_path, items=(item,), groups=groups), LABELS, Options()
    )
    assert plan.parameters["algorithm"] == ALGORITHM
    assert plan.parameters["seed"] == 0


def test_sides_read_back(source, tmp_path):
    pack("imagenet-val", str(source), str(tmp_path), LABELS, Options(workers=1))
    index = PackedDataset(str(tmp_path / "imagenet-val")).index
    numbers = np.array([int(key[-8:]) for key in index.key])
    assert (index.width == 4 + numbers).all()
    assert (index.height == 4 + numbers).all()
    assert (index.label == numbers % 2).all()
