"""Steps before a command's libraries are imported: standard library only.

Some libraries read environment variables on import and fail on wrong values, such as torch on
TORCH_LOGS. That is a user's mistake like any other, but it occurs before `rft.cli` can handle it.
"""

import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from types import TracebackType

from rft import commands
from rft.text import printable

TOOLS = Path(__file__).resolve().parents[1] / "tools"
MESSAGE_LETTERS = 300  # kept of a library's message
# exit codes: 128 + SIGINT, as shells report it; EX_TEMPFAIL for a run that can be resumed
INTERRUPTED, STOPPED = 130, 75


def is_command() -> bool:
    """Whether this process was started as a command of rft, not as a user of the library."""
    # argv[0] is "-m" until the module is found, and finding it imports rft
    started = sys.argv[0] if sys.argv else ""
    path = Path(started)
    return started == "-m" or path.stem == "rft" or path.resolve().parent == TOOLS


def watch_imports() -> None:
    """Report import errors caused by the environment in one line, until `cli.run` begins."""
    # shells inside Jupyter set it to a package of Jupyter; rft's pictures need no backend
    os.environ.pop("MPLBACKEND", None)
    # `cli.run` raises an error for these variables
    warnings.filterwarnings("ignore", "Ignoring environment variable FSSPEC", UserWarning)
    sys.excepthook = _tell


def say_interrupted(again: str = "", what: str = "interrupted") -> None:
    """Print the line after Ctrl-C, with the command that resumes.

    A stage leaves it to its plan, and other ranks to rank 0, because all of them get the signal.
    """
    if commands.STAGE not in os.environ and os.environ.get("RANK", "0") == "0":
        print(f"{what}; to resume: {again}" if again else what, file=sys.stderr, flush=True)


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        say_interrupted()
        sys.exit(INTERRUPTED)
    if not isinstance(error, (ValueError, OSError)) or os.environ.get("RFT_TRACEBACK"):
        sys.__excepthook__(kind, error, trace)
        return
    frames = list(traceback.walk_tb(trace))
    # among the modules being imported, the innermost is the one that failed
    modules = [f.f_globals["__name__"] for f, _ in frames if f.f_code.co_name == "<module>"]
    names = _variables(error, "".join(traceback.format_tb(trace)))
    advice = (
        f"correct or unset {' or '.join(names)} in the environment"
        if names
        else ("check its settings, in files and in the environment")
    )
    message = printable(" ".join(str(error).split()), MESSAGE_LETTERS)
    line = f"error: {modules[-1]} cannot be imported: {message}; {advice}"
    print(line, file=sys.stderr, flush=True)
    sys.exit(2)


def _variables(error: BaseException, frames: str) -> list[str]:
    """Find the variables named in an error or its traceback, else those whose value it quotes."""
    text = f"{frames}{error}"
    # short names, such as _ and TZ, occur in source lines and paths by chance
    named = [
        name for name in os.environ if len(name) > 3 and re.search(rf"\b{re.escape(name)}\b", text)
    ]
    # libraries quote the value that they refuse
    return named or [name for name, value in os.environ.items() if repr(value) in str(error)]
