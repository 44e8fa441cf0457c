"""The record of OUT's inputs, written before the first stage and compared by every later call.

Each stage refuses inputs that do not fit its files, with errors about hashes and options that
`rft photos` does not have. This earlier comparison gives one line in the terms of this command.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rft.packing.own_folder import Photos
from rft.packing.source import Source
from rft.storage import files
from rft.storage.documents import Count, Sha256, document

NAME = "made-from.json"
MADE = ("shards", "runs", "choice.json", "model", "report")  # the stages' outputs in OUT
# files, because photos that are left out count too
SETS = {
    "train": "files to train on",
    "test": "files to test with",
    "val": "files to validate with",
}


@document
class Part:
    """The photos of one set."""

    photos: Count
    sha256: Sha256
    """Hash of their classes, sizes and paths below the folder."""


@document
class MadeFrom:
    """Options and photos that the stages start from."""

    options: dict[str, str]
    """Options that change the results, by their names on the command line."""
    classes: Count
    classes_sha256: Sha256
    """Hash of the classes' folders, names and prompts."""
    sets: dict[str, Part]


def made_from(photos: Photos, options: Mapping[str, str]) -> MadeFrom:
    """Build the record of a command."""
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
    """Compare with the record of OUT's inputs; a set without any packed shard may still change.

    Raises:
        ValueError: naming the changed options, or the changed photos and the folders to delete.
    """
    record = out / NAME
    # a shard, rather than a manifest: interrupted packing counts too
    packed = {name for name in now.sets if any((out / "shards" / name).glob("*.tar"))}
    if not record.exists() or not (packed or (out / "runs").exists()):
        return
    before = files.read_document(str(record), MadeFrom)
    # only options in the record: one that a newer version adds does not refuse an older OUT
    options = {
        name: value for name, value in before.options.items() if now.options.get(name) != value
    }
    if options:
        words = " ".join(f"{name} {value}" for name, value in options.items() if value)
        raise ValueError(
            f"{out} was made with {words} (given or the default): pass the same options, or choose "
            "another --out"
        )
    changes = []
    if before.classes != now.classes:
        changes.append(f"{before.classes:,} -> {now.classes:,} classes")
    elif before.classes_sha256 != now.classes_sha256:
        changes.append("different names or prompts of the classes")
    for name in [
        one for one in now.sets if one in packed and before.sets.get(one) != now.sets[one]
    ]:
        old, new = (one.sets[name].photos if name in one.sets else 0 for one in (before, now))
        if old != new:
            changes.append(f"{old:,} -> {new:,} {SETS[name]}")
        else:
            changes.append(f"{new:,} {SETS[name]} as before, but different ones")
    if changes:
        made = ", ".join(str(out / name) for name in MADE if (out / name).exists())
        raise ValueError(
            f"photos changed since {out} was made ({', '.join(changes)}): choose another --out, or "
            f"delete {made}"
        )


def write(out: Path, now: MadeFrom) -> None:
    """Record the stages' inputs, unless OUT already has results without a record."""
    if (out / NAME).exists() or not any((out / name).exists() for name in MADE):
        files.write_json(str(out / NAME), asdict(now))
