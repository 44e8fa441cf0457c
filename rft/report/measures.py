"""Measures of runs from their predictions: accuracies with intervals, calibration, pairs of rows.

Predictions are read one set and one row at a time. Until a set is finished, only which images are
right is kept of them. Runs that were evaluated by an older rft have counts but no predictions, and
therefore no measures.

Shapes: N images of a set, R runs of all rows, S seeds of one row, K classes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

from rft.classes import Classes
from rft.report import mistakes
from rft.report.mistakes import Mistakes
from rft.report.read import Run, classes_of
from rft.runs import filenames, predictions
from rft.runs.predictions import Predictions
from rft.shards import keys as sample_keys
from rft.statistics import accuracy, calibration, paired
from rft.statistics.accuracy import Interval
from rft.statistics.calibration import Bins
from rft.statistics.paired import Difference

COMPARED = 64  # rows that are compared with each other: 2,016 pairs
IMAGES = 2**23  # limit of a measured set; the complete ImageNet-C has 4.75 million
PAIR_REPLICATES = 2_000
"""Replicates of each pair, fewer because pairs are many: the ends of an interval then vary between
draws with a standard deviation of about 1.5% of its width."""
TOP = 5


class Numbers(NamedTuple):
    """The numbers of one run on one set; shares are in [0, 1]."""

    top1: float
    top5: float
    per_class: float
    """Mean of the classes' accuracies."""
    nll: float
    """Negative log-likelihood of the label, the mean over images, in nats."""
    error_width: float
    """Calibration error over bins of equal width."""
    error_mass: float
    """Calibration error over bins of equally many images."""
    scaled_nll: float
    """NLL of logits divided by the temperature; NaN if none was fitted."""
    scaled_error: float
    """Calibration error of these logits, over bins of equal width; NaN if none was fitted."""


@dataclass(frozen=True, kw_only=True)
class SetMeasures:
    """The measures of one row on one set."""

    images: int
    seeds: tuple[Numbers, ...]
    """In the order of the row's runs."""
    interval: Interval
    """Interval of top-1: Wilson's for one seed. With several seeds, or images that are drawn
    together, it is a bootstrap interval of the mean over seeds."""
    bins: Bins
    """Confidence against accuracy of all seeds' images, in bins of equal width."""
    class_correct_K: np.ndarray
    """Right images of each class, the mean over seeds, fp64."""
    mistakes: Mistakes
    """Mistakes of the first seed."""


@dataclass(frozen=True, kw_only=True)
class SetClasses:
    """The classes of a set, in rising order of their labels."""

    label_K: np.ndarray
    images_K: np.ndarray
    known: Classes | None

    def name_of(self, label: int) -> str:
        """Look up the name of a label's class."""
        if self.known is None or label >= len(self.known):
            return f"class {label}"
        return self.known.names[label]

    def id_of(self, label: int) -> str:
        """Look up the id of a label's class, such as a WordNet id; the label if it has none."""
        known = self.known
        return known.ids[label] if known and label < len(known.ids) else str(label)


class SetPair(NamedTuple):
    """One row against another on one set."""

    difference: Difference
    gained: int
    """Images that the first row gets right more often, over its seeds, than the second."""
    lost: int
    """Images that the first row gets right less often."""
    seeds: tuple[float, ...]
    """Difference of each pair of seeds: of equal seeds if both rows have the same ones."""
    mcnemar: tuple[float, ...]
    """p-value of each of these; empty if images are drawn together."""

    def __neg__(self) -> "SetPair":
        """Exchange the two rows."""
        seeds = tuple(-value for value in self.seeds)
        return SetPair(-self.difference, self.lost, self.gained, seeds, self.mcnemar)


class AveragePair(NamedTuple):
    """One row against another, in the mean over several sets."""

    difference: Difference
    seeds: tuple[float, ...]

    def __neg__(self) -> "AveragePair":
        """Exchange the two rows."""
        return AveragePair(-self.difference, tuple(-value for value in self.seeds))


