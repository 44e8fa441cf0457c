"""Reads and writes the results of a checkpoint, and checks that they belong to weights and sets.

results.json has the hash of the weights that its counts were measured with. Counts of other weights
are ignored.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from rft import cli
from rft.evaluate.count import Predicted
from rft.evaluate.scores import in_words, score_of
from rft.runs import predictions
from rft.runs.folder import current_results, results_path
from rft.runs.records import Results, SetCount, Temperature
from rft.sets import Score
from rft.shards.guard import Seen
from rft.shards.manifest import Manifest
from rft.storage import files

log = logging.getLogger(__name__)


class Counted(Protocol):
    """A model whose results are recorded: a checkpoint, or an ensemble of two."""

    @property
    def path(self) -> Path:
        """The run folder or weights file that the results belong to."""
        ...

    @property
    def sha256(self) -> str:
        """Identity of its weights."""
        ...

    def record(self) -> dict[str, Any]:
        """Make the entries of a document of results that identify the weights."""
        ...


class Evaluated(NamedTuple):
    """The predictions of a checkpoint for a packed set, and the facts recorded beside them."""

    predicted: Predicted
    manifest_sha256: str
    temperature: Temperature | str | None = None
    """Fitted on held-out images; the reason if it was requested but not fitted."""
    seen: Seen | None = Seen()
    """Images of the set that the model was trained on; None if that could not be checked."""
    score: Score = "top1"
    ood: bool = False


def is_current(
    checkpoint: Path,
    sets: Mapping[str, Manifest],
    *,
    logits: bool = False,
    temperature: bool = False,
) -> bool:
    """Whether the recorded results are complete and belong to the current weights and these sets.

    Files of predictions, and of `logits` if requested, are compared by their hash. A requested
    `temperature`, or the reason why none was fitted, must be recorded.
    """
    recorded = current_results(checkpoint)
    counts = recorded.sets if recorded else {}
    return all(
        (count := counts.get(name)) is not None
        and (count.manifest_sha256, count.total) == (one.sha256, one.samples)
        and _is(predictions.path_of(checkpoint, name), count.predictions_sha256)
        and not (temperature and count.temperature is None and not count.no_temperature)
        and (not logits or _is(predictions.logits_path_of(checkpoint, name), count.logits_sha256))
        for name, one in sets.items()
    )


def _is(path: Path, sha256: str | None) -> bool:
    return path.is_file() and files.sha256_file(path) == sha256


def write_results(one: Counted, sets: Mapping[str, Evaluated]) -> None:
    """Write the predictions and counts of one checkpoint.

    results.json is written last: a file of predictions is valid only if its hash is recorded there.

    Raises:
        ValueError: if the weights were replaced after they were loaded.
    """
    record = one.record()
    # counts of other weights are dropped
    earlier = current_results(one.path)
    if earlier and earlier.checkpoint_sha256 != one.sha256:
        earlier = None
    counts = {name: _write(one.path, name, found) for name, found in sets.items()}
    # counts of the same weights from an earlier call are kept
    results = Results(**record, sets={**(earlier.sets if earlier else {}), **counts})
    files.write_json(str(results_path(one.path)), asdict(results))


def say_results(checkpoints: Iterable[Path], sets: Iterable[str]) -> None:
    """Print the recorded accuracies of each checkpoint on some sets."""
    names = list(sets)
    for checkpoint in checkpoints:
        if results := current_results(checkpoint):
            state = f" (unfinished, {results.unfinished})" if results.unfinished else ""
            shares = (f"{name} {in_words(results.sets[name])}" for name in names)
            cli.say(f"{checkpoint}{state}: {', '.join(shares)}")


def record_seen(checkpoint: Path, seen: Mapping[str, Seen | None]) -> None:
    """Record how many images of each set a model was trained on, in results that are current.

    A number is None if the training set is no longer available; then the old number is kept.
    """
    results = current_results(checkpoint)
    counts = results.sets if results else {}
    newer = {
        name: replace(counts[name], seen=one.images, seen_other_label=one.other_label)
        for name, one in seen.items()
        if one is not None and (counts[name].seen, counts[name].seen_other_label) != one
    }
    if results and newer:
        found = replace(results, sets={**counts, **newer})
        files.write_json(str(results_path(checkpoint)), asdict(found))


def warn_of_no_temperature(checkpoints: Sequence[Path], sets: Sequence[str]) -> None:
    """Warn of checkpoints without a fitted temperature, with one warning per reason."""
    without: dict[str, list[str]] = {}
    for checkpoint in checkpoints:
        results = current_results(checkpoint)
        counts = [results.sets[name] for name in sets] if results else []
        for reason in sorted({count.no_temperature for count in counts} - {""}):
            without.setdefault(reason, []).append(str(checkpoint))
    for reason, names in without.items():
        several = len(names) > 1
        what = f"{len(names)} models get" if several else f"{names[0]} gets"
        lines = [f"  {name}" for name in names] if several else []
        log.warning(f"{what} no temperature: {reason}", extra={"lines": lines})


def _write(checkpoint: Path, name: str, found: Evaluated) -> SetCount:
    """Write the files of a set; return its entry for results.json."""
    data = found.predicted.predictions.to_bytes()
    files.write_bytes(str(predictions.path_of(checkpoint, name)), data)
    path = predictions.logits_path_of(checkpoint, name)
    if (logits_NK := found.predicted.logits_NK) is not None:
        # written straight to the disk, because the logits of a large set are gigabytes
        with files.publish(str(path)) as scratch, scratch.open("wb") as stream:
            np.save(stream, logits_NK)
        half_sha256 = files.sha256_file(path)
    else:
        # an earlier call may have kept logits of the same predictions
        half_sha256 = _kept_logits(checkpoint, name, files.sha256_bytes(data))
    return SetCount(
        **asdict(found.predicted.count),
        **asdict(score_of(found.predicted.predictions, found.score)),
        ood=found.ood,
        manifest_sha256=found.manifest_sha256,
        predictions_sha256=files.sha256_bytes(data),
        logits_sha256=half_sha256,
        temperature=None if isinstance(found.temperature, str) else found.temperature,
        no_temperature=found.temperature if isinstance(found.temperature, str) else "",
        seen=None if found.seen is None else found.seen.images,
        seen_other_label=0 if found.seen is None else found.seen.other_label,
    )


def _kept_logits(checkpoint: Path, name: str, predictions_sha256: str) -> str | None:
    """Look up the hash of the logits that an earlier call kept for the same predictions."""
    earlier = current_results(checkpoint)
    count = earlier.sets.get(name) if earlier else None
    return count.logits_sha256 if count and count.predictions_sha256 == predictions_sha256 else None
