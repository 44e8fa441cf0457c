"""Logging of a command: one setup, one format of lines with time, rank, level and text.

A module logs to `logging.getLogger(__name__)`, a child of the logger `rft`. Records of other
libraries and Python's warnings get the same format. The result of a command is printed, not logged.
If rft is used as a library, nothing is set up and Python's default applies: warnings appear on
stderr, everything else goes where the program's logging sends it.
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

# `extra` of a record: INFO that must stay out of stdout, because the result is printed there
ASIDE = {"aside": True}
# and of a record that concerns one rank; all others occur on every rank, and only rank 0 shows them
EVERY_RANK = {"every_rank": True}


def setup(redact: Callable[[str], str] = str) -> None:
    """Show each record of rft and of other libraries once, however often this is called.

    Args:
        redact: removes credentials from records of other libraries; rft's own records hold none.
    """
    own, others = logging.getLogger(NAME), logging.getLogger()
    own.setLevel(logging.INFO)
    own.propagate = False  # or a library that sets up the root logger would print every line twice
    for logger in (own, others):
        # by name, because a reimported rft has a different class
        for handler in [handler for handler in logger.handlers if handler.name == NAME]:
            logger.removeHandler(handler)
        logger.addHandler(Handler(redact))
    warnings.formatwarning = _one_line
    # warnings become records of the logger py.warnings, which the root handler shows
    logging.captureWarnings(True)


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Format a Python warning without its source line, which does not help a user."""
    return f"{category.__name__}: {' '.join(str(message).split())} ({filename}:{lineno})"


def is_first_rank() -> bool:
    """Whether this process shows the records that occur on all ranks."""
    return os.environ.get("RANK", "0") == "0"


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal with colours on which lines can be redrawn."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class Formatter(logging.Formatter):
    """Escapes third-party text in records; `extra={"lines": ...}` adds lines below the first."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """Format the lines of a record, without a traceback."""
        return "\n".join([plain(super().formatMessage(record)), *_lines_below(record)])


class Handler(logging.Handler):
    """Writes to the current stdout or stderr, and raises write errors as print does.

    INFO goes to stdout and everything else to stderr, unbuffered. A full disk or a closed pipe ends
    the command (`rft.cli.run`); logging's own handlers would print a traceback for each line.
    """

    above: "Console | None" = None
    """Console with a live drawing, such as a bar, above which lines must be printed."""

    def __init__(self, redact: Callable[[str], str]) -> None:
        super().__init__()
        self._redact = redact
        self.set_name(NAME)
        self.setFormatter(Formatter(FORMAT, TIME))

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop rft's records on ranks other than 0, unless they concern that rank alone."""
        record.rank = os.environ.get("RANK", "0")
        # children of the logger `rft` are named rft.something; `rftools` is not one
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
        # imported only for a terminal, because rich is slow to import
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
        # soft_wrap leaves wrapping to the terminal, so that paths can be copied
        (self.above or Console(file=stream)).print(line, soft_wrap=True)


def _lines_below(record: logging.LogRecord) -> list[str]:
    return list(map(plain, getattr(record, "lines", ())))


@contextlib.contextmanager
def above(console: "Console") -> Iterator[None]:
    """Print log lines above the live drawing of `console`."""
    # an attribute of the class, because a second `setup` makes new handlers
    Handler.above = console
    try:
        yield
    finally:
        Handler.above = None
