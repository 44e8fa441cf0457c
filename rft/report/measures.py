"""What the predictions of runs say: accuracies with intervals, calibration, and every pair of rows.

Predictions are read one set at a time, one row's runs at a time; what is kept of them is which
images are right, one bit of each, until the set is done. Runs that were evaluated before
predictions were kept have counts alone, and no measures.

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
IMAGES = 2**23  # of a set that is measured; the whole ImageNet-C has 4.75 million
PAIR_REPLICATES = 2_000
"""Of each pair, as there are many: the ends of an interval then vary from draw to draw with a
standard deviation of about 1.5% of its width."""
TOP = 5


class Numbers(NamedTuple):
    """Of one run on one set; shares are in [0, 1]."""

    top1: float
    top5: float
    per_class: float
    """Mean of the classes' accuracies."""
    nll: float
    """Negative log-likelihood of the label, the mean over images, in nats."""
    error_width: float
    """Calibration error over bins of equal width."""
    error_mass: float
    """Over bins of equally many images."""
    scaled_nll: float
    """Of logits divided by the temperature; NaN where none was fitted."""
    scaled_error: float
    """Over bins of equal width, likewise."""


@dataclass(frozen=True, kw_only=True)
class SetMeasures:
    """One row on one set."""

    images: int
    seeds: tuple[Numbers, ...]
    """In the order of the row's runs."""
    interval: Interval
    """Of top-1: Wilson's for one seed; the bootstrap's of their means for more, or where images are
    drawn together."""
    bins: Bins
    """Confidence against accuracy of all seeds' images, in bins of equal width."""
    class_correct_K: np.ndarray
    """Images of each class that are right, the mean over seeds, fp64."""
    mistakes: Mistakes
    """Of the first seed."""


@dataclass(frozen=True, kw_only=True)
class SetClasses:
    """The classes of a set, in rising order of what its labels call them."""

    label_K: np.ndarray
    images_K: np.ndarray
    known: Classes | None

    def name_of(self, label: int) -> str:
        """Return what the class of a label is called."""
        if self.known is None or label >= len(self.known):
            return f"class {label}"
        return self.known.names[label]

    def id_of(self, label: int) -> str:
        """Return its id, such as a WordNet id; the label where it has none."""
        known = self.known
        return known.ids[label] if known and label < len(known.ids) else str(label)


class SetPair(NamedTuple):
    """One row against another on one set."""

    difference: Difference
    gained: int
    """Images that the one has right more often, over its seeds, than the other."""
    lost: int
    seeds: tuple[float, ...]
    """Difference of each two seeds: of the same seed where both rows have the same ones."""
    mcnemar: tuple[float, ...]
    """p-value of each of these; none where images are drawn together."""

    def __neg__(self) -> "SetPair":
        """Return the other row against the one."""
        seeds = tuple(-value for value in self.seeds)
        return SetPair(-self.difference, self.lost, self.gained, seeds, self.mcnemar)


class AveragePair(NamedTuple):
    """One row against another, in the mean over several sets."""

    difference: Difference
    seeds: tuple[float, ...]

    def __neg__(self) -> "AveragePair":
        """Return the other row against the one."""
        return AveragePair(-self.difference, tuple(-value for value in self.seeds))


