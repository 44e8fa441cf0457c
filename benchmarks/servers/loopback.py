"""Utilities of all servers: a free port, the program, its start, and a guaranteed end."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.waiting import until

ADDRESS = "127.0.0.1"
# servers are often installed where only root's PATH leads
PROGRAMS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class NotHereError(RuntimeError):
    """A program or permission that this machine lacks; tests are skipped with the reason."""


def program(name: str, package: str) -> str:
    """Return the path of a program.

    Raises:
        NotHereError: if it is not installed.
    """
    path = shutil.which(name, path=PROGRAMS)
    if path is None:
        raise NotHereError(f"{name} is not installed (Debian package {package})")
    return path


def free_port() -> int:
    """Return a loopback port on which nothing listens."""
    with socket.create_server((ADDRESS, 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a server in the foreground during the body, with output to `log`.

    It cannot outlive this process: the kernel kills it with its parent, however that ends.
    """
    tied = [program("setpriv", "util-linux"), "--pdeathsig", "KILL", *command]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            tied, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        yield process
    finally:
        # they have no state to save, and an orderly end takes seconds
        process.kill()
        process.wait()


def wait_for_port(port: int, process: subprocess.Popen, log: Path) -> None:
    """Wait until a server accepts connections; fail with its log if it ends first."""

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((ADDRESS, port)):
            return True
        return False

    until(lambda: process.poll() is not None or answers(), f"a server on port {port}: see {log}")
    assert process.poll() is None, log.read_text(errors="replace")[-2000:]
