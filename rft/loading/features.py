"""Features of a frozen image tower in a file: computed once, then read by number.

Each row stands behind a crc32 that covers the file's key and the row's number. A row that is
absent, torn, damaged or from a different file counts as missing, and its reader computes it anew.
So the file has no other state: it may be written row by row, by several processes that compute the
same rows, and be interrupted or deleted at any time.
"""

import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32

from rft.log import EVERY_RANK
from rft.storage import files, local

ALGORITHM = 1  # part of every key: raise it when the same tower and images give other features
CHECK_BYTES = 4
NAME = re.compile(r"[0-9a-f]{64}\.features")

log = logging.getLogger(__name__)


class FeatureFile:
    """An open file of fp32 rows of one width, some of which may be missing."""

    def __init__(self, path: Path, descriptor: int, width: int) -> None:
        self.path, self.width = path, width
        self._descriptor = descriptor
        self._salt = int(path.name[:8], 16)
        self._warned = False
        self.failed = False
        """Whether a row could not be written."""

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (B, E) and which of them are there, bool (B,); the others are arbitrary."""
        records = np.zeros((len(numbers), record_bytes(self.width)), dtype=np.uint8)
        try:
            for part, offset in self._runs(numbers):
                buffers: list[Any] = [records[part]]
                os.preadv(self._descriptor, buffers, offset)
        except OSError as error:
            # another machine deleted the file, or the disk is failing
            if not self.failed:
                self._fail(error, "read from")
            records[:] = 0
        found_B, expected_B = self._stored(records), self._checks(numbers, records)
        whole_B = found_B == expected_B
        # 0 is what a hole in the file reads as: never written
        if (damaged := int((~whole_B & (found_B != 0)).sum())) and not self._warned:
            self._warned = True
            log.warning(
                f"{self.path}: {damaged} of {len(numbers)} rows that were read are damaged or from "
                "a different file; they are computed again",
                extra=EVERY_RANK,
            )
        return records[:, CHECK_BYTES:].copy().view(np.float32), whole_B

    def keep(self, numbers: np.ndarray, rows_BE: np.ndarray) -> None:
        """Write rows (B, E); after a failure, which is logged, nothing more is written."""
        if self.failed:
            return
        try:
            self._write(numbers, rows_BE)
        except OSError as error:
            self._fail(error)

    def sync(self) -> None:
        """Bring what was written to the disk, where processes of other machines see it."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Close the file, which may then be deleted to make room."""
        os.close(self._descriptor)

    def _fail(self, error: OSError, what: str = "written to") -> None:
        self.failed = True
        log.warning(
            f"features cannot be {what} {self.path}: {files.reason(error)}. Results do not "
            "change; what is not kept is computed again",
            extra=EVERY_RANK,
        )

    def _write(self, numbers: np.ndarray, rows_BE: np.ndarray) -> None:
        records = np.empty((len(numbers), record_bytes(self.width)), dtype=np.uint8)
        records[:, CHECK_BYTES:] = np.ascontiguousarray(rows_BE, dtype=np.float32).view(np.uint8)
        self._stored(records)[:] = self._checks(numbers, records)
        for part, offset in self._runs(numbers):
            left = memoryview(records[part].tobytes())
            while left:  # a nearly full disk takes a part, and refuses the rest
                done = os.pwrite(self._descriptor, left, offset)
                left, offset = left[done:], offset + done

    def _runs(self, numbers: np.ndarray) -> Iterator[tuple[slice, int]]:
        """Yield runs of consecutive numbers: their places, and the offset in the file."""
        starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1).tolist()
        for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
            yield slice(start, stop), int(numbers[start]) * record_bytes(self.width)

    @staticmethod
    def _stored(records: np.ndarray) -> np.ndarray:
        return records[:, :CHECK_BYTES].view(np.uint32)[:, 0]

    def _checks(self, numbers: np.ndarray, records: np.ndarray) -> np.ndarray:
        pairs = zip(numbers.tolist(), records[:, CHECK_BYTES:], strict=True)
        # a row must not pass under a different number; 0 is kept for rows that were never written
        found = (crc32(row, (self._salt + number) & 0xFFFFFFFF) or 1 for number, row in pairs)
        return np.fromiter(found, np.uint32, len(numbers))


class FeatureFolder:
    """Feature files in a folder, bounded in bytes; several processes and jobs may share it."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self._refused = False

    def open(self, key: Mapping[str, Any], rows: int, width: int) -> FeatureFile | None:
        """Open the file of `key`, a new one if there is none.

        `key` names all that decides the rows. Files that no process has open are deleted for it,
        least recently opened first. None, with one line that says why, where it does not fit or
        the file system refuses.

        Raises:
            ValueError: if the folder is none that can be used.
        """
        name = f"{files.sha256_json({'algorithm': ALGORITHM, **key})}.features"
        size = rows * record_bytes(width)
        local.require_own_folder(self.path, "--loader.features-dir, or --features-dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._make_room(size, name):
                if not self._refused:
                    log.info(
                        f"features of {rows:,} images are not kept: their {size / 1e9:,.2f} GB do "
                        f"not fit in the {self.limit / 1e9:g} GB that {self.path} may have; raise "
                        "--loader.features-gb (of rft.evaluate --features-gb) to keep them"
                    )
                self._refused = True
                return None
            return FeatureFile(self.path / name, self._open(self.path / name, size), width)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"features cannot be kept in {self.path}: it or a folder above is a file; name a "
                "different folder"
            ) from error
        except (OSError, ValueError) as error:
            if not self._refused:
                log.warning(
                    f"features are not kept in {self.path}: {files.reason(error)}. Results do not "
                    "change; another folder (--loader.features-dir, of rft.evaluate "
                    "--features-dir) saves the time"
                )
            self._refused = True
            return None

    def _open(self, path: Path, size: int) -> int:
        descriptor = local.open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            # the owner of a file can put other rows with fitting checksums into it
            if status.st_uid not in (os.geteuid(), 0):
                raise ValueError(f"{path} belongs to a different user; remove it")
            if status.st_size not in (0, size):
                log.warning(
                    f"{path} has {status.st_size:,} bytes instead of {size:,}: it is cleared and "
                    "filled again",
                    extra=EVERY_RANK,
                )
                os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, size)  # holes take no space, but count for the limit
            os.utime(descriptor)
            # not every network file system has locks; then the file counts as unused
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _make_room(self, size: int, own: str) -> bool:
        """Delete what may go until `size` bytes fit; False if they do not."""
        others = []
        for path in self.path.iterdir():
            if NAME.fullmatch(path.name) and path.name != own:
                with suppress(FileNotFoundError):
                    others.append((path.lstat(), path))
        used = sum(status.st_size for status, _ in others)
        for status, path in sorted(others, key=lambda other: other[0].st_mtime_ns):
            if size > self.limit or used + size <= self.limit:
                break
            if local.remove_unlocked(path):
                used -= status.st_size
        return used + size <= self.limit

    def clear(self) -> None:
        """Delete every feature file and, if nothing else is in it, the folder."""
        with suppress(OSError):
            for path in self.path.iterdir():
                if NAME.fullmatch(path.name):
                    path.unlink()
            self.path.rmdir()


def record_bytes(width: int) -> int:
    """Return the bytes that a row of so many numbers takes in a file."""
    return CHECK_BYTES + 4 * width


def computed_by(device: torch.device) -> str:
    """Name what a feature's last bits depend on beside tower, image and precision."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
