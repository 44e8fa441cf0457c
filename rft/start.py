"""What a command does before its libraries are imported: standard library only.

Some libraries read variables of the environment when they are imported, and fail there: torch with
TORCH_LOGS, and others. That is a mistake of the user like any other,
but it is met before `rft.cli` can run anything.
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
MESSAGE_LETTERS = 300  # of a library's message
# exit codes: 128 + SIGINT, as shells report it; of a run that can be resumed (EX_TEMPFAIL)
INTERRUPTED, STOPPED = 130, 75


def is_command() -> bool:
    """Whether this process was started as a command of rft; others import it as a library."""
    # "-m" stands there until the module is found, and rft is imported to find it
    started = sys.argv[0] if sys.argv else ""
    path = Path(started)
    return started == "-m" or path.stem == "rft" or path.resolve().parent == TOOLS


def watch_imports() -> None:
    """Make one line of what libraries raise because of the environment, until `cli.run` begins."""
    # Jupyter's shells set it to a package of Jupyter's own; rft's pictures need no backend
    os.environ.pop("MPLBACKEND", None)
    # `cli.run` raises an error for it
    warnings.filterwarnings("ignore", "Ignoring environment variable FSSPEC", UserWarning)
    sys.excepthook = _tell


def say_interrupted(again: str = "", what: str = "interrupted") -> None:
    """Print the line of Ctrl-C, with the command that resumes.

    A stage leaves it to its plan, and a rank to the first one: all of them get the signal.
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
    # of the modules whose bodies run, the innermost is the one whose import fails
    modules = [f.f_globals["__name__"] for f, _ in frames if f.f_code.co_name == "<module>"]
    names = _variables(error, "".join(traceback.format_tb(trace)))
    advice = (
        f"correct or unset {' or '.join(names)} in the environment"
        if names
        else ("look at its settings, in files and in the environment")
    )
    message = printable(" ".join(str(error).split()), MESSAGE_LETTERS)
    line = f"error: {modules[-1]} cannot be imported: {message}; {advice}"
    print(line, file=sys.stderr, flush=True)
    sys.exit(2)


def _variables(error: BaseException, frames: str) -> list[str]:
    """Name the variables that an error shows: by their name or, in its message, their value."""
    text = f"{frames}{error}"
    # short names, such as _ and TZ, are in source lines and paths by chance
    named = [
        name for name in os.environ if len(name) > 3 and re.search(rf"\b{re.escape(name)}\b", text)
    ]
    # libraries quote the value that they refuse
    return named or [name for name, value in os.environ.items() if repr(value) in str(error)]
