"""The positions of a tar's members, parsed strictly.

Python's tarfile takes a damaged header for the end of the archive, without an error
(cpython issue 120740), so a damaged or truncated tar would only look shorter. Here the archive must
end as the format requires: two blocks of zeros, and only zeros after them.

tarfile also trusts sizes: a negative one makes it loop forever (cpython issue 130577, not fixed in
older Pythons), and a name of gigabytes is read into memory. So tarfile only parses single header
blocks here. The code below locates the next header and interprets extended headers, and every block
moves it forward.
"""

import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

BLOCK = 512  # bytes; headers and payloads are padded to full blocks
END = 2 * BLOCK  # zeros that end an archive
# Writers pad an archive to records of 10 KiB, or rarely of a power of two up to 1 MiB
# (--blocking-factor). More zeros are left by a download or writer that allocated the file first.
RECORD = 10_240
RECORDS = [2**n for n in range(14, 21)]
DESCRIPTION_BYTES = 2**20  # of names and attributes before a member
NAME_LETTERS = 4096  # Linux's limit of a path
MEMBERS = 1_000_000  # of one tar: all of them are kept in memory
# types of headers that describe the next member
DESCRIBES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
SIZE = re.compile(r"[0-9]{1,18}")
# first bytes of files often mistaken for a tar: the actual kind, and how to convert it
OTHER_KINDS = {
    b"\x1f\x8b": "compressed by gzip; unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it with unzstd",
    b"BZh": "compressed by bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "compressed by xz; unpack it with unxz",
    b"\x04\x22\x4d\x18": "compressed by lz4; unpack it with unlz4",
    b"PK\x03\x04": "a zip archive; unpack it and pack the files with tar",
}

AGAIN = "download or write it again"

log = logging.getLogger(__name__)


class IncompleteError(ValueError):
    """A tar that was not written or copied completely."""


# reads a number of bytes from a position in a tar, fewer at its end
Read = Callable[[int, int], bytes]


class Member(NamedTuple):
    """A regular file in a tar: its payload is `size` bytes at `offset` of the archive."""

    name: str
    offset: int
    size: int