def significant(pair: SetPair | AveragePair) -> bool:
    """Whether the interval excludes 0 and the difference of every pair of seeds has its sign."""
    low, high = pair.difference.interval
    if low > 0:
        return all(value > 0 for value in pair.seeds)
    return high < 0 and all(value < 0 for value in pair.seeds)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """All measures from the predictions of a report's runs, as shares, not percent."""

    sets: dict[tuple[str, str], SetMeasures] = field(default_factory=dict)
    """(row, set) -> its numbers."""
    averages: dict[tuple[str, str], Interval] = field(default_factory=dict)
    """(row, column of an average) -> its interval."""
    classes: dict[str, SetClasses] = field(default_factory=dict)
    pairs: dict[tuple[str, str, str], SetPair] = field(default_factory=dict)
    """(row, other, set) -> the first against the other; only one of both orders is stored."""
    average_pairs: dict[tuple[str, str, str], AveragePair] = field(default_factory=dict)
    """(row, other, column of an average) -> the same for an average."""
    without: tuple[Run, ...] = ()
    """Runs without the predictions of some set."""
    too_large: tuple[str, ...] = ()
    """Sets of more than `IMAGES` images, which are not measured."""
    versions: tuple[str, ...] = ()
    """Sets in which images of one name, in several domains, are drawn together."""

    def pair(self, row: str, other: str, name: str) -> SetPair | None:
        """Look up a row against another on a set; None if one of them has no predictions of it."""
        if (found := self.pairs.get((row, other, name))) is not None:
            return found
        found = self.pairs.get((other, row, name))
        return None if found is None else -found

    def average_pair(self, row: str, other: str, column: str) -> AveragePair | None:
        """Look up a row against another in an average; None unless both have all of its sets."""
        if (found := self.average_pairs.get((row, other, column))) is not None:
            return found
        found = self.average_pairs.get((other, row, column))
        return None if found is None else -found


class _Sum:
    """Replicates of an average over sets, as a running sum: one array, not one per set."""

    def __init__(self) -> None:
        self.sets = 0
        self.total_R: np.ndarray | float = 0.0

    def add(self, drawn_R: np.ndarray) -> None:
        self.sets += 1
        self.total_R = self.total_R + drawn_R

    def difference(self, value: float) -> Difference:
        """Summarise the replicates of the average as a difference with this value."""
        return paired.summarise(value, np.asarray(self.total_R) / self.sets)


class _Right(NamedTuple):
    """Which images a row gets right on one set."""

    right_SN: np.ndarray
    seeds: tuple[int, ...]

    def hits(self) -> np.ndarray:
        """Count the seeds that get each image right, int (N,)."""
        return self.right_SN.sum(axis=0, dtype=np.intp)


@dataclass(frozen=True)
class Units:
    """Which images of a set are drawn together: those of one name and class, in several domains.

    In ImageNet-C these are versions of one image. Other sets have equal names by chance. No set
    declares which case it is, so the wider of both intervals is used (`wider`).

    Shapes: U units.
    """

    number_N: np.ndarray
    """Number of each image's unit."""
    size_U: np.ndarray
    """Number of images in each unit."""

    @classmethod
    def of(cls, rows: Predictions) -> "Units | None":
        """Find the units of a set with domains; None if every image is a unit of its own."""
        if rows.domain is None:
            return None
        names = [
            sample_keys.below_domain(*pair) for pair in zip(rows.key, rows.domain, strict=True)
        ]
        _, name_N = np.unique(names, return_inverse=True)
        # the label belongs to the unit, because numbered files of two classes may share a name
        both_N = name_N * (int(rows.label.max()) + 1) + rows.label
        _, number_N, size_U = np.unique(both_N, return_inverse=True, return_counts=True)
        return cls(number_N, size_U) if (size_U > 1).any() else None

    def total(self, hits_N: np.ndarray) -> np.ndarray:
        """Sum the hits of the images of each unit."""
        return np.bincount(self.number_N, hits_N, len(self.size_U)).astype(np.int64)


def wider(images_R: np.ndarray, units_R: np.ndarray) -> np.ndarray:
    """Choose the replicates that vary more: those of single images, or those of units.

    Versions of an image make units vary more. If names repeat by chance, both vary alike, except
    that replicates of very few units vary too little.
    """
    return units_R if units_R.std() > images_R.std() else images_R


def measure(
    rows: Mapping[str, Sequence[Run]],
    names: Sequence[str],
    averages: Mapping[str, Sequence[str]],
) -> Measures:
    """Measure rows of runs on sets, and compare the first `COMPARED` rows with each other.

    Args:
        rows: name of each row -> its runs, one per seed.
        names: the sets.
        averages: column of an average -> its sets, whose mean is compared too.

    Raises:
        ValueError: if predictions were changed, or are of different images.
    """
    runs = [run for members in rows.values() for run in members]
    too_large = {n for run in runs for n, count in run.counts.items() if count.total > IMAGES}
    names = [name for name in names if name not in too_large]
    found = Measures(without=tuple(_without(rows, names)), too_large=tuple(sorted(too_large)))
    versions = []
    compared = list(rows)[:COMPARED]
    sums = {column: {row: _Sum() for row in rows} for column in averages}
    pair_sums: dict[str, dict[tuple[str, str], _Sum]] = {column: {} for column in averages}
    for name in names:
        within = [column for column, sets in averages.items() if name in sets]
        rights, units = _measure_set(found, rows, name, [sums[column] for column in within])
        versions += [name] if units else []
        there = {row: rights[row] for row in compared if row in rights}
        for pair, drawn_R in _compare(found, there, name, units):
            for column in within:
                pair_sums[column].setdefault(pair, _Sum()).add(drawn_R)
    for column, sets in averages.items():
        for row, one in sums[column].items():
            if one.sets == len(sets):
                # only the interval is used; the value of a row's average comes from its counts
                found.averages[row, column] = one.difference(0.0).interval
        for (row, other), one in pair_sums[column].items():
            if one.sets == len(sets):
                of_sets = [found.pairs[row, other, name] for name in sets]
                value = float(np.mean([pair.difference.value for pair in of_sets]))
                seeds = np.mean([pair.seeds for pair in of_sets], axis=0)
                found.average_pairs[row, other, column] = AveragePair(
                    one.difference(value), tuple(seeds.tolist())
                )
    return replace(found, versions=tuple(versions))


