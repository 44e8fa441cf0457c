"""Archives of arrays: read like numpy does, and refused before they cost anything."""

import contextlib
import io
import resource
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from rft.storage.arrays import read_npz

KINDS = ("<u8", "<u4", "<i4", "<u2", "|u1", "<i8", "<f4", "<f2", "|b1", "|S5", "<U3")
ARRAYS = st.sampled_from(KINDS).flatmap(
    lambda kind: arrays_of.arrays(kind, arrays_of.array_shapes(min_dims=0, min_side=0, max_side=4))
)
NAMES = st.text("abc/_", min_size=1, max_size=6)
LIMIT = 10**6


def archive(columns: dict[str, np.ndarray], save=np.savez) -> bytes:
    stream = io.BytesIO()
    save(stream, **columns)
    return stream.getvalue()


@pytest.mark.slow
@given(st.dictionaries(NAMES, ARRAYS, max_size=4), st.sampled_from([np.savez, np.savez_compressed]))
def test_arrays_come_back(columns, save):
    found = read_npz(archive(columns, save), LIMIT)
    assert found.keys() == columns.keys()
    for name, array in columns.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
        assert not found[name].flags.writeable


def test_the_order_of_columns_comes_back():
    array = np.asfortranarray(np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(read_npz(archive({"a": array}), LIMIT)["a"], array)


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as writer:
        for name, content in members.items():
            writer.writestr(name, content)
    return stream.getvalue()


def npy(header: str, content: bytes = b"", version: bytes = b"\1\0") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + content


def header(descr: str = "'<u8'", shape: str = "(1,)", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def bomb() -> bytes:
    """256 MiB of zeros in 256 KiB."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as writer,
        writer.open("a.npy", "w") as member,
    ):
        member.write(npy(header(shape=f"({2**25},)")))
        for _ in range(16):
            member.write(bytes(2**24))
    return stream.getvalue()


def lying_bomb() -> bytes:
    """The same with a directory that understates the size."""
    data = bytearray(bomb())
    place = data.rindex(b"PK\1\2")
    data[place + 24 : place + 28] = struct.pack("<L", 1000)
    return bytes(data)


def many_members() -> bytes:
    return zipped({f"{n}.npy": b"" for n in range(20_000)})


def twice() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as writer:
        for name in ("a.npy", "b.npy"):
            writer.writestr(name, npy(header(), bytes(8)))
    return stream.getvalue().replace(b"b.npy", b"a.npy")


HOSTILE = {
    "many rows": zipped({"a.npy": npy(header(shape=f"({2**40},)"), bytes(8))}),
    "rows of nothing": zipped({"a.npy": npy(header("'|S0'", f"({2**40},)"))}),
    "negative rows": zipped({"a.npy": npy(header(shape="(-1,)"), bytes(8))}),
    "an object": zipped({"a.npy": npy(header("'|O'"), b"cos\nsystem\n(S'id'\ntR.")}),
    "a structure": zipped({"a.npy": npy(header("[('x', '<u8')]"), bytes(8))}),
    "code": zipped({"a.npy": npy(header("__import__('os')"), bytes(8))}),
    "brackets": zipped({"a.npy": npy("(" * 9000, bytes(8))}),
    "a long header": zipped({"a.npy": b"\x93NUMPY\2\0" + struct.pack("<L", 2**32 - 1) + b"{"}),
    "another version": zipped({"a.npy": npy(header(), bytes(8), b"\3\0")}),
    "an unknown type": zipped({"a.npy": npy(header("'<u3'"), bytes(3))}),
    "cut off": zipped({"a.npy": npy(header(), bytes(7))}),
    "bytes behind": zipped({"a.npy": npy(header(), bytes(9))}),
    "no array": zipped({"a.npy": b""}),
    "another file": zipped({"a.txt": b"text"}),
    "another method": zipped({"a.npy": npy(header(), bytes(8))}, zipfile.ZIP_LZMA),
    "a comment": zipped({})[:-2] + b"\5\0hello",
    "no zip": b"PK\3\4" + bytes(100),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_cannot_be_an_array_is_refused(kind):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_npz(HOSTILE[kind], LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bomb, "its arrays have 268,435,"),
        (lying_bomb, "not a readable .npz|does not match"),
        (many_members, "not a readable .npz: its directory has "),
        (twice, "two arrays with the same name"),
    ],
)
def test_bombs_cost_nothing(make, message):
    data = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        read_npz(data, LIMIT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB


WHOLE = archive({"a": np.arange(9, dtype=np.uint32), "b": np.zeros((2, 2), np.float32)})


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4))
def test_a_damaged_archive_is_read_or_refused(changes):
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    with contextlib.suppress(ValueError):
        read_npz(bytes(data), LIMIT)


@given(st.binary(max_size=300), st.integers(0, len(WHOLE)))
def test_any_bytes_are_read_or_refused(data, cut):
    for content in (data, data + WHOLE, WHOLE[:cut], WHOLE[:cut] + data + WHOLE[-100:]):
        with contextlib.suppress(ValueError):
            read_npz(content, LIMIT)
