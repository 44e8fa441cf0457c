"""Local files that other users may have created.

Only regular files are read: opening a FIFO waits for a writer, and a device has no end. Nothing is
written through a symbolic link, which would redirect a write or a deletion to files that the user
did not name. A folder that the user names may be a link.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable
from io import BufferedReader, BufferedWriter
from pathlib import Path

DEVICES = Path("/dev")
REMOVE, COPY = "; remove it", "; copy its content to a regular file"
# kinds that are not regular, and the advice; a FIFO may be the shell's, as in `--classes <(...)`
KINDS = {
    stat.S_IFIFO: ("a FIFO", COPY),
    stat.S_IFSOCK: ("a socket", REMOVE),
    stat.S_IFCHR: ("a device", COPY),
    stat.S_IFBLK: ("a device", COPY),
    stat.S_IFDIR: ("a folder", ""),
    stat.S_IFLNK: ("a link", REMOVE),
}
OTHER_KIND = ("something else", REMOVE)
# O_NONBLOCK: opening a FIFO does not wait for its other end
WITHOUT_WAITING = os.O_NONBLOCK


def require_regular(path: str | os.PathLike[str], status: os.stat_result | None = None) -> None:
    """Check that a path, or the target of a link, is a regular file. Opens nothing.

    Raises:
        ValueError: for a FIFO, a socket, a device, a folder or (by its status) a link.
        OSError: if it cannot be examined.
    """
    mode = (status or os.stat(path)).st_mode  # noqa: PTH116 - a str is a path too
    if not stat.S_ISREG(mode):
        what, advice = KINDS.get(stat.S_IFMT(mode), OTHER_KIND)
        raise ValueError(f"{os.fspath(path)} is {what}, not a regular file{advice}")


def require_replaceable(path: Path) -> None:
    """Check that a file may be renamed to a path: only a regular file or a link is replaced.

    The target of a link is never written. Root could replace devices for the entire machine, and
    `/dev/stdout` is a link, so nothing in `/dev` is replaced or added.

    Raises:
        ValueError: for a folder, a device, a FIFO or a socket, and for any path in `/dev`.
        OSError: if it cannot be examined.
    """
    # only the parent: /dev/stdout itself resolves to a file or terminal elsewhere
    if path.parent.resolve() == DEVICES:
        raise ValueError(f"{path} is in {DEVICES}, where rft does not write; name a regular file")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:  # a new file
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        what, _ = KINDS.get(stat.S_IFMT(mode), OTHER_KIND)
        raise ValueError(f"{path} is {what} and cannot be replaced; name a regular file")


def remove_unlocked(path: Path) -> bool:
    """Remove a regular file that no process has locked; return whether it was removed.

    Nothing happens if it has vanished, is not a regular file, or its file system has no locks.
    """
    with contextlib.suppress(OSError, ValueError):
        # opened for writing: NFS grants an exclusive lock only on such a descriptor
        descriptor = open_regular(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
        finally:
            os.close(descriptor)
    return False


def open_regular(
    path: str | os.PathLike[str], flags: int = os.O_RDONLY, folder: int | None = None
) -> int:
    """Open a regular file and return its descriptor, without waiting on a FIFO or device.

    A relative path starts from `folder`, an optional descriptor.

    Raises:
        ValueError: for a FIFO, a socket or a device; with O_NOFOLLOW also for a link.
        IsADirectoryError: for a folder.
        OSError: if it cannot be opened.
    """
    try:
        # 0o666: the mode of a new file, before the user's umask
        descriptor = os.open(path, flags | WITHOUT_WAITING, 0o666, dir_fd=folder)
    except OSError as error:
        # it may be a kind that is refused anyway (a link, a socket, a FIFO without a reader):
        # that error is clearer
        if not isinstance(error, FileNotFoundError | IsADirectoryError):
            follows = not flags & os.O_NOFOLLOW
            require_regular(path, os.stat(path, dir_fd=folder, follow_symlinks=follows))
        raise
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{os.fspath(path)} is a folder")
        require_regular(path, status)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def reader(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading; raises as `open_regular`."""
    return os.fdopen(open_regular(path), "rb")


def writer(path: str | os.PathLike[str]) -> BufferedWriter:
    """Truncate a regular file and open it for writing, never through a link.

    Raises as `open_regular`.
    """
    return os.fdopen(open_regular(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "wb")


def require_no_links(folder: Path, names: Iterable[str], hint: str = "") -> None:
    """Check that none of the names in a folder, through which files are written, is a link.

    They may be absent, and the folder itself may be a link. `hint` is advice besides removing it.

    Raises:
        ValueError: naming the first link.
    """
    for name in names:
        path = folder / name
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link; rft never writes or deletes through links: remove it"
                f"{hint and f', {hint}'}"
            )


def require_own_folder(path: Path, option: str) -> None:
    """Check that a folder is not a link that a different user created.

    In a world-writable folder, such as /tmp, it could point to the user's own files.

    Raises:
        ValueError: if it is such a link.
    """
    if path.is_symlink() and path.lstat().st_uid not in (os.geteuid(), 0):
        raise ValueError(
            f"{path} is a link that belongs to a different user; name a folder of your own with "
            f"{option} (docs/security.md#shared-folders)"
        )
