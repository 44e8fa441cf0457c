"""The progress of long commands: a bar on a terminal, a log line now and then elsewhere."""

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

SECONDS_PER_LINE = 10.0  # without a terminal; a log file of a night stays readable
# enough to look like motion; a unit may take less than a millisecond
SECONDS_PER_DRAWING = 0.1
UNKNOWN = "-:--:--"  # the time that is left, before anything is done


class Advance(Protocol):
    """Counts what was done."""

    def __call__(self, units: int, size: int = 0, /) -> None:
        """Count so many units, and bytes of them."""


log = logging.getLogger(__name__)


class Bar(Progress):
    """One task of a known length: its clock, and its picture where both streams are a terminal.

    Speed and time left follow from all that was done since the bar was made: what an earlier job
    did, perhaps on other machines, does not count. Drawn when there is something new, so that no
    thread takes turns with the work.

    Args:
        title: what is done.
        total: how much of it there is.
        done: what was done before.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._status, self._before = "", done
        super().__init__(
            # a title may hold brackets, which are rich's markup
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            # rich's own column keeps 1,000 updates, and thousands of images are done in a second
            TextColumn("{task.fields[left]}", style="progress.remaining"),
            # stdout is for results, which another command may read
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
        """The time that is left, as hours, minutes and seconds."""
        if not self.speed:
            return UNKNOWN
        minutes, seconds = divmod(math.ceil((self.tasks[0].remaining or 0) / self.speed), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

    @property
    def speed(self) -> float:
        """How much is done per second, 0 before the first update."""
        return (self.tasks[0].completed - self._before) / max(self.seconds, 1e-9)

    @property
    def seconds(self) -> float:
        """The time since the bar was made."""
        return self.tasks[0].elapsed or 0.0

    def show(self, done: int, status: str = "") -> None:
        """Count up to `done`; what is drawn has a line for `status` below it."""
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
        """Leave the terminal as it was."""
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
    """Yield a function to call with how many units, and how many bytes of them, were done.

    Args:
        title: what is done.
        unit: of what is counted, in the plural.
        total: how many there are.
        extra: of the log lines, such as `rft.log.ASIDE` where the result goes to stdout.
        ends: whether the end has a log line too, as where no result follows at once.
    """
    done = size = 0
    bar = Bar(title, total)
    spoke = drew = time.monotonic()

    def rate() -> str:
        speed = f"{bar.speed:,.{0 if bar.speed >= 10 else 1}f} {unit}/s"
        mib = size / 2**20
        per_s = mib / max(bar.seconds, 1e-9)  # a first unit may take less than the clock shows
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
