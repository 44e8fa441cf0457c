"""Pack anyone's own images, one folder for each class, into tar shards: see --help."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from rft import cli, recipes
from rft.data.folder import class_counts, read_folder, shared_images
from rft.data.labels import LabelSpace
from rft.data.pack import Options, pack_source
from rft.data.sources import Source

LINES = 20  # pairs of equal images that are printed


@dataclass(frozen=True, kw_only=True)
class ShardFolder:
    """Pack your own images into WebDataset tar shards: OUT/train and OUT/test.

    The source is DIR/<class>/..., of which a share is held out as the test set, or
    DIR/train/<class>/... and DIR/test/<class>/... (or val). Images are JPEG, PNG or WebP. A killed
    or failed run continues when it is started again with the same arguments, and gives the same
    bytes for any number of workers and tasks. Example:

    python tools/shard_folder.py --source photos --out shards --classes classes.json
    """

    source: str
    """Folder that holds the class folders, or train/ and test/ (or val/) with these in them."""
    out: str
    """Where the packed sets go: a folder, or a URL that fsspec opens (s3://, gs://, ...)."""
    classes: str | None = None
    """JSON file that says what the class folders show, in label order: {"ids": [folder names],
    "names": [words for the text encoder], "templates": ["a photo of a {c}.", ...]}. None takes the
    folder names with underscores as spaces, and OpenAI's 80 prompts for ImageNet."""
    test_share: float = 0.2
    """Share of each class that is held out as test set, where the source has none; 0 is none."""
    split_seed: int = 0
    """Seed of that choice."""
    packing: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    """How to pack."""


def main() -> None:
    """Pack what the command line names."""
    command = cli.parse(ShardFolder, config=(tyro.conf.FlagCreatePairsOff,))
    labels = LabelSpace.load(command.classes) if command.classes else None
    sources, labels = read_folder(
        Path(command.source), labels, command.test_share, command.split_seed
    )
    say(sources, labels)
    complete = [pack_source(source, command.out, labels, command.packing) for source in sources]
    if all(complete):
        say_next(sources, command.out)


def say(sources: Sequence[Source], labels: LabelSpace) -> None:
    """Print what was found, and a warning for images that are on two sides."""
    for layout in dict.fromkeys(source.layout for source in sources):
        print(f"found {layout}")
    print(f"prompts: {len(labels.templates)}, such as {labels.templates[0]!r}")
    counts = class_counts(sources, labels)
    for name, words in zip(labels.ids, labels.names, strict=True):
        numbers = ", ".join(
            f"{count} {source.dataset}" for count, source in zip(counts[name], sources, strict=True)
        )
        print(f"class {name} ({words}): {numbers}")
    pairs = shared_images(sources)
    for first, second in pairs[:LINES]:
        print(f"warning: {first} and {second} hold the same bytes; a test on it proves nothing")
    if len(pairs) > LINES:
        print(f"warning: ... and {len(pairs) - LINES} more such pairs")


def say_next(sources: Sequence[Source], out: str) -> None:
    """Print the commands that train on the sets and test on them."""
    words = ["-m", "rft.train", recipes.DEFAULT, "--data", out, "--train-set", "train"]
    words += ["--scale", "small", "--run-dir", "runs/first"]
    print(cli.next_step(words))
    if tests := [source.dataset for source in sources[1:]]:
        words = ["-m", "rft.evaluate", "runs/first", "--data", out, "--sets", *tests]
        print(cli.next_step(words, label="then"))
    print(cli.SEVERAL_GPUS)


if __name__ == "__main__":
    cli.run(main)
