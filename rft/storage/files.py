"""Files that are complete or absent, on any store that `rft.storage.urls` admits.

Everything is written under a temporary name and then renamed, or uploaded as one finished object,
so a reader never sees half a file. No URL is ever passed to a shell.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import posixpath
import re
import stat
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import get_loop, sync
from fsspec.implementations.local import LocalFileSystem

import rft
from rft import commands
from rft.storage import documents, local, remote, urls

T = TypeVar("T")

# default limit of a document read at once: Python keeps a text with one rare letter at four bytes
# per letter, in several copies
DOCUMENT_BYTES = 2**26
BESIDE = 1000  # names compared with that of a missing file
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")  # left by `publish` when it is killed


def open_store(url: str) -> tuple[AbstractFileSystem, str]:
    """Find the fsspec file system of `url` and the path inside it.

    Raises:
        ValueError: for a URL that `rft.storage.urls` refuses, or a client that is not installed or
            not configured.
    """
    urls.check(url)
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, TypeError, ImportError) as error:
        hint = urls.installation(url) if isinstance(error, ImportError) else ""
        raise ValueError(f"cannot open {url!r}: {reason(error)}{hint}") from error


def require_local(path: str | Path, option: str) -> None:
    """Check that a file or folder which is opened by path, or written incrementally, is local.

    Raises:
        ValueError: for a URL, which would otherwise become a local folder named after its scheme.
    """
    text = str(path)
    if urls.is_whole(text) or urls.protocol_word(text):
        raise ValueError(
            f"{option} is {urls.shown(text)}; it must be a local folder or file: copy it yourself "
            "before or afterwards"
        )
    urls.check(text)


def require_file(path: Path, what: str) -> None:
    """Check that a local path is a regular file: reading a FIFO or a device may never return.

    `what` describes the expected file in messages.

    Raises:
        ValueError: if it is absent or anything else.
    """
    if path.is_dir():
        raise ValueError(f"no {what} at {path}: it is a folder")
    try:
        local.require_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no {what} at {path}: it does not exist{_did_you_mean(path)}") from None


def _did_you_mean(path: Path) -> str:
    """Name the file or folder beside a missing one that has nearly its name."""

    def stem(one: Path) -> str:
        # of runs/wise-ft-0.5 the number is no suffix
        return one.name if one.suffix[1:].isdigit() else one.stem

    try:
        beside = {stem(one): one for one in islice(path.parent.iterdir(), BESIDE)}
    except OSError:
        return ""
    # suffixes would make all names alike
    close = get_close_matches(stem(path), beside, n=1, cutoff=0.8)
    return f"; did you mean {beside[close[0]]}?" if close else ""


def join(url: str, *names: str) -> str:
    """Append path components to a URL or a local path."""
    return "/".join([url.rstrip("/"), *names])


def name_of(url: str) -> str:
    """Return the last component of a URL or of a local path, which may be relative."""
    return posixpath.basename(posixpath.normpath(open_store(url)[1]))


def resolve(url: str, name: str) -> str:
    """Locate `name`: below `url`, unless it is a URL or an absolute path itself.

    Untrusted names were checked by `rft.storage.urls.check_shard_name`.
    """
    return name if urls.is_whole(name) or name.startswith("/") else join(url, name)


def ask(url: str, verb: str, question: Callable, of_path: Callable) -> Any:
    """Query `url`: with `question` of `rft.storage.remote`, or with `of_path` for a local path.

    Raises:
        FileNotFoundError, IsADirectoryError: as the store reports.
        ValueError: if the query fails; `verb` is for the message.
    """
    fs, path = open_store(url)
    try:
        if isinstance(fs, LocalFileSystem):
            return of_path(Path(path))
        return sync(get_loop(), question, remote.client(fs), path)
    except (FileNotFoundError, NotADirectoryError) as error:  # the latter: below a file
        raise FileNotFoundError(path) from error
    except IsADirectoryError:
        raise
    except (remote.Failure, OSError) as error:
        raise ValueError(f"cannot {verb} {url}: {reason(error)}") from error


def exists(url: str) -> bool:
    """Whether a file or folder exists at `url`.

    Raises:
        ValueError: if the store does not answer.
    """
    try:
        # not Path.exists, which hides some errors as False, such as a loop of links
        return ask(url, "look for", remote.exists, lambda path: bool(path.stat()))
    except FileNotFoundError:
        return False


def size(url: str) -> int:
    """Return the size in bytes of a file that will be read in ranges.

    Raises:
        FileNotFoundError: if the store reports that no such file exists.
        IsADirectoryError: if it is a folder.
        ValueError: if the store reports no size, or serves no ranges.
    """

    def measure(path: Path) -> int:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(path)
        local.require_regular(path, status)
        return status.st_size

    return ask(url, "read", remote.size, measure)


def find_bytes(url: str, limit: int = DOCUMENT_BYTES) -> bytes | None:
    """Read all of `url`; None if the store reports that no such file exists.

    Raises:
        ValueError: if it cannot be read, or is larger than `limit` bytes.
    """

    def read(path: Path) -> bytes:
        with local.reader(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read() if size <= limit else b""
        # the file may have grown since its size was read
        if max(size, len(data)) > limit:
            raise ValueError(f"cannot read {url}: {remote.too_large(limit)}")
        return data

    try:
        return ask(url, "read", partial(remote.read, limit=limit), read)
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise ValueError(f"cannot read {url}: it is a folder") from error


def read_bytes(url: str, limit: int = DOCUMENT_BYTES) -> bytes:
    """Read all of `url`.

    Raises:
        ValueError: if no such file exists, it cannot be read, or it is larger than `limit` bytes.
    """
    data = find_bytes(url, limit)
    if data is None:
        # the cause distinguishes an absent file from one that cannot be read
        raise ValueError(f"no such file: {url}") from FileNotFoundError(url)
    return data


def is_answered(error: ValueError) -> bool:
    """Whether a request of this module failed by an answer that a retry would not change."""
    cause = error.__cause__
    if isinstance(cause, remote.Failure):
        cause = cause.__cause__
    return cause is None or not remote.is_transient(cause)


def reason(error: BaseException) -> str:
    """Describe a client's error on one line, without credentials.

    rft accepts no URL with credentials, but a server may redirect a client to one.
    """
    return urls.redact(" ".join(remote.explain(error).split()))


def read_json(url: str, limit: int = DOCUMENT_BYTES) -> Any:
    """Read any JSON document at `url`.

    Raises:
        ValueError: if it is absent, larger than `limit` bytes, or not JSON.
    """
    return documents.parse(read_bytes(url, limit), url)


def read_document(
    url: str, kind: type[T], limit: int = DOCUMENT_BYTES, values: int = documents.VALUES
) -> T:
    """Read the JSON document at `url` as a type that `documents` checks.

    Raises:
        ValueError: naming the fault, if it is absent, larger than `limit` bytes, holds more than
            `values` values, or does not match the type.
    """
    return documents.decode(read_bytes(url, limit), kind, url, values=values)


@contextlib.contextmanager
def _client_errors(verb: str, url: str) -> Iterator[None]:
    """Turn any error of a client library into an OSError that names the failed operation."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # every client library has its own error classes
        raise OSError(f"cannot {verb} {url}: {reason(error)}") from error


