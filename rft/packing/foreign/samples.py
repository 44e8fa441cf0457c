"""The samples of any tar shard, as webdataset groups them, and complete shards from any store.

A sample's key is its members' folder and base name up to the first dot; the rest, in lower case, is
the suffix. Members without a key (`README`, `._x.jpg`, `__meta__`) webdataset passes over, and so
does this, but they are counted.
"""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from rft.shards import tar
from rft.storage import files, local, remote

PASSED_OVER_BY_WEBDATASET = re.compile(r"__[^/]*__($|/)")  # its `skip_meta`
TEXT_BYTES = 2**20  # of a .cls or .json
SIZE_THREADS = 16  # asking for sizes is latency-bound


class Sample(NamedTuple):
    """The members of one sample by suffix."""

    key: str
    members: dict[str, tar.Member]


def whole_url(url: str) -> str:
    """Return a URL as it is, and a local path as an absolute one without parts that are `.`."""
    fs, path = files.open_store(url)
    return str(Path(path)) if isinstance(fs, LocalFileSystem) else url


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
        ValueError: if it does not exist, is a folder, or its store reports no size.
    """
    try:
        return files.size(url)
    except FileNotFoundError as error:
        raise ValueError(f"no such shard: {url}") from error
    except IsADirectoryError as error:
        found, tars = "", [name for name in files.names(url) if name.endswith(".tar")]
        if tars:
            found = f"of its {len(tars)} .tar files the first is {tars[0]}, the last {tars[-1]}; "
        pattern = files.join(url, "{000000..000123}.tar")
        raise ValueError(
            f"{url} is a folder, not a shard; {found}name its shards, such as '{pattern}'"
        ) from error


@contextmanager
def open_whole(url: str, size: int) -> Iterator[tuple[IO[bytes], str]]:
    """Yield a seekable stream of a whole shard of `size` bytes and the hex sha256 of what it holds.

    A remote shard is brought into a temporary file, which is gone when the body ends.

    Raises:
        ValueError: if it is not there or cannot be read.
    """

    async def bring(fs: Any, path: str) -> IO[bytes]:
        with ExitStack() as stack:
            # without a name, so that not even a killed process leaves it behind
            copy = stack.enter_context(tempfile.TemporaryFile())
            await remote.fill(copy.fileno(), size, partial(remote.read_range, fs, path))
            # left open for the caller; an error above has closed it, and thereby removed it
            stack.pop_all()
            return copy

    try:
        stream = files.ask(url, "read", bring, local.reader)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"no such shard: {url}") from error
    with stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        yield stream, sha256


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-case suffix of a tar member, or None where webdataset sees no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or PASSED_OVER_BY_WEBDATASET.match(name):
        return None
    return folder + slash + stem, suffix.lower()


def read_samples(stream: IO[bytes], where: str, passed_over: Counter[str]) -> list[Sample]:
    """Return the samples of a tar in order; names without a key are counted in `passed_over`.

    Raises:
        ValueError: if the tar is damaged, a member occurs twice, or members of other samples lie
            between those of one: webdataset would make several samples of it.
    """
    samples: dict[str, Sample] = {}
    current = ""
    for member in tar.walk(stream, where):
        split = split_name(member.name)
        if split is None:
            passed_over["members without a key"] += 1
            continue
        key, suffix = split
        if key in samples and key != current:
            raise ValueError(
                f"{where}: key {key!r} comes back at byte {member.offset:,} ({member.name}) after "
                f"other keys; the members of a sample must be neighbours: write the tar again with "
                f"names in order (tar --sort=name)"
            )
        current = key
        members = samples.setdefault(key, Sample(key, {})).members
        if suffix in members:
            raise ValueError(f"{where}: two members are called {member.name!r}")
        members[suffix] = member
    return list(samples.values())


def read_text(stream: IO[bytes], member: tar.Member, where: str) -> bytes:
    """Return the content of a member that holds a label.

    Raises:
        ValueError: if it is longer than any label.
    """
    if member.size > TEXT_BYTES:
        raise ValueError(
            f"{where}: {member.name!r} has {member.size:,} bytes, no label has so many"
        )
    return read_member(stream, member)


def read_member(stream: IO[bytes], member: tar.Member) -> bytes:
    """Return the content of a member."""
    stream.seek(member.offset)
    return stream.read(member.size)
