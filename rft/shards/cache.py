"""Complete shards in a folder of this node, bounded in bytes and shared by its processes.

Other users may write the folder too. Files are opened and deleted by name within the open folder,
never through a link, and only names that the cache itself gives (a hash of 64 hex digits) count as
its files: whatever else lies there is never touched.
"""

import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Set
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from rft.shards.manifest import Shard
from rft.storage import local

HASH = re.compile("[0-9a-f]{64}")
WHOLE, PART = re.compile(rf"({HASH.pattern})\.tar"), re.compile(rf"\.{HASH.pattern}\.part")


class Folder:
    """An open cache folder: a different one that takes its place meanwhile is not touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            # a link raises ELOOP in POSIX and, with O_DIRECTORY, ENOTDIR on Linux, as a file does
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise ValueError(
                f"the cache folder {path} was replaced by a link or a file; remove it, or choose "
                f"another --loader.cache-dir"
            ) from error

    def open(self, name: str, flags: int) -> int:
        """Open a regular file and return its descriptor.

        Raises:
            ValueError: if it is anything else, such as a link.
            OSError: if it cannot be opened.
        """
        try:
            return local.open_regular(name, flags | os.O_NOFOLLOW, self.descriptor)
        except ValueError as error:
            raise ValueError(f"in the cache folder {self.path}: {error}") from error

    def delete(self, name: str) -> None:
        """Delete a file if it exists, and free its space even where a process has it open."""
        # cut too: a reader that has it open sees too few bytes, and the disk has its room at once;
        # but last, because a process that ends in between must leave no empty file under a shard's
        # name. A file with another name elsewhere is not the cache's alone, and is not cut
        with suppress(FileNotFoundError):
            descriptor = self.open(name, os.O_WRONLY)
            try:
                alone = os.fstat(descriptor).st_nlink == 1
                os.unlink(name, dir_fd=self.descriptor)
                if alone:
                    os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder's lock for the length of the body."""
        descriptor = self.open(".lock", os.O_RDWR | os.O_CREAT)
        try:
            # flock, not lockf: it locks open files, not processes, so threads exclude each other
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close the folder's descriptor."""
        os.close(self.descriptor)