def require_writable(url: str) -> None:
    """Check that a file may be written at `url`; locally it may replace only files and links.

    Raises:
        ValueError: for a folder, a device, a FIFO or a socket, or a URL that `open_store` refuses.
    """
    fs, path = open_store(url)
    if isinstance(fs, LocalFileSystem):
        with contextlib.suppress(NotADirectoryError):  # writing reports it
            local.require_replaceable(Path(path))


@contextlib.contextmanager
def publish(url: str, scratch: Path | None = None) -> Iterator[Path]:
    """Yield a local path to write, which becomes `url` atomically if the body succeeds.

    A local file is renamed within its folder. A remote object is written below `scratch`, by
    default the folder for temporary files, and uploaded when finished. If the body raises, nothing
    appears at `url`.

    Raises:
        ValueError: as `require_writable`, before anything is written.
        OSError: if it cannot be written.
    """
    require_writable(url)
    fs, path = open_store(url)
    is_local = isinstance(fs, LocalFileSystem)
    folder = Path(path).parent if is_local else scratch or Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    # an upload's temporary file may be in a folder that other users can read
    mode = 0o666 if is_local else 0o600
    where = url if is_local else str(folder)
    try:
        with _temporary(folder, Path(path).name, mode) as temporary:
            yield temporary
            if is_local:
                # before the rename: after a power failure the name must not hold an empty file
                with local.reader(temporary) as stream:
                    os.fsync(stream.fileno())
                temporary.replace(path)
            else:
                where = url
                with _client_errors("write", url):
                    # with fsspec's shared client, which retries; `remote.client` does not
                    fs.put_file(str(temporary), path)
    except OSError as error:
        # some errors, such as a full disk, come without the file's name
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, where) from error


@contextlib.contextmanager
def _temporary(folder: Path, name: str, mode: int) -> Iterator[Path]:
    """Create an empty file beside `name` and lock it, so that `remove_abandoned` keeps it."""
    while True:
        # not tempfile.mkstemp: its mode 0600 would survive the rename and override the user's umask
        path = folder / f".{name}.{uuid.uuid4().hex}.tmp"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        try:
            # some network file systems have no locks; there, nothing is removed as abandoned
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            # it may have been removed before it was locked
            if path.exists():
                yield path
                return
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Delete temporary files of killed writers in a local folder that others may be writing to."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            local.remove_unlocked(path)


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """Yield a local path to read `url` from: itself, or a copy that is deleted after the body.

    Raises:
        ValueError: if it cannot be read.
    """
    fs, path = open_store(url)
    if isinstance(fs, LocalFileSystem):
        with contextlib.suppress(FileNotFoundError):  # opening it reports this
            local.require_regular(path)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(path).name
        try:
            with copy.open("wb") as stream:
                sync(get_loop(), remote.download, remote.client(fs), path, stream.fileno())
        except FileNotFoundError as error:
            raise ValueError(f"no such file: {url}") from error
        except remote.Failure as error:
            raise ValueError(f"cannot read {url}: {reason(error)}") from error
        yield copy


