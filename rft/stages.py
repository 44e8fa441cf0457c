"""Stages of a plan: documented commands, each printed for repetition by hand, then run.

Each stage is a separate process. On Linux it is forked from this one, which has already imported
the libraries: importing torch and open_clip takes seconds, and the plan of `rft photos` has ten
stages. This process must not compute with torch before a fork, because torch's thread pool does not
survive it. On other systems, and with several ranks, a stage is a new process.
"""

import ctypes
import importlib
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from rft import cli, commands, dist, start
from rft.commands import Command

FORKS = sys.platform == "linux"
CONTINUED = "   "  # indentation of continuation lines
COLUMNS = 80  # longer command lines are continued below
MISTAKE = 2  # exit code after `rft.cli.run` printed a user's mistake
PR_SET_PDEATHSIG = 1


def local(command: tuple[str, ...], processes: int) -> tuple[str, ...]:
    """Convert a command of the plan to this interpreter and `processes` ranks on this machine."""
    launcher, *rest = command
    # the module behind `torchrun`, which may not be on the path
    ranks = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes))
    return sys.executable, *{"python": (), "torchrun": ranks}[launcher], *rest


def run(name: str, command: tuple[str, ...]) -> None:
    """Print a command and run it.

    Raises:
        ValueError: if it fails.
    """
    # shown for pasting, without the path of this interpreter
    show(("python", *command[1:]))
    # the user's own variables come last and take precedence
    environment = {**dist.RANKS_HERE, **os.environ, commands.STAGE: "1"}
    _require_done(name, subprocess.run(command, env=environment).returncode)


def run_here(name: str, words: Sequence[str]) -> None:
    """Print a command (`-m rft.train OPTION...`, or a file of tools/) and run it as one process.

    Raises:
        ValueError: if it fails.
        SystemExit: with its exit code, if it was stopped or printed a user's mistake.
    """
    names = commands.named(words)
    found = command_of(names)
    options = names[1 if isinstance(commands.COMMANDS[names[0]], Command) else 2 :]
    by_rft = commands.STARTED in os.environ
    title = " ".join(["rft", *names[: len(names) - len(options)]])
    show(["rft", *names] if by_rft else ["python", *words])

    started = f"{words[1].replace('.', '/')}/__main__.py" if words[0] == "-m" else words[0]
    environment = {**os.environ, commands.STAGE: "1"}
    environment |= {commands.STARTED: title} if by_rft else {}

    def work() -> None:
        os.environ.update(environment)
        # as Python itself has it, for the record of the command
        sys.argv = [title if by_rft else started, *options]
        cli.run(importlib.import_module(found.module).main)

    if FORKS:
        code = fork(work)
    else:
        code = subprocess.run([sys.executable, *words], env=environment).returncode
    if code in (MISTAKE, start.STOPPED, start.INTERRUPTED):
        # the stage has printed the error; the plan prints how to resume
        sys.exit(code)
    _require_done(name, code)


def command_of(names: Sequence[str]) -> Command:
    """Look up the command named by the words after `rft`."""
    found = commands.COMMANDS[names[0]]
    return found if isinstance(found, Command) else found[names[1]]


def load(modules: Sequence[str]) -> None:
    """Import the modules of the stages once, before any fork."""
    for name in modules if FORKS else ():
        importlib.import_module(name)


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a fork of this process and return its exit code.

    Signals that end this process end the fork too.
    """
    process = multiprocessing.get_context("fork").Process(target=_begin, args=(work, os.getpid()))
    process.start()
    # both processes get the terminal's Ctrl-C; the stage decides how to handle it
    kept: Mapping[int, Any] = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, _hand_on(process)),
    }
    try:
        process.join()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert process.exitcode is not None
    # 128 + the number of a signal, as shells report it
    return process.exitcode if process.exitcode >= 0 else 128 - process.exitcode


def _begin(work: Callable[[], None], parent: int) -> None:
    # a killed parent cannot forward a signal
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)
    import torch

    # creates this process's thread pool now, before several threads could do so at once
    torch.set_num_threads(torch.get_num_threads())
    work()


def _hand_on(process: Any) -> Callable[[int, FrameType | None], None]:
    return lambda number, _: os.kill(process.pid, number)


def show(words: Sequence[str]) -> None:
    """Print a command line before it runs, split into lines that can be pasted as one command."""
    lines = ["$"]
    options: list[list[str]] = [[]]
    for word in map(shlex.quote, words):
        if word.startswith("-"):
            options.append([])
        options[-1].append(word)
    room = COLUMNS - len(" \\")
    for option in options:
        # an option and its values stay together if they fit on a line
        whole = " ".join(option)
        for text in [whole] if len(CONTINUED) + 1 + len(whole) <= room else option:
            if len(lines[-1]) + 1 + len(text) > room and lines[-1] not in ("$", CONTINUED):
                lines[-1] += " \\"
                lines.append(CONTINUED)
            lines[-1] += f" {text}"
    print("\n" + "\n".join(lines), flush=True)


def _require_done(name: str, code: int) -> None:
    if code:
        raise ValueError(
            f"{name} ended with exit code {code}, its output is above; run the same command again "
            "to resume there"
        )
