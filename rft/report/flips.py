"""The images behind the classes that a report lists: those that a row gained and lost.

An image is gained if a row gets it right more often, over its seeds, than the reference row
(`rft.report.measures`), and lost in the opposite case. Within a class, images are sorted by the
change of the label's log-likelihood, averaged over seeds, and then by key. If the page has no space
for all images, rows, classes and images take turns, beginning with the first image of the first
class of each row.

Shapes: N images of a set, M some of them, S seeds of a row.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from rft.config import MAX_PIXELS
from rft.report import thumbnails
from rft.report.details import ClassChange
from rft.report.measures import Measures, SetClasses, read_predictions
from rft.report.read import Run
from rft.report.tables import Row, heading, sets_of
from rft.report.thumbnails import Place, read_thumbnails
from rft.text import printable

PER_CLASS = 6  # images gained, and as many lost
IMAGES = 1000  # limit of a page, where an image counts as often as it is shown
BYTES = 900_000  # limit of a page's different thumbnails; base64 adds a third
LETTERS = 60  # limit of a key or a class's name
PREDICTIONS = 3  # predictions of a row's seeds that are listed

Kind = Literal["gained", "lost"]
KINDS: tuple[Kind, Kind] = ("gained", "lost")
Changes = Sequence[tuple[Row, Sequence[tuple[str, Sequence[ClassChange], Sequence[ClassChange]]]]]
"""For each row and column: the heading, and the classes that gained and lost most."""


@dataclass(frozen=True, kw_only=True)
class Flip:
    """An image that a row gets right more often, or less often, than the reference row."""

    place: Place
    set: str
    """Heading of its set."""
    key: str
    label: str
    before: str
    """Prediction of the reference row."""
    after: str
    """Prediction of the row."""
    change: float
    """Increase of the label's log-likelihood, in nats."""


def _by_kind() -> dict[Kind, list]:
    return {kind: [] for kind in KINDS}


@dataclass(frozen=True, kw_only=True)
class ClassFlips:
    """A class that a page lists, with the images that its row gained and lost."""

    row: str
    column: str
    """Heading of its column."""
    label: int
    listed: Kind
    """Whether the class gained or lost."""
    turn: tuple[int, int]
    """Index of the class among the row's classes, and of the row among rows."""
    found: dict[Kind, list[Flip]] = field(default_factory=_by_kind)
    """The first `PER_CLASS` images of each set."""
    totals: Counter[Kind] = field(default_factory=Counter)
    shown: dict[Kind, list[tuple[int, Flip]]] = field(default_factory=_by_kind)
    """Number of the picture on the page, and image."""

    def first(self, kind: Kind) -> list[Flip]:
        """Select the images of a kind that may be shown, those that changed most first."""
        return sorted(self.found[kind], key=lambda one: (-abs(one.change), one.key))[:PER_CLASS]


@dataclass(frozen=True, kw_only=True)
class Flips:
    """The gained and lost images on a page."""

    classes: Mapping[tuple[str, str, int], ClassFlips] = field(default_factory=dict)
    """(row, heading of a column, label) -> its images."""
    pictures: Sequence[bytes] = ()
    """Each different thumbnail once, WebP."""
    left_out: int = 0
    """Number of images for which the page had no space."""
    missing: Sequence[str] = ()
    """Headings of the sets that the data root lacks."""

    def of(self, row: str, column: str, label: int) -> ClassFlips | None:
        """Look up the images of a class; None if none of them is shown."""
        found = self.classes.get((row, column, label))
        return found if found and any(found.shown.values()) else None

    def styles(self) -> str:
        """Make a style sheet with the pictures; it contains no untrusted text."""
        return thumbnails.styles("thumb", self.pictures)


def find_flips(
    rows: Mapping[str, Sequence[Run]],
    measures: Measures,
    reference: str,
    changes: Changes,
    columns: Sequence[str],
    data: str,
    max_pixels: float = MAX_PIXELS,
) -> Flips:
    """Find the images behind listed classes, and read them from the packed sets of a data root.

    Args:
        rows: name of each row -> its runs.
        measures: the measures of these rows.
        reference: name of the row that the others are compared with.
        changes: the classes listed for each row.
        columns: the columns under whose headings they are listed.
        data: URL of the data root.
        max_pixels: limit of an image, in millions of pixels.

    Raises:
        ValueError: if a set below `data` is not the one that was evaluated, or cannot be read.
    """
    sets = {heading(column): sets_of(column) for column in columns}
    classes = list(_listed(changes))
    for name in dict.fromkeys(name for names in sets.values() for name in names):
        there = [one for one in classes if name in sets[one.column]]
        _find(there, rows, measures, reference, name)
    turns = [
        ((one.turn[0] + number, one.turn[0], kind != one.listed, one.turn[1]), one, kind, flip)
        for one in classes
        for kind in KINDS
        for number, flip in enumerate(one.first(kind))
    ]
    # a stable sort: equal turns keep the order of the page
    turns.sort(key=lambda turn: turn[0])
    wanted = {flip.place: flip.key for _, _, _, flip in turns[:IMAGES]}
    counts = {
        name: run.counts[name] for runs in rows.values() for run in runs for name in run.counts
    }
    pictures, missing = read_thumbnails(data, wanted, counts, max_pixels)
    numbers: dict[Place, int] = {}
    room, left_out = BYTES, max(0, len(turns) - IMAGES)
    for _, one, kind, flip in turns[:IMAGES]:
        # broken images and missing sets were already warned of
        if flip.place not in pictures:
            continue
        if flip.place not in numbers:
            room -= len(pictures[flip.place])
            if room < 0:
                left_out += 1
                continue
            numbers[flip.place] = len(numbers)
        one.shown[kind].append((numbers[flip.place], flip))
    return Flips(
        classes={(one.row, one.column, one.label): one for one in classes},
        pictures=[pictures[place] for place in numbers],
        left_out=left_out,
        missing=[heading(name) for name in missing],
    )


