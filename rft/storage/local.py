"""Files of this machine that others may have put there.

What is read must be a regular file: opening a FIFO waits for a writer, and a device
has no end. What is written must not lie behind a symbolic link, which would lead the write, or a
deletion, to files that the user did not name. A folder that the user names may be a link.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable
from io import BufferedReader, BufferedWriter
from pathlib import Path

DEVICES = Path("/dev")
REMOVE, COPY = "; remove it", "; copy what it holds to a regular file"
# what is not regular, and what to do about it; a FIFO may be the shell's, as in `--classes <(...)`
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
        OSError: if it cannot be looked at.
    """
    mode = (status or os.stat(path)).st_mode  # noqa: PTH116 - a str is a path too
    if not stat.S_ISREG(mode):
        what, advice = KINDS.get(stat.S_IFMT(mode), OTHER_KIND)
        raise ValueError(f"{os.fspath(path)} is {what}, not a regular file{advice}")


def require_replaceable(path: Path) -> None:
    """Check that a file may be renamed to a path: only a regular file or a link is replaced.

    What a link leads to is never written to. Root may replace devices, for the whole machine, and
    `/dev/stdout` is a link; so nothing in `/dev` is replaced or added.

    Raises:
        ValueError: for a folder, a device, a FIFO or a socket, and for whatever lies in `/dev`.
        OSError: if it cannot be looked at.
    """
    # the parent alone: /dev/stdout itself resolves to a file or terminal elsewhere
    if path.parent.resolve() == DEVICES:
        raise ValueError(f"{path} lies in {DEVICES}, where nothing is written; name a regular file")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:  # a new file
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        what, _ = KINDS.get(stat.S_IFMT(mode), OTHER_KIND)
        raise ValueError(f"{path} is {what}, which is not replaced by a file; name a regular file")


def remove_unlocked(path: Path) -> bool:
    """Remove a regular file that no process holds a lock on; whether it was removed.

    A file stays that is gone meanwhile, that is none, or whose file system has no locks.
    """
    with contextlib.suppress(OSError, ValueError):
        # to write: NFS has an exclusive lock for such a descriptor alone
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
    """Open a regular file and return its descriptor; nothing else is waited for.

    A relative path starts from `folder`, a descriptor, if there is one.

    Raises:
        ValueError: for a FIFO, a socket or a device; with O_NOFOLLOW also for a link.
        IsADirectoryError: for a folder.
        OSError: if it cannot be opened.
    """
    try:
        # 0o666: the mode of a new file, before the user's umask
        descriptor = os.open(path, flags | WITHOUT_WAITING, 0o666, dir_fd=folder)
    except OSError as error:
        # what cannot be opened may be what must not be: a link, a socket, a FIFO without a reader
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
    """Open a regular file to be read; raises as `open_regular`."""
    return os.fdopen(open_regular(path), "rb")


def writer(path: str | os.PathLike[str]) -> BufferedWriter:
    """Empty a regular file and open it to be written, through no link; raises as `open_regular`."""
    return os.fdopen(open_regular(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "wb")


def require_no_links(folder: Path, names: Iterable[str], hint: str = "") -> None:
    """Check that what is written through in a folder is there itself, or not at all.

    The folder may be a link; `hint` is what to do besides removing one in it.

    Raises:
        ValueError: naming the first that is a link.
    """
    for name in names:
        path = folder / name
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link, and nothing is written or deleted through links; remove it"
                f"{hint and f', {hint}'}"
            )


def require_own_folder(path: Path, option: str) -> None:
    """Check that a folder is not a link which a different user put there.

    In a folder that all may write, such as /tmp, it could lead to the user's own files.

    Raises:
        ValueError: if it is.
    """
    if path.is_symlink() and path.lstat().st_uid not in (os.geteuid(), 0):
        raise ValueError(
            f"{path} is a link that belongs to a different user; name a folder of your own with "
            f"{option}"
        )
