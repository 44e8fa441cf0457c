"""A small file system in memory, which is soon full."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.servers.loopback import NotHereError, program


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of `size` bytes at `folder`.

    Raises:
        NotHereError: where none may be mounted.
    """
    if os.geteuid() != 0:
        raise NotHereError("only root can mount a small file system to fill")
    mount, umount = program("mount", "mount"), program("umount", "mount")
    command = [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NotHereError(f"cannot mount a small file system here: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        # lazily, because a killed process of a test may hold a file open for a moment longer
        subprocess.run([umount, "--lazy", str(folder)], check=True)
