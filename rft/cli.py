"""Start and failure of every rft command.

A user's mistake is a `ValueError`, or an `OSError` from a file they named. It becomes one line on
stderr and exit code 2. Everything else is a bug and keeps its traceback; RFT_TRACEBACK=1 in the
environment shows a traceback for mistakes too. URLs with credentials on the command line are
refused, because many commands record their arguments. Credentials in the messages of other
libraries are redacted.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import groupby, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import tyro
from fsspec.config import set_conf_env

from rft import commands, log, start
from rft.storage import files, urls
from rft.text import plain

T = TypeVar("T")
ERROR_LETTERS = 1800  # per error line; tests/hostile allows at most 2,000
OPTION = re.compile(r"│ (?:-\w, )?--\S.*?(?=  |$)")  # an option's line in tyro's help
EMPTY = re.compile(r"\(default:[ │\n]*\)")
# tyro's complaints about text in place of a number; {None} marks an option that may be omitted
NO_NUMBER = re.compile(
    r"^Error parsing (?P<name>--[\w.-]+): "
    r"(?:(?P<whole>invalid literal for int\(\) with base 10: )|could not convert string to float: "
    r"|no type matching (?:\{None\}\|)?(?P<kind>INT|FLOAT) could be instantiated from \[)"
    r"'(?P<value>.*)'\]?\.?$"
)
STYLE = re.compile(r"\x1b\[[0-9;]*m")  # escape sequences for terminal colours
LEAST_COLUMNS = 40  # of a terminal: below 5 columns, tyro's --help never ends
SIZE = r"[1-9][0-9]{0,3}"  # columns or lines of a terminal; rich would pad a larger one with spaces

# the variables that torchrun sets for each rank
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

SEVERAL_GPUS = "  (with several GPUs: torchrun --nproc_per_node NUMBER in place of python)"


def run(main: Callable[[], None], *, ranks: bool = False, again: str = "") -> None:
    """Run `main`; turn a user's mistake into one clear line and exit code 2.

    Under torchrun all ranks of a node meet the same mistake, so only one per node prints it, and
    torchrun repeats it at the end of its summary. Without `ranks` the command runs as one process,
    and a launcher's variables in the environment are ignored. `again` is the command line of a
    plan, printed after Ctrl-C because it resumes the plan.
    """
    sys.excepthook = _tell_bug  # for exceptions that no clause below catches
    log.setup(urls.redact)
    if not ranks:
        for name in LAUNCHED:
            os.environ.pop(name, None)
    try:
        _require_streams()
        _bound_terminal()
        _require_client_settings()
        for word in sys.argv[1:]:
            urls.refuse_credentials(word)
        try:
            main()
        except SystemExit as stopped:  # from --help, or the command's own exit code
            _finish_output()  # a failed write counts here too
            # a stage of the plan was interrupted or stopped
            if again and stopped.code in (start.INTERRUPTED, start.STOPPED):
                start.say_interrupted(again, "stopped")
            raise
        _finish_output()
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        _drop_output()
        sys.exit(1)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            start.say_interrupted(again)
        _drop_output()
        sys.exit(start.INTERRUPTED)
    except (ValueError, OSError) as error:
        if os.environ.get("RFT_TRACEBACK"):
            raise
        _say_error(error)
        _drop_output()
        sys.exit(2)


def _say_error(error: Exception) -> None:
    """Print a user's mistake, and hand it to torchrun, which may repeat it."""
    message = commands.by_name(urls.redact(" ".join(str(error).split())))
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" on rank {rank}"
    line = _shortened(plain(f"error{where}: {message}"))
    # longer advice, printed below the error
    advice = map(commands.by_name, getattr(error, "__notes__", ()))
    notes = [_shortened(plain(f"  {urls.redact(note)}")) for note in advice]
    with contextlib.suppress(OSError):  # keep the order if both streams go to one file
        if sys.stdout is not None:
            sys.stdout.flush()
    if not is_quiet_rank():
        with contextlib.suppress(OSError):  # stderr is full or closed
            print(line, *notes, sep="\n", file=sys.stderr, flush=True)
    _hand_to_torchrun(line)


