"""How the lines of a command are logged: time, rank, level and text, from one setup.

A module logs to `logging.getLogger(__name__)`, a child of the logger `rft`. What other libraries
log, and Python's own warnings, get the same lines. A command's result is no log line: it is
printed. Used as a library, nothing is set up, and Python's own rule holds: warnings appear on
stderr, the rest where the program's logging sends it.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from rft.text import plain

if TYPE_CHECKING:
    from rich.console import Console

NAME = "rft"
FORMAT = "%(asctime)s [%(rank)s] %(levelname)s: %(message)s"
TIME = "%Y-%m-%d %H:%M:%S"
SHORT_TIME = "%H:%M:%S"
STYLES = {"INFO": "green", "WARNING": "yellow"}

# `extra` of a record: INFO beside a result that goes to stdout, or that a pipeline never read there
ASIDE = {"aside": True}
# and of a rank's own matter; all others are those of every rank, and rank 0 alone shows them
EVERY_RANK = {"every_rank": True}


def setup(redact: Callable[[str], str] = str) -> None:
    """Show the records of rft and of others, once, however often this is called.

    Args:
        redact: takes credentials out of what other libraries log; rft's own lines hold none.
    """
    own, others = logging.getLogger(NAME), logging.getLogger()
    own.setLevel(logging.INFO)
    own.propagate = False  # a library that sets up the root logger would show every line twice
    for logger in (own, others):
        # by its name: where rft was imported anew, its class is a different one
        for handler in [handler for handler in logger.handlers if handler.name == NAME]:
            logger.removeHandler(handler)
        logger.addHandler(Handler(redact))
    warnings.formatwarning = _one_line
    # they become records of the logger py.warnings, which the root's handler shows
    logging.captureWarnings(True)


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Format a Python warning without the line of source below it, which does not help a user."""
    return f"{category.__name__}: {' '.join(str(message).split())} ({filename}:{lineno})"


def is_first_rank() -> bool:
    """Whether this process shows what all ranks meet."""
    return os.environ.get("RANK", "0") == "0"


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which lines can be coloured and drawn over."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class Formatter(logging.Formatter):
    """Escapes third-party text in records; `extra={"lines": ...}` are lines below the first."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """Return the lines of a record, without a traceback."""
        return "\n".join([plain(super().formatMessage(record)), *_lines_below(record)])


class Handler(logging.Handler):
    """Writes to what stdout or stderr is at that time, and lets its errors out as print does.

    INFO goes to stdout, all else to stderr, at once. A full disk or a closed pipe ends the command
    (`rft.cli.run`), where logging's own handlers would print a traceback for each line.
    """

    above: "Console | None" = None
    """Where something is drawn on the terminal that lines must stay above."""

    def __init__(self, redact: Callable[[str], str]) -> None:
        super().__init__()
        self._redact = redact
        self.set_name(NAME)
        self.setFormatter(Formatter(FORMAT, TIME))

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep one of the lines that all ranks log; what others log may be of this rank alone."""
        record.rank = os.environ.get("RANK", "0")
        # a child of the logger `rft` is named rft.something; `rftools` is none
        if record.name.partition(".")[0] != NAME:
            try:
                text = record.getMessage()
            except (TypeError, ValueError, KeyError):  # arguments that do not fit the text
                text = f"{record.msg} {record.args}"
            record.msg, record.args = self._redact(text), ()
            return True
        return is_first_rank() or hasattr(record, "every_rank")

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        is_aside = record.levelno > logging.INFO or hasattr(record, "aside")
        stream = sys.stderr if is_aside else sys.stdout
        if is_terminal(stream):
            self._draw(record, stream)
        else:
            print(self.format(record), file=stream, flush=True)

    def _draw(self, record: logging.LogRecord, stream: TextIO) -> None:
        # not before there is a terminal: most commands need no rich, which is slow to import
        from rich.console import Console
        from rich.text import Text

        time = logging.Formatter(datefmt=SHORT_TIME).formatTime(record, SHORT_TIME)
        rank = "" if is_first_rank() else f"[{plain(str(getattr(record, 'rank', '')))}] "
        line = Text.assemble(
            (f"{time} ", "dim"),
            rank,
            (f"{record.levelname} ", STYLES.get(record.levelname, "bold red")),
            "\n".join([plain(record.getMessage()), *_lines_below(record)]),
        )
        # wrapped by the terminal, so that a path can be copied from it
        (self.above or Console(file=stream)).print(line, soft_wrap=True)


def _lines_below(record: logging.LogRecord) -> list[str]:
    return list(map(plain, getattr(record, "lines", ())))


@contextlib.contextmanager
def above(console: "Console") -> Iterator[None]:
    """Log above what `console` draws, which a line must not be written into."""
    # of the class, because a second `setup` makes new handlers
    Handler.above = console
    try:
        yield
    finally:
        Handler.above = None