def padded(size: int) -> int:
    """Round a size in bytes up to full blocks."""
    return -(-size // BLOCK) * BLOCK


def walk(stream: IO[bytes], name: str, part: Member | None = None) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar in order. Folders are skipped.

    The stream must be seekable; the caller may move it between two members. `name` is for messages.
    With `part`, a member of the stream's tar that is a tar itself, that member is walked.

    Raises:
        ValueError: if a header is damaged, the archive is truncated or too large to be a shard, or
            a member is neither a file nor a folder.
    """
    base, total = (part.offset, part.size) if part else (0, stream.seek(0, os.SEEK_END))

    def read(position: int, size: int) -> bytes:
        stream.seek(base + position)
        # never negative, which would read everything: positions were compared with the total
        return stream.read(min(size, total - position))

    position = count = 0  # `position` in bytes from the base
    said: dict[str, str] = {}  # fields that extended headers give the next member
    while (entry := _read_header(read, position, name)) is not None:
        start = position + BLOCK
        describes = entry.type in DESCRIBES
        # a PAX header overrides the member's own field, which is limited to 8 GiB
        size = entry.size if describes else int(said.get("size", entry.size))
        # other members, such as folders, have no content, whatever their size field says
        stop = start + (padded(size) if entry.isreg() or describes else 0)
        if size < 0:
            raise ValueError(f"{name}: the member at byte {position:,} has {size:,} bytes")
        if stop > total:
            raise IncompleteError(
                f"{name} is cut off at byte {total:,}: the member at byte {position:,} has "
                f"{size:,} bytes; {AGAIN}"
            )
        if describes:
            # if several headers set a field, the first wins, as in tarfile
            said = _describe(read, start, entry, name) | said
            position = stop
            continue
        member = Member(said.get("path", entry.name).rstrip("/"), base + start, size)
        if len(member.name) > NAME_LETTERS:
            raise ValueError(
                f"{name}: a member's name has {len(member.name):,} letters; shorten it"
            )
        count += 1
        if count > MEMBERS:
            raise ValueError(f"{name} holds more than {MEMBERS:,} files; split it into several")
        # tarfile treats sparse files as regular, but their gaps are not in the archive
        if entry.isreg() and entry.type != tarfile.GNUTYPE_SPARSE:
            yield member
        elif not entry.isdir():
            raise ValueError(f"{name}: {member.name!r} is neither a file nor a folder")
        position, said = stop, {}
    _require_end(read, position, total, name)


def _read_header(read: Read, position: int, name: str) -> tarfile.TarInfo | None:
    """Parse the header at a byte of a tar; None where zeros end the archive."""
    block = read(position, BLOCK)
    # a missing block is an end too, which `_require_end` refuses; an empty file is not a tar
    if not block.strip(b"\0") and (block or position):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        for magic, what in OTHER_KINDS.items():
            if position == 0 and block.startswith(magic):
                raise ValueError(f"{name} is not a plain tar but {what}") from error
        if position == 0 or len(block) < BLOCK:
            raise ValueError(
                f"{name} is not a complete tar: {error} after byte {position:,}"
            ) from error
        raise ValueError(
            f"{name}: damaged header or foreign bytes after byte {position:,}; {AGAIN}"
        ) from error


def _describe(read: Read, start: int, entry: tarfile.TarInfo, name: str) -> dict[str, str]:
    """Read a header that describes the member after it: its path, its size."""
    where = f"{name}: the header at byte {start - BLOCK:,}"
    if entry.size > DESCRIPTION_BYTES:
        raise ValueError(f"{where} has {entry.size:,} bytes, more than any name needs")
    data = read(start, entry.size)
    if entry.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    if entry.type == tarfile.GNUTYPE_LONGLINK:
        return {}  # belongs to a link, which is refused at its own header
    records = _pax_records(data, where)
    if any(key.startswith("GNU.sparse.") for key in records):
        raise ValueError(f"{where} describes a sparse file; write the tar again without --sparse")
    said = {key: records[key] for key in ("path", "size") if key in records}
    if said and entry.type == tarfile.XGLTYPE:
        raise ValueError(f"{where} gives all members the same {' and '.join(said)}")
    if not SIZE.fullmatch(said.get("size", "0")):
        raise ValueError(f"{where} gives the size {said['size'][:40]!a}")
    return said


def _pax_records(data: bytes, where: str) -> dict[str, str]:
    """Parse the records of a PAX header (POSIX.1-2001): "LENGTH KEY=VALUE" lines."""
    records, position = {}, 0
    # a zero ends the records, as in tarfile
    while position < len(data) and data[position]:
        # at most seven digits and the space: enough for DESCRIPTION_BYTES
        space = data.find(b" ", position, position + 8)
        digits = data[position : max(space, position)]
        # LENGTH counts itself, the space and the line break
        stop = position + int(digits) if digits.isdigit() else 0
        key, equals, value = data[space + 1 : stop - 1].partition(b"=")
        if not space < stop <= len(data) or not equals or data[stop - 1 : stop] != b"\n":
            raise ValueError(f"{where} is damaged")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position = stop
    return records


def _require_end(read: Read, end: int, total: int, name: str) -> None:
    """Check that only zeros, and neither too few nor too many, follow the last member."""
    # not all of them: a sparse file may have terabytes
    if read(end, END + RECORDS[-1]).strip(b"\0"):
        raise ValueError(f"{name}: damaged header or foreign bytes after byte {end:,}; {AGAIN}")
    padding = total - end - END
    if padding < 0:
        raise IncompleteError(
            f"{name} is cut off at byte {total:,}: a tar ends with {END} zeros; {AGAIN}"
        )
    if padding < RECORD:
        return
    what = f"{name} ends at byte {end:,} of {total:,}, with zeros after it"
    unusual = "tar writes so many only with an unusual --blocking-factor"
    if any(total % size == 0 and padding < size for size in RECORDS):
        log.warning(f"{what}: {unusual}; otherwise it was not written completely, and lacks files")
        return
    raise IncompleteError(f"{what}: it was not written completely ({unusual}); {AGAIN}")
