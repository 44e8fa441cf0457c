"""Reads and checks the report's input, evaluated run folders.

The files of a run folder are untrusted and may be malformed. After `load_run`, values have the
types below.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePath

from rft import classes
from rft.classes import Classes
from rft.config import settings
from rft.report.variants import variants
from rft.runs import filenames, header, records
from rft.runs.folder import (
    checkpoint_path,
    evaluation_command,
    read_results,
    require_current,
    require_own_weights,
    unfinished,
)
from rft.runs.records import Metrics, Provenance, Results, RunConfig, SetCount
from rft.sets import TEST_SETS
from rft.shards.label_space import IMAGENET_CLASSES, is_imagenet
from rft.storage import documents, files, urls
from rft.text import to_ascii

RUNS = 2000  # limit of a report; the paper's experiments with three seeds make 106
DEPTH = 32  # most folders between a given path and its runs
MAX_LINES = 2**19  # limit of all metrics of a report; 60 trainings as in the paper have 150,000
DOCUMENT_BYTES = 2**25  # limit of all other documents of a report; a run has some ten thousand
TRANSDUCTIVE = " (transductive)"
"""Suffix of systems whose prediction for an image depends on the other test images."""
SETTINGS_LETTERS = 2**16  # limit of a run's settings on the page; a training has a few thousand

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One evaluated run folder."""

    path: Path
    recipe: str
    """Its recipe, with a suffix if the run has not ended or is transductive."""
    variant: str = ""
    """Settings in which it differs from other runs of its recipe, if any."""
    seed: int
    results: Results
    config: RunConfig
    provenance: Provenance
    metrics: tuple[Metrics, ...]
    """Lines of metrics.jsonl; a merged model has none."""
    unfinished: bool = False
    classes: Classes | None = None
    """Classes of its head; None if no weights name them."""
    notes: tuple[str, ...] = ()
    """Caveats about the run, for the page."""

    @property
    def row(self) -> str:
        """Name of its row, shared with other seeds of the same settings."""
        return f"{self.recipe}, {self.variant}" if self.variant else self.recipe

    @property
    def counts(self) -> dict[str, SetCount]:
        """Packed set -> counts."""
        return self.results.sets

    @property
    def clip(self) -> str:
        """Name of the CLIP that was fine-tuned, without a folder; empty for a merged model."""
        return to_ascii(PurePath(self.config.model.clip.removeprefix("local-dir:")).name)

    @property
    def precision(self) -> str:
        """Precision of the training; empty without one: merged, imported, zero-shot."""
        optim = self.config.optim
        return to_ascii(self.config.precision) if optim and optim.epochs != 0 else ""

    @property
    def gallery_path(self) -> Path:
        """Path of the run's gallery, which need not exist."""
        return self.path / filenames.GALLERY


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read all run folders at or below some paths, and check that they fit into one table.

    Raises:
        ValueError: if there is none, one was not evaluated or its results are of other weights, two
            have the same recipe, settings and seed, or they were evaluated on different data.
    """
    found = find_runs(paths)
    _require_affordable(found)
    runs, lines = [], 0
    for path in found:
        runs.append(load_run(path, max(MAX_LINES - lines, 0)))
        lines += len(runs[-1].metrics)
    if lines > MAX_LINES:
        # all are dropped, because the mean over some of the seeds would be a different curve
        log.warning(
            f"no training curves: the metrics of all runs together have more than {MAX_LINES:,} "
            "lines; name fewer runs to see them"
        )
        runs = [replace(run, metrics=()) for run in runs]
    named = variants([(run.recipe, settings(run.config.whole)) for run in runs])
    runs = [replace(run, variant=variant) for run, variant in zip(runs, named, strict=True)]
    _check_current(runs)
    _check_same_classes(runs)
    _check_seeds(runs)
    _check_same_data(runs)
    return [replace(run, notes=tuple(_notes(run)), classes=_classes(run)) for run in runs]


def _notes(run: Run) -> Iterator[str]:
    """List the page's caveats about a run that passed the checks (`_check_current` logs them)."""
    if run.unfinished:
        yield "its training has not ended"
    # the weights of an average in memory were never written
    if not (run.results.without_weights or checkpoint_path(run.path).is_file()):
        yield "its weights are missing, so its results cannot be compared with them"
    if run.results.config_sha256 not in (None, files.sha256_file(run.path / filenames.CONFIG)):
        yield f"its {filenames.CONFIG} was changed after the evaluation"


def classes_of(runs: Sequence[Run], name: str) -> Classes | None:
    """Find the classes of the heads that were evaluated on a set; None if no weights name them.

    All heads have the same classes, because `load_runs` refuses others.
    """
    known = (run.classes for run in runs if name in run.counts)
    return next(filter(None, known), None)


