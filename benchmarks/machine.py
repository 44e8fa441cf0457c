"""Provenance of results, and signals to the sessions of processes that a benchmark started.

`describe` defines the provenance of every file in benchmarks/results.
"""

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rft.storage import files

ROOT = Path(__file__).parents[1]
CODE = ("*.py", "*.toml", "launch", "Makefile")  # of git's files, those that affect a run
DATA_PLANE = ("rft/loading", "rft/packing", "rft/shards", "rft/storage")
STEP = ("rft/clip", "rft/method", "rft/train")
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def describe(code: Sequence[str] = ("rft",)) -> dict[str, Any]:
    """Return date, commit, packages and kind of machine, but no host name.

    `code` are the folders whose code is measured: results with one hash are of the same code,
    whatever else their commits changed.
    """
    made = files.provenance()
    return {
        "date": date(),
        "commit": commit(),
        "code": {"folders": list(code), "sha256": source_sha256(code)},
        "machine": made["machine"],
        "processor": _processor(),
        "cores": made["cpus"],
        "threads": torch.get_num_threads(),
        "python": made["python"],
        "versions": made["packages"],
    }


def made(result: Mapping[str, Any]) -> str:
    """Format a result's provenance for the line above its table: commit, day, processor, threads.

    Files that are older than a field lack it.
    """
    count = result.get("threads")
    threads = f", {count} thread{'' if count == 1 else 's'}" if count else ""
    return (
        f"commit {result.get('commit') or 'not recorded'}, {result['date'][:10]}, "
        f"{result.get('processor', 'processor not recorded')}{threads}"
    )


def together(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the provenance of each result that a page joins, by name, and whether they match.

    Raises:
        ValueError: if they are of different processors, because a page is read as of one machine.
    """
    processors = {one["processor"] for one in results.values() if "processor" in one}
    if len(processors) > 1:
        raise ValueError(
            f"{', '.join(results)} were measured on different machines ({', '.join(processors)}); "
            "measure all of them on one"
        )
    lines = [f"- {name}: {made(one)}." for name, one in results.items()]
    code: dict[tuple[str, ...], set[str]] = {}
    for one in results.values():
        if "code" in one:
            code.setdefault(tuple(one["code"]["folders"]), set()).add(one["code"]["sha256"])
    lines += [
        f"- **Not of the same code**: {', '.join(folders)} changed between these measurements."
        for folders, hashes in code.items()
        if len(hashes) > 1
    ]
    return "\n".join(lines)


def commit() -> str | None:
    """Return the commit of the sources, with `-dirty` if code differs from it; None if unknown.

    Results and pages do not count: the first result that a command saves changes the tree.
    """
    revision = files.git_revision()
    if revision is None or not revision.endswith("-dirty"):
        return revision
    command = ["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", *CODE]
    clean = subprocess.run(command, check=False).returncode == 0
    return revision.removesuffix("-dirty") if clean else revision


def session_processes(session: int) -> list[int]:
    """Return the ids of a session's living processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended between listing and reading
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


def source_sha256(folders: Sequence[str] = ("rft", "benchmarks", "tests/gpu")) -> str:
    """Hash the Python files below some folders; by default all code that benchmarks.gpu runs."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that ended and was not waited for does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    return False


def descendants(pid: int) -> list[int]:
    """Return the child processes of a process, recursively.

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
    """Make the system kill this process when its parent ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def signal_session(session: int, number: signal.Signals) -> None:
    """Send a signal to every process of a session, including other process groups."""
    for process in session_processes(session):
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