class Cache:
    """Complete shards in a folder of this node, shared by every process there, bounded in bytes.

    A shard's file is named after its sha256, so equal names of two sets never meet. It is written
    as a `.part` file whose full size is taken at once (so the bound counts it) and whose lock
    distinguishes a live filler from a killed one. There is no owner and no bookkeeping but the
    folder itself.

    When space is needed, files that no process asks for are deleted: those of other data sets
    first, then the newest of our own. Shards come round once per epoch, so deleting the least
    recently used would always delete the next one to come; this way a fixed part of the set stays.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        local.require_own_folder(folder, "--loader.cache-dir")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the cache folder {folder}: {error.strerror}") from error
        self.folder = folder.resolve()  # a link of the user's own is followed here, and only here
        self.limit = limit

    def path(self, shard: Shard) -> Path:
        """Return where a shard is kept.

        Raises:
            ValueError: if its sha256 is none, and so no name of a file.
        """
        if not HASH.fullmatch(shard.sha256):
            raise ValueError(
                f"shard {shard.name}: its sha256 is {shard.sha256!r}, no 64 hex digits"
            )
        return self.folder / f"{shard.sha256}.tar"

    def has(self, shard: Shard) -> bool:
        """Whether the cache has the shard."""
        return self.path(shard).exists()

    def open(self, shard: Shard) -> int | None:
        """Return a descriptor of a shard's file, or None if it is absent or not this user's.

        The owner of a file can put other pixels with fitting checksums into it at any time.
        """
        with suppress(FileNotFoundError), closing(Folder(self.folder)) as folder:
            # root can exchange any file of this user anyway
            descriptor = folder.open(self.path(shard).name, os.O_RDONLY)
            if os.fstat(descriptor).st_uid in (os.geteuid(), 0):
                return descriptor
            os.close(descriptor)
        return None

    def drop(self, shard: Shard) -> None:
        """Delete a shard's file and free its space, even where a process has it open."""
        with suppress(FileNotFoundError), closing(Folder(self.folder)) as folder:
            folder.delete(self.path(shard).name)

    def begin(self, shard: Shard, *, keep: Set[str], known: Set[str]) -> "Part | None":
        """Reserve space for a shard; None if it exists, is another process's, or does not fit.

        `keep` has the sha256 of the shards that must stay, `known` of all shards of this data set.

        Raises:
            ValueError: if something else than a file of the cache is in its place.
            OSError: if the disk has no room, or fails.
        """
        final = self.path(shard).name
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = Folder(self.folder)
        part = Part(folder, f".{shard.sha256}.part", final)
        with ExitStack() as unless_taken:
            unless_taken.callback(part.close)
            # only under the part's lock: its last filler may have published the shard just now
            if part.is_ours and not self.has(shard):
                with folder.lock():
                    # locked, or two processes would give the same space to two shards
                    if self._make_room(folder, shard.bytes, part.name, keep, known):
                        _allocate(part.descriptor, shard.bytes)
                        unless_taken.pop_all()
                        return part
        return None

    def trim(self, known: Set[str]) -> None:
        """Delete what is above the limit, which may be lower than it was in an earlier run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with closing(Folder(self.folder)) as folder, folder.lock():
            self._make_room(folder, 0, "", set(), known)

    def _make_room(
        self, folder: Folder, size: int, own: str, keep: Set[str], known: Set[str]
    ) -> bool:
        """Delete what may go until `size` bytes fit; False if they do not."""
        used, droppable = 0, []
        for name in os.listdir(folder.descriptor):  # noqa: PTH208 - a descriptor is no path
            whole, part = WHOLE.fullmatch(name), PART.fullmatch(name)
            # our own part is what `size` stands for
            if name == own or not (whole or part):
                continue
            with suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    continue  # a different user's: it takes no room, and is refused when it is read
                if part and _delete_abandoned(folder, name):
                    continue
                used += status.st_size
                if whole and whole[1] not in keep:
                    age = status.st_mtime_ns
                    # sorted: other sets before this one, theirs oldest first and ours newest first
                    order = (1, -age) if whole[1] in known else (0, age)
                    droppable.append((order, status.st_size, name))
        for _, freed, name in sorted(droppable):
            if used + size <= self.limit:
                break
            with suppress(PermissionError):  # a different user's: it stays, and counts
                folder.delete(name)
                used -= freed
        return used + size <= self.limit


class Part:
    """A shard's file while it is being filled, in an open folder that is closed with it.

    The lock on its descriptor makes it ours; without the lock, `close` leaves the file as it is.

    Raises:
        ValueError: if the name is not that of a file which the cache alone has.
    """

    def __init__(self, folder: Folder, name: str, final: str) -> None:
        self.name = name
        self._folder, self._final = folder, final
        with ExitStack() as opened:
            opened.callback(folder.close)
            self.descriptor = folder.open(name, os.O_RDWR | os.O_CREAT)
            opened.callback(os.close, self.descriptor)
            # written and cut at once: with another name it may be a file of the user's
            if os.fstat(self.descriptor).st_nlink > 1:
                raise ValueError(f"{folder.path / name} has a second name elsewhere; remove it")
            # between opening and locking, the process that had it may have published or deleted it
            self.is_ours = _lock(self.descriptor) and _is_named(folder, name, self.descriptor)
            self.let_go = opened.pop_all().close  # which leaves the file as it is

    def sha256(self) -> str:
        """Return the hash of what was written."""
        # a duplicate: closing the descriptor itself would release the lock
        with os.fdopen(os.dup(self.descriptor), "rb") as stream:
            stream.seek(0)
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def publish(self) -> None:
        """Make it the shard's file."""
        descriptor = self._folder.descriptor
        # not synced to the disk: a sample that a crash damages fails its crc32 and is fetched again
        # a process that adds up the files now would look for it under neither of its names
        with self._folder.lock():
            os.rename(self.name, self._final, src_dir_fd=descriptor, dst_dir_fd=descriptor)

    def close(self) -> None:
        """Close the file; if it is ours and was not published, it is deleted."""
        if self.is_ours and _is_named(self._folder, self.name, self.descriptor):
            self._folder.delete(self.name)
        self.let_go()


def _lock(descriptor: int) -> bool:
    # the lock ends with its process, however that ends: so a part without one is abandoned
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(folder: Folder, name: str, descriptor: int) -> bool:
    """Whether a name is still that of the file of the descriptor."""
    with suppress(FileNotFoundError):
        status = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
        return os.path.samestat(status, os.fstat(descriptor))
    return False


def _delete_abandoned(folder: Folder, name: str) -> bool:
    """Delete a part whose filler was killed; False if one is alive, or it may not be."""
    with suppress(PermissionError), ExitStack() as opened:
        descriptor = folder.open(name, os.O_RDWR)
        opened.callback(os.close, descriptor)
        # while we have the lock of the file that has the name, no process can put another there
        if _lock(descriptor) and _is_named(folder, name, descriptor):
            folder.delete(name)
            return True
    return False


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the disk's space now, so that a full disk is known before anything is fetched."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS has no such call; the size counts for the bound, the space is not reserved
        os.ftruncate(descriptor, size)
