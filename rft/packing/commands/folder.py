"""Pack your own images into tar shards: `python tools/shard_folder.py`."""

import logging
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from rft import cli, commands, recipes
from rft.packing.names import Patterns, patterns_of
from rft.packing.own_folder import Photos, UnusableError, read_folder, same_bytes
from rft.packing.pack import Options, pack_source
from rft.packing.source import Source, require_apart
from rft.sets import ClassScore
from rft.shards import photo_names
from rft.shards.label_space import LabelSpace
from rft.storage import files
from rft.storage.documents import Seed, document
from rft.text import printable

SETS = ("train", "test", "val")
LINES = 20  # printed warnings, and printed pairs of equal images

log = logging.getLogger("rft.tools")


@document(name="--")
class ShardFolder:
    """Pack your own images into WebDataset tar shards: OUT/train and OUT/test.

    The source is DIR/<class>/..., of which a share is held out as the test set, or
    DIR/train/<class>/... and DIR/test/<class>/... (or val; spellings such as Training and test_set
    are recognised). Images are JPEG, PNG or WebP. A run is safe to interrupt and rerun with the
    same arguments, and writes the same bytes for any number of workers and tasks. Example:

    python tools/shard_folder.py --source photos --out shards --classes classes.json
    """

    source: str
    """Folder that holds the class folders, or train/ and test/ (or val/) with these in them."""
    out: str
    """Output for the packed sets: a folder, or a URL (s3://, gs://, az://, ...)."""
    classes: str | None = None
    """JSON file that describes the class folders, in label order: {"ids": [folder names],
    "names": [words for the text encoder], "templates": ["a photo of a {c}.", ...]}. None uses the
    folder names with underscores as spaces, and OpenAI's 80 prompts for ImageNet."""
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of each class that is held out as the test set, if the source has none; 0 holds out
    nothing."""
    split_seed: Seed = 0
    """Seed of the held-out choice."""
    ignore: Annotated[Patterns, tyro.conf.arg(metavar="NAME...")] = ()
    """Names of files and folders to skip, such as '*.mov' '*.aae', in upper or lower case. Hidden
    files, and files that NAS devices, macOS and Windows leave behind, are always skipped."""
    score: ClassScore = "top1"
    """Headline metric of the test sets: the share of correct images, or its mean over classes."""
    ood: bool = False
    """Declare the test sets out-of-distribution: they count in the OOD average, and training
    refuses their images."""
    packing: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    """How to pack."""


def main() -> None:
    """Pack the sets that the command line names."""
    command = cli.parse(ShardFolder, config=(tyro.conf.FlagCreatePairsOff,))
    source = Path(command.source)
    require_apart([source], command.out, SETS)
    labels = LabelSpace.load(command.classes) if command.classes else None
    ignore = patterns_of(command.ignore)
    try:
        photos = read_folder(source, labels, command.test_share, command.split_seed, ignore)
    except UnusableError as error:
        if error.ignore and error.several:
            error.add_note(f"to skip them: --ignore {shlex.join(error.ignore)}")
        if error.holds_out:
            error.add_note("or pack without a test set: --test-share 0")
        raise
    sources, labels = declare(photos.sources, command), photos.labels
    # a class folder may be a link, and --out must not be inside its target either
    folders = {(found.root / item.path).parent for found in sources for item in found.items}
    linked = [path for path in folders if not path.resolve().is_relative_to(source.resolve())]
    require_apart(linked, command.out, SETS)
    if commands.STAGE not in os.environ:  # otherwise `rft photos` has already printed it
        say(photos)
    complete = [pack_source(source, command.out, labels, command.packing) for source in sources]
    for one in sources:
        names = ((item.key, item.path) for item in one.items)
        photo_names.write(files.join(command.out, one.dataset), names)
    if all(complete):
        say_next(sources, command.out)


def declare(sources: Sequence[Source], command: ShardFolder) -> list[Source]:
    """Apply the command's declarations to the test sources; the first source is for training."""
    train, *tests = sources
    if command.ood and not tests:
        raise ValueError(
            "--ood declares a test set, but all images would be packed as train; "
            "tools/shard_set.py packs them as one set of any name (docs/data.md#other-test-sets)"
        )
    return [train, *(replace(one, score=command.score, ood=command.ood) for one in tests)]


def say(photos: Photos) -> None:
    """Print a summary of the photos, and warnings."""
    sources, labels = photos.sources, photos.labels
    for layout in dict.fromkeys(source.layout for source in sources):
        print(f"found {printable(layout)}")
    for note in photos.notes:
        print(note)
    print(f"prompts: {len(labels.templates)}, such as {labels.templates[0]!r}")
    counts = {source.dataset: Counter(item.label for item in source.items) for source in sources}
    for class_id, (name, words) in enumerate(zip(labels.ids, labels.names, strict=True)):
        numbers = ", ".join(f"{count[class_id]} {dataset}" for dataset, count in counts.items())
        print(f"class {printable(name)} ({printable(words)}): {numbers}")
    warn(photos)


def warn(photos: Photos) -> None:
    """Print warnings about findings that are rarely intended."""
    for warning in photos.warnings[:LINES]:
        log.warning(warning)
    if len(photos.warnings) > LINES:
        log.warning(f"{len(photos.warnings) - LINES:,} more such warnings")
    same = same_bytes(photos.sources)
    warn_of_pairs(same.between_classes, "of equal images in two classes; one label is wrong")
    warn_of_pairs(
        same.between_both,
        "of equal images in two classes and in two sets; one label is wrong, and testing on them "
        "is meaningless",
    )
    warn_of_pairs(same.between_sets, "of equal images in two sets; testing on them is meaningless")


def warn_of_pairs(pairs: Sequence[tuple[str, str]], what: str) -> None:
    """Print a warning with the number of pairs and the first few."""
    if not pairs:
        return
    lines = [f"  {printable(one)} = {printable(other)}" for one, other in pairs[:LINES]]
    more = [f"  ... and {len(pairs) - LINES:,} more"] if len(pairs) > LINES else []
    number = f"{len(pairs):,} pair{'s' if pairs[1:] else ''}"
    log.warning(f"{number} {what}:", extra={"lines": [*lines, *more]})


def say_next(sources: Sequence[Source], out: str) -> None:
    """Print the commands that train and test on the sets."""
    words = ["-m", "rft.train", recipes.DEFAULT, "--data", out, "--train-set", "train"]
    words += ["--scale", "small", "--run-dir", "runs/first"]
    tests = [source.dataset for source in sources[1:]]
    cli.say_next(cli.next_step(words, on_gpus=not tests))
    # the first is the training set
    if tests:
        words = ["-m", "rft.evaluate", "runs/first", "--data", out, "--sets", *tests]
        cli.say_next(cli.next_step(words, label="then", on_gpus=True))