def other_classes(runs: Sequence[Run]) -> str:
    """Write a caveat if benchmarks were evaluated in a label space that is not ImageNet's.

    Empty for the miniature world, which has its own caveat.
    """
    if any(run.config.scale == "miniature" for run in runs):
        return ""
    for run in runs:
        if run.classes and run.counts.keys() & set(TEST_SETS) and not is_imagenet(run.classes):
            return (
                f"{len(run.classes):,} classes, not ImageNet's {IMAGENET_CLASSES:,}: these numbers "
                "cannot be compared with published ones."
            )
    return ""


def _classes(run: Run) -> Classes | None:
    weights = checkpoint_path(run.path)
    return header.read_entries(weights).classes if weights.is_file() else None


def _require_affordable(paths: Sequence[Path]) -> None:
    """Check the total size of all documents, because each may be large."""
    names = (filenames.CONFIG, filenames.RESULTS, filenames.PROVENANCE, filenames.TRAINING)
    size = 0
    for path in paths:
        # metrics.jsonl has a limit on lines instead (MAX_LINES)
        size += sum((path / name).stat().st_size for name in names if (path / name).is_file())
        if size > DOCUMENT_BYTES:
            raise ValueError(
                f"up to {path}, the runs' {', '.join(names[:-1])} and {names[-1]} have {size:,} "
                f"bytes; the limit of a report is {DOCUMENT_BYTES:,}"
            )


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Find the run folders at and below some paths, each once, in the order of the paths.

    `rft.merge wise` with several alphas writes a folder of run folders. Links are followed. A run
    that is reached by several paths keeps the first.

    Raises:
        ValueError: if no path is given, or a path neither is a run folder nor contains one.
    """
    if not paths:
        raise ValueError("name at least one run folder to report on")
    found: dict[Path, Path] = {}
    for path in paths:
        # a new set of visited folders per path, so that a path may be given twice
        inside = list(_runs_below(path, set()))
        if not inside:
            raise ValueError(
                f"{path} is not a run folder and contains none: no {filenames.CONFIG} was found"
                if path.is_dir()
                else f"{path} is not a run folder: no such folder"
            )
        for run in inside:
            found.setdefault(run.resolve(), run)
    if len(found) > RUNS:
        raise ValueError(f"found {len(found):,} run folders; the limit of a report is {RUNS:,}")
    return list(found.values())


def _runs_below(path: Path, visited: set[Path], depth: int = 0) -> Iterator[Path]:
    """Find the run folders at and below a path, sorted by name; they are never nested."""
    if depth > DEPTH:
        raise ValueError(
            f"{path} is nested too deep for a run folder; name the folder of your runs"
        )
    # links may form a cycle
    if not path.is_dir() or path.resolve() in visited:
        return
    visited.add(path.resolve())
    if (path / filenames.CONFIG).is_file():
        yield path
        return
    # sorted, to have the same order on every file system: the first run with a gallery shows it
    for inner in sorted(path.iterdir()):
        # a killed writer leaves hidden files only
        if not inner.name.startswith("."):
            yield from _runs_below(inner, visited, depth + 1)


def load_run(path: Path, lines: int = MAX_LINES) -> Run:
    """Read one run folder.

    Args:
        path: the folder.
        lines: limit of its metrics.jsonl; one line more is read to show that it is longer.

    Raises:
        ValueError: if it is not a run folder, was not evaluated, or has a malformed file.
    """
    config, results = records.read_config(path), read_results(path)
    if results is None:
        raise ValueError(
            f"{path} has no {filenames.RESULTS}; evaluate it first: {evaluation_command(path)}"
        )
    recipe, reached = config.recipe, unfinished(path)
    if reached:
        # with its own name it enters no mean, no pair and no row of the paper
        recipe = f"{recipe} (unfinished, {reached})"
    if config.transductive:
        # part of the name, so that every table and picture shows it
        recipe = f"{recipe}{TRANSDUCTIVE}"
    provenance = records.find(path / filenames.PROVENANCE, records.Provenance)
    if provenance is None and results.without_weights:
        # the average was made by the evaluation, so there is no provenance.json of a merge
        where = f"{path / filenames.RESULTS}: provenance"
        provenance = documents.convert(results.provenance, Provenance, where)
    provenance = provenance or Provenance()
    _require_publishable(path / filenames.CONFIG, shown_settings(config))
    _require_publishable(path / filenames.PROVENANCE, " ".join(provenance.command))
    logged_lines = records.read_metrics(path / filenames.METRICS)
    return Run(
        path=path,
        recipe=recipe,
        seed=config.seed,
        results=results,
        config=config,
        provenance=provenance,
        metrics=tuple(logged.metrics for logged in islice(logged_lines, lines + 1)),
        unfinished=bool(reached),
    )


def _require_publishable(path: Path, text: str) -> None:
    """Refuse a file with a credential in the part that a report shows."""
    if urls.redact(text) != text:
        raise ValueError(
            f"{path} has a URL with a credential, which a report would publish; remove it "
            "(docs/storage.md#credentials)"
        )


def shown_settings(config: RunConfig) -> str:
    """Format a run's config.json for the page; one that is too long is cut."""
    # piece by piece, because indentation may make an untrusted file many times larger
    parts, letters = [], 0
    for part in json.JSONEncoder(indent=2, sort_keys=True).iterencode(config.whole):
        letters += len(part)
        if letters > SETTINGS_LETTERS:
            return "".join([*parts, "\n... (too long to show)"])
        parts.append(part)
    return "".join(parts)


