"""Alarms of a report: training images in a test set, lost accuracy, collapse. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from rft.report.measures import Measures, significant
from rft.report.read import Run
from rft.report.tables import Row, columns, heading, is_average, pair_of, target
from rft.statistics.paired import Difference
from rft.text import printable

BASELINE = "zero-shot"
# A model with this share of the images' classes among its predictions, or less, has collapsed. Good
# models predict nearly all classes, and one that collapsed to the most frequent class predicts one.
PREDICTED_SHARE = 0.5
NAMED = 5  # photos that an alarm names
# test set -> files of its photos that are also in training, with equal labels and with others
Photos = Mapping[str, tuple[Sequence[str], Sequence[str]]]


def of_report(
    runs: Sequence[Run],
    rows: Sequence[Row],
    measures: Measures,
    chosen: Row | None = None,
    photos: Photos = MappingProxyType({}),
) -> list[str]:
    """Collect the alarms of a report's runs and rows, as sentences.

    Args:
        runs: all runs.
        rows: the rows that are shown.
        measures: their numbers.
        chosen: the row of the exported model.
        photos: files of the photos that were trained on, if they are known.
    """
    return [
        *_seen(runs, photos),
        *_unchecked(runs),
        *_behind(rows, measures, chosen),
        *_lost(rows, measures, chosen),
        *_collapsed(rows, measures),
    ]


def better(rows: Sequence[Row], measures: Measures, chosen: Row) -> list[tuple[Row, Difference]]:
    """Find the rows that are significantly better than the exported model, the best first."""
    column = target(rows)
    pairs = [(row, pair_of(measures, row.name, chosen.name, column)) for row in rows]
    found = [
        (row, pair.difference)
        for row, pair in pairs
        if row != chosen and pair and pair.difference.value > 0 and significant(pair)
    ]
    return sorted(found, key=lambda one: -one[1].value)


def _seen(runs: Sequence[Run], photos: Photos) -> Iterator[str]:
    """Find test sets with images that a model was trained on, as its evaluation recorded."""
    found: dict[tuple[str, bool, int, int], dict[str, None]] = {}
    for run in runs:
        for name, count in run.counts.items():
            other = count.seen_other_label
            for is_other, seen in ((False, (count.seen or 0) - other), (True, other)):
                if seen:
                    found.setdefault((name, is_other, seen, count.total), {})[run.row] = None
    for (name, is_other, seen, total), rows in found.items():
        paths = photos.get(name, ((), ()))[is_other]
        files = ""
        if len(paths) == seen:  # otherwise the sets have changed since the evaluation
            more = ", ..." if len(paths) > NAMED else ""
            files = f" ({', '.join(map(printable, paths[:NAMED]))}{more})"
        was, them = ("was", "it") if seen == 1 else ("were", "them")
        points = f"{100 * seen / total:.3g}"
        how, remedy = "", f"too high. Remove {them}"
        if is_other:
            how = " under a different label"
            remedy = f"too low, because one label of each is wrong. Correct or remove {them}"
        yield (
            f"{seen:,} of the {total:,} images of {printable(heading(name))}{files} {was} in the "
            f"training set of {', '.join(rows)}{how}: this accuracy is up to {points} points "
            f"{remedy}, then run again with a new --out."
        )


def _unchecked(runs: Sequence[Run]) -> Iterator[str]:
    """Find test sets that could not be compared with a model's training set."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, count in run.counts.items():
            if count.seen is None:
                found.setdefault(name, {})[run.row] = None
    for name, rows in found.items():
        yield (
            f"It was not checked whether images of {printable(heading(name))} were in the training "
            f"set of {', '.join(rows)}, which was not available. Evaluate again with the training "
            "set below --data."
        )


def _behind(rows: Sequence[Row], measures: Measures, chosen: Row | None) -> Iterator[str]:
    """Compare the exported model with the others, in the report's main column."""
    found = better(rows, measures, chosen) if chosen else []
    if chosen and found:
        others = ", ".join(
            f"{row.name} {100 * value:+.1f} points (95% interval {100 * low:+.1f} to "
            f"{100 * high:+.1f})"
            for row, (value, (low, high), _) in found
        )
        yield (
            f"The exported model, {chosen.name}, is significantly worse than others on "
            f"{heading(target(rows))}: {others}. Export one of them instead, which is then a "
            "choice on test images."
        )


def _lost(rows: Sequence[Row], measures: Measures, chosen: Row | None) -> Iterator[str]:
    """Find rows that are significantly worse than zero-shot, in the report's main column."""
    column = target(rows)
    for row in rows:
        # `_behind` compares the exported model with all others
        skipped = row.name == BASELINE or row == chosen
        pair = None if skipped else pair_of(measures, row.name, BASELINE, column)
        if pair is None or pair.difference.value >= 0 or not significant(pair):
            continue
        low, high = pair.difference.interval
        yield (
            f"{row.name} lost accuracy against {BASELINE} on {heading(column)}: "
            f"{100 * pair.difference.value:+.1f} points (95% interval {100 * low:+.1f} to "
            f"{100 * high:+.1f}). Fine-tuning made it worse; use {BASELINE} or a WiSE average, or "
            "train with a lower learning rate or fewer epochs."
        )


def _collapsed(rows: Sequence[Row], measures: Measures) -> Iterator[str]:
    """Find rows that predict only few of the classes of a set."""
    for name in (one for one in columns(rows) if not is_average(one)):
        classes = measures.classes.get(name)
        # predictions of a single class cannot collapse
        if classes is None or len(classes.label_K) < 2:
            continue
        for row in rows:
            found = measures.sets.get((row.name, name))
            if found is None:
                continue
            predicted, there = found.mistakes.predicted, len(classes.label_K)
            if predicted <= PREDICTED_SHARE * there:
                yield (
                    f"{row.name} collapsed on {heading(name)}: it predicts {predicted:,} of "
                    f"{there:,} classes. Check the accuracy of each class, and whether some are "
                    "far more frequent than others in the training set."
                )
