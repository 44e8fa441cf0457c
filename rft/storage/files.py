"""Files that are whole or absent, on any store that `rft.storage.urls` lets be opened.

Everything is written to a temporary name first and renamed (or uploaded as one finished object)
last, so that a reader never sees half a file. No URL is ever handed to a shell.
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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import get_loop, sync
from fsspec.implementations.local import LocalFileSystem

import rft
from rft.storage import documents, local, remote, urls

T = TypeVar("T")

# of a document that is read whole, unless its reader says otherwise. Of a text with one rare letter
# Python keeps four bytes for each, in several copies
DOCUMENT_BYTES = 2**26
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")  # what `publish` leaves when killed


def open_store(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the fsspec filesystem of `url` and the path inside it.

    Raises:
        ValueError: for what `rft.storage.urls` does not let be opened, or a client that is not
            installed or not configured.
    """
    urls.check(url)
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"cannot open {url!r}: {reason(error)}") from error


def require_local(path: str | Path, option: str) -> None:
    """Check that a file or folder that we open by its path, or write piece by piece, is local.

    Raises:
        ValueError: for a URL, which would otherwise become a local folder named after its scheme.
    """
    text = str(path)
    if urls.is_whole(text) or urls.protocol_word(text):
        raise ValueError(
            f"{option} is {urls.shown(text)}; it must be a local folder or file: copy it to or "
            "from there yourself"
        )
    urls.check(text)


def require_file(path: Path, what: str) -> None:
    """Check that a local path is a file with an end: reading a FIFO or a device may never return.

    `what` is expected there, for messages.

    Raises:
        ValueError: if it is absent or anything else.
    """
    if path.is_dir():
        raise ValueError(f"no {what} at {path}: it is a folder")
    try:
        local.require_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no {what} at {path}") from None


def join(url: str, *names: str) -> str:
    """Append path components to a URL or a local path."""
    return "/".join([url.rstrip("/"), *names])


def name_of(url: str) -> str:
    """Return the last component of a URL or a local path, which may be relative."""
    return posixpath.basename(posixpath.normpath(open_store(url)[1]))


def resolve(url: str, name: str) -> str:
    """Return where `name` lies: below `url`, unless it is a URL or an absolute path of its own.

    Names of others were checked by `rft.storage.urls.check_shard_name`.
    """
    return name if urls.is_whole(name) or name.startswith("/") else join(url, name)


def ask(url: str, verb: str, question: Callable, of_path: Callable) -> Any:
    """Answer a question about `url`: by `rft.storage.remote`, or by `of_path` for a local path.

    Raises:
        FileNotFoundError, IsADirectoryError: as the store reports.
        ValueError: if it does not answer: `verb` is for the message.
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
    """Whether a file or folder is at `url`.

    Raises:
        ValueError: if the store does not answer.
    """
    try:
        # not Path.exists, which is False after some errors too, such as a loop of links
        return ask(url, "look for", remote.exists, lambda path: bool(path.stat()))
    except FileNotFoundError:
        return False


def size(url: str) -> int:
    """Measure a file that is to be read in ranges, in bytes.

    Raises:
        FileNotFoundError: if the store reports that no such file exists.
        IsADirectoryError: if it is a folder.
        ValueError: if the store gives no size, or has no ranges.
    """

    def measure(path: Path) -> int:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(path)
        local.require_regular(path, status)
        return status.st_size

    return ask(url, "read", remote.size, measure)


def find_bytes(url: str, limit: int = DOCUMENT_BYTES) -> bytes | None:
    """Return the whole content of `url`, None if the store reports that no such file exists.

    Raises:
        ValueError: if it cannot be read, or is larger than `limit` bytes.
    """

    def read(path: Path) -> bytes:
        with local.reader(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read() if size <= limit else b""
        # the file may have grown since it was measured
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
    """Return the whole content of `url`.

    Raises:
        ValueError: if no such file exists, it cannot be read, or it is larger than `limit` bytes.
    """
    data = find_bytes(url, limit)
    if data is None:
        # the cause distinguishes an absent file from one that cannot be read
        raise ValueError(f"no such file: {url}") from FileNotFoundError(url)
    return data


def reason(error: BaseException) -> str:
    """Word on one line, without credentials, why a client could not read.

    rft is given no credentials, but a server may redirect a client to a URL that holds some.
    """
    return urls.redact(" ".join(remote.explain(error).split()))


def read_json(url: str, limit: int = DOCUMENT_BYTES) -> Any:
    """Read the JSON document at `url`, whatever its content.

    Raises:
        ValueError: if it is absent, larger than `limit` bytes, or not JSON.
    """
    return documents.parse(read_bytes(url, limit), url)


def read_document(
    url: str, kind: type[T], limit: int = DOCUMENT_BYTES, values: int = documents.VALUES
) -> T:
    """Read the JSON document at `url`, which must be of a kind that `documents` checks.

    Raises:
        ValueError: if it is absent, larger than `limit` bytes, holds more than `values`
            values, or is not of that kind: naming what.
    """
    return documents.decode(read_bytes(url, limit), kind, url, values=values)


@contextlib.contextmanager
def _client_errors(verb: str, url: str) -> Iterator[None]:
    """Turn what a client library raises into an OSError that names what could not be done."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # every client library has error classes of its own
        raise OSError(f"cannot {verb} {url}: {reason(error)}") from error


