"""`rft COMMAND ...`: every command by one name. Standard library only, until one is chosen.

A command that several GPUs share starts a process for each GPU that is visible, unless a launcher
(torchrun, SLURM) has started this process as one of them.
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import rft
from rft.commands import COMMANDS, RANKS, STARTED, Command


def main() -> None:
    """Run the command that the first words name."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
    elif words[0] in ("-V", "--version"):
        print(f"rft {rft.__version__}")
    else:
        run(words)


def usage() -> str:
    """Return what `rft --help` prints."""
    lines = ["usage: rft COMMAND [OPTION...]", "", "Robust fine-tuning of CLIP.", ""]
    for name, found in COMMANDS.items():
        if isinstance(found, Command):
            lines.append(f"  {name:16}{found.about}")
        else:
            lines += [f"  {name + ' ' + kind:16}{one.about}" for kind, one in found.items()]
    shared = ", ".join(
        name for name, one in COMMANDS.items() if isinstance(one, Command) and one.ranks
    )
    lines += ["", "rft COMMAND --help prints its options, rft --version the version."]
    lines += [f"{shared} start a process for each visible GPU; {RANKS} N: others."]
    return "\n".join(lines)


def run(words: Sequence[str]) -> None:
    """Run a command with its options."""
    name, found = words[0], COMMANDS.get(words[0])
    rest = list(words[1:])
    if isinstance(found, Mapping):
        if not rest or rest[0] in ("-h", "--help"):
            lines = [f"  rft {name} {kind:10}{one.about}" for kind, one in found.items()]
            print("\n".join([f"usage: rft {name} KIND [OPTION...]", "", *lines]))
            return
        kind = rest.pop(0)
        name, found = f"{name} {kind}", found.get(kind) or _refuse(f"kind of {name}", kind, found)
    elif found is None:
        found = _refuse("command", name, COMMANDS)
    os.environ[STARTED] = f"rft {name}"
    rest[:0] = found.first
    ranks = _take_ranks(rest) if found.ranks else 1
    sys.argv = [sys.argv[0], *rest]
    # late: they take seconds, and which is needed is known only now
    from rft import cli

    if ranks == 1:
        cli.run(importlib.import_module(found.module).main, ranks=found.ranks)
    else:
        from rft import dist

        cli.run(lambda: sys.exit(dist.start_ranks(found.package, rest, ranks)))


def _refuse(what: str, name: str, known: Mapping[str, object]) -> Command:
    """End with the line of a name that is not known."""
    from rft import cli

    def refuse() -> None:
        raise cli.unknown(what, name, list(known))

    cli.run(refuse)
    raise AssertionError(name)


def _take_ranks(options: list[str]) -> int:
    """Take `--ranks N` out of a command's options; without it, one for each visible GPU."""
    for place, option in enumerate(options):
        if option == RANKS or option.startswith(f"{RANKS}="):
            value = option.partition("=")[2] or "".join(options[place + 1 : place + 2])
            del options[place : place + (1 if "=" in option else 2)]
            return int(value) if value.isdigit() and int(value) else _bad_ranks(value)
    # started by a launcher, or a machine without a GPU of NVIDIA's, which is seen without torch
    if "WORLD_SIZE" in os.environ or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    if any(option in ("-h", "--help") for option in options):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _bad_ranks(value: str) -> int:
    from rft import cli

    def refuse() -> None:
        raise ValueError(f"{RANKS} is {value!r}; it must be a whole number of processes, 1 or more")

    cli.run(refuse)
    raise AssertionError(value)
