"""Progress of long commands: a bar on a terminal, otherwise a log line at intervals."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
)
from rich.text import Text

from rft import log as logs
from rft.text import plain

SECONDS_PER_LINE = 10.0  # without a terminal; the log of a long job stays readable
# fast enough to look smooth; a unit may take less than a millisecond
SECONDS_PER_DRAWING = 0.1
UNKNOWN = "-:--:--"  # remaining time before the first update


class Advance(Protocol):
    """Callback that counts finished units."""

    def __call__(self, units: int, size: int = 0, /) -> None:
        """Add finished units, and their size in bytes."""


log = logging.getLogger(__name__)


class Bar(Progress):
    """One task of known length: its clock, and a drawn bar if both streams are terminals.

    Speed and remaining time are computed from the work since the bar was made; the work of an
    earlier job, perhaps on other machines, does not count. The bar is redrawn on updates only, so
    that no thread competes with the work.

    Args:
        title: name of the task.
        total: number of units.
        done: units finished by an earlier job.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._status, self._before = "", done
        super().__init__(
            # a title may contain brackets, which are rich's markup
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            # rich's own column averages 1,000 updates, but thousands of images are done per second
            TextColumn("{task.fields[left]}", style="progress.remaining"),
            # stdout is for results, which other commands may read
            console=Console(file=sys.stderr),
            auto_refresh=False,
        )
        self._row = self.add_task(plain(title), total=total, completed=done, left=UNKNOWN)
        self.is_drawn = (
            logs.is_first_rank()
            and all(map(logs.is_terminal, (sys.stdout, sys.stderr)))
            and self.console.is_terminal
        )
        self._open = contextlib.ExitStack()
        if self.is_drawn:
            self._open.enter_context(logs.above(self.console))
            self._open.enter_context(self)
            self.refresh()

    @property
    def left(self) -> str:
        """Remaining time, as hours, minutes and seconds."""
        if not self.speed:
            return UNKNOWN
        minutes, seconds = divmod(math.ceil((self.tasks[0].remaining or 0) / self.speed), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

    @property
    def speed(self) -> float:
        """Units per second, 0 before the first update."""
        return (self.tasks[0].completed - self._before) / max(self.seconds, 1e-9)

    @property
    def seconds(self) -> float:
        """Seconds since the bar was made."""
        return self.tasks[0].elapsed or 0.0

    def show(self, done: int, status: str = "") -> None:
        """Set the number of finished units to `done`; a drawn bar shows `status` below it."""
        self._status = status
        self.update(self._row, completed=done)
        if self.is_drawn:
            self.update(self._row, left=self.left, refresh=True)

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the bar and its status line."""
        yield self.make_tasks_table(self.tasks)
        if self._status:
            yield Text(self._status)

    def close(self) -> None:
        """Restore the terminal."""
        self._open.close()


@contextlib.contextmanager
def progress(
    title: str,
    unit: str,
    total: int,
    extra: Mapping[str, object] | None = None,
    *,
    ends: bool = True,
) -> Iterator[Advance]:
    """Yield a function to call with the number of finished units, and their bytes.

    Args:
        title: name of the task.
        unit: name of the unit, in the plural.
        total: number of units.
        extra: of the log lines, such as `rft.log.ASIDE` if the result goes to stdout.
        ends: whether the end gets a log line too, for commands whose result does not follow at
            once.
    """
    done = size = 0
    bar = Bar(title, total)
    spoke = drew = time.monotonic()

    def rate() -> str:
        speed = f"{bar.speed:,.{0 if bar.speed >= 10 else 1}f} {unit}/s"
        mib = size / 2**20
        per_s = mib / max(
            bar.seconds, 1e-9
        )  # the first unit may take less than the clock's resolution
        return f"{mib:,.1f} MiB, {speed}, {per_s:,.1f} MiB/s" if size else speed

    def advance(more: int, more_bytes: int = 0, /) -> None:
        nonlocal done, size, spoke, drew
        done, size = done + more, size + more_bytes
        now, is_last = time.monotonic(), done >= total
        if bar.is_drawn:
            if is_last or now - drew > SECONDS_PER_DRAWING:
                bar.show(done, rate())
                drew = now
            return
        bar.show(done)
        if (is_last and ends) or now - spoke > SECONDS_PER_LINE:
            counted = f"{title}: {done:,} of {total:,} {unit}"
            log.info("%s, %s, %s left", counted, rate(), bar.left, extra=extra)
            spoke = now

    with contextlib.closing(bar):
        yield advance
