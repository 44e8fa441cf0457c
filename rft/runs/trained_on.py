"""Which packed sets a model's weights have seen, recorded in the header of the weights.

Own photos are split anew when they are packed with a different seed or share, so a test image may
be one that a model was trained on. Run folders are copied, merged and imported, and weights files
leave their folder, so the record is in the weights file itself. No torch: headers are enough.
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
    """Name of the set below its data root."""
    manifest_sha256: Sha256
    held_out: Count = 0
    """Number of its images that the weights have not seen, drawn by `rft.loading.split`."""
    split_seed: RecordedSeed = 0
    """Seed of that draw, and of the draw of the shots."""
    shots: Count = 0
    """Training images per class; 0 is all images that were not held out."""

    @property
    def pair(self) -> tuple[str, str]:
        """Name and manifest's hash, by which the set is found."""
        return self.name, self.manifest_sha256


def as_lists(seen: Iterable[TrainedOn]) -> list[list[str | int]]:
    """List sets for a JSON document; 0 shots are left out, so that older versions can read it."""
    return [list(one if one.shots else one[:-1]) for one in sorted(set(seen))]


def entries(seen: Iterable[TrainedOn]) -> dict[str, str]:
    """Make the metadata entry that names the sets."""
    # also for an empty list: weights without an entry are older ones, with unknown training sets
    return {KEY: json.dumps(as_lists(seen))}


def of_metadata(path: Path, metadata: Mapping[str, str]) -> frozenset[TrainedOn] | None:
    """Parse the training sets in a weights file's metadata; None if it has no entry.

    Raises:
        ValueError: naming the file, if it is malformed.
    """
    if KEY not in metadata:
        return None
    where = f"{path} is damaged: {KEY}"
    return frozenset(documents.decode(metadata[KEY].encode(), tuple[TrainedOn, ...], where))


def of_model(path: Path, metadata: Mapping[str, str]) -> frozenset[TrainedOn]:
    """Find the sets that the model of a run folder or weights file is known to have seen.

    Older weights have no such entry. For them, the folder of a finished run names its set.

    Args:
        path: the run folder or weights file.
        metadata: the metadata of its weights.

    Raises:
        ValueError: if the weights' header or a file of the run folder is malformed.
    """
    seen = of_metadata(path, metadata)
    if seen is not None:
        return seen
    # step 0 is zero-shot: its training.json names a set that the weights have not seen
    if metadata.get("step") == "0":
        return frozenset()
    config = records.find_config(path)
    training = records.find(path / filenames.TRAINING, records.Training)
    if config is None or training is None or not config.train_set or not training.manifest_sha256:
        return frozenset()
    return frozenset([TrainedOn(config.train_set, training.manifest_sha256)])


def different_splits(models: Mapping[str, Iterable[TrainedOn]]) -> str:
    """Return a warning if models have seen different sets of one name; empty otherwise.

    Together such models may have seen the test images of each other's split. The keys of `models`
    are their names in the warning.
    """
    first: dict[str, tuple[str, str]] = {}
    for model, seen in models.items():
        # sorted: the order of a Python set differs between processes, and the warning should not
        for one in sorted(seen):
            other, expected = first.setdefault(one.name, (model, one.manifest_sha256))
            if one.manifest_sha256 != expected:
                return (
                    f"{other} and {model} were trained on different sets called {one.name} "
                    f"(manifests {expected[:12]} and {one.manifest_sha256[:12]}): together "
                    "they may have seen the test images beside either"
                )
    return ""
