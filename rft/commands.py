"""`rft COMMAND ...`: every command by one name. Standard library only, until one is chosen.

The same commands start as `python -m rft.train` and `python tools/shard_imagenet.py`. Here a
command that several GPUs share starts a process for each GPU that is visible, unless a launcher
(torchrun, SLURM) has started this process as one of them.
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import rft

# what `rft COMMAND` was started as, for the commands that are printed to come next
STARTED = "RFT_COMMAND"
RANKS = "--ranks"


class Command(NamedTuple):
    """A command: the module whose `main` it is, and what it does."""

    module: str
    about: str
    ranks: bool = False
    """Whether several processes can share its work."""
    script: str = ""
    """Its file in tools/, if it has one."""
    first: tuple[str, ...] = ()
    """Options that it always has."""

    @property
    def package(self) -> str:
        """What `python -m` starts it by."""
        return self.module.removesuffix(".command")


PACKING = "rft.packing.commands"
PACK: Mapping[str, Command] = {
    "imagenet": Command(f"{PACKING}.imagenet", "ImageNet's images", script="shard_imagenet.py"),
    "ood": Command(f"{PACKING}.ood", "V2, R, Sketch, ObjectNet, A", script="shard_ood.py"),
    "folder": Command(
        f"{PACKING}.folder", "your own images, a folder for each class", script="shard_folder.py"
    ),
    "set": Command(
        f"{PACKING}.other_set", "any other test set: ImageNet-C, WILDS, ...", script="shard_set.py"
    ),
}
COMMANDS: Mapping[str, Command | Mapping[str, Command]] = {
    "photos": Command(
        "rft.photos.command", "from a folder of photos to a report and a model: all stages"
    ),
    "pack": PACK,
    "index": Command(
        f"{PACKING}.index", "make existing tar shards readable", script="index_shards.py"
    ),
    "verify": Command(
        f"{PACKING}.verify", "check packed sets, every byte if asked", script="verify_shards.py"
    ),
    "show": Command("rft.loading.show", "print or export samples of a packed set"),
    "train": Command("rft.train.command", "fine-tune CLIP by a recipe", ranks=True),
    "evaluate": Command("rft.evaluate.command", "predict all test images of a run", ranks=True),
    "merge": Command("rft.merge.command", "average weights: WiSE-FT, soups", ranks=True),
    "choose": Command("rft.merge.choose", "choose one of several models by held-out images"),
    "convert": Command("rft.convert.command", "import and export weights"),
    "report": Command("rft.report.command", "put evaluated runs side by side"),
    "predict": Command("rft.predict.command", "class names of new images, as lines, CSV or a page"),
    "demo": Command("rft.demo.command", "the method on a miniature world, from images to a report"),
    "reproduce": Command(
        "rft.demo.command", "every experiment of the paper, in miniature", first=("paper",)
    ),
    "env": Command("rft.env", "which libraries are in use here"),
}


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


def named(words: Sequence[str]) -> list[str]:
    """Return `-m rft.train OPTION...`, or a file of tools/, as the words after `rft`."""
    started = words[1] if words[0] == "-m" else Path(words[0]).name
    every = {(name,): one for name, one in COMMANDS.items() if isinstance(one, Command)}
    every |= {("pack", kind): one for kind, one in PACK.items()}
    found = next(name for name, one in every.items() if started in (one.package, one.script))
    return [*found, *words[2 if words[0] == "-m" else 1 :]]


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