def _without(rows: Mapping[str, Sequence[Run]], names: Sequence[str]) -> Iterator[Run]:
    for members in rows.values():
        for run in members:
            if any(name in run.counts and not _is_kept(run, name) for name in names):
                yield run


def _is_kept(run: Run, name: str) -> bool:
    """Whether a run's predictions of a set exist; results may be copied without them."""
    count = run.counts.get(name)
    return (
        count is not None
        and count.predictions_sha256 is not None
        and predictions.path_of(run.path, name).is_file()
    )


def read_predictions(run: Run, name: str) -> Predictions:
    """Read a run's predictions of a set.

    Raises:
        ValueError: if they were changed, or contradict the count in results.json.
    """
    count, path = run.counts[name], predictions.path_of(run.path, name)
    rows = predictions.read(path, count.total, count.predictions_sha256 or "")
    if (right := int(rows.right.sum())) != count.correct:
        raise ValueError(
            f"{path} has {right:,} right predictions, {filenames.RESULTS} has {count.correct:,}; "
            "evaluate the run again"
        )
    return rows


class _Images(NamedTuple):
    """The images of a set, taken from the first run."""

    run: Run
    key_N: np.ndarray
    label_N: np.ndarray

    def require_same(self, run: Run, rows: Predictions, name: str) -> None:
        """Check that a run has the same images with the same labels in the same order."""
        for what, own, other in (
            ("images", self.key_N, rows.key),
            ("labels", self.label_N, rows.label),
        ):
            if not np.array_equal(own, other):
                first = int(np.argmax(own != other))
                raise ValueError(
                    f"{self.run.path} and {run.path} have predictions of different {what} for "
                    f"{name}, although both name the same packed set (first: row {first}, "
                    f"{own[first]!a} and {other[first]!a}); evaluate both again"
                )


def _measure_set(
    found: Measures,
    rows: Mapping[str, Sequence[Run]],
    name: str,
    sums: Sequence[Mapping[str, _Sum]],
) -> tuple[dict[str, _Right], Units | None]:
    """Measure each row whose runs all have predictions of a set.

    `sums` has the rows' replicates for each average that includes the set; they are added there.

    Returns:
        The right images of each row, and the images that are drawn together.
    """
    images: _Images | None = None
    units: Units | None = None
    rights: dict[str, _Right] = {}
    for row, members in rows.items():
        if not all(_is_kept(run, name) for run in members):
            continue
        read: list[Predictions] = []
        for run in members:
            one = read_predictions(run, name)
            if images is None:
                images, units = _Images(run, one.key, one.label), Units.of(one)
                found.classes[name] = _classes(one.label, classes_of([run], name))
            images.require_same(run, one, name)
            read.append(one)
        right = _Right(np.stack([one.right for one in read]), tuple(run.seed for run in members))
        hits_N = right.hits()
        gains = paired.tally(hits_N, len(members))
        draws = _draws(name, row)
        drawn_R = paired.redraw(gains, draws)
        if units is not None:
            together = paired.tally(units.total(hits_N), len(members), size_N=units.size_U)
            drawn_R = wider(drawn_R, paired.redraw(together, draws))
        for of_average in sums:
            of_average[row].add(drawn_R)
        # Wilson's interval is valid only for independent images
        bootstrap = paired.summarise(gains.mean, drawn_R).interval
        interval = None if len(members) == 1 and units is None else bootstrap
        found.sets[row, name] = _set_measures(found.classes[name], read, right, interval)
        rights[row] = right
    return rights, units


def _draws(*names: str) -> np.random.Generator:
    """Seed the draws of a row or pair by its names, so that other rows do not change them."""
    return np.random.default_rng(list("\0".join(names).encode()))


