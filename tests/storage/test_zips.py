"""The directory of a zip archive: its size is checked before zipfile reads it."""

import io
import struct
import zipfile

import pytest
import torch

from rft.storage.zips import LARGE_END, LOCATOR, require_small_directory

LARGE = LARGE_END.size + LOCATOR.size + 22


def archive(members: int, name: str = "", comment: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as writer:
        for number in range(members):
            writer.writestr(f"{number:06d}{name}", b"")
        writer.comment = comment
    return stream.getvalue()


def directory(data: bytes) -> int:
    return len(data) - data.index(b"PK\1\2") - (LARGE if b"PK\6\6" in data else 22)


# from 65,536 members on, the numbers are in a separate record
@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 100, 2**16])
def test_the_limit_is_exact(members: int):
    data = archive(members)
    size = directory(data)
    assert size == members * (46 + 6)
    stream = io.BytesIO(data)
    require_small_directory(stream, size)
    assert stream.tell() == 0
    assert len(zipfile.ZipFile(stream).namelist()) == members
    with pytest.raises(ValueError, match=f"its directory has {size:,} bytes; at most"):
        require_small_directory(stream, size - 1)


def test_what_torch_writes_is_read():
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, stream)
    assert b"PK\6\6" in stream.getvalue()  # for any size
    require_small_directory(stream, 1000)
    with pytest.raises(ValueError, match="at most 99 are allowed"):
        require_small_directory(stream, 99)


def large(**fields: int) -> bytes:
    """Torch's output, with other numbers in its last records."""
    stream = io.BytesIO()
    torch.save({}, stream)
    data = bytearray(stream.getvalue())
    at = data.index(b"PK\6\6")
    values = list(LARGE_END.unpack_from(data, at))
    values[8] = fields.get("size", values[8])
    LARGE_END.pack_into(data, at, *values)
    place = fields.get("place", at)
    data[at + LARGE_END.size + 8 : at + LARGE_END.size + 16] = struct.pack("<Q", place)
    return bytes(data)


HOSTILE = {
    "nothing": (b"", "does not end as"),
    "no archive": (bytes(100), "does not end as"),
    "cut off": (archive(1)[:-1], "does not end as"),
    "a comment": (archive(1, comment=b"hello"), "does not end as"),
    "exabytes": (large(size=2**63), "its directory has 9,223,372,036,854,775,808 bytes"),
    "a record in a different place": (large(place=0), "not where its last record points"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_others_are_refused(kind: str):
    data, message = HOSTILE[kind]
    with pytest.raises(ValueError, match=message):
        require_small_directory(io.BytesIO(data), 1000)
