"""Names of files and folders: those a system leaves behind, those that cannot be kept, and output.

NAS devices, macOS and Windows put files of their own beside a user's, some of them images
(thumbnails, one per photo). They are recognised by name, in any case of letters. Galleries and
cameras put thumbnails into folders with plain names; inside a class folder these are left out too.
"""

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Iterable
from itertools import chain
from pathlib import Path, PurePosixPath

import tyro

from rft.classes import composed, find_twins
from rft.shards.image_files import IMAGE_SUFFIXES
from rft.storage import local
from rft.text import printable, shown

SYSTEM_NAMES = (
    # Synology, QNAP, NetApp
    *("@eaDir", "#recycle", "#snapshot", "@tmp", "@SynoResource"),
    *("@Recycle", "@Recently-Snapshot", "@__thumb", "~snapshot"),
    # macOS, and its files on servers; a folder's icon has a name that ends in a carriage return
    *("__MACOSX", "Icon\r", "Network Trash Folder", "Temporary Items"),
    # Windows; a disk's own folder on Linux
    *("Thumbs.db", "Thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),
    *("$RECYCLE.BIN", "RECYCLER", "Recycled", "System Volume Information", "lost+found"),
    # what viewers and importers leave beside photos
    *("Picasa.ini", "ZbThumbnail.info", "photothumb.db"),
)
# hidden files, of which "._x.jpg" is macOS's for x.jpg; streams that became files of their own
SYSTEM_PATTERNS = (
    *("._*", ".*", "*@SynoEAStream", "*@SynoResource", "*:Zone.Identifier"),
    # what Windows' chkdsk rescued, Lightroom's previews
    *("found.[0-9][0-9][0-9]", "*.lrdata"),
)
Patterns = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]
"""Values of --ignore: names after each, and each adds to those before."""
THUMBNAILS = re.compile(r"[\W_]*thumb(nail)?s?[\W_]*")
_SYSTEM = {name.casefold(): name for name in SYSTEM_NAMES}


def patterns_of(values: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Return the names of all --ignore of a command line."""
    return tuple(chain.from_iterable(values))


def taken_for_name(values: Iterable[Iterable[str]]) -> str:
    """Word a hint where the last name of --ignore may have been meant as a folder or file.

    An option that takes any number of names takes what stands behind it, too.
    """
    last = "".join(patterns_of(values)[-1:])
    if not last or not Path(last).exists():
        return ""
    return f"; --ignore took {shown(last)} as a name to pass over: write it before the options"


def passed_over(name: str, ignore: Iterable[str] = ()) -> str:
    """Return what a file or folder that is left out is counted under; empty if it is not left out.

    That is a system's name, or a pattern of `ignore` (of `fnmatch`, in any case of letters).
    """
    plain = composed(name).casefold()
    # the user's patterns first: one that is counted nowhere is warned of
    for pattern in (*ignore, *SYSTEM_PATTERNS):
        # both in folded case, because fnmatch.fnmatch ignores case only on Windows
        if fnmatch.fnmatchcase(plain, composed(pattern).casefold()):
            return pattern
    return _SYSTEM.get(plain, "")


def thumbnails(name: str) -> str:
    """Return what a folder of thumbnails is counted under, empty if it is none by its name.

    A class may be called so, which is why this is not for folders that may be classes.
    """
    plain = composed(name).casefold()
    return plain if THUMBNAILS.fullmatch(plain) else ""


def require_utf8(path: str | Path) -> None:
    """Check the last part of a path: manifests and class lists are UTF-8.

    Raises:
        ValueError: showing the bytes of a name that is not UTF-8.
    """
    folder, name = os.path.split(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the name {os.fsencode(name)!r} in {printable(folder)} is not UTF-8; rename it"
        ) from None


def require_distinct(root: Path, names: Iterable[str]) -> None:
    """Check that folders differ in more than the Unicode form of their names.

    Raises:
        ValueError: with both names, escaped, because they look alike.
    """
    if twins := find_twins(names):
        raise ValueError(
            f"{root} holds two folders of one name in different Unicode forms: {twins[0]!a} and "
            f"{twins[1]!a}; move their images into one"
        )


class Links:
    """The links in a source folder that lead out of it, so that what is packed lies elsewhere."""

    def __init__(self, source: Path) -> None:
        self._source = source.resolve()
        self._found: list[str] = []

    def look(self, path: str | os.PathLike[str]) -> None:
        """Count what is known to be a link, or to lie behind one, if it leads out."""
        if not Path(os.path.realpath(path)).is_relative_to(self._source):
            self._found.append(os.fspath(path))

    def said(self) -> str:
        """Return the number of them and the first in one line; nothing if there are none."""
        if not self._found:
            return ""
        # the first by name below, because folders are listed in threads, in any order
        several = len(self._found) > 1
        count = f"{len(self._found):,} links lead" if several else "a link leads"
        return (
            f"{count} out of {printable(str(self._source))}, and what lies there is packed: "
            f"{printable(min(self._found))}{', ...' if several else ''}"
        )


def regular_size(entry: "os.PathLike[str]", links: Links | None = None) -> int:
    """Look up the size in bytes of a file, or of the file that a link leads to. Opens nothing.

    `links` counts it if it is a link that leads out of the source.

    Raises:
        ValueError: for a broken link, a FIFO, a socket, a device or a folder.
    """
    path = os.fspath(entry)
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError as error:
            # no target, or links in a circle; a target that may not be looked at is no broken link
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            raise ValueError(f"{path} is a broken link; remove it, or restore its target") from None
        if links:
            links.look(path)
    local.require_regular(path, status)
    return status.st_size


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path, which need not exist, is a folder that exists or lies in it, links resolved.

    Folders are compared by what they are, so that the case of letters is the file system's matter.
    """
    resolved = path.resolve()
    return folder.exists() and any(
        place.exists() and place.samefile(folder) for place in (resolved, *resolved.parents)
    )


def has_image_suffix(name: str) -> bool:
    """Whether a file's name says that it is an image of a kind that is packed."""
    return PurePosixPath(name).suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
