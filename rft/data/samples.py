"""The samples of any tar shard, as webdataset groups them, and whole shards from any store.

A sample's key is its members' folder and base name up to the first dot; the rest, in lower case, is
the suffix. Members without a key (`README`, `._x.jpg`, `__meta__`) webdataset passes over, and so
does this, but they are counted.
"""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from rft import files
from rft.data import tar
from rft.data.fetch import Shards
from rft.data.manifest import Shard
from rft.remote import REQUEST_BYTES

PASSED_OVER_BY_WEBDATASET = re.compile(r"__[^/]*__($|/)")
REQUESTS_AT_ONCE = 4  # requests for one remote shard under way at a time
SIZE_THREADS = 16  # asking for sizes is latency-bound


class Sample(NamedTuple):
    """The members of one sample by suffix."""

    key: str
    members: dict[str, tar.Member]


def whole_url(url: str) -> str:
    """Return a URL as it is, and a local path as an absolute one."""
    fs, path = files.open_store(url)
    return path if isinstance(fs, LocalFileSystem) else url


def parent(url: str) -> str | None:
    """Return the folder of a whole URL, or None for one that has none (a host, a bucket)."""
    scheme, mark, rest = url.rstrip("/").rpartition("://")
    folder, slash, _ = rest.rpartition("/")
    if not slash or (mark and not folder):
        return None
    return scheme + mark + (folder or "/")


def shard_size(url: str) -> int:
    """Return the bytes of a shard.

    Raises:
        ValueError: if it is not there, or its store does not tell.
    """
    fs, path = files.open_store(url)
    try:
        size = fs.size(path)
    except FileNotFoundError as error:
        raise ValueError(f"no such shard: {url}") from error
    if size is None:
        raise ValueError(f"the server of {url} does not tell its size")
    return size


@contextmanager
def open_whole(url: str, size: int) -> Iterator[tuple[IO[bytes], str]]:
    """Yield a seekable stream of a whole shard of `size` bytes and the hex sha256 of what it holds.

    A remote shard is brought into a temporary file, which is gone when the body ends.

    Raises:
        ValueError: if it is not there or cannot be read.
    """
    fs, path = files.open_store(url)
    if isinstance(fs, LocalFileSystem):
        if not fs.isfile(path):
            raise ValueError(f"no such shard: {url}")
        with Path(path).open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            yield stream, sha256
        return
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as stream:
        for data in _blocks(url, size):
            digest.update(data)
            stream.write(data)
        stream.seek(0)
        yield stream, digest.hexdigest()


def _blocks(url: str, size: int) -> Iterator[bytes]:
    shards = Shards("", [Shard(name=url, bytes=size, sha256="", samples=0)])
    starts = range(0, size, REQUEST_BYTES)
    for first in range(0, len(starts), REQUESTS_AT_ONCE):
        wanted = starts[first : first + REQUESTS_AT_ONCE]
        yield from shards.ranges([(0, n, min(REQUEST_BYTES, size - n)) for n in wanted])


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-case suffix of a tar member, or None where webdataset sees no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or PASSED_OVER_BY_WEBDATASET.match(name):
        return None
    return folder + slash + stem, suffix.lower()


def read_samples(stream: IO[bytes], where: str, passed_over: Counter[str]) -> Iterator[Sample]:
    """Yield the samples of a tar in order; names without a key are counted in `passed_over`.

    Raises:
        ValueError: if the tar is damaged, or a key or a member occurs twice.
    """
    seen: set[str] = set()
    current: Sample | None = None
    for member in tar.walk(stream, where):
        split = split_name(member.name)
        if split is None:
            passed_over["members without a key"] += 1
            continue
        key, suffix = split
        if current is None or key != current.key:
            if current is not None:
                yield current
            if key in seen:
                raise ValueError(
                    f"{where}: key {key!r} comes back at byte {member.offset:,} after other keys; "
                    f"a sample's members must be neighbours"
                )
            seen.add(key)
            current = Sample(key, {})
        if suffix in current.members:
            raise ValueError(f"{where}: two members are called {member.name!r}")
        current.members[suffix] = member
    if current is not None:
        yield current


def read_member(stream: IO[bytes], member: tar.Member) -> bytes:
    """Return the content of a member."""
    stream.seek(member.offset)
    return stream.read(member.size)
