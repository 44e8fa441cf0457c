"""A node-local cache of complete shards, bounded in bytes and shared by the node's processes.

Other users may have write access to the folder. Files are opened and deleted by name within the
open folder, never through a link. Only names that the cache itself generates (a hash of 64 hex
digits) count as its files; all others are never touched.
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
    """An open cache folder; if the path is replaced meanwhile, the replacement is not touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            # a link raises ELOOP in POSIX but ENOTDIR on Linux with O_DIRECTORY, as a file does
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise ValueError(
                f"the cache folder {path} was replaced by a link or a file; remove it, or choose "
                f"another --loader.cache-dir (docs/security.md#shared-folders)"
            ) from error

    def open(self, name: str, flags: int) -> int:
        """Open a regular file and return its descriptor.

        Raises:
            ValueError: if it is not a regular file, for example a link.
            OSError: if it cannot be opened.
        """
        try:
            return local.open_regular(name, flags | os.O_NOFOLLOW, self.descriptor)
        except ValueError as error:
            raise ValueError(f"in the cache folder {self.path}: {error}") from error

    def delete(self, name: str) -> None:
        """Delete a file if it exists, and free its space even if a process has it open."""
        # truncated too, so that the space is free at once; a reader that has it open gets a short
        # read. Truncated last: a process killed in between must not leave an empty file under a
        # shard's name. A file with a second link is not only the cache's, and is not truncated
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
        """Hold the folder's lock while the body runs."""
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

    A shard's file is named after its sha256, so equal shard names of two sets do not collide. It is
    written as a `.part` file, which reserves its full size immediately, so that the bound counts
    it, and whose lock distinguishes a live filler from a killed one. There is no owner and no
    bookkeeping besides the folder itself.

    To free space, files that no process needs are deleted: those of other data sets first, then the
    newest of this set. Each shard is used once per epoch, so evicting the least recently used one
    would always evict the next one needed; this order keeps a fixed part of the set.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        local.require_own_folder(folder, "--loader.cache-dir")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the cache folder {folder}: {error.strerror}") from error
        self.folder = folder.resolve()  # the user's own link is followed here, and only here
        self.limit = limit

    def path(self, shard: Shard) -> Path:
        """Return the path of a shard in the cache.

        Raises:
            ValueError: if its sha256 is malformed, and so unfit for a file name.
        """
        if not HASH.fullmatch(shard.sha256):
            raise ValueError(
                f"shard {shard.name}: its sha256 is {shard.sha256!r}, not 64 hex digits"
            )
        return self.folder / f"{shard.sha256}.tar"

    def has(self, shard: Shard) -> bool:
        """Whether the cache has the shard."""
        return self.path(shard).exists()

    def open(self, shard: Shard) -> int | None:
        """Open a shard's file and return its descriptor; None if absent or not this user's.

        The owner of a file can replace its pixels and their checksums at any time.
        """
        with suppress(FileNotFoundError), closing(Folder(self.folder)) as folder:
            # root can replace any file of this user anyway
            descriptor = folder.open(self.path(shard).name, os.O_RDONLY)
            if os.fstat(descriptor).st_uid in (os.geteuid(), 0):
                return descriptor
            os.close(descriptor)
        return None

    def drop(self, shard: Shard) -> None:
        """Delete a shard's file and free its space, even if a process has it open."""
        with suppress(FileNotFoundError), closing(Folder(self.folder)) as folder:
            folder.delete(self.path(shard).name)

    def begin(self, shard: Shard, *, keep: Set[str], known: Set[str]) -> "Part | None":
        """Reserve space for a shard.

        `keep` has the sha256 of the shards that must stay, `known` those of all shards of this data
        set. None if the shard exists, does not fit, or is being filled by a different process.

        Raises:
            ValueError: if its path is occupied by anything but a file of the cache.
            OSError: if the disk is full or fails.
        """
        final = self.path(shard).name
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = Folder(self.folder)
        part = Part(folder, f".{shard.sha256}.part", final)
        with ExitStack() as unless_taken:
            unless_taken.callback(part.close)
            # tested under the part's lock: its last filler may have just published the shard
            if part.is_ours and not self.has(shard):
                with folder.lock():
                    # locked, or two processes could give the same space to two shards
                    if self._make_room(folder, shard.bytes, part.name, keep, known):
                        _allocate(part.descriptor, shard.bytes)
                        unless_taken.pop_all()
                        return part
        return None

    def trim(self, known: Set[str]) -> None:
        """Delete files above the limit, which may have been higher in an earlier run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with closing(Folder(self.folder)) as folder, folder.lock():
            self._make_room(folder, 0, "", set(), known)

    def _make_room(
        self, folder: Folder, size: int, own: str, keep: Set[str], known: Set[str]
    ) -> bool:
        """Evict files until `size` bytes fit; False if they still do not."""
        used, droppable = 0, []
        for name in os.listdir(folder.descriptor):  # noqa: PTH208 - a descriptor, not a path
            whole, part = WHOLE.fullmatch(name), PART.fullmatch(name)
            # `size` counts our own part already
            if name == own or not (whole or part):
                continue
            with suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    continue  # a different user's: it takes no space, and reading it is refused
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
            with suppress(PermissionError):  # a different user's: it stays, and still counts
                folder.delete(name)
                used -= freed
        return used + size <= self.limit


class Part:
    """A shard's file while it is filled, in an open folder that is closed with it.

    The lock on its descriptor makes it ours; without the lock, `close` keeps the file unchanged.

    Raises:
        ValueError: if the file is not regular, or has a second name elsewhere.
    """

    def __init__(self, folder: Folder, name: str, final: str) -> None:
        self.name = name
        self._folder, self._final = folder, final
        with ExitStack() as opened:
            opened.callback(folder.close)
            self.descriptor = folder.open(name, os.O_RDWR | os.O_CREAT)
            opened.callback(os.close, self.descriptor)
            # it will be truncated: with a second name it may be one of the user's files
            if os.fstat(self.descriptor).st_nlink > 1:
                raise ValueError(f"{folder.path / name} has a second name elsewhere; remove it")
            # before the lock was taken, its previous filler may have published or deleted it
            self.is_ours = _lock(self.descriptor) and _is_named(folder, name, self.descriptor)
            self.let_go = opened.pop_all().close  # keeps the file unchanged

    def sha256(self) -> str:
        """Hash the bytes written so far."""
        # a duplicate: closing the descriptor itself would release the lock
        with os.fdopen(os.dup(self.descriptor), "rb") as stream:
            stream.seek(0)
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def publish(self) -> None:
        """Rename it to the shard's final name."""
        descriptor = self._folder.descriptor
        # not synced to disk: a sample damaged by a crash fails its crc32 and is fetched again.
        # Locked, or a process that adds up the files could find it under neither name
        with self._folder.lock():
            os.rename(self.name, self._final, src_dir_fd=descriptor, dst_dir_fd=descriptor)

    def close(self) -> None:
        """Close the file, and delete it if it is ours and was not published."""
        if self.is_ours and _is_named(self._folder, self.name, self.descriptor):
            self._folder.delete(self.name)
        self.let_go()


def _lock(descriptor: int) -> bool:
    # the lock ends with its process, even a killed one: so a part without a lock is abandoned
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(folder: Folder, name: str, descriptor: int) -> bool:
    """Whether a name still belongs to the descriptor's file."""
    with suppress(FileNotFoundError):
        status = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
        return os.path.samestat(status, os.fstat(descriptor))
    return False


def _delete_abandoned(folder: Folder, name: str) -> bool:
    """Delete a part whose filler was killed; False if it is alive, or deletion is not permitted."""
    with suppress(PermissionError), ExitStack() as opened:
        descriptor = folder.open(name, os.O_RDWR)
        opened.callback(os.close, descriptor)
        # while we hold the lock of the file with this name, no process can replace it
        if _lock(descriptor) and _is_named(folder, name, descriptor):
            folder.delete(name)
            return True
    return False


def _allocate(descriptor: int, size: int) -> None:
    """Reserve disk space now, so that a full disk is noticed before anything is fetched."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS has no such call: the bound counts the size, but no space is reserved
        os.ftruncate(descriptor, size)
