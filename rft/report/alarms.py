"""What should stop a reader: fine-tuning that lost accuracy, collapse, shared images. Pure.

The first two come from predictions; the third needs the packed sets (`shared_images`).
"""

from collections.abc import Iterator, Sequence

from rft.report.measures import Measures, significant
from rft.report.read import Run
from rft.report.tables import Row, columns, heading, is_average, pair_of, target
from rft.sets import BENCHMARKS
from rft.shards.folder import MANIFEST
from rft.shards.guard import common_images
from rft.storage import files
from rft.text import printable

BASELINE = "zero-shot"
# Of the classes that the images have, as many are predicted at least. A good model predicts nearly
# all, and one that has collapsed to the most frequent class, one.
PREDICTED_SHARE = 0.5


def of_rows(rows: Sequence[Row], measures: Measures) -> list[str]:
    """Return the alarms of a report's rows."""
    return [*_lost(rows, measures), *_collapsed(rows, measures)]


def _lost(rows: Sequence[Row], measures: Measures) -> Iterator[str]:
    """Yield the rows that are significantly worse than zero-shot, in the report's main column."""
    column = target(rows)
    for row in rows:
        pair = None if row.name == BASELINE else pair_of(measures, row.name, BASELINE, column)
        if pair is None or pair.difference.value >= 0 or not significant(pair):
            continue
        low, high = pair.difference.interval
        yield (
            f"{row.name} lost accuracy against {BASELINE} on {heading(column)}: "
            f"{100 * pair.difference.value:+.1f} points (95% interval {100 * low:+.1f} to "
            f"{100 * high:+.1f}). Fine-tuning made it worse; use {BASELINE} or a WiSE average, or "
            "train with a lower --optim.lr or fewer --optim.epochs."
        )


def _collapsed(rows: Sequence[Row], measures: Measures) -> Iterator[str]:
    """Yield the rows and sets whose predictions have few of the classes that the images have."""
    for name in (one for one in columns(rows) if not is_average(one)):
        classes = measures.classes.get(name)
        # of one class nothing can collapse
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
                    f"{there:,} classes. Look at the accuracy of each class; are some of them far "
                    "more frequent than others in the training set?"
                )


def shared_images(runs: Sequence[Run], data: str) -> list[str]:
    """Return an alarm for each test set below a data root that holds images of a training set.

    Images are compared by their files' bytes. Benchmarks are not compared: their authors saw to it,
    and ImageNet's training set is large. What cannot be compared is no alarm.
    """
    pairs = dict.fromkeys((run.config.train_set, name) for run in runs for name in run.counts)
    found = []
    for train_set, name in pairs:
        if not train_set or name in BENCHMARKS or train_set in BENCHMARKS or name == train_set:
            continue
        urls = [files.join(data, one) for one in (train_set, name)]
        if not all(files.exists(files.join(url, MANIFEST)) for url in urls):
            continue
        common = common_images(*urls)
        if common:
            found.append(
                f"{common:,} images of the test set {printable(name)} are images of the training "
                f"set {printable(train_set)} too: accuracies on it are too good. Remove the copies "
                "and pack again."
            )
    return found
