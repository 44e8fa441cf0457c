"""The miniature world on disk: images in the official layouts, and their shards."""

from pathlib import Path

import filelock

from rft.demo.render import IMAGE_SIZE
from rft.demo.world import CLASS_LIST, write_world
from rft.packing.pack import Options, pack
from rft.sets import BENCHMARKS
from rft.shards.label_space import LabelSpace

FOLDER = Path("miniature")  # where commands make and find it by default


def prepare_data(folder: Path) -> None:
    """Make the world and pack its seven sets below `folder`; existing parts stay."""
    folder.mkdir(parents=True, exist_ok=True)
    # several commands may want the world at once
    with filelock.FileLock(folder / ".lock"):
        world = folder / "world"
        write_world(world)
        labels = LabelSpace.load(str(world / CLASS_LIST))
        # raw pixels: images this small take little space, and training decodes nothing;
        # small shards, so that the miniature has several of them as a cluster would
        options = Options(encoding="pixels", size=IMAGE_SIZE, shard_mb=2, workers=1)
        for dataset in BENCHMARKS:
            pack(dataset, str(world), str(shards(folder)), labels, options)


def shards(folder: Path) -> Path:
    """Return the data root of the miniature kept in `folder`."""
    return folder / "shards"
