"""What OUT is made of, recorded before the first stage and compared by every later call.

Each stage refuses what does not fit its own files, in words of hashes and of options that
`rft photos` does not have. Compared first, the mistake is one line in the words of this command.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rft.packing.own_folder import Photos
from rft.packing.source import Source
from rft.storage import files
from rft.storage.documents import Count, Sha256, document

NAME = "made-from.json"
MADE = ("shards", "runs", "choice.json", "model", "report")  # in OUT, by the stages
SETS = {"train": "to train on", "test": "to test with", "val": "to validate with"}


@document
class Part:
    """The photos of one set."""

    photos: Count
    sha256: Sha256
    """Of their classes, sizes and paths below the folder."""


@document
class MadeFrom:
    """Options and photos that the stages start from."""

    options: dict[str, str]
    """By their names on the command line; those that change what is made."""
    classes: Count
    classes_sha256: Sha256
    """Of the classes' folders, names and prompts."""
    sets: dict[str, Part]


def made_from(photos: Photos, options: Mapping[str, str]) -> MadeFrom:
    """Return the record of a command."""
    labels = photos.labels
    return MadeFrom(
        options=dict(options),
        classes=len(labels),
        classes_sha256=files.sha256_json([labels.ids, labels.names, labels.templates]),
        sets={one.dataset: _part(one) for one in photos.sources},
    )


def _part(source: Source) -> Part:
    listing = sorted((item.path, item.label, item.bytes) for item in source.items)
    return Part(photos=len(listing), sha256=files.sha256_json(listing))


def agree(out: Path, now: MadeFrom) -> None:
    """Compare with what OUT was made from; a set of which nothing is packed yet may change.

    Raises:
        ValueError: naming the options, or the photos that changed and the folders to delete.
    """
    record = out / NAME
    packed = {name for name in now.sets if any((out / "shards" / name).glob("*.tar"))}
    if not record.exists() or not (packed or (out / "runs").exists()):
        return
    before = files.read_document(str(record), MadeFrom)
    options = {
        name: value for name, value in before.options.items() if now.options.get(name) != value
    }
    if options:
        words = " ".join(f"{name} {value}" for name, value in options.items() if value)
        raise ValueError(f"{out} was made with {words}: use that as before, or another --out")
    changes = []
    if before.classes != now.classes:
        changes.append(f"{before.classes:,} -> {now.classes:,} classes")
    elif before.classes_sha256 != now.classes_sha256:
        changes.append("other names or prompts of the classes")
    for name in [
        one for one in now.sets if one in packed and before.sets.get(one) != now.sets[one]
    ]:
        old, new = (one.sets[name].photos if name in one.sets else 0 for one in (before, now))
        number = f"{old:,} -> {new:,}" if old != new else f"other files, again {new:,}"
        changes.append(f"{number} {SETS[name]}")
    if changes:
        made = ", ".join(str(out / name) for name in MADE if (out / name).exists())
        raise ValueError(
            f"photos changed since {out} was made ({', '.join(changes)}): choose another --out, or "
            f"delete {made}"
        )


def write(out: Path, now: MadeFrom) -> None:
    """Record what the stages start from, unless OUT holds what was made without a record."""
    if (out / NAME).exists() or not any((out / name).exists() for name in MADE):
        files.write_json(str(out / NAME), asdict(now))