def _shortened(line: str) -> str:
    """Shorten a long line to its beginning and its end."""
    half = ERROR_LETTERS // 2
    return line if len(line) <= ERROR_LETTERS else f"{line[:half]} ... {line[-half:]}"


def _require_streams() -> None:
    # a file opened later would get the descriptor of a closed stream, and receive its output
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            raise ValueError(f"{name} is closed; redirect it to /dev/null to discard it")


def _bound_terminal() -> None:
    """Bound the terminal's size to values in which help, tables and bars can be drawn."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch(SIZE, os.environ.get(name, ""), re.ASCII):
            os.environ.pop(name, None)
    widths = [int(os.environ.get("COLUMNS", "0"))]
    for stream in range(3):  # rich checks each of them
        with contextlib.suppress(OSError):
            widths.append(os.get_terminal_size(stream).columns)
    # COLUMNS wins, as in rich; a terminal without a size reports 0
    width = widths[0] or min(filter(None, widths), default=LEAST_COLUMNS)
    if width < LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(LEAST_COLUMNS)


def _require_client_settings() -> None:
    """Check fsspec's settings in the environment, because fsspec ignores those it cannot parse."""
    for name, value in os.environ.items():
        if name.startswith("FSSPEC"):
            with warnings.catch_warnings(record=True) as ignored:
                warnings.simplefilter("always")
                # into a throw-away dictionary: fsspec itself read the variables on import
                set_conf_env({}, {name: value})
            if ignored:
                raise ValueError(
                    f"{name} in the environment is not a setting of fsspec: FSSPEC_ and a protocol "
                    "with a JSON object, such as FSSPEC_HTTP='{}'; correct or unset it"
                )


def _finish_output() -> None:
    """Flush stdout while a failure can still be reported as an error line and an exit code."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write to stdout: {error.strerror}") from error


def _drop_output() -> None:
    """Point unwritable streams at /dev/null, so that Python's flush at exit cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
                # otherwise the flush at exit fails too, with a message and code 120
                os.dup2(nowhere.fileno(), stream.fileno())


