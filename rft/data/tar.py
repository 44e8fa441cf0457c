"""Where the members of a tar lie, read strictly.

Python's tarfile takes a damaged header for the end of the archive and says nothing
(cpython issue 120740), so a damaged or cut tar would only look shorter. Here the archive must end
as the format says: two blocks of zeros and nothing but zeros behind them.
"""

import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

BLOCK = 512  # bytes; headers and payloads are padded to whole blocks
END = 2 * BLOCK  # zeros that end an archive
# first bytes of what is taken for a tar: what it is, and a command that makes a tar of it
OTHER_KINDS = {
    b"\x1f\x8b": "compressed by gzip; unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it with unzstd",
    b"BZh": "compressed by bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "compressed by xz; unpack it with unxz",
    b"\x04\x22\x4d\x18": "compressed by lz4; unpack it with unlz4",
    b"PK\x03\x04": "a zip archive; unpack it and pack the files with tar",
}


class Member(NamedTuple):
    """A regular file in a tar: its payload is `size` bytes at `offset` of the archive."""

    name: str
    offset: int
    size: int


def padded(size: int) -> int:
    """Return `size` bytes rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def walk(stream: IO[bytes], name: str) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar in order; `name` is for messages.

    `stream` must be seekable; between two members the caller may move it. Folders are passed over.

    Raises:
        ValueError: if a header is damaged, the archive is cut, or a member is no file or folder.
    """
    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as opened:
            archive: Any = opened
            for entry in archive:
                if entry.isreg() and not entry.issparse():
                    yield Member(entry.name, entry.offset_data, entry.size)
                elif not entry.isdir():
                    raise ValueError(f"{name}: {entry.name!r} is neither a file nor a folder")
                end = entry.offset_data + (padded(entry.size) if entry.isreg() else 0)
                # tarfile remembers every member it has seen
                archive.members = []
    except tarfile.TarError as error:
        stream.seek(0)
        if what := _other_kind(stream.read(BLOCK)):
            raise ValueError(f"{name} is no plain tar but {what}") from error
        raise ValueError(f"{name} is no whole tar: {error} after byte {end:,}") from error
    stream.seek(end)
    zeros = 0
    while rest := stream.read(1 << 20):
        if rest.strip(b"\0"):
            raise ValueError(f"{name}: damaged header or foreign bytes after byte {end:,}")
        zeros += len(rest)
    if zeros < END:
        raise ValueError(f"{name} is cut off at byte {end + zeros:,}: a tar ends with {END} zeros")


def _other_kind(start: bytes) -> str:
    """Return what a file with these first bytes is, empty if it is none of the known kinds."""
    kinds = (what for magic, what in OTHER_KINDS.items() if start.startswith(magic))
    return next(kinds, "")
