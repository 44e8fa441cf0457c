"""Whole shards in a folder of this node, bounded in bytes and shared by its processes."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from rft.data.manifest import Shard

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Cache:
    """Whole shards in a folder of this node, shared by every process there, bounded in bytes.

    A shard's file is named after its sha256, so equal names of two sets never meet. It is written
    as a `.part` file whose full size is taken at once (so the bound counts it) and whose lock tells
    a filler that lives from one that was killed. There is no owner and no bookkeeping but the
    folder itself.

    When room is needed, the files that nobody asks for go: those of other data sets first, then the
    newest of our own. Shards come round once an epoch, where throwing away the least recently used
    would always throw away the next one to come; so a fixed part of the set stays.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the cache folder {folder}: {error.strerror}") from error
        self.folder = folder
        self.limit = limit
        self.refusals = 0

    def path(self, shard: Shard) -> Path:
        """Return where a shard is kept."""
        return self.folder / f"{shard.sha256}.tar"

    def has(self, shard: Shard) -> bool:
        """Whether the shard is there."""
        return self.path(shard).exists()

    def open(self, shard: Shard) -> int | None:
        """Return a descriptor of a shard's file, or None if it is not there."""
        try:
            return os.open(self.path(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None

    def drop(self, shard: Shard) -> None:
        """Delete a shard's file and give its room back, even where a process has it open."""
        _delete(self.path(shard))

    def begin(self, shard: Shard, *, keep: Set[str], known: Set[str]) -> "Part | None":
        """Take room for a shard; None if it is there, is another process's, or finds no room.

        Args:
            shard: the shard to be filled.
            keep: sha256 of the shards that must stay.
            known: sha256 of all shards of this data set.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".{shard.sha256}.part"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        part = Part(descriptor, path, self.path(shard), self._lock)
        if not _lock(descriptor) or not part.is_ours():
            os.close(descriptor)
            return None
        if self.has(shard):
            part.close()
            return None
        with self._lock():
            try:
                fits = self._make_room(shard.bytes, part.path, keep, known)
                if fits:
                    _allocate(descriptor, shard.bytes)
                    return part
            except OSError as error:
                part.close()
                if error.errno not in NO_ROOM:
                    raise
                self.refusals += 1
                return None
        part.close()
        return None

    def trim(self, known: Set[str]) -> None:
        """Delete what is above the limit, which may be lower than it was in an earlier run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._make_room(0, self.folder, set(), known)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, size: int, own: Path, keep: Set[str], known: Set[str]) -> bool:
        """Delete what may go until `size` bytes fit; False if they do not."""
        used, droppable = 0, []
        for path in self.folder.iterdir():
            if path == own or path.suffix not in (".part", ".tar"):
                continue
            with suppress(FileNotFoundError):
                if path.suffix == ".part" and _delete_abandoned(path):
                    continue
                status = path.stat()
                used += status.st_size
                if path.suffix == ".tar" and path.stem not in keep:
                    age = status.st_mtime_ns
                    order = (1, -age) if path.stem in known else (0, age)
                    droppable.append((order, status.st_size, path))
        for _, freed, path in sorted(droppable):
            if used + size <= self.limit:
                break
            _delete(path)
            used -= freed
        return used + size <= self.limit


class Part:
    """A shard's file while it is being filled; the lock on its descriptor makes it ours."""

    def __init__(
        self,
        descriptor: int,
        path: Path,
        final: Path,
        lock: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.descriptor = descriptor
        self.path = path
        self._final = final
        self._lock = lock

    def is_ours(self) -> bool:
        """Whether the path still names the file that we have locked."""
        return _is_named(self.path, self.descriptor)

    def sha256(self) -> str:
        """Return the hash of what was written."""
        with os.fdopen(os.dup(self.descriptor), "rb") as stream:
            stream.seek(0)
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def publish(self) -> None:
        """Make it the shard's file."""
        # whoever adds up the files now would look for it under neither of its names
        with self._lock():
            self.path.replace(self._final)

    def close(self) -> None:
        """Let go of it; what was not published is deleted."""
        if self.is_ours():
            _delete(self.path)
        os.close(self.descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether the path still names the file of the descriptor."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _delete(path: Path) -> None:
    # cut too: a reader that has it open sees too few bytes, and the disk has its room at once; but
    # last, because a process that ends in between must leave no empty file under a shard's name
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_WRONLY)
        try:
            path.unlink()
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)


def _delete_abandoned(path: Path) -> bool:
    """Delete a part whose filler was killed; False if one is alive."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        # while we have the lock of the file that the path names, nobody can put another there
        if not (_lock(descriptor) and _is_named(path, descriptor)):
            return False
        _delete(path)
        return True
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Take the disk's room now, so that a full disk is known before anything is fetched."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