def significant(pair: SetPair | AveragePair) -> bool:
    """Whether a difference counts: its interval has no 0, and every seed's own has its sign."""
    low, high = pair.difference.interval
    if low > 0:
        return all(value > 0 for value in pair.seeds)
    return high < 0 and all(value < 0 for value in pair.seeds)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """All that the predictions of a report's runs say. Shares, not percent."""

    sets: dict[tuple[str, str], SetMeasures] = field(default_factory=dict)
    """(row, set) -> its numbers."""
    averages: dict[tuple[str, str], Interval] = field(default_factory=dict)
    """(row, column of an average) -> its interval."""
    classes: dict[str, SetClasses] = field(default_factory=dict)
    pairs: dict[tuple[str, str, str], SetPair] = field(default_factory=dict)
    """(row, other, set) -> the first against the other; of two orders one is here."""
    average_pairs: dict[tuple[str, str, str], AveragePair] = field(default_factory=dict)
    """(row, other, column of an average), likewise."""
    without: tuple[Run, ...] = ()
    """Runs of which a set has no predictions."""
    too_large: tuple[str, ...] = ()
    """Sets of more than `IMAGES` images, which are not measured."""
    versions: tuple[str, ...] = ()
    """Sets whose images of one name, in several domains, are drawn together."""

    def pair(self, row: str, other: str, name: str) -> SetPair | None:
        """Return a row against another on a set; None if one of them has no predictions of it."""
        if (found := self.pairs.get((row, other, name))) is not None:
            return found
        found = self.pairs.get((other, row, name))
        return None if found is None else -found

    def average_pair(self, row: str, other: str, column: str) -> AveragePair | None:
        """Return a row against another in an average, if both have all of its sets."""
        if (found := self.average_pairs.get((row, other, column))) is not None:
            return found
        found = self.average_pairs.get((other, row, column))
        return None if found is None else -found


class _Sum:
    """Replicates of an average over sets, of those that were added; one array, not one of each."""

    def __init__(self) -> None:
        self.sets = 0
        self.total_R: np.ndarray | float = 0.0

    def add(self, drawn_R: np.ndarray) -> None:
        self.sets += 1
        self.total_R = self.total_R + drawn_R

    def difference(self, value: float) -> Difference:
        """Return the average as a difference of some value."""
        return paired.summarise(value, np.asarray(self.total_R) / self.sets)


class _Right(NamedTuple):
    """Which images a row has right on one set."""

    right_SN: np.ndarray
    seeds: tuple[int, ...]

    def hits(self) -> np.ndarray:
        """Return how many seeds have each image right, int (N,)."""
        return self.right_SN.sum(axis=0, dtype=np.intp)


@dataclass(frozen=True)
class Units:
    """Which images of a set are drawn together: those of one name and class, in several domains.

    In ImageNet-C they are versions of one image. Other sets have such names by chance, and no
    set declares which, so the wider of both intervals is taken (`wider`).

    Shapes: U units.
    """

    number_N: np.ndarray
    """Of each image's unit."""
    size_U: np.ndarray
    """Images of each unit."""

    @classmethod
    def of(cls, rows: Predictions) -> "Units | None":
        """Return the units of a set with domains; None if no image has another version there."""
        if rows.domain is None:
            return None
        names = [
            sample_keys.below_domain(*pair) for pair in zip(rows.key, rows.domain, strict=True)
        ]
        _, name_N = np.unique(names, return_inverse=True)
        # labels too: numbered files of two classes may have one name
        both_N = name_N * (int(rows.label.max()) + 1) + rows.label
        _, number_N, size_U = np.unique(both_N, return_inverse=True, return_counts=True)
        return cls(number_N, size_U) if (size_U > 1).any() else None

    def total(self, hits_N: np.ndarray) -> np.ndarray:
        """Add up what images have, for each unit."""
        return np.bincount(self.number_N, hits_N, len(self.size_U)).astype(np.int64)


def wider(images_R: np.ndarray, units_R: np.ndarray) -> np.ndarray:
    """Return the replicates that vary more: of images drawn one by one, or in units.

    Versions of an image make units vary more. Where names repeat by chance both vary alike, unless
    there are so few units that drawing them shows too little.
    """
    return units_R if units_R.std() > images_R.std() else images_R


