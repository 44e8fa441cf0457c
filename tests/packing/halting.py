"""Stops a packing process just before a given step on disk, to kill it exactly there.

Python reports file operations to audit hooks before they happen. So every step of the real code is
seen in the real process, without patching.
"""

import os
import re
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir")
HALTED = "halted\n"
FORK_SERVER = "the fork server starts"
WORKER = "a worker starts"


def watch(below: tuple[str, ...], tool: str, seen: Callable[[str], None]) -> None:
    """Call `seen` before each step: a change of a file below folders, or an image that is read."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in CHANGES:
            return
        path = arguments[0]
        if not isinstance(path, str | Path):
            return
        if str(path) == tool and is_forked():
            seen(WORKER)
        elif str(path).startswith(below):
            writes = event in CHANGES or arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or str(path).endswith(".JPEG"):
                seen(f"{event} {re.sub('[.][0-9a-f]{32}[.]', '.', Path(path).name)}")

    sys.addaudithook(hook)


def is_forked() -> bool:
    """Whether this process is a fork server or was forked from one."""
    return any("multiprocessing.forkserver" in word for word in sys.orig_argv)


def pack_watched(
    link: Connection, below: tuple[str, ...], step: str | None, arguments: tuple
) -> None:
    """Pack; send the names of the steps, or halt before `step` for ever after sending that."""
    from rft.packing.pack import pack  # every process of a packing imports this file

    def seen(found: str) -> None:
        if step is None:
            link.send(found)
        elif found == step:
            link.send(found)
            threading.Event().wait()

    watch(below, "", seen)
    pack(*arguments)
    link.send(None)


def halt(below: tuple[str, ...], tool: str, step: str, gate: str) -> None:
    """Before `step`, print that this process halts; it continues when the FIFO `gate` has a writer.

    To be called from a sitecustomize, which is how it reaches every process of a command.
    """

    def seen(found: str) -> None:
        if found == step:
            os.write(1, HALTED.encode())
            os.close(os.open(gate, os.O_RDONLY))

    watch(below, tool, seen)
    if is_forked():
        seen(FORK_SERVER)
