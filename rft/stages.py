"""Stages of a plan: documented commands, each printed so that it can be repeated by hand, then run.

A stage is a process of its own. On Linux it is forked from this one, which has imported what the
stages need: importing torch and open_clip takes seconds, and a plan of own photos has ten stages.
This process must not compute with torch before, because its pool of threads does not survive a
fork. On other systems, and with several ranks, a stage is a new process.
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
CONTINUED = "   "  # before the words of a line that continues one
COLUMNS = 80  # of a command's line, which is continued below
MISTAKE = 2  # exit code: `rft.cli.run` printed the user's mistake
PR_SET_PDEATHSIG = 1


def local(command: tuple[str, ...], processes: int) -> tuple[str, ...]:
    """Return a command of the plan for this interpreter and so many ranks on this machine."""
    launcher, *rest = command
    # what `torchrun` starts, which need not be on the path
    ranks = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes))
    return sys.executable, *{"python": (), "torchrun": ranks}[launcher], *rest


def run(name: str, command: tuple[str, ...]) -> None:
    """Print a command and run it.

    Raises:
        ValueError: if it fails.
    """
    # to be pasted: not the path of this interpreter
    show(("python", *command[1:]))
    # the user's own variables come last and win
    environment = {**dist.RANKS_HERE, **os.environ, commands.STAGE: "1"}
    _require_done(name, subprocess.run(command, env=environment).returncode)


def run_here(name: str, words: Sequence[str]) -> None:
    """Print a command (`-m rft.train OPTION...`, or a file of tools/) and run it as one process.

    Raises:
        ValueError: if it fails.
        SystemExit: if it was stopped, with its exit code.
    """
    names = commands.named(words)
    found = command_of(names)
    options = names[1 if isinstance(commands.COMMANDS[names[0]], Command) else 2 :]
    by_rft = commands.STARTED in os.environ
    title = " ".join(["rft", *names[: len(names) - len(options)]])
    show(["rft", *names] if by_rft else ["python", *words])

    environment = {**os.environ, commands.STAGE: "1"}
    environment |= {commands.STARTED: title} if by_rft else {}

    def work() -> None:
        os.environ.update(environment)
        sys.argv = [title if by_rft else words[0], *options]
        cli.run(importlib.import_module(found.module).main)

    if FORKS:
        code = fork(work)
    else:
        code = subprocess.run([sys.executable, *words], env=environment).returncode
    if code in (MISTAKE, start.STOPPED, start.INTERRUPTED):
        # the stage has printed what was wrong; how the plan resumes is the plan's line
        sys.exit(code)
    _require_done(name, code)


def command_of(names: Sequence[str]) -> Command:
    """Return the command that the words after `rft` name."""
    found = commands.COMMANDS[names[0]]
    return found if isinstance(found, Command) else found[names[1]]


def load(modules: Sequence[str]) -> None:
    """Import what stages will need, once for all of them."""
    for name in modules if FORKS else ():
        importlib.import_module(name)


def fork(work: Callable[[], None]) -> int:
    """Call `work` in a fork of this process, which ends with it; return its exit code.

    A signal that ends this process ends the fork too.
    """
    process = multiprocessing.get_context("fork").Process(target=_begin, args=(work, os.getpid()))
    process.start()
    # both get the terminal's Ctrl-C, and the stage decides what it means
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
    # of a signal's number, as shells report it
    return process.exitcode if process.exitcode >= 0 else 128 - process.exitcode


def _begin(work: Callable[[], None], parent: int) -> None:
    # a parent that is killed hands nothing on
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)
    import torch

    # makes the pool of threads of this process before several threads would at once
    torch.set_num_threads(torch.get_num_threads())
    work()


def _hand_on(process: Any) -> Callable[[int, FrameType | None], None]:
    return lambda number, _: os.kill(process.pid, number)


def show(words: Sequence[str]) -> None:
    """Print a command line that is about to run, on several lines that can be pasted as one."""
    lines = ["$"]
    options: list[list[str]] = [[]]
    for word in map(shlex.quote, words):
        if word.startswith("-"):
            options.append([])
        options[-1].append(word)
    room = COLUMNS - len(" \\")
    for option in options:
        # an option stays with its values where a line holds them
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
            f"{name} ended with exit code {code}, what it said is above; started again, "
            "this resumes there"
        )
