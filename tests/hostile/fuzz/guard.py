"""Limits of a fuzzed call: it may refuse, and write to one folder. Everything else is harm.

An audit hook sees every file that Python opens for writing, every process and every connection.
"""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CPU_SECONDS = 5.0  # of one call, in CPU time, on any machine
ADDRESSES = 3 * 2**30  # bytes of address space that a call may use in addition
LOOPBACK = ("127.0.0.1", "localhost", "::1", "", None)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate")
CHANGES += ("os.chmod", "os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")


class Harm(BaseException):
    """A call did something that no input may cause. rft never catches it."""


class _Watch:
    """The limits for the hook; a process has one hook, which cannot be removed."""

    folder: Path | None = None
    installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    folder = _Watch.folder
    if folder is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = any(sign in mode for sign in "wax+") if isinstance(mode, str) else flags & WRITES
        if writes and not isinstance(path, int):
            _require_inside(event, path, folder)
    elif event in CHANGES:
        _require_inside(event, arguments[0], folder)
    elif event in PROCESSES or (event == "socket.getaddrinfo" and arguments[0] not in LOOPBACK):
        _harm(f"{event} {arguments[0]!r}")


def _require_inside(event: str, path: Any, folder: Path) -> None:
    if isinstance(path, int):
        return
    name = os.fsdecode(path)
    compiled = "__pycache__" in name
    inside = Path(os.path.realpath(os.path.dirname(name) or ".")).is_relative_to(folder)  # noqa: PTH120
    if not (inside or compiled or name == os.devnull):
        _harm(f"{event} {name!r}")


def _harm(what: str) -> None:
    _Watch.folder = None  # handling the exception may open files
    raise Harm(what)


class SlowHarm(Harm):
    """A call took too long."""


def _too_long(*_: object) -> None:
    raise SlowHarm(f"it took more than {CPU_SECONDS:g} s of a core")


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Monitor the body: it may write below a folder and use limited time.

    Raises:
        Harm: if it does anything else.
    """
    if not _Watch.installed:
        sys.addaudithook(_hook)
        _Watch.installed = True
    _Watch.folder = folder.resolve()
    before = signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        _Watch.folder = None


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Let the body use so much more address space; beyond that it gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