def _classes(label_N: np.ndarray, known: Classes | None) -> SetClasses:
    label_K, images_K = np.unique(label_N, return_counts=True)
    return SetClasses(label_K=label_K, images_K=images_K, known=known)


def _set_measures(
    classes: SetClasses,
    read: Sequence[Predictions],
    right: _Right,
    interval: Interval | None,
) -> SetMeasures:
    """Measure a row; its interval is Wilson's if none is given."""
    images = len(read[0].label)
    # labels may have gaps, as in ImageNet-R, so classes are numbered by position
    class_N = np.searchsorted(classes.label_K, read[0].label)
    correct_SK = np.stack(
        [accuracy.per_group(one.right, class_N, len(classes.label_K))[0] for one in read]
    )
    confidence_N = np.concatenate([one.confidence for one in read])
    seeds = zip(read, correct_SK, strict=True)
    return SetMeasures(
        images=images,
        seeds=tuple(_numbers(one, correct_K, classes.images_K) for one, correct_K in seeds),
        interval=interval or accuracy.wilson(int(right.right_SN.sum()), images),
        bins=calibration.bins(confidence_N, right.right_SN.reshape(-1)),
        class_correct_K=correct_SK.mean(axis=0),
        mistakes=mistakes.find(read[0]),
    )


def _numbers(rows: Predictions, correct_K: np.ndarray, images_K: np.ndarray) -> Numbers:
    images, right_N = len(rows.label), rows.right
    scaled_nll = scaled_error = math.nan
    if rows.scaled_confidence is not None and rows.scaled_log_likelihood is not None:
        scaled_nll = -float(rows.scaled_log_likelihood.mean(dtype=np.float64))
        scaled_error = calibration.bins(rows.scaled_confidence, right_N).error
    return Numbers(
        top1=int(right_N.sum()) / images,
        top5=accuracy.top(rows.rank, TOP) / images,
        per_class=accuracy.mean_of_groups(correct_K, images_K),
        nll=-float(rows.log_likelihood.mean(dtype=np.float64)),
        error_width=calibration.bins(rows.confidence, right_N).error,
        error_mass=calibration.bins(rows.confidence, right_N, "mass").error,
        scaled_nll=scaled_nll,
        scaled_error=scaled_error,
    )


def _compare(
    found: Measures, rights: Mapping[str, _Right], name: str, units: Units | None
) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """Compare all pairs of rows on a set; yield (row, other) and their replicates."""
    if len(rights) < 2:
        return
    right_RN = np.concatenate([one.right_SN for one in rights.values()]).astype(np.float32)
    # float32 is exact for counts below 2^24, which IMAGES guarantees
    both_RR = np.rint(right_RN @ right_RN.T).astype(np.int64)
    firsts = np.cumsum([0, *(len(one.seeds) for one in rights.values())])
    at = {row: range(*firsts[place : place + 2]) for place, row in enumerate(rights)}
    hits = {row: one.hits() for row, one in rights.items()}
    totals = {row: units.total(hits_N) for row, hits_N in hits.items()} if units else {}
    images = right_RN.shape[1]
    # a later row of the table against an earlier one, like a method against its baselines
    for other, row in combinations(rights, 2):
        one, two = rights[row], rights[other]
        gains = paired.tally(hits[row], len(one.seeds), hits[other], len(two.seeds))
        draws = _draws(name, row, other)
        drawn_R = paired.redraw(gains, draws, PAIR_REPLICATES)
        if units is not None:
            both = (totals[row], len(one.seeds), totals[other], len(two.seeds))
            together = paired.tally(*both, units.size_U)
            drawn_R = wider(drawn_R, paired.redraw(together, draws, PAIR_REPLICATES))
        matched = _matched(one.seeds, two.seeds)
        a = np.array([at[row][place] for place, _ in matched])
        b = np.array([at[other][place] for _, place in matched])
        gained, lost = both_RR[a, a] - both_RR[a, b], both_RR[b, b] - both_RR[a, b]
        found.pairs[row, other, name] = SetPair(
            paired.summarise(gains.mean, drawn_R),
            gains.gained,
            gains.lost,
            tuple(((gained - lost) / images).tolist()),
            # McNemar's test assumes independent images
            () if units else tuple(paired.mcnemar_p(gained, lost).tolist()),
        )
        yield (row, other), drawn_R


def _matched(one: Sequence[int], two: Sequence[int]) -> list[tuple[int, int]]:
    """Pair the indices of seeds to compare: equal seeds, or else each with each."""
    if set(one) == set(two):
        return [(place, list(two).index(seed)) for place, seed in enumerate(one)]
    return [(a, b) for a in range(len(one)) for b in range(len(two))]
