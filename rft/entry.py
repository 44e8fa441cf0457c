"""`rft COMMAND ...`, the entry point. Standard library only, until a command is chosen.

A command that can share its work starts one process per visible GPU, unless a launcher (torchrun,
SLURM) has started this process as one of several.
"""

import importlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import rft
from rft import start
from rft.commands import COMMANDS, GROUPS, HELP_ALL, RANKS, STARTED, Command
from rft.text import plain

HELP, VERSION = ("-h", "--help"), ("-V", "--version")


def main() -> None:
    """Run the command named by the first words; Ctrl-C prints one line at any time."""
    words = sys.argv[1:]
    try:
        _main(words)
    except KeyboardInterrupt:  # during imports; later `cli.run` catches it
        start.say_interrupted(_again(words))
        sys.exit(start.INTERRUPTED)


def _main(words: Sequence[str]) -> None:
    if not words or words[0] in (*HELP, HELP_ALL, "help"):
        print(usage())
    elif words[0] in VERSION:
        print(f"rft {rft.__version__}")
    else:
        run(words)


def usage() -> str:
    """Format the text of `rft --help`."""
    lines = ["usage: rft COMMAND [OPTION...]", "", "Robust fine-tuning of CLIP."]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"]
        for name, found in group.items():
            kinds = {name: found} if isinstance(found, Command) else _of(name, found)
            lines += [f"  {words:16}{one.about}" for words, one in kinds.items()]
    shared = ", ".join(
        name for name, one in COMMANDS.items() if isinstance(one, Command) and one.ranks
    )
    lines += ["", "Try it without photos: rft photos --example"]
    lines += ["rft COMMAND --help prints its options, rft --version the version."]
    lines += [f"{shared}: one process per visible GPU, or {RANKS} N."]
    return "\n".join(lines)


def _of(name: str, kinds: Mapping[str, Command]) -> dict[str, Command]:
    return {f"{name} {kind}": one for kind, one in kinds.items()}


def _again(words: Sequence[str]) -> str:
    """Format the command line that resumes a plan; empty for other commands."""
    found = COMMANDS.get(words[0]) if words else None
    is_plan = isinstance(found, Command) and found.plan
    return plain(shlex.join(["rft", *words])) if is_plan else ""


def run(words: Sequence[str]) -> None:
    """Run a command with its options."""
    name, found = words[0], COMMANDS.get(words[0])
    rest = list(words[1:])
    if isinstance(found, Mapping):
        if not rest or rest[0] in (*HELP, HELP_ALL):
            lines = [f"  rft {name} {kind:10}{one.about}" for kind, one in found.items()]
            print("\n".join([f"usage: rft {name} KIND [OPTION...]", "", *lines]))
            return
        kind = rest.pop(0)
        name, found = (
            f"{name} {kind}",
            found.get(kind) or _refuse(f"kind of {name}", kind, list(found)),
        )
    elif name.startswith("-"):
        found = _refuse("option", name, [*HELP, *VERSION])
    elif found is None:
        found = _refuse("command", name, list(COMMANDS))
    os.environ[STARTED] = f"rft {name}"
    # `rft reproduce` is the demo's command with a fixed first word
    rest[:0] = found.first
    ranks = _take_ranks(rest) if found.ranks else 1
    sys.argv = [sys.argv[0], *rest]
    # imported late: imports take seconds, and `--help` alone needs none of them
    from rft import cli

    if ranks == 1:
        main = importlib.import_module(found.module).main
        cli.run(main, ranks=found.ranks, again=_again(words))
    else:
        from rft import dist

        # this process only starts the ranks, which parse the options themselves
        cli.run(lambda: sys.exit(dist.start_ranks(found.package, rest, ranks)))


def _refuse(what: str, name: str, known: Sequence[str]) -> Command:
    """Exit with the error line for an unknown name."""
    from rft import cli

    def refuse() -> None:
        raise cli.unknown(what, name, known)

    cli.run(refuse)
    raise AssertionError(name)


def _take_ranks(options: list[str]) -> int:
    """Take `--ranks N` out of a command's options; without it, one rank per visible GPU."""
    for place, option in enumerate(options):
        if option == RANKS or option.startswith(f"{RANKS}="):
            value = option.partition("=")[2] or "".join(options[place + 1 : place + 2])
            del options[place : place + (1 if "=" in option else 2)]
            return int(value) if value.isdigit() and int(value) else _bad_ranks(value)
    # started by a launcher, or no NVIDIA GPU here, which can be seen without importing torch
    if "WORLD_SIZE" in os.environ or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    if any(option in (*HELP, HELP_ALL) for option in options):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _bad_ranks(value: str) -> int:
    from rft import cli

    def refuse() -> None:
        raise ValueError(f"{RANKS} is {value!r}; it must be a whole number of processes, 1 or more")

    cli.run(refuse)
    raise AssertionError(value)
