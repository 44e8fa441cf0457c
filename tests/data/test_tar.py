"""The strict tar walk: what it finds, and that no damage passes for a shorter archive."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rft.data import tar

CONTENT = [(f"folder/{n:03d}.jpg", bytes([n]) * (n * 97)) for n in range(12)]


def archive(content: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as writer:
        for name, data in content:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            writer.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def found(data: bytes) -> list[tuple[str, bytes]]:
    stream = io.BytesIO(data)
    return [(m.name, data[m.offset : m.offset + m.size]) for m in tar.walk(stream, "x.tar")]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_finds_every_file(kind: int) -> None:
    long = [] if kind == tarfile.USTAR_FORMAT else [("x" * 300 + ".jpg", b"long name")]
    assert found(archive(CONTENT + long, kind)) == CONTENT + long


def test_an_empty_archive_has_no_members() -> None:
    assert found(archive([])) == []


def test_folders_are_passed_over_and_links_refused() -> None:
    for kind, expected in ((tarfile.DIRTYPE, None), (tarfile.SYMTYPE, "neither a file")):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as writer:
            entry = tarfile.TarInfo("n01")
            entry.type = kind
            writer.addfile(entry)
        if expected is None:
            assert found(stream.getvalue()) == []
        else:
            with pytest.raises(ValueError, match=expected):
                found(stream.getvalue())


@pytest.mark.slow
@given(st.integers(0, 10**9))
def test_every_cut_is_an_error(position: int) -> None:
    data = archive(CONTENT)
    whole = max(m.offset + tar.padded(m.size) for m in tar.walk(io.BytesIO(data), "x"))
    cut = data[: position % (whole + tar.END)]
    with pytest.raises(ValueError, match=r"x\.tar"):
        found(cut)


@given(st.integers(0, 10**9), st.integers(1, 255))
def test_every_flipped_header_byte_is_an_error(position: int, flip: int) -> None:
    data = bytearray(archive(CONTENT))
    starts = [m.offset - tar.BLOCK for m in tar.walk(io.BytesIO(bytes(data)), "x")]
    # bytes 148-155 hold the checksum itself, whose padding may differ and still be read
    inside = [n for n in range(500) if not 148 <= n < 156]
    place = starts[position % len(starts)] + inside[position % len(inside)]
    data[place] ^= flip
    with pytest.raises(ValueError, match=r"x\.tar"):
        found(bytes(data))
