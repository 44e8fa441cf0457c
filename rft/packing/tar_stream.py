"""Writing a tar whose bytes depend on names and contents alone, hashed on the way."""

import hashlib
import tarfile
from typing import IO

from rft.shards.tar import BLOCK, END, padded


class TarStream:
    """A tar that is hashed while it is written; only names and contents decide its bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.size = 0
        self._stream = stream
        self._sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a file and return the offset of its content."""
        self._write(tar_header(name, len(data)))
        offset = self.size
        self._write(data)
        self._write(bytes(padded(len(data)) - len(data)))
        return offset

    def close(self) -> str:
        """End the archive, filled up to a whole record, and return its hex sha256."""
        self._write(bytes(END))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        return self._sha256.hexdigest()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sha256.update(data)
        self.size += len(data)


def tar_header(name: str, size: int) -> bytes:
    """Return the header of a member: owner root, mode 0444, time 0, on any machine at any time.

    The bytes are tarfile's. Its own code takes longer than copying an image does, so a header that
    fits into one block is made from a finished one by putting in name, size and checksum.
    """
    if len(name) > NAME_BYTES or size > LARGEST_OCTAL or not name.isascii():
        return _tarfile_header(name, size)
    name_field = name.encode("ascii")
    size_field = b"%011o" % size
    checksum = BARE_CHECKSUM + sum(name_field) + sum(size_field)
    return b"".join(
        (
            name_field.ljust(NAME_BYTES, b"\0"),
            BARE_HEADER[NAME_BYTES:SIZE_AT],
            size_field,
            BARE_HEADER[SIZE_AT + len(size_field) : CHECKSUM_AT],
            b"%06o" % checksum,
            BARE_HEADER[CHECKSUM_AT + 6 :],
        )
    )


def _tarfile_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o444, 0  # a float mtime would cost a PAX header
    member.uname = member.gname = "root"
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


# the fields of a tar header (POSIX ustar), and a header with nothing in those that differ
NAME_BYTES, SIZE_AT, CHECKSUM_AT = 100, 124, 148
LARGEST_OCTAL = 8**11 - 1
BARE_HEADER = _tarfile_header("", 0)
BARE_CHECKSUM = int(BARE_HEADER[CHECKSUM_AT : CHECKSUM_AT + 6], 8) - sum(b"0" * 11)
assert len(BARE_HEADER) == BLOCK
