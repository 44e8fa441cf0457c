"""The samples of any tar shard, as webdataset groups them, and complete shards from any store.

A sample's key is its members' folder and base name up to the first dot; the rest, in lower case, is
the suffix. Members without a key (`README`, `._x.jpg`, `__meta__`) are skipped, as in webdataset,
but counted.
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

from rft.packing.foreign.patterns import as_patterns
from rft.shards import tar
from rft.storage import files, local, remote

PASSED_OVER_BY_WEBDATASET = re.compile(r"__[^/]*__($|/)")  # its `skip_meta`
TEXT_BYTES = 2**20  # of a .cls or .json
NO_SHARD = "no such shard"
SIZE_THREADS = 16  # querying sizes is latency-bound
PATTERNS = 5  # shown of the shards in a folder


class BadSample(ValueError):  # noqa: N818 - a sample is bad, the program is not
    """A sample without image or label, or whose image is unreadable: `--max-bad` leaves it out."""


class Sample(NamedTuple):
    """The members of one sample by suffix."""

    key: str
    members: dict[str, tar.Member]


def whole_url(url: str) -> str:
    """Make a local path absolute, without `.` parts; a URL is returned unchanged."""
    fs, path = files.open_store(url)
    return str(Path(path)) if isinstance(fs, LocalFileSystem) else url


def parent(url: str) -> str | None:
    """Find the folder of a complete URL; None if it has none (a host, a bucket)."""
    scheme, mark, rest = url.rstrip("/").rpartition("://")
    folder, slash, _ = rest.rpartition("/")
    if not slash or (mark and not folder):
        return None
    return scheme + mark + (folder or "/")


def shard_size(url: str) -> int:
    """Return the size of a shard in bytes.

    Raises:
        ValueError: if it does not exist, is a folder, or its store reports no size.
    """
    try:
        return files.size(url)
    except FileNotFoundError as error:
        raise ValueError(f"{NO_SHARD}: {url}") from error
    except IsADirectoryError as error:
        # a common mistake: suggest the pattern of the shards in the folder
        tars = [name for name in files.names(url) if name.endswith(".tar")]
        found = [f"'{files.join(url, pattern)}'" for pattern in as_patterns(tars)]
        more = f" and {len(found) - PATTERNS} more" if len(found) > PATTERNS else ""
        hint = f"name its shards: {' '.join(found[:PATTERNS])}{more}"
        raise ValueError(
            f"{url} is a folder, not a shard; {hint if found else 'it has no .tar files'} "
            f"(docs/data.md#third-party-shards)"
        ) from error


@contextmanager
def open_whole(url: str, size: int) -> Iterator[tuple[IO[bytes], str]]:
    """Yield a seekable stream of a complete shard of `size` bytes, and its sha256 in hex.

    A remote shard is copied into a temporary file, which is deleted after the body.

    Raises:
        ValueError: if it does not exist or cannot be read.
    """

    async def bring(fs: Any, path: str) -> IO[bytes]:
        with ExitStack() as stack:
            # unnamed, so that even a killed process leaves nothing behind
            copy = stack.enter_context(tempfile.TemporaryFile())
            await remote.fill(copy.fileno(), size, partial(remote.read_range, fs, path))
            # left open for the caller; an error above closes and thereby removes it
            stack.pop_all()
            return copy

    try:
        stream = files.ask(url, "read", bring, local.reader)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{NO_SHARD}: {url}") from error
    with stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        yield stream, sha256


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and lower-case suffix; None if webdataset would skip it."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or PASSED_OVER_BY_WEBDATASET.match(name):
        return None
    return folder + slash + stem, suffix.lower()


def read_samples(stream: IO[bytes], where: str, passed_over: Counter[str]) -> list[Sample]:
    """List the samples of a tar in order; names without a key are counted in `passed_over`.

    Raises:
        ValueError: if the tar is damaged, a member occurs twice, or the members of a sample are not
            contiguous: webdataset would split it into several samples.
    """
    samples: dict[str, Sample] = {}
    current = ""
    for member in tar.walk(stream, where):
        split = split_name(member.name)
        if split is None:
            passed_over["members without a key"] += 1
            continue
        key, suffix = split
        # webdataset ends a sample at the first member with a different key
        members = samples.setdefault(key, Sample(key, {})).members
        if suffix in members:
            raise ValueError(
                f"{where}: two members are named {members[suffix].name!r}"
                f"{_and_its_spelling(members[suffix], member)}; rename one"
            )
        if members and key != current:
            raise ValueError(
                f"{where}: key {key!r} recurs at byte {member.offset:,} ({member.name}) after "
                f"other keys; the members of a sample must be neighbours: write the tar again with "
                f"sorted names (tar --sort=name)"
            )
        current = key
        members[suffix] = member
    return list(samples.values())


def _and_its_spelling(first: tar.Member, second: tar.Member) -> str:
    # suffixes are compared in lower case
    return "" if first.name == second.name else f", except for case ({second.name!r})"


def read_text(stream: IO[bytes], member: tar.Member, where: str) -> bytes:
    """Read the content of a member that holds a label.

    Raises:
        ValueError: if it is too long for a label.
    """
    if member.size > TEXT_BYTES:
        raise ValueError(
            f"{where}: {member.name!r} has {member.size:,} bytes, too many for a label"
        )
    return read_member(stream, member)


def read_member(stream: IO[bytes], member: tar.Member) -> bytes:
    """Read the content of a member."""
    stream.seek(member.offset)
    return stream.read(member.size)
