"""The commands of `rft COMMAND ...`, which `rft.entry` starts. Facts alone.

The same commands start as `python -m rft.train` and `python tools/shard_imagenet.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# what `rft COMMAND` was started as, for the commands that are printed to come next
STARTED = "RFT_COMMAND"
# set for a stage of a plan, which knows what comes next
STAGE = "RFT_STAGE"
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


def named(words: Sequence[str]) -> list[str]:
    """Return `-m rft.train OPTION...`, or a file of tools/, as the words after `rft`."""
    started = words[1] if words[0] == "-m" else Path(words[0]).name
    every = {(name,): one for name, one in COMMANDS.items() if isinstance(one, Command)}
    every |= {("pack", kind): one for kind, one in PACK.items()}
    found = next(name for name, one in every.items() if started in (one.package, one.script))
    return [*found, *words[2 if words[0] == "-m" else 1 :]]