def _check_current(runs: Sequence[Run]) -> None:
    """Check that the results of each run belong to its weights, and the weights to the run."""
    warnings: list[str] = []
    changed: list[Path] = []
    for run in runs:
        try:
            warnings += require_current(run.path, run.results)
        except ValueError:
            # if the weights were replaced, raise that instead: restoring them is the remedy
            require_own_weights(run.path)
            raise
        # require_current has just verified this hash, so the file is not read a second time
        require_own_weights(run.path, sha256=run.results.checkpoint_sha256)
        weights, counted = checkpoint_path(run.path), str(run.results.step)
        if weights.is_file() and (step := header.read_entries(weights).step) != counted:
            raise ValueError(
                f"{run.path}/{filenames.RESULTS} is of step {counted}, the weights are of step "
                f"{step}; evaluate the run again"
            )
        if run.results.config_sha256 not in (None, files.sha256_file(run.path / filenames.CONFIG)):
            changed.append(run.path / filenames.CONFIG)
    if changed:
        log.warning(
            f"{_with_more(changed, '')} was changed after the evaluation; the report shows its "
            "current settings"
        )
    if warnings:
        log.warning(_with_more(warnings))


def _with_more(found: Sequence[object], what: str = " runs") -> str:
    """Format the first of several, and the number of the others."""
    return f"{found[0]} (and {len(found) - 1} more{what})" if found[1:] else str(found[0])


def _check_same_classes(runs: Sequence[Run]) -> None:
    """Check that the heads of runs that were evaluated on one set have the same classes.

    Weights that do not name their classes cause one warning.
    """
    first_with: dict[str, tuple[Path, classes.Classes]] = {}
    warnings: dict[str, None] = {}  # an ordered set, so that each warning appears once
    silent: list[Path] = []
    for run in runs:
        weights = checkpoint_path(run.path)
        # _check_current warned of missing weights, and an average in memory has none
        if not weights.is_file():
            continue
        known = header.read_entries(weights).classes
        if known is None:  # weights of an older rft, without classes
            silent.append(run.path)
            continue
        # heads without a common set may have different classes
        for name in run.counts:
            path, before = first_with.setdefault(name, (run.path, known))
            warnings |= dict.fromkeys(classes.compare(before, str(path), known, str(run.path)))
    if silent:
        log.warning(
            f"{_with_more(silent)}: the weights do not name the classes of their head, so they "
            "cannot be compared"
        )
    for warning in warnings:
        log.warning(warning)


def _with_first(runs: Iterable[Run], key: Callable[[Run], object]) -> Iterator[tuple[Run, Run]]:
    """Pair the first run of each key with each other run of that key."""
    first_of: dict[object, Run] = {}
    for run in runs:
        first = first_of.setdefault(key(run), run)
        if first is not run:
            yield first, run


def _check_seeds(runs: Sequence[Run]) -> None:
    """Check that the runs of a row differ in seed and weights, so that none counts twice.

    Their settings are the same, because other settings make a different row.
    """
    for one, two in _with_first(runs, lambda run: (run.row, run.seed)):
        raise ValueError(
            f"{one.path} and {two.path} are both {one.row} with seed {one.seed}; report one of them"
        )
    # models without training are the same for every seed, and a merge with alpha 0 is the
    # zero-shot model
    trained = [run for run in runs if run.results.step != 0 and run.config.alpha != 0]
    for one, two in _with_first(trained, lambda run: (run.row, run.results.checkpoint_sha256)):
        raise ValueError(
            f"{one.path} and {two.path} are seeds {one.seed} and {two.seed} of {one.row}, but have "
            "the same weights; name one"
        )
    for one, two in _with_first(runs, lambda run: run.row):
        if missing := sorted(one.counts.keys() ^ two.counts.keys()):
            raise ValueError(
                f"the seeds of {one.row} were evaluated on different sets: only one of {one.path} "
                f"and {two.path} has {missing[0]}; evaluate both on the same sets"
            )


def _check_same_data(runs: Sequence[Run]) -> None:
    """Check that a set of one name is the same data in all runs."""
    first_with: dict[str, Run] = {}
    for run in runs:
        for name, count in run.counts.items():
            other = first_with.setdefault(name, run)
            before = other.counts[name]
            if (before.manifest_sha256, before.total) != (count.manifest_sha256, count.total):
                raise ValueError(
                    f"{name} is not the same data in all runs: {other.path} has {_data(before)}, "
                    f"{run.path} has {_data(count)}; evaluate both on the same packed set"
                )


def _data(count: SetCount) -> str:
    return f"manifest {count.manifest_sha256[:12]} ({count.total} images)"