def _hand_to_torchrun(line: str) -> None:
    """Write the error to the file from which torchrun, if present, prints the cause last."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            # same format as torch.distributed.elastic's ErrorHandler; its summary prints
            # py_callstack
            cause = {"py_callstack": line, "timestamp": str(int(time.time()))}
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": cause}}))


def is_quiet_rank() -> bool:
    """Whether torchrun started this rank and another rank of its node prints shared errors.

    If only torchrun's variables are left in a shell, no other process would print them.
    """
    # another launcher may not set it: then the variables below decide
    if (text := os.environ.get("TORCHELASTIC_ERROR_FILE")) is not None:
        error_file = Path(text)
        # torchrun deletes this folder when it ends
        if not (error_file.is_absolute() and error_file.parent.is_dir()):
            return False
    texts = [os.environ.get(name, "") for name in LAUNCHED]
    if "TORCHELASTIC_RUN_ID" not in os.environ or not all(
        re.fullmatch("[0-9]{1,10}", text, re.ASCII) for text in texts
    ):
        return False
    rank, size, local_rank, local_size = map(int, texts)
    return 0 < local_rank < local_size <= size and local_rank <= rank < size


def _tell_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, with the credentials of URLs redacted."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(urls.redact(text), end="", file=sys.stderr, flush=True)


def parse(kind: Callable[..., T], *, shown: Sequence[str] = (), **options: Any) -> T:
    """Parse the command line with `tyro.cli`, to which `options` are passed.

    For a command with many options, `shown` names those that --help prints; --help-all prints all.

    Raises:
        ValueError: with the first lines of tyro's complaint, which tyro would print as a box; or
            for a URL given to an option that takes a path, of which pathlib would make a folder
            `s3:`.
    """
    if commands.STARTED in os.environ:
        # "rft.convert export" has a kind after the command
        kind_of = options.get("prog", "").partition(" ")[2]
        options["prog"] = f"{os.environ[commands.STARTED]} {kind_of}".rstrip()
    words = list(options.pop("args", sys.argv[1:]))
    given = [word for word in words if word.startswith("--")]
    if commands.HELP_ALL in words:
        words, shown = [*words, "--help"], ()
        words.remove(commands.HELP_ALL)
    complaint, help_text = io.StringIO(), _boxes()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(help_text):
            found = tyro.cli(kind, args=words, **options)
        _require_local_paths(found, "")
        return found
    except SystemExit as stopped:
        if stopped.code != 2:  # --help
            # tyro's text for an empty tuple; blanked, so that the box keeps its width
            text = EMPTY.sub(lambda found: re.sub("[^│\n]", " ", found[0]), _read(help_text))
            print_help(only_shown(text, shown) if shown else text)
            raise
        sections = _sections(complaint.getvalue())
        first = next(sections, [])
        # the option is named in its own line already
        text = re.sub(r"^Error parsing [\w.]+: (?=--)", "", " ".join(first))
        if text.startswith("Missing"):
            # "Missing from COMMAND:" and a list, or one line about an option without its value
            text = _missing(first) if first[1:] else text
            # tyro reports missing arguments first, but an unknown option is the likelier mistake
            kinds = [*takewhile(lambda word: not word.startswith("-"), words)]
            _require_known_options(given, kinds, kind, options)
        text = NO_NUMBER.sub(_number, text)
        # of the names of an option (--run, --run-dir), the last is the documented one
        meant = [
            found[1]
            for title, *lines in sections
            if title.startswith("Perhaps you meant")
            for line in lines
            if (found := re.match(r"(?:--\S+, )*(--[^\s,)]+)", line))
        ]
        hint = f"; did you mean {' or '.join(meant[:3])}?" if meant else ""
        raise ValueError(f"{text}{hint} (see --help)") from None


def _missing(lines: Sequence[str]) -> str:
    """Reword tyro's list of missing arguments: for each a line with its name, and lines of help.

    A long list of choices, in brackets after the name, is wrapped.
    """
    found: list[list[str]] = []
    name, end = "", "(required)"
    for line in lines[1:]:
        if not name:
            found.append([])
        if not name or len(re.findall(r"[\[{]", name)) > len(re.findall(r"[\]}]", name)):
            name = f"{name} {line}".lstrip()
            found[-1][:] = [f"{name}:"]
            continue
        found[-1].append(line)
        if line.endswith(end):
            name = ""
    texts = (" ".join(words).removesuffix(end).rstrip(" .:") for words in found)
    return f"missing: {'; '.join(texts)}"


def _boxes() -> io.TextIOWrapper:
    """Make a UTF-8 stream for tyro's help: tyro draws boxes only if the encoding has them."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8")


def _read(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


def _require_known_options(
    given: Sequence[str],
    before: Sequence[str],
    kind: Callable[..., object],
    options: Mapping[str, Any],
) -> None:
    """Refuse the first of the `given` options that is not in the command's --help.

    `before` are the words before the options; the first may be a kind with its own options.
    """
    help_text = _boxes()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(help_text):
        tyro.cli(kind, args=[*before, "--help"], **options)
    lines = [found[0] for found in map(OPTION.match, _read(help_text).splitlines()) if found]
    known = {name for line in lines for name in re.findall(r"--[\w.-]+", line)}
    for word in given:
        name = word.partition("=")[0].replace("_", "-")
        if name not in known:
            raise unknown("option", name, sorted(known))


def _number(found: re.Match[str]) -> str:
    what = "whole number" if found["whole"] or found["kind"] == "INT" else "number"
    return f"{found['name']} is {found['value']!r}; it must be a {what}"


def _require_local_paths(value: object, name: str) -> None:
    """Check every path of a parsed command line; `name` is the option or argument it came from."""
    if isinstance(value, Path):
        # pathlib turns an empty string into the current folder
        if value == Path() and "" in sys.argv[1:]:
            raise ValueError(f"{name or 'a path'} is empty; name a file or folder")
        files.require_local(value, name)
    elif isinstance(value, tuple):
        for one in value:
            _require_local_paths(one, name)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _require_local_paths(getattr(value, field.name), f"--{field.name.replace('_', '-')}")


def say(text: str) -> None:
    """Print a result, not a log line, with file names escaped for any terminal."""
    print(plain(text, kept="\n"), flush=True)


def say_next(text: str) -> None:
    """Print the next command (`next_step`), unless a plan runs it."""
    if commands.STAGE not in os.environ:
        say(text)


def next_step(
    words: Sequence[object],
    *,
    ranks: int = 1,
    unknown: Mapping[str, str] | None = None,
    label: str = "next",
    on_gpus: bool = False,
) -> str:
    """Format the next command, so that its line can be pasted into a shell.

    `words` follow `python`, or torchrun if it starts several `ranks`. `unknown` are words for the
    user to fill in, each explained on its own line. `on_gpus` adds how to share the work between
    several GPUs.
    """
    texts = [str(word) for word in words]
    if commands.STARTED in os.environ:
        # by the same name as the running command; `rft` starts ranks by itself
        launcher, texts = ["rft"], [*commands.named(texts)]
    else:
        launcher = ["python"] if ranks == 1 else ["torchrun", "--nproc_per_node", str(ranks)]
    line = f"{label}: {shlex.join([*launcher, *texts])}"
    notes = [f"  ({word}: {meaning})" for word, meaning in (unknown or {}).items()]
    if on_gpus and commands.STARTED not in os.environ:
        notes.append(SEVERAL_GPUS)
    return "\n".join([line, *notes])


def unknown(kind: str, name: str, known: Sequence[str]) -> ValueError:
    """Make the error for a `name` that is not among the `known`, with the closest match."""
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(known)}"
    return ValueError(f"unknown {kind} {name!r}; {hint}")


