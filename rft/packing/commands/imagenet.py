"""Pack ImageNet into tar shards: `python tools/shard_imagenet.py`."""

from dataclasses import dataclass, field
from typing import Literal

import tyro

from rft import cli, next_steps
from rft.packing.expected import parse_allowed_counts
from rft.packing.pack import Options, pack_all
from rft.shards.label_space import choose_labels


@dataclass(frozen=True, kw_only=True)
class ShardImagenet:
    """Pack ImageNet into WebDataset tar shards: OUT/imagenet-train and OUT/imagenet-val.

    The layout of the source is detected, and the same images in any layout give the same shards:
    class folders (train/<wnid>/*.JPEG, val/<wnid>/*.JPEG), or the archives as downloaded, which are
    never extracted (ILSVRC2012_img_train.tar or a folder with its 1000 tars; ILSVRC2012_img_val.tar
    or its flat files in val/, with ILSVRC2012_devkit_t12.tar.gz or the unpacked folder beside them,
    which has their classes). A run is safe to interrupt and rerun with the same arguments, and
    writes the same bytes for any number of workers and tasks. Example, on four machines (I = 0, 1,
    2, 3):

    python tools/shard_imagenet.py --source /data/imagenet --out s3://bucket/rft --task I/4
    """

    source: str
    """Folder with train/ and val/ or the archives, directly or in imagenet/ or ILSVRC2012/."""
    out: str
    """Output for the packed sets: a folder, or a URL (s3://, gs://, az://, ...)."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Which splits to pack."""
    classes: str | None = None
    """JSON file with another label space (keys ids, names, templates); None is ImageNet's 1000."""
    allow_count: tuple[str, ...] = ()
    """SET=N: accept an incomplete copy with exactly N images; one value per set, such as
    imagenet-val=49999."""
    packing: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    """How to pack."""


def main() -> None:
    """Pack the splits that the command line names."""
    command = cli.parse(ShardImagenet, config=(tyro.conf.FlagCreatePairsOff,))
    if not command.splits:
        raise ValueError("--splits names nothing to pack")
    labels = choose_labels(command.classes)
    datasets = [f"imagenet-{split}" for split in command.splits]
    allowed = parse_allowed_counts(command.allow_count, datasets)
    if pack_all(datasets, command.source, command.out, labels, command.packing, allowed):
        say_next(command)


def say_next(command: ShardImagenet) -> None:
    """Print the command that trains on the set, or evaluates on it if only val was packed."""
    if "train" in command.splits:
        cli.say_next(next_steps.training(command.out))
    else:
        words = ["-m", "rft.evaluate", "RUN", "--data", command.out, "--sets", "imagenet-val"]
        unknown = {"RUN": "folder of a run that was trained"}
        cli.say_next(cli.next_step(words, unknown=unknown, on_gpus=True))
