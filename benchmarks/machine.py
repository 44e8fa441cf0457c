"""What a benchmark ran on, and signals to whole sessions of the processes it started."""

import os
import platform
import signal
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Return date, kind of machine and interpreter; no host name."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
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
