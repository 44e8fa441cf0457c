"""Runs parts one after the other, each in its own process, within a time limit.

Each part is forked from this process, which has imported everything and never touches the GPU. So a
part that fails, hangs, runs out of memory or breaks the GPU's context does not affect the others. A
part writes its measurements as it goes, so a timeout loses only the current one. The result file is
rewritten after each part, for the same reason.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import machine
from rft.storage import files

Status = Literal["done", "failed", "cut off", "not reached"]
PARTING = 3.0  # seconds for a part's processes to end when its time is up
LOG_TAIL = 2000  # characters of a failed part's output that are shown


class Record:
    """A part's measurements so far: a tree of JSON values in a file that is always complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {}

    def put(self, *names: str, **values: Any) -> None:
        """Add values below the given names, and write the file."""
        branch = self.values
        for name in names:
            branch = branch.setdefault(name, {})
        branch.update(values)
        files.write_json(str(self._path), self.values)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to measure."""

    name: str
    work: Callable[[Record], None]
    least: float
    """Minimum seconds to start it."""
    most: float
    """Seconds after which it is ended, regardless of the time left for all parts."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a part."""

    status: Status
    seconds: float
    reason: str
    values: dict[str, Any]


def each(cases: Mapping[str, Callable[[], None]]) -> None:
    """Run all of a part's cases; a failure of one does not affect the others.

    Raises:
        RuntimeError: at the end, naming those that failed.
    """
    failures = []
    for name, work in cases.items():
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            failures.append(f"{name}: {files.reason(error)[:200]}")
    if failures:
        raise RuntimeError("; ".join(failures))


def run(
    parts: Sequence[Part], folder: Path, deadline: float, done: Callable[[str, Outcome], None]
) -> None:
    """Run the parts in order until the deadline.

    Args:
        parts: most valuable first.
        folder: for the parts' records and what they print (NAME.json, NAME.log).
        deadline: of `time.monotonic`; nothing of a part is alive after it.
        done: called with each part's outcome as soon as it is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        started = time.monotonic()
        left = deadline - started - PARTING
        if left < part.least:
            reason = f"{max(left, 0):.0f} s were left, it needs {part.least:g} or more"
            done(part.name, Outcome(status="not reached", seconds=0.0, reason=reason, values={}))
            continue
        print(f"{part.name} ...", flush=True)
        try:
            outcome = run_one(part, folder, min(part.most, left))
        except BaseException:  # Ctrl-C or a signal: keep the part's measurements so far
            reason = "the command was ended"
            done(part.name, cut_off(part, folder, started, reason))
            raise
        print(f"{part.name}: {outcome.status} in {outcome.seconds:.0f} s {outcome.reason}".rstrip())
        if outcome.status == "failed":
            log = (folder / f"{part.name}.log").read_text(errors="replace")
            print(log[-LOG_TAIL:].rstrip(), file=sys.stderr, flush=True)
        done(part.name, outcome)


def run_one(part: Part, folder: Path, seconds: float) -> Outcome:
    """Run one part in its own process, for at most so many seconds."""
    record, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    failure = folder / f"{part.name}.failure"
    for path in (record, log, failure):
        path.unlink(missing_ok=True)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be(part, record, log, failure)
    status = _wait(pid, started + seconds)
    took = time.monotonic() - started
    if status is None:
        return cut_off(part, folder, started, f"not ended after {seconds:.0f} s")
    values = measured(record)
    if status == 0:
        return Outcome(status="done", seconds=took, reason="", values=values)
    if failure.exists():
        reason = failure.read_text()
    elif os.WIFSIGNALED(status):
        reason = f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    else:
        reason = f"ended with exit code {os.waitstatus_to_exitcode(status)}"
    return Outcome(status="failed", seconds=took, reason=reason, values=values)


def measured(record: Path) -> dict[str, Any]:
    """Read a part's record."""
    return files.read_json(str(record)) if record.exists() else {}


def cut_off(part: Part, folder: Path, started: float, reason: str) -> Outcome:
    """Describe a part that did not complete."""
    values = measured(folder / f"{part.name}.json")
    seconds = time.monotonic() - started
    return Outcome(status="cut off", seconds=seconds, reason=reason, values=values)


def _be(part: Part, record: Path, log: Path, failure: Path) -> None:
    """Be the process of a part, which never returns."""
    code = 1
    try:
        os.setsid()
        machine.die_with_parent()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        part.work(Record(record))
        code = 0
    except BaseException as error:  # any exception becomes the part's reason
        traceback.print_exc()
        failure.write_text(f"{type(error).__name__}: {files.reason(error)[:300]}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # not sys.exit: this is a fork, which must not run the exit handlers of its parent
        os._exit(code)


def _wait(pid: int, deadline: float) -> int | None:
    """Wait for a part to end, and end its remaining processes.

    Returns:
        Its exit status; None if its time ended first.
    """
    status = None
    try:
        while status is None and time.monotonic() < deadline:
            found, code = os.waitpid(pid, os.WNOHANG)
            status = code if found else None
            time.sleep(0.02)
    finally:
        end_all(pid)
        if status is None:
            os.waitpid(pid, 0)
    return status


def end_all(session: int) -> None:
    """End a part's processes: by a signal that lets torchrun end its ranks, then by SIGKILL."""
    # torchrun starts each rank in its own session
    started = [*machine.session_processes(session), *machine.descendants(session)]
    deadline = time.monotonic() + PARTING
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while any(map(machine.is_alive, started)) and time.monotonic() < deadline:
            time.sleep(0.02)
