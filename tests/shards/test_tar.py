"""The strict tar walk: its members, and that no damage passes for a shorter archive."""

import contextlib
import io
import tarfile
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rft.shards import tar

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
    # bytes 148-155 hold the checksum itself, whose padding may differ and still be readable
    inside = [n for n in range(500) if not 148 <= n < 156]
    place = starts[position % len(starts)] + inside[position % len(inside)]
    data[place] ^= flip
    with pytest.raises(ValueError, match=r"x\.tar"):
        found(bytes(data))


def header(name: str = "a.jpg", size: int | bytes = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header block with a size that tarfile would not write, and a correct checksum."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    block = bytearray(entry.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base_256(number: int) -> bytes:
    """GNU tar's format of sizes that exceed octal digits."""
    return (number % 256**12 | (0x80 << 88 if number >= 0 else 0)).to_bytes(12)


def filled(data: bytes) -> bytes:
    return data + bytes(tar.padded(len(data)) - len(data))


def pax(*records: tuple[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A header with records, each preceded by its own length."""
    lines = b""
    for key, value in records:
        text = f" {key}={value}\n".encode()
        length = len(text) + 1
        while len(str(length)) + len(text) != length:
            length += 1
        lines += str(length).encode() + text
    return header("pax", len(lines), kind) + filled(lines)


def long_name(letters: int) -> bytes:
    return header("././@LongLink", letters + 1, tarfile.GNUTYPE_LONGNAME) + filled(b"x" * letters)


FILE = header(size=3) + filled(b"abc")
ENDED = bytes(tar.END)
HOSTILE = {
    "negative": (header(size=base_256(-512)) + FILE, "has -512 bytes"),
    "negative, far": (FILE + header(size=base_256(-(10**6))) + FILE, "has -1,000,000 bytes"),
    "negative, of a name": (header("x", base_256(-512), tarfile.GNUTYPE_LONGNAME) + FILE, "-512"),
    "endless": (header(size=base_256(2**80)) + FILE, "is cut off at byte"),
    "terabytes": (header(size=base_256(2**40)) + FILE, "is cut off at byte"),
    "a block too many": (header(size=4 * 512) + FILE, "is cut off at byte"),
    "pax, negative": (pax(("size", "-1024")) + FILE, "gives the size '-1024'"),
    "pax, endless": (pax(("size", "9" * 18)) + FILE, "is cut off at byte"),
    "pax, no number": (pax(("size", "9" * 5000)) + FILE, "gives the size '9999"),
    "pax, a float": (pax(("size", "1e3")) + FILE, "gives the size '1e3'"),
    "pax, gigabytes": (header("x", 2**33 - 1, tarfile.XHDTYPE) + FILE, "is cut off at byte"),
    "pax, of all": (
        pax(("size", "3"), kind=tarfile.XGLTYPE) + FILE,
        "gives all members the same size",
    ),
    "pax, one name": (
        pax(("path", "x"), kind=tarfile.XGLTYPE) + FILE,
        "gives all members the same pa",
    ),
    "pax, sparse 0.1": (pax(("GNU.sparse.map", "0,1")) + FILE, "describes a sparse file"),
    "pax, sparse 1.0": (
        pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")) + header(size=512) + bytes(512),
        "describes a sparse file",
    ),
    "pax, no length": (
        header("x", 9, tarfile.XHDTYPE) + filled(b"path=abc\n") + FILE,
        "is damaged",
    ),
    "pax, length 0": (header("x", 9, tarfile.XHDTYPE) + filled(b"0 path=x\n") + FILE, "is damaged"),
    "pax, too long": (header("x", 9, tarfile.XHDTYPE) + filled(b"99 a=bcd\n") + FILE, "is damaged"),
    "gnu sparse": (header(kind=tarfile.GNUTYPE_SPARSE) + FILE, "neither a file nor a folder"),
    "a long name": (long_name(10**6) + FILE, "a member's name has 1,000,000 letters"),
    "a longer name": (long_name(3 * 10**6) + FILE, "more than any name needs"),
    "pax, a long name": (pax(("path", "x" * 5000)) + FILE, "a member's name has 5,000 letters"),
    "a device": (header(kind=tarfile.CHRTYPE), "neither a file nor a folder"),
    "a link": (header(kind=tarfile.LNKTYPE), "neither a file nor a folder"),
    "headers alone": (500 * pax(("mtime", "1")) + b"x" * 512, "damaged header or foreign bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_sizes_are_not_believed(kind):
    data, message = HOSTILE[kind]
    began = time.process_time()
    with pytest.raises(ValueError, match=f"^x\\.tar[^\n]*{message}"):
        found(data + ENDED)
    assert time.process_time() - began < 1


def test_more_members_than_memory_has_room_for(monkeypatch):
    monkeypatch.setattr(tar, "MEMBERS", 3)
    assert len(found(3 * FILE + ENDED)) == 3
    with pytest.raises(ValueError, match=r"x\.tar holds more than 3 files; split it into several"):
        found(4 * FILE + ENDED)


@pytest.mark.slow
def test_zeros_without_end(tmp_path):
    """A sparse file takes no space on the disk, and hours to read."""
    path = tmp_path / "x.tar"
    path.write_bytes(FILE)
    with path.open("r+b") as stream:
        stream.truncate(2**40)
        began = time.process_time()
        with pytest.raises(
            ValueError, match=r"x\.tar ends at byte 1,024 of 1,099,511,627,776, with zeros"
        ):
            list(tar.walk(stream, "x.tar"))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("record", [512, 10_240, 2**16, 2**20])
def test_a_tar_may_be_padded_to_a_record(record):
    data = FILE + ENDED
    assert len(found(data + bytes(-len(data) % record))) == 1


@pytest.mark.parametrize(("total", "warned"), [(11_264, 0), (16_384, 1), (2**20, 1)])
def test_zeros_of_an_unusual_record_are_a_warning(total, warned, capsys):
    """A file of this size may also be one that was not written completely."""
    assert len(found(FILE.ljust(total, b"\0"))) == 1
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == warned
    for message in messages:
        assert f"x.tar ends at byte 1,024 of {total:,}, with zeros after it: tar wri" in message


@pytest.mark.parametrize("total", [12_288, 71_680, 2**21, 3 * 2**16])
def test_more_zeros_are_a_file_that_was_not_written_completely(total):
    """The rest of a download or of a killed writer, in a file of its final size."""
    message = rf"x\.tar ends at byte 1,024 of {total:,}, with zeros after it: .*; download or write"
    with pytest.raises(tar.IncompleteError, match=message):
        found(FILE.ljust(total, b"\0"))


def test_a_size_in_a_pax_header_counts():
    data = pax(("size", "3"), ("path", "b/\N{SNOWMAN}.jpg")) + header(size=0) + filled(b"abc")
    assert found(data + FILE + ENDED) == [("b/\N{SNOWMAN}.jpg", b"abc"), ("a.jpg", b"abc")]
    comment = pax(("comment", "0123"), kind=tarfile.XGLTYPE)  # as written by git archive
    assert found(comment + FILE + ENDED) == [("a.jpg", b"abc")]


@pytest.mark.parametrize(
    "descriptions",
    [
        pax(("size", "600")) + long_name(200),
        pax(("path", "a"), ("size", "600")) + long_name(200),
        long_name(200) + pax(("path", "a"), ("size", "600")),
        pax(("path", "a"), ("size", "600")) + pax(("path", "b"), ("size", "3")),
    ],
    ids=["size", "first path", "first name", "first pax"],
)
def test_several_headers_of_one_member_mean_what_tarfile_reads(descriptions: bytes):
    data = descriptions + header() + filled(bytes(600)) + FILE + ENDED
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        expected = [(entry.name, opened.extractfile(entry).read()) for entry in opened]
    assert found(data) == expected
    assert len(expected) == 2


NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=150
)


@pytest.mark.slow
@given(
    st.lists(st.tuples(NAMES.map("folder/{}".format), st.binary(max_size=1200)), max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_names_and_contents_are_those_of_tarfile(content, kind):
    data = archive(content, kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        expected = [(entry.name, opened.extractfile(entry).read()) for entry in opened]
    assert found(data) == expected == content


MIXED = archive([*CONTENT[:3], ("y" * 200, b"z")], tarfile.PAX_FORMAT)[: 24 * 512]


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, len(MIXED) - 1), st.integers(0, 255)), max_size=5),
    st.binary(max_size=1024),
    st.booleans(),
)
def test_any_bytes_are_a_tar_or_refused(changes, junk, right_checksums):
    data = bytearray(MIXED)
    for place, value in changes:
        data[place] = value
    if right_checksums:
        for start in {place // 512 * 512 for place, _ in changes}:
            data[start + 148 : start + 156] = b" " * 8
            total = sum(data[start : start + 512])
            data[start + 148 : start + 156] = b"%06o\0 " % total
    for content in (bytes(data), junk, bytes(data[:1536]) + junk):
        with contextlib.suppress(ValueError):
            found(content)
