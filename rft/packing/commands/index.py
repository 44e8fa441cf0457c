"""Index existing tar shards, so that rft can read them: `python tools/index_shards.py`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from rft import cli
from rft.packing.foreign.index import index_shards
from rft.packing.foreign.rule import Options
from rft.shards.folder import QUARANTINE
from rft.shards.label_space import choose_labels
from rft.storage import files
from rft.text import counted


@dataclass(frozen=True, kw_only=True)
class IndexShards:
    """Write manifest, index.npz and samples.npz for existing WebDataset shards, without a copy.

    A sample is an image (jpg, jpeg, png, webp) with its label: a .cls member, or a field of the
    sample's .json. That covers timm's imagenet-1k-wds, CLIP_benchmark's wds_* sets and
    img2dataset's output. Evaluation and training find a set by its folder name, so end --out with
    that name. Examples:

    python tools/index_shards.py '/data/imagenet1k-train-{0000..1023}.tar' --out data/imagenet-train

    python tools/index_shards.py 'https://host/wds_imagenet-r/test/{0..3}.tar' --out data/imagenet-r
    """

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Paths or URLs, with bash braces: 'folder/{000..127}.tar'."""
    out: str
    """Folder or URL for manifest and index; it can be moved if it also holds the shards."""
    classes: str | None = None
    """JSON file with another label space (keys ids, names, templates); None is ImageNet's 1000."""
    reading: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    """How to read the shards."""


def main() -> None:
    """Index the shards that the command line names."""
    command = cli.parse(IndexShards, config=(tyro.conf.FlagCreatePairsOff,))
    labels = choose_labels(command.classes)
    manifest = index_shards(command.shards, command.out, labels, command.reading)
    print(
        f"{manifest.dataset}: {counted(manifest.samples, 'sample')} in "
        f"{counted(len(manifest.shards), 'shard')}, {len(manifest.groups)} classes scored; "
        f"index at {command.out}"
    )
    if manifest.quarantined:
        listed = files.join(command.out, QUARANTINE)
        print(f"{counted(manifest.quarantined, 'sample')} left out, listed in {listed}")
    # beside this file, whatever the working folder
    verify = Path(sys.argv[0]).with_name("verify_shards.py")
    cli.say_next(cli.next_step([verify, command.out, "--deep"]))
