"""The commands of `rft COMMAND ...`, which `rft.entry` starts. Facts alone.

The same commands start as `python -m rft.train` and `python tools/shard_imagenet.py`.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# what `rft COMMAND` was started as, for the commands that are printed to come next
STARTED = "RFT_COMMAND"
# set for a stage of a plan, which knows what comes next
STAGE = "RFT_STAGE"
RANKS = "--ranks"
HELP_ALL = "--help-all"  # of commands whose --help leaves options out


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
    plan: bool = False
    """Whether it runs stages, and resumes after the last one."""

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
# in the order of `rft --help`, below their headings
GROUPS: Mapping[str, Mapping[str, Command | Mapping[str, Command]]] = {
    "Start here": {
        "photos": Command(
            "rft.photos.command",
            "from a folder of photos to a report and a model: all stages",
            plan=True,
        ),
        "predict": Command(
            "rft.predict.command", "class names of new images, as lines, CSV or a page"
        ),
    },
    "The stages of `rft photos`, and of experiments": {
        "pack": PACK,
        "train": Command("rft.train.command", "fine-tune CLIP by a recipe", ranks=True),
        "merge": Command("rft.merge.command", "average weights: WiSE-FT, soups", ranks=True),
        "choose": Command("rft.merge.choose", "choose one of several models by held-out images"),
        "evaluate": Command("rft.evaluate.command", "predict all images of test sets", ranks=True),
        "ensemble": Command(
            "rft.ensemble.command", "evaluate two models together: OSE, VRF, DaWin", ranks=True
        ),
        "report": Command("rft.report.command", "put evaluated runs side by side"),
        "convert": Command("rft.convert.command", "import and export weights"),
    },
    "Packed sets": {
        "index": Command(
            f"{PACKING}.index", "make existing tar shards readable", script="index_shards.py"
        ),
        "verify": Command(
            f"{PACKING}.verify", "check packed sets, every byte if asked", script="verify_shards.py"
        ),
        "show": Command("rft.loading.show", "list the samples of a training step"),
    },
    "The paper and this machine": {
        "demo": Command(
            "rft.demo.command",
            "the method on a miniature world, from images to a report",
            plan=True,
        ),
        "reproduce": Command(
            "rft.demo.command",
            "every experiment of the paper, in miniature",
            first=("paper",),
            plan=True,
        ),
        "env": Command("rft.env", "which libraries are in use here"),
    },
}
COMMANDS: Mapping[str, Command | Mapping[str, Command]] = {
    name: one for group in GROUPS.values() for name, one in group.items()
}


def named(words: Sequence[str]) -> list[str]:
    """Return `-m rft.train OPTION...`, or a file of tools/, as the words after `rft`."""
    started = words[1] if words[0] == "-m" else Path(words[0]).name
    found = next(name for name, one in _every() if started in (one.package, one.script))
    return [*found, *words[2 if words[0] == "-m" else 1 :]]


def by_name(text: str, *, bare: bool = False) -> str:
    """Return a text with its commands as `rft COMMAND`, where that is how this one was started.

    `bare` are names without `python -m` too (rft.train), which in a message may be a file's.
    """
    if STARTED not in os.environ:
        return text
    launcher = r"(?:python|torchrun(?: --nproc_per_node \w+)?) -m "
    for words, one in _every():
        module = rf"(?:{launcher}){'?' if bare else ''}\b{re.escape(one.package)}(?!\w|\.\w)"
        script = rf"python tools/{re.escape(one.script)}" if one.script else ""
        text = re.sub("|".join(filter(None, (module, script))), " ".join(("rft", *words)), text)
    return text


def _every() -> Iterator[tuple[tuple[str, ...], Command]]:
    """Yield each command and the words that name it after `rft`."""
    for name, found in COMMANDS.items():
        if isinstance(found, Command):
            yield (name,), found
        else:
            for kind, one in found.items():
                yield (name, kind), one
