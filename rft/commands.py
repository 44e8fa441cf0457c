"""The table of `rft COMMAND ...`; `rft.entry` starts them.

The same commands can be started as `python -m rft.train` or `python tools/shard_imagenet.py`.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# the `rft COMMAND` that was started, so that printed next commands use the same form
STARTED = "RFT_COMMAND"
# set for a stage of a plan, which prints no next command
STAGE = "RFT_STAGE"
RANKS = "--ranks"
HELP_ALL = "--help-all"  # of commands whose --help leaves options out


class Command(NamedTuple):
    """A command: its module, whose `main` runs, and its line of help."""

    module: str
    about: str
    ranks: bool = False
    """Whether several processes can share its work."""
    script: str = ""
    """Its file in tools/, if it has one."""
    first: tuple[str, ...] = ()
    """Arguments that are always passed."""
    plan: bool = False
    """Whether it runs stages and resumes after the last finished one."""

    @property
    def package(self) -> str:
        """Module name for `python -m`."""
        return self.module.removesuffix(".command")


PACKING = "rft.packing.commands"
PACK: Mapping[str, Command] = {
    "imagenet": Command(f"{PACKING}.imagenet", "ImageNet's images", script="shard_imagenet.py"),
    "ood": Command(f"{PACKING}.ood", "V2, R, Sketch, ObjectNet, A", script="shard_ood.py"),
    "folder": Command(
        f"{PACKING}.folder", "your own images, one folder per class", script="shard_folder.py"
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
        "report": Command("rft.report.command", "compare evaluated runs on one page"),
        "convert": Command("rft.convert.command", "import and export weights"),
    },
    "Packed sets": {
        "index": Command(
            f"{PACKING}.index", "make existing tar shards readable", script="index_shards.py"
        ),
        "verify": Command(
            f"{PACKING}.verify",
            "check packed sets, optionally every byte",
            script="verify_shards.py",
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
        "env": Command("rft.env", "which libraries are in use"),
    },
}
COMMANDS: Mapping[str, Command | Mapping[str, Command]] = {
    name: one for group in GROUPS.values() for name, one in group.items()
}


def typed(words: Sequence[str]) -> list[str]:
    """Rebuild the command line of this process (`sys.argv`), as it can be typed again."""
    program, names = Path(words[0]), os.environ.get(STARTED, "").split()[1:]
    parts, options = (*program.parts[:-1], program.stem), list(words[1:])
    for command, one in _every():
        module = (*one.package.split("."), "__main__")
        # a rank or a stage, which is started as `python -m rft.train`
        is_module = parts[-len(module) :] == module
        if not names and is_module:
            return ["python", "-m", one.package, *options]
        by_rft = program.name in ("rft", " ".join(("rft", *names))) or parts[-2:] == (
            "rft",
            "__main__",
        )
        if names and (is_module or (list(command) == names and by_rft)):
            if one.first and tuple(options[: len(one.first)]) == one.first:
                del options[: len(one.first)]
            return ["rft", *command, *options]
    return [program.name, *words[1:]]


def named(words: Sequence[str]) -> list[str]:
    """Translate `-m rft.train OPTION...`, or a file of tools/, to the words after `rft`."""
    started = words[1] if words[0] == "-m" else Path(words[0]).name
    found = next(name for name, one in _every() if started in (one.package, one.script))
    return [*found, *words[2 if words[0] == "-m" else 1 :]]


def by_name(text: str, *, bare: bool = False) -> str:
    """Rewrite the commands in a text as `rft COMMAND`, if the process was started that way.

    With `bare`, names without `python -m` (rft.train) are rewritten too; in a message they may be
    file names.
    """
    if STARTED not in os.environ:
        return text
    launcher = r"(?:python|torchrun(?: --nproc_per_node \w+)?) -m "
    for words, one in _every():
        # not followed by a longer name, as rft.merge is in rft.merge.choose
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