def listing(url: str) -> list[dict[str, Any]]:
    """List fsspec's entries (`name`, `size`, `type`) of a folder; empty if it does not exist.

    Raises:
        OSError: if the store does not answer.
    """
    fs, path = open_store(url)
    try:
        if isinstance(fs, LocalFileSystem):
            return list[Any](fs.ls(path, detail=True))
        return list(sync(get_loop(), remote.listing, remote.client(fs), path) or ())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except remote.Failure as error:
        raise OSError(f"cannot list {url}: {reason(error)}") from error


def names(url: str, kind: str = "file") -> list[str]:
    """List the names of the files in a folder, sorted; empty if it does not exist.

    Raises:
        OSError: if the store does not answer.
    """
    found = (entry["name"].rstrip("/") for entry in listing(url) if entry["type"] == kind)
    return sorted(name.rsplit("/", 1)[-1] for name in found)


def folders(url: str) -> list[str]:
    """List the names of the folders in a folder, as `names` does for files."""
    return names(url, "directory")


def rename(url: str, name: str) -> None:
    """Rename the file at `url` within its folder.

    Raises:
        OSError: if it cannot be renamed, for example because a folder has that name.
    """
    fs, path = open_store(url)
    target = Path(path).with_name(name)
    if isinstance(fs, LocalFileSystem):
        Path(path).replace(target)  # mv would move it into an existing folder of that name
        return
    with _client_errors("rename", url):
        fs.mv(path, str(target))


def remove(url: str) -> None:
    """Delete the file at `url` if it exists."""
    fs, path = open_store(url)
    with contextlib.suppress(FileNotFoundError), _client_errors("delete", url):
        fs.rm_file(path)


def sweep(url: str) -> None:
    """Delete temporary files of killed writers in a folder that no other process writes to."""
    for name in names(url):
        # the user's own hidden files stay
        if TEMPORARY.fullmatch(name):
            remove(join(url, name))


def write_bytes(url: str, data: bytes) -> None:
    """Write `data` to `url`, completely or not at all."""
    with publish(url) as path, local.writer(path) as stream:
        stream.write(data)


def write_json(url: str, document: Any) -> None:
    """Write `document` to `url` as indented JSON with sorted keys, completely or not at all."""
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    write_bytes(url, text.encode())


def sha256_bytes(data: bytes) -> str:
    """Hash bytes: sha256 in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(document: Any) -> str:
    """Hash a JSON document in its canonical (sorted, compact) form: sha256 in hex."""
    # this form must not change: plans, manifests and finished runs are identified by this hash
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return sha256_bytes(text.encode())


def sha256_file(path: Path) -> str:
    """Hash a local file: sha256 in hex."""
    with local.reader(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def differing(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the leaves in which two JSON documents differ: name and both values (None: absent)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            name = f"{prefix}.{key}" if prefix else key
            yield from differing(old.get(key), new.get(key), name)
    elif old != new:
        yield prefix, old, new


def difference(old: Any, new: Any) -> list[str]:
    """Describe the leaves in which two JSON documents differ, one text per leaf."""
    return [f"{name}: {was!r} -> {now!r}" for name, was, now in differing(old, new)]


def provenance() -> dict[str, Any]:
    """Describe the origin of a result, for its record: code, packages, interpreter, machine kind.

    No environment variable or host name is recorded. Command lines with credentials are refused
    earlier.
    """
    packages = ("torch", "torchvision", "open_clip_torch", "webdataset", "numpy", "pillow")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            # from the installed distribution: importing torch for its version would take seconds
            versions[name] = importlib.metadata.version(name)
    return {
        "rft": rft.__version__,
        "git": git_revision(),
        "packages": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "command": commands.typed(sys.argv),
    }


def git_revision() -> str | None:
    """Find the commit of the source tree, with `-dirty` if it is modified; None if unknown.

    A copy of the tree, such as launch/ makes for a run, records it in the file REVISION.
    """
    folder = Path(rft.__file__).parents[1]
    # only the tree's own repository: an enclosing one belongs to a different project
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            return result.stdout.strip()
    # after the repository: a file left behind in a checkout would name an old commit
    path = folder / "REVISION"
    return path.read_text().strip() if path.exists() else None