def _listed(changes: Changes) -> Iterator[ClassFlips]:
    for line, (row, lists) in enumerate(changes):
        for title, *both in lists:
            for kind, found in zip(KINDS, both, strict=True):
                for place, one in enumerate(found):
                    yield ClassFlips(
                        row=row.name,
                        column=title,
                        label=one.label,
                        listed=kind,
                        turn=(place, line),
                    )


def _find(
    classes: Sequence[ClassFlips],
    rows: Mapping[str, Sequence[Run]],
    measures: Measures,
    reference: str,
    name: str,
) -> None:
    """Find the images of a set that were gained and lost, and add them to the classes."""
    if not classes or (reference, name) not in measures.sets:
        return
    before = _predicted(rows[reference], name)
    for row, of_row in groupby(classes, key=lambda one: one.row):
        if (row, name) not in measures.sets:
            continue
        pair = _Pair(name, measures.classes[name], before, _predicted(rows[row], name))
        for one in of_row:
            for kind in KINDS:
                sample_M = pair.flipped(one.label, kind)
                one.totals[kind] += len(sample_M)
                one.found[kind].extend(map(pair.flip, sample_M[:PER_CLASS].tolist()))


class _Predicted(NamedTuple):
    """The predictions of a row for the images of a set."""

    key_N: np.ndarray
    label_N: np.ndarray
    prediction_SN: np.ndarray
    hits_N: np.ndarray
    """Number of seeds that get the image right."""
    likelihood_N: np.ndarray
    """Log-likelihood of the label, the mean over seeds."""

    def shown(self, sample: int, classes: SetClasses) -> str:
        """Format the classes predicted for an image, those of most seeds first."""
        votes = Counter(self.prediction_SN[:, sample].tolist()).most_common()
        names = [_short(classes.name_of(label)) for label, _ in votes[:PREDICTIONS]]
        if len(votes) > 1:
            names = [
                f"{name} ({count} of {len(self.prediction_SN)})"
                for name, (_, count) in zip(names, votes, strict=False)
            ]
        return ", ".join([*names, *(["..."] if len(votes) > PREDICTIONS else [])])


def _predicted(runs: Sequence[Run], name: str) -> _Predicted:
    read = [read_predictions(run, name) for run in runs]
    return _Predicted(
        read[0].key,
        read[0].label,
        np.stack([one.prediction for one in read]),
        np.stack([one.right for one in read]).sum(axis=0, dtype=np.intp),
        np.stack([one.log_likelihood for one in read]).mean(axis=0, dtype=np.float64),
    )


class _Pair:
    """A row and the reference row on one set."""

    def __init__(
        self, name: str, classes: SetClasses, before: _Predicted, after: _Predicted
    ) -> None:
        self.name, self.classes, self.before, self.after = name, classes, before, after
        seeds, others = len(after.prediction_SN), len(before.prediction_SN)
        # integers, as in paired.tally
        gain_N = after.hits_N * others - before.hits_N * seeds
        # a likelihood of 0 in both rows gives -inf - -inf = NaN, which is no change
        with np.errstate(invalid="ignore"):
            change_N = after.likelihood_N - before.likelihood_N
        self.change_N = np.where(np.isnan(change_N), 0.0, change_N)
        flipped_M = np.flatnonzero(gain_N)
        largest = -np.abs(self.change_N[flipped_M])
        flipped_M = flipped_M[np.lexsort((after.key_N[flipped_M], largest))]
        self._order = {
            kind: flipped_M[sign * gain_N[flipped_M] > 0]
            for kind, sign in zip(KINDS, (1, -1), strict=True)
        }

    def flipped(self, label: int, kind: Kind) -> np.ndarray:
        """Find the images of a class that were gained or lost, the largest change first, (M,)."""
        order_M = self._order[kind]
        return order_M[self.after.label_N[order_M] == label]

    def flip(self, sample: int) -> Flip:
        """Collect what the page shows of an image."""
        return Flip(
            place=(self.name, sample),
            set=heading(self.name),
            key=str(self.after.key_N[sample]),
            label=_short(self.classes.name_of(int(self.after.label_N[sample]))),
            before=self.before.shown(sample, self.classes),
            after=self.after.shown(sample, self.classes),
            change=float(self.change_N[sample]),
        )


def _short(name: str) -> str:
    return printable(name, LETTERS)