def only_shown(help_text: str, shown: Sequence[str]) -> str:
    """Reduce tyro's --help to some of its options, and add how many more there are.

    Boxes without remaining options are removed.
    """
    boxes: list[list[str]] = [[]]  # the first holds the text before the boxes
    hidden, keep = 0, True
    for line in help_text.splitlines():
        if line.startswith("╭"):
            boxes.append([])
        if line.startswith(("╭", "╰")):
            keep = True
        elif option := OPTION.match(line):
            names = {name.removeprefix("--") for name in re.findall(r"--[\w.-]+", option[0])}
            keep = bool(names & {*shown, "help"})
            hidden += not keep
        if keep:
            boxes[-1].append(line)
    texts = ["\n".join(box) for box in boxes if box == boxes[0] or any(map(OPTION.match, box))]
    return "\n".join([*texts, f"{hidden} more options: {commands.HELP_ALL}"])


def print_help(text: str) -> None:
    """Print a help text no wider than the terminal, with commands by name; it may hold boxes."""
    columns = shutil.get_terminal_size().columns
    lines = [part for line in text.splitlines() for part in _help_lines(line, columns)]
    _print_drawn("\n".join(lines))


def _help_lines(line: str, columns: int) -> list[str]:
    """Wrap a line of a help text; text to the right of a gap stays a column."""
    if line.startswith("│"):
        # hide {None} of an optional value, and keep the columns aligned
        line = re.sub(r"\{None\}\|(\S+)", r"\1       ", line)
        named = commands.by_name(line, bare=True)
        return [f"{named[:-1].rstrip():{len(line) - 1}}{line[-1]}"]
    line = commands.by_name(line.replace("{None}|", ""), bare=True)
    if line.startswith(("╭", "╰")) or len(line) <= columns:
        return [line]
    indent = re.match(r"\s*(?:\S+ {2,}|usage: )?", line)
    assert indent is not None
    below = " " * min(len(indent[0]), columns // 2)
    # an example that can be pasted
    end = " \\" if line.startswith(("rft ", "python ")) or line.endswith("\\") else ""
    *parts, last = textwrap.wrap(
        line,
        columns - len(end),
        subsequent_indent=below,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [*(f"{part}{end}" for part in parts), last]


def _print_drawn(text: str) -> None:
    """Print a text with boxes, in ASCII if the encoding has none."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(str.maketrans("╭─╮│╰╯", "+-+|++")).encode("ascii", "replace").decode()
    print(text)


def _sections(box: str) -> Iterator[list[str]]:
    """Split the body of a box that tyro drew at its rules."""
    # on a terminal tyro colours its output even if it is redirected here
    lines = [line.strip("│| ") for line in STYLE.sub("", box).splitlines()[1:]]
    sections = groupby(lines, key=lambda line: bool(line.strip("─-╰╯+")))
    return (list(section) for is_text, section in sections if is_text)
