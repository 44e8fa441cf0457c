"""The mistakes of a row: accuracy of classes, confusions, most confident mistakes. Pure.

Pairs, matrix and images are those of a row's first seed; accuracies are the mean over seeds.

Shapes: N images of a set, K classes among its labels or predictions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rft.report import thumbnails
from rft.runs.predictions import Predictions
from rft.statistics import accuracy
from rft.text import printable

if TYPE_CHECKING:
    from rft.report.measures import SetClasses, SetMeasures
    from rft.report.tables import Row

ROWS = 8  # rows on a page
CLASSES = 40  # the worst classes in a row's table
PAIRS = 15  # pairs of confused classes
MATRIX = 30  # most classes of a matrix; for more, the pairs are enough
CONFIDENT = 12  # mistakes shown per row
LETTERS = 60  # limit of a class's name or a key
BYTES = 400_000  # limit of a page's thumbnails of mistakes


class Confused(NamedTuple):
    """Images of one class that are predicted as another."""

    label: int
    prediction: int
    images: int


class Mistake(NamedTuple):
    """An image whose prediction is wrong."""

    sample: int
    key: str
    label: int
    prediction: int
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """A row's mistakes on a set; its size does not depend on that of the set."""

    predicted: int = 0
    """Classes that are predicted for at least one image."""
    wrong: int = 0
    """Images whose prediction is wrong."""
    pairs: tuple[Confused, ...] = ()
    """The most frequent confusions, in falling order."""
    confident: tuple[Mistake, ...] = ()
    """The most confident mistakes, in falling order."""
    label_K: tuple[int, ...] = ()
    """Rows and columns of the matrix."""
    matrix_KK: np.ndarray | None = None
    """Images of each class (row) by prediction (column); None for more than `MATRIX` classes."""


def find(rows: Predictions) -> Mistakes:
    """Find the mistakes of one run on one set."""
    wrong_M = np.flatnonzero(~rows.right)
    pairs_P2, count_P = np.unique(
        np.stack([rows.label[wrong_M], rows.prediction[wrong_M]], axis=1),
        axis=0,
        return_counts=True,
    )
    # ties are ordered by label, because np.unique sorts and this sort is stable
    order_P = np.argsort(-count_P, kind="stable")[:PAIRS]
    order_M = np.lexsort((rows.key[wrong_M], -rows.confidence[wrong_M]))[:CONFIDENT]
    label_K, place_N = np.unique(np.concatenate([rows.label, rows.prediction]), return_inverse=True)
    images = len(rows.label)
    matrix_KK = None
    if len(label_K) <= MATRIX:
        matrix_KK = accuracy.confusion(place_N[:images], place_N[images:], len(label_K))
    return Mistakes(
        predicted=len(np.unique(rows.prediction)),
        wrong=len(wrong_M),
        pairs=tuple(
            Confused(label, prediction, images)
            for (label, prediction), images in zip(
                pairs_P2[order_P].tolist(), count_P[order_P].tolist(), strict=True
            )
        ),
        confident=tuple(
            Mistake(
                sample,
                str(rows.key[sample]),
                int(rows.label[sample]),
                int(rows.prediction[sample]),
                float(rows.confidence[sample]),
            )
            for sample in wrong_M[order_M].tolist()
        ),
        label_K=tuple(label_K.tolist()) if matrix_KK is not None else (),
        matrix_KK=matrix_KK,
    )


def brief(name: str) -> str:
    """Shorten a name for the page: untrusted names may be long, and appear many times."""
    return printable(name, LETTERS)


class ClassLine(NamedTuple):
    """A class and its accuracy, in percent."""

    name: str
    images: int
    share: float
    low: float
    high: float


def class_lines(classes: "SetClasses", found: "SetMeasures") -> list[ClassLine]:
    """List the classes of a set with a row's accuracies, the worst first, at most `CLASSES`.

    Intervals are Wilson's, for the images of the class. The mean of several seeds is treated like
    the count of one.
    """
    share_K = found.class_correct_K / classes.images_K
    lines = []
    for place in np.lexsort((-classes.images_K, share_K))[:CLASSES].tolist():
        images = int(classes.images_K[place])
        low, high = accuracy.wilson(round(float(found.class_correct_K[place])), images)
        name = classes.name_of(int(classes.label_K[place]))
        lines.append(ClassLine(name, images, 100 * float(share_K[place]), 100 * low, 100 * high))
    return lines


@dataclass(frozen=True, kw_only=True)
class RowMistakes:
    """The mistakes of a row, as the page shows them."""

    row: "Row"
    classes: list[ClassLine]
    left_out: int
    """Classes that the table lacks."""
    found: Mistakes


def of_rows(
    rows: "Sequence[Row]",
    sets: "Mapping[tuple[str, str], SetMeasures]",
    classes: "SetClasses",
    name: str,
) -> list[RowMistakes]:
    """Collect the mistakes of the first rows that have predictions of a set."""
    found = []
    for row in rows:
        one = sets.get((row.name, name))
        if one is not None and len(found) < ROWS:
            lines = class_lines(classes, one)
            more = len(classes.label_K) - len(lines)
            found.append(RowMistakes(row=row, classes=lines, left_out=more, found=one.mistakes))
    return found


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Thumbnails of mistakes: sample -> its number on the page, and each picture once."""

    numbers: Mapping[int, int] = field(default_factory=dict)
    pictures: Sequence[bytes] = ()

    @staticmethod
    def of(found: Mapping[int, bytes]) -> "Pictures":
        """Take pictures in order, as long as the page has space."""
        numbers, kept, room = {}, [], BYTES
        for sample, picture in found.items():
            room -= len(picture)
            if room >= 0:
                numbers[sample] = len(kept)
                kept.append(picture)
        return Pictures(numbers=numbers, pictures=kept)

    def styles(self) -> str:
        """Make a style sheet with the pictures; it contains no untrusted text."""
        return thumbnails.styles("mistake", self.pictures)
