"""What a benchmark ran on, and signals to whole sessions of the processes it started."""

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import signal
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def describe() -> dict[str, Any]:
    """Return date, kind of machine and interpreter; no host name."""
    return {
        "date": date(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def session_processes(session: int) -> list[int]:
    """Return the ids of a session's living processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended between listing and reading
            state, _, _, owner = stat.read_text().rsplit(") ", 1)[1].split()[:4]
            if int(owner) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def date() -> str:
    """Return the time now, to the minute, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def source_sha256() -> str:
    """Hash the Python files of rft, its benchmarks and its tests on GPUs: the code under test."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("rft", "benchmarks", "tests/gpu"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that ended and was not waited for does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    return False


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and theirs.

    Python's resource trackers are left out: they remove the shared memory of those that were
    killed, and end with them.
    """
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, task.read_text().split()):
                tracker = b"resource_tracker" in Path(f"/proc/{child}/cmdline").read_bytes()
                found += [] if tracker else [child, *descendants(child)]
    return found


def die_with_parent() -> None:
    """Have the system kill this process as soon as the one that started it is gone."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def signal_session(session: int, number: signal.Signals) -> None:
    """Send a signal to every process of a session, those of other process groups too."""
    for process in session_processes(session):
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
