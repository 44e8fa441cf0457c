"""A small file system in memory, for tests of a full disk."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.loopback import program


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of `size` bytes at `folder`; skip, with the reason, where none may be."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system to fill")
    mount, umount = program("mount", "mount"), program("umount", "mount")
    command = [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"cannot mount a small file system here: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        # lazily: a process that a test killed may hold a file open for a moment longer
        subprocess.run([umount, "--lazy", str(folder)], check=True)
