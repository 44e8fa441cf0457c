"""Stored features of a frozen image tower: computed once, then read by row number.

Each row follows a crc32 that covers the file's key and the row's number. A row that is absent,
torn, damaged or from a different file counts as missing, and its reader recomputes it. The file
needs no other state: several processes that compute the same rows may write it row by row, and it
is safe to interrupt them or delete the file at any time.
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

ALGORITHM = 1  # part of every key: raise it if the same tower and images give other features
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
        """Read rows (B, E), and which of them are valid, bool (B,); the others are arbitrary."""
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
        # a checksum of 0 is a hole in the file: never written
        if (damaged := int((~whole_B & (found_B != 0)).sum())) and not self._warned:
            self._warned = True
            log.warning(
                f"{self.path}: {damaged} of {len(numbers)} rows are damaged or from a different "
                "file; they are recomputed",
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
        """Flush written rows to disk, so that processes on other machines see them."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Close the file, which may then be deleted to free space."""
        os.close(self._descriptor)

    def _fail(self, error: OSError, what: str = "written to") -> None:
        self.failed = True
        log.warning(
            f"features cannot be {what} {self.path}: {files.reason(error)}. Results do not change; "
            "missing features are recomputed",
            extra=EVERY_RANK,
        )

    def _write(self, numbers: np.ndarray, rows_BE: np.ndarray) -> None:
        records = np.empty((len(numbers), record_bytes(self.width)), dtype=np.uint8)
        records[:, CHECK_BYTES:] = np.ascontiguousarray(rows_BE, dtype=np.float32).view(np.uint8)
        self._stored(records)[:] = self._checks(numbers, records)
        for part, offset in self._runs(numbers):
            left = memoryview(records[part].tobytes())
            while left:  # a nearly full disk accepts a part and refuses the rest
                done = os.pwrite(self._descriptor, left, offset)
                left, offset = left[done:], offset + done

    def _runs(self, numbers: np.ndarray) -> Iterator[tuple[slice, int]]:
        """Yield runs of consecutive numbers: their slice, and their offset in the file."""
        starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1).tolist()
        for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
            yield slice(start, stop), int(numbers[start]) * record_bytes(self.width)

    @staticmethod
    def _stored(records: np.ndarray) -> np.ndarray:
        return records[:, :CHECK_BYTES].view(np.uint32)[:, 0]

    def _checks(self, numbers: np.ndarray, records: np.ndarray) -> np.ndarray:
        pairs = zip(numbers.tolist(), records[:, CHECK_BYTES:], strict=True)
        # salted with the number, so that a row is invalid under a different one; 0 means never
        # written
        found = (crc32(row, (self._salt + number) & 0xFFFFFFFF) or 1 for number, row in pairs)
        return np.fromiter(found, np.uint32, len(numbers))


class FeatureFolder:
    """Feature files in a folder, bounded in bytes; several processes and jobs may share it."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self._refused = False

    def open(self, key: Mapping[str, Any], rows: int, width: int) -> FeatureFile | None:
        """Open the file of `key`, or create it.

        `key` contains everything that decides the rows. To free space, files that no process has
        open are deleted, least recently opened first. If the file does not fit or the file system
        refuses it, the reason is logged and None is returned.

        Raises:
            ValueError: if the folder cannot be used.
        """
        name = f"{files.sha256_json({'algorithm': ALGORITHM, **key})}.features"
        size = rows * record_bytes(width)
        local.require_own_folder(self.path, "--loader.features-dir, or --features-dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._make_room(size, name):
                if not self._refused:
                    log.info(
                        f"features of {rows:,} images are not stored: their {size / 1e9:,.2f} GB "
                        f"exceed the {self.limit / 1e9:g} GB allowed in {self.path}; raise "
                        "--loader.features-gb (for rft.evaluate: --features-gb) to store them"
                    )
                self._refused = True
                return None
            return FeatureFile(self.path / name, self._open(self.path / name, size), width)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"features cannot be stored in {self.path}: it or a parent is a file; name a "
                "different folder"
            ) from error
        except (OSError, ValueError) as error:
            if not self._refused:
                log.warning(
                    f"features are not stored in {self.path}: {files.reason(error)}. Results do "
                    "not change; another folder (--loader.features-dir, for rft.evaluate: "
                    "--features-dir) saves time"
                )
            self._refused = True
            return None

    def _open(self, path: Path, size: int) -> int:
        descriptor = local.open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            # another owner could write wrong rows with valid checksums
            if status.st_uid not in (os.geteuid(), 0):
                raise ValueError(f"{path} belongs to a different user; remove it")
            if status.st_size not in (0, size):
                log.warning(
                    f"{path} has {status.st_size:,} bytes instead of {size:,}: it is cleared and "
                    "refilled",
                    extra=EVERY_RANK,
                )
                os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, size)  # holes take no space, but count towards the limit
            os.utime(descriptor)
            # some network file systems lack locks; the file then counts as unused
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _make_room(self, size: int, own: str) -> bool:
        """Delete unused files until `size` bytes fit; False if they do not."""
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
        """Delete all feature files, and the folder if it is then empty."""
        with suppress(OSError):
            for path in self.path.iterdir():
                if NAME.fullmatch(path.name):
                    path.unlink()
            self.path.rmdir()


def record_bytes(width: int) -> int:
    """Compute the bytes of a row of `width` numbers in a file."""
    return CHECK_BYTES + 4 * width


def computed_by(device: torch.device) -> str:
    """Identify the software and hardware that a feature's last bits depend on."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