def require_writable(url: str) -> None:
    """Check that a file may be written at `url`: on this machine, that it replaces files or links.

    Raises:
        ValueError: for a folder, a device, a FIFO or a socket, or what `open_store` refuses.
    """
    fs, path = open_store(url)
    if isinstance(fs, LocalFileSystem):
        with contextlib.suppress(NotADirectoryError):  # writing says so
            local.require_replaceable(Path(path))


@contextlib.contextmanager
def publish(url: str, scratch: Path | None = None) -> Iterator[Path]:
    """Yield a local path to write; when the body ends without error, it becomes `url` in one step.

    A local file is renamed within its folder; a remote object is written below `scratch`, by
    default the folder of temporary files, and uploaded finished. If the body raises, nothing
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
                # before the rename: after a power cut the name must not stand for an empty file
                with local.reader(temporary) as stream:
                    os.fsync(stream.fileno())
                temporary.replace(path)
            else:
                where = url
                with _client_errors("write", url):
                    # by fsspec's shared client, which retries; `remote.client` would not
                    fs.put_file(str(temporary), path)
    except OSError as error:
        # a full disk, for one, is reported without the file's name
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, where) from error


@contextlib.contextmanager
def _temporary(folder: Path, name: str, mode: int) -> Iterator[Path]:
    """Make an empty file beside `name` and hold it, so that `remove_abandoned` leaves it alone."""
    while True:
        # not tempfile.mkstemp: its mode 0600 would survive the rename and override the user's umask
        path = folder / f".{name}.{uuid.uuid4().hex}.tmp"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        try:
            # not every network file system has locks; there, nothing is removed as abandoned
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            # it may have been removed before it was held
            if path.exists():
                yield path
                return
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Delete what killed writers left in a local folder that others may be writing now."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            local.remove_unlocked(path)


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """Yield a local path to read `url` from: itself, or a copy for the length of the body.

    Raises:
        ValueError: if it cannot be read.
    """
    fs, path = open_store(url)
    if isinstance(fs, LocalFileSystem):
        with contextlib.suppress(FileNotFoundError):  # opening it reports that
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
    """Return fsspec's entries (`name`, `size`, `type`) of a folder; none if it does not exist.

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
    """Return the names of the files in a folder, sorted; none if it does not exist.

    Raises:
        OSError: if the store does not answer.
    """
    found = (entry["name"].rstrip("/") for entry in listing(url) if entry["type"] == kind)
    return sorted(name.rsplit("/", 1)[-1] for name in found)


def folders(url: str) -> list[str]:
    """Return the names of the folders in a folder, as `names` does those of files."""
    return names(url, "directory")


def rename(url: str, name: str) -> None:
    """Give the file at `url` another name in the same folder.

    Raises:
        OSError: if it cannot be renamed, as where a folder has the name.
    """
    fs, path = open_store(url)
    target = Path(path).with_name(name)
    if isinstance(fs, LocalFileSystem):
        Path(path).replace(target)  # mv would move it into a folder of that name
        return
    with _client_errors("rename", url):
        fs.mv(path, str(target))


def remove(url: str) -> None:
    """Delete the file at `url` if it exists."""
    fs, path = open_store(url)
    with contextlib.suppress(FileNotFoundError), _client_errors("delete", url):
        fs.rm_file(path)


def sweep(url: str) -> None:
    """Delete what killed writers left in a folder that no other process writes now."""
    for name in names(url):
        # the user's own hidden files stay
        if TEMPORARY.fullmatch(name):
            remove(join(url, name))


def write_bytes(url: str, data: bytes) -> None:
    """Write `data` to `url`, whole or not at all."""
    with publish(url) as path, local.writer(path) as stream:
        stream.write(data)


def write_json(url: str, document: Any) -> None:
    """Write `document` as indented JSON with sorted keys to `url`, whole or not at all."""
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    write_bytes(url, text.encode())


def sha256_bytes(data: bytes) -> str:
    """Return the hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(document: Any) -> str:
    """Return the hex sha256 of a JSON document in its canonical (sorted, compact) form."""
    # this form must not change: plans, manifests and finished runs are known by this hash
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return sha256_bytes(text.encode())


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a local file."""
    with local.reader(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def differing(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the leaves in which two JSON documents differ: name, and both values (None: absent)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            name = f"{prefix}.{key}" if prefix else key
            yield from differing(old.get(key), new.get(key), name)
    elif old != new:
        yield prefix, old, new


def difference(old: Any, new: Any) -> list[str]:
    """List the leaves in which two JSON documents differ, for a message, a line each."""
    return [f"{name}: {was!r} -> {now!r}" for name, was, now in differing(old, new)]


def provenance() -> dict[str, Any]:
    """Describe what produced a result, for its record: code, packages, interpreter, machine kind.

    No environment variable or host name is recorded; a command line with credentials was refused.
    """
    packages = ("torch", "torchvision", "open_clip_torch", "webdataset", "numpy", "pillow")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            # of the installed distribution: importing torch for its version would take seconds
            versions[name] = importlib.metadata.version(name)
    return {
        "rft": rft.__version__,
        "git": git_revision(),
        "packages": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def git_revision() -> str | None:
    """Return the commit of the source tree with `-dirty` if it is changed, or None if unknown.

    A copy of the tree, such as launch/ makes for a run, has it in the file REVISION.
    """
    folder = Path(rft.__file__).parents[1]
    # the tree's own repository: one around it, say of an environment's packages, is another's
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            return result.stdout.strip()
    # only here: a file that was left behind in a checkout would name an old commit
    path = folder / "REVISION"
    return path.read_text().strip() if path.exists() else None
