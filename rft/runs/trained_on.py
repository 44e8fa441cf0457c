"""Which packed sets a model's weights have seen: a fact that travels in the weights' header.

Own photos are split anew when they are packed with a different seed or share, so a test image may
be one that a model was trained on. A run folder may be copied, merged or imported, and a weights
file lies alone; what it was trained on goes with it. No torch: it is a matter of headers.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from rft.runs import filenames, records
from rft.runs.records import RecordedSeed
from rft.storage import documents
from rft.storage.documents import Count, Name, Sha256

KEY = "trained_on"


class TrainedOn(NamedTuple):
    """A packed set that weights have seen."""

    name: Name
    """Of the set below its data root."""
    manifest_sha256: Sha256
    held_out: Count = 0
    """How many of its images the weights have not seen, drawn by `rft.loading.split`."""
    split_seed: RecordedSeed = 0
    """Seed of that draw, and of the next."""
    shots: Count = 0
    """Images of each class that they were trained on; 0 are all that were not held out."""


def as_lists(seen: Iterable[TrainedOn]) -> list[list[str | int]]:
    """List sets for a JSON document; without shots, as versions read it that know of none."""
    return [list(one if one.shots else one[:-1]) for one in sorted(set(seen))]


def entries(seen: Iterable[TrainedOn]) -> dict[str, str]:
    """Return the metadata entry that names the sets."""
    # an empty list too: without an entry, the weights are taken for older ones, which are unknown
    return {KEY: json.dumps(as_lists(seen))}


def of_metadata(path: Path, metadata: Mapping[str, str]) -> frozenset[TrainedOn] | None:
    """Return the sets that a weights file's metadata names; None if it has no entry.

    Raises:
        ValueError: naming the file, if it is malformed.
    """
    if KEY not in metadata:
        return None
    where = f"{path} is damaged: {KEY}"
    return frozenset(documents.decode(metadata[KEY].encode(), tuple[TrainedOn, ...], where))


def of_model(path: Path, metadata: Mapping[str, str]) -> frozenset[TrainedOn]:
    """Return the sets that a run folder's or weights file's model is known to have seen.

    Older weights name none; the folder of a run that has ended does.

    Args:
        path: the run folder or weights file.
        metadata: of its weights.

    Raises:
        ValueError: if the weights' header or a file of the run folder is malformed.
    """
    seen = of_metadata(path, metadata)
    if seen is not None:
        return seen
    # zero-shot: training.json names a set, which the weights have not seen
    if metadata.get("step") == "0":
        return frozenset()
    config = records.find_config(path)
    training = records.find(path / filenames.TRAINING, records.Training)
    if config is None or training is None or not config.train_set or not training.manifest_sha256:
        return frozenset()
    return frozenset([TrainedOn(config.train_set, training.manifest_sha256)])


def different_splits(models: Mapping[str, Iterable[TrainedOn]]) -> str:
    """Return a warning if models, by what names them, have seen different sets of one name.

    Empty if none have. Together they may have seen the test images of each other's split.
    """
    first: dict[str, tuple[str, str]] = {}
    for model, seen in models.items():
        # sorted: a set's order differs between processes, and the warning should not
        for one in sorted(seen):
            other, expected = first.setdefault(one.name, (model, one.manifest_sha256))
            if one.manifest_sha256 != expected:
                return (
                    f"{other} and {model} were trained on different sets called {one.name} "
                    f"(manifests {expected[:12]} and {one.manifest_sha256[:12]}): together "
                    "they may have seen the test images beside either"
                )
    return ""
