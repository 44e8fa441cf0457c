"""Names of files and folders: system files to skip, unusable names, links, and output folders.

NAS devices, macOS and Windows put their own files beside the user's, some of them images
(thumbnails, one per photo). They are recognised by name, in upper or lower case. Galleries and
cameras put thumbnails into folders with plain names; inside a class folder these are skipped too.
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
    # macOS, and its files on servers; the name of a folder's icon ends in a carriage return
    *("__MACOSX", "Icon\r", "Network Trash Folder", "Temporary Items"),
    # Windows; the last one is Linux's
    *("Thumbs.db", "Thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),
    *("$RECYCLE.BIN", "RECYCLER", "Recycled", "System Volume Information", "lost+found"),
    # left beside photos by viewers and importers
    *("Picasa.ini", "ZbThumbnail.info", "photothumb.db"),
)
HIDDEN = ".*"
# hidden files ("._x.jpg" is macOS's for x.jpg); streams that were saved as separate files
SYSTEM_PATTERNS = (
    *("._*", HIDDEN, "*@SynoEAStream", "*@SynoResource", "*:Zone.Identifier"),
    # files rescued by Windows' chkdsk, Lightroom's previews
    *("found.[0-9][0-9][0-9]", "*.lrdata"),
)
Patterns = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]
"""Values of --ignore: it takes several names, and may be repeated."""
THUMBNAILS = re.compile(r"[\W_]*thumb(nail)?s?[\W_]*")
_SYSTEM = {name.casefold(): name for name in SYSTEM_NAMES}


def patterns_of(values: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Join the names of all --ignore options of a command line."""
    return tuple(chain.from_iterable(values))


def taken_for_name(values: Iterable[Iterable[str]]) -> str:
    """Write a hint if the last name of --ignore may have been meant as a folder or file.

    An option with any number of names also takes the positional arguments that follow it.
    """
    last = "".join(patterns_of(values)[-1:])
    if not last or not Path(last).exists():
        return ""
    return f"; --ignore took {shown(last)} as a name to skip: write it before the options"


def passed_over(name: str, ignore: Iterable[str] = ()) -> str:
    """Return the name or pattern by which a file or folder is skipped; empty if it is kept.

    This is a system name, or a pattern of `ignore` (as in `fnmatch`, in upper or lower case).
    """
    plain = composed(name).casefold()
    # the user's patterns first: a pattern without a match gets a warning
    for pattern in (*ignore, *SYSTEM_PATTERNS):
        # both casefolded, because fnmatch.fnmatch ignores case only on Windows
        if fnmatch.fnmatchcase(plain, composed(pattern).casefold()):
            return pattern
    return _SYSTEM.get(plain, "")


def named(pattern: str) -> str:
    """Format a name or pattern by which files are skipped, for a line that counts them."""
    return f"{printable(pattern)}{' (hidden)' if pattern == HIDDEN else ''}"


def thumbnails(name: str) -> str:
    """Return the name under which a folder of thumbnails is counted; empty for any other name.

    Not for folders that may be classes, because a class may have such a name.
    """
    plain = composed(name).casefold()
    return plain if THUMBNAILS.fullmatch(plain) else ""


def require_utf8(path: str | Path) -> None:
    """Check that the last part of a path is UTF-8, as manifests and class lists are.

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
            f"{root} holds two folders with the same name in different Unicode forms: "
            f"{twins[0]!a} and {twins[1]!a}; move their images into one"
        )


class Links:
    """Collects the links in a source folder that lead out of it, to images stored elsewhere."""

    def __init__(self, source: Path) -> None:
        self._source = source.resolve()
        self._found: list[str] = []

    def look(self, path: str | os.PathLike[str]) -> None:
        """Record a path that is a link, or is reached through one, if it leads out."""
        if not Path(os.path.realpath(path)).is_relative_to(self._source):
            self._found.append(os.fspath(path))

    def said(self) -> str:
        """Describe their number and the first of them in one line; empty if none was found."""
        if not self._found:
            return ""
        # min(): threads list the folders in any order
        several = len(self._found) > 1
        count = f"{len(self._found):,} links lead" if several else "a link leads"
        return (
            f"{count} out of {printable(str(self._source))}, and the targets are packed: "
            f"{printable(min(self._found))}{', ...' if several else ''}"
        )


def regular_size(entry: "os.PathLike[str]", links: Links | None = None) -> int:
    """Look up the size in bytes of a file, or of a link's target. Opens nothing.

    `links` records it if it is a link that leads out of the source.

    Raises:
        ValueError: for a broken link, a FIFO, a socket, a device or a folder.
    """
    path = os.fspath(entry)
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError as error:
            # no target, or a loop of links; a target without permission is not a broken link
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            raise ValueError(f"{path} is a broken link; remove it, or restore its target") from None
        if links:
            links.look(path)
    local.require_regular(path, status)
    return status.st_size


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path, which need not exist, is an existing folder or inside it, links resolved.

    Folders are compared by identity, so upper and lower case are left to the file system.
    """
    resolved = path.resolve()
    return folder.exists() and any(
        place.exists() and place.samefile(folder) for place in (resolved, *resolved.parents)
    )


def has_image_suffix(name: str) -> bool:
    """Whether a file's name has the suffix of a supported image format."""
    return PurePosixPath(name).suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