def measure(
    rows: Mapping[str, Sequence[Run]],
    names: Sequence[str],
    averages: Mapping[str, Sequence[str]],
) -> Measures:
    """Measure rows of runs on sets, and compare the first `COMPARED` rows with each other.

    Args:
        rows: name of each row -> its runs, one of each seed.
        names: the sets.
        averages: column of an average -> its sets, whose mean is compared too.

    Raises:
        ValueError: if predictions were changed, or are not of the same images.
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
                # of a row's average only the interval is used: the value is made of its counts
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
    """Whether a run's predictions of a set are there; results may be copied without them."""
    count = run.counts.get(name)
    return (
        count is not None
        and count.predictions_sha256 is not None
        and predictions.path_of(run.path, name).is_file()
    )


def read_predictions(run: Run, name: str) -> Predictions:
    """Read a run's predictions of a set.

    Raises:
        ValueError: if they were changed, or do not give the count of results.json.
    """
    count, path = run.counts[name], predictions.path_of(run.path, name)
    rows = predictions.read(path, count.total, count.predictions_sha256 or "")
    if (right := int(rows.right.sum())) != count.correct:
        raise ValueError(
            f"{path} has {right:,} images right, {filenames.RESULTS} says {count.correct:,}; "
            "evaluate the run again"
        )
    return rows


class _Images(NamedTuple):
    """The images of a set, as the first run has them."""

    run: Run
    key_N: np.ndarray
    label_N: np.ndarray

    def require_same(self, run: Run, rows: Predictions, name: str) -> None:
        """Check that another run has the same images with the same labels in the same order."""
        for what, own, other in (
            ("images", self.key_N, rows.key),
            ("labels", self.label_N, rows.label),
        ):
            if not np.array_equal(own, other):
                first = int(np.argmax(own != other))
                raise ValueError(
                    f"{self.run.path} and {run.path} have predictions of different {what} for "
                    f"{name}, although both name one packed set (first: row {first}, "
                    f"{own[first]!a} and {other[first]!a}); evaluate both again"
                )


def _measure_set(
    found: Measures,
    rows: Mapping[str, Sequence[Run]],
    name: str,
    sums: Sequence[Mapping[str, _Sum]],
) -> tuple[dict[str, _Right], Units | None]:
    """Measure each row whose runs all have predictions of a set.

    `sums` are, of each average that the set is part of, the rows' replicates.

    Returns:
        What each row has right, and which images are drawn together.
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
        # Wilson's is about images that are drawn one by one
        bootstrap = paired.summarise(gains.mean, drawn_R).interval
        interval = None if len(members) == 1 and units is None else bootstrap
        found.sets[row, name] = _set_measures(found.classes[name], read, right, interval)
        rights[row] = right
    return rights, units


def _draws(*names: str) -> np.random.Generator:
    """Return the draws of a row or pair: the same whatever else is in the report."""
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
    """Measure a row; its interval is Wilson's if it is not given."""
    images = len(read[0].label)
    # labels may have gaps, as in ImageNet-R
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
    """Compare each two rows on a set; yield (row, other) and their replicates."""
    if len(rights) < 2:
        return
    right_RN = np.concatenate([one.right_SN for one in rights.values()]).astype(np.float32)
    # numbers of images below 2^24, which float32 has exactly
    both_RR = np.rint(right_RN @ right_RN.T).astype(np.int64)
    firsts = np.cumsum([0, *(len(one.seeds) for one in rights.values())])
    at = {row: range(*firsts[place : place + 2]) for place, row in enumerate(rights)}
    hits = {row: one.hits() for row, one in rights.items()}
    totals = {row: units.total(hits_N) for row, hits_N in hits.items()} if units else {}
    images = right_RN.shape[1]
    # a later row of the table against an earlier one, as a method against its baselines
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
            # the test is one of images that are independent
            () if units else tuple(paired.mcnemar_p(gained, lost).tolist()),
        )
        yield (row, other), drawn_R


def _matched(one: Sequence[int], two: Sequence[int]) -> list[tuple[int, int]]:
    """Return the places of seeds that are compared: equal ones, or else each with each."""
    if set(one) == set(two):
        return [(place, list(two).index(seed)) for place, seed in enumerate(one)]
    return [(a, b) for a in range(len(one)) for b in range(len(two))]
