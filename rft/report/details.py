"""Tables of the numbers from predictions: per row and set, per pair of rows, per class. Pure."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rft.report import tables
from rft.report.measures import (
    COMPARED,
    AveragePair,
    Measures,
    Numbers,
    SetPair,
    significant,
)
from rft.report.tables import (
    ABSENT,
    ID_COLUMN,
    OOD_COLUMN,
    PLUS_MINUS,
    Row,
    Spread,
    columns,
    heading,
    is_average,
    pair_of,
    sets_of,
    summarise,
)
from rft.sets import OOD_SETS
from rft.statistics import calibration
from rft.statistics.accuracy import Interval
from rft.statistics.calibration import Bins

CLASSES = 20  # number of largest gains, and of largest losses

# heading, factor of the unit, decimals
SHOWN = {
    "top5": ("top-5", 100, 1),
    "per_class": ("per class", 100, 1),
    "nll": ("NLL", 1, 3),
    "error_width": ("ECE", 100, 1),
    "error_mass": ("ECE, equal mass", 100, 1),
    "scaled_nll": ("NLL, scaled", 1, 3),
    "scaled_error": ("ECE, scaled", 100, 1),
}
assert SHOWN.keys() == set(Numbers._fields) - {"top1"}


def targets(rows: Sequence[Row]) -> list[str]:
    """Choose the columns that are shown in detail: ID and OOD averages, or else the first."""
    shown = columns(rows)
    return [name for name in shown if name == ID_COLUMN or is_average(name)] or shown[:1]


def numbers(measures: Measures, row: str, column: str) -> list[Numbers]:
    """Look up the numbers of each seed of a row in a column; empty without predictions.

    The numbers of an average are unweighted means over its sets.
    """
    names = sets_of(column)
    of_sets = [measures.sets.get((row, name)) for name in names]
    found = [one.seeds for one in of_sets if one is not None]
    if len(found) < len(names):
        return []
    return [Numbers(*np.mean(seed, axis=0).tolist()) for seed in zip(*found, strict=True)]


def interval(measures: Measures, row: str, column: str) -> Interval | None:
    """Look up the interval of a row's top-1 in a column, as shares; None without predictions."""
    if is_average(column):
        return measures.averages.get((row, column))
    found = measures.sets.get((row, column))
    return None if found is None else found.interval


def interval_percent(found: Interval | None) -> str:
    """Format an interval in percent."""
    return ABSENT if found is None else f"{100 * found.low:.1f} to {100 * found.high:.1f}"


@dataclass(frozen=True)
class Grid:
    """A table as text: the headings of the columns, and the row and cells of each line."""

    header: list[str]
    lines: list[tuple[Row, list[str]]]


def spread(seeds: Sequence[Numbers], name: str) -> Spread | None:
    """Summarise one of a row's numbers in its unit; None if a seed lacks it (no temperature)."""
    values = [SHOWN[name][1] * getattr(one, name) for one in seeds]
    return None if any(map(math.isnan, values)) else summarise(values)


def statistics_grid(rows: Sequence[Row], measures: Measures, column: str) -> Grid | None:
    """Make the table of intervals and calibration of one column; None without predictions."""
    by_row = {row.name: numbers(measures, row.name, column) for row in rows}
    there = [row for row in rows if by_row[row.name]]
    # scaled numbers exist only if a temperature was fitted
    shown = [name for name in SHOWN if any(spread(by_row[row.name], name) for row in there)]
    # 100% with five classes or fewer
    if all(one.top5 == 1 for row in there for one in by_row[row.name]):
        shown = [name for name in shown if name != "top5"]
    lines = []
    for row in there:
        cells = [row.cells[column].text(), interval_percent(interval(measures, row.name, column))]
        for name in shown:
            found = spread(by_row[row.name], name)
            cells.append(ABSENT if found is None else found.text(SHOWN[name][2]))
        lines.append((row, cells))
    # an average of declared scores has no interval and is not top-1
    of_images = any(interval(measures, row.name, column) for row in there)
    header = [
        "top-1" if of_images else "score",
        "95% interval",
        *(SHOWN[name][0] for name in shown),
    ]
    return Grid(header, lines) if lines else None


def statistics_csv(rows: Sequence[Row], measures: Measures) -> str:
    """Format every number of every row in every column as CSV; shares are in percent."""
    titles = [name for name in Numbers._fields if name != "top1"]
    header = ["recipe", "set", "images", "n", "top1", "top1 sd", "low", "high"]
    header += [text for title in titles for text in (title, f"{title} sd")]
    lines = [header]
    for row in rows:
        for column in columns(rows):
            seeds = numbers(measures, row.name, column)
            found = interval(measures, row.name, column)
            if not seeds or found is None:
                continue
            of_set = measures.sets.get((row.name, column))
            line = [row.name, heading(column), str(of_set.images) if of_set else ""]
            line += [str(len(seeds)), *tables.csv_numbers(row.cells[column])]
            line += [f"{100 * end:.6f}" for end in found]
            for title in titles:
                line += tables.csv_numbers(spread(seeds, title))
            lines.append(line)
    return tables.csv_lines(lines)


def differences_csv(rows: Sequence[Row], measures: Measures) -> str:
    """Format the differences of each row to each earlier one as CSV, in points."""
    lines = [
        [
            *("recipe", "against", "set", "difference", "low", "high", "p", "significant"),
            *("images gained", "images lost", "by seed", "McNemar p by seed"),
        ]
    ]
    shown = columns(rows)
    for place, row in enumerate(rows):
        for other in rows[:place]:
            for column in shown:
                pair = pair_of(measures, row.name, other.name, column)
                if pair is not None:
                    lines.append([row.name, other.name, heading(column), *_cells(pair)])
    return tables.csv_lines(lines)


def _cells(pair: SetPair | AveragePair) -> list[str]:
    value, (low, high), p = pair.difference
    cells = [*(f"{100 * one:.6f}" for one in (value, low, high)), f"{p:.6g}"]
    cells.append("yes" if significant(pair) else "no")
    by_seed = " ".join(f"{100 * one:.6f}" for one in pair.seeds)
    if isinstance(pair, AveragePair):
        return [*cells, "", "", by_seed, ""]
    tests = " ".join(f"{one:.6g}" for one in pair.mcnemar)
    return [*cells, str(pair.gained), str(pair.lost), by_seed, tests]


class PairCell(NamedTuple):
    """A cell of the table of every row against every other."""

    text: str
    title: str
    """The interval and the p-value."""


def matrix(
    rows: Sequence[Row], measures: Measures, column: str
) -> list[tuple[Row, list[PairCell]]]:
    """Make the table of each row minus each other in one column, of the rows with predictions."""
    kept = [row for row in rows[:COMPARED] if numbers(measures, row.name, column)]
    lines = []
    for row in kept:
        cells = []
        for other in kept:
            pair = pair_of(measures, row.name, other.name, column)
            cells.append(PairCell("", "") if pair is None else _pair_cell(pair))
        lines.append((row, cells))
    # an average of declared scores has no pairs
    return lines if any(cell.text for _, cells in lines for cell in cells) else []


def _pair_cell(pair: SetPair | AveragePair) -> PairCell:
    value, (low, high), p = pair.difference
    mark = tables.SIGNIFICANT if significant(pair) else ""
    title = f"{100 * low:+z.2f} to {100 * high:+z.2f}, p = {p:.2g}"
    return PairCell(f"{100 * value:+z.2f}{mark}", title)


def flips_grid(rows: Sequence[Row], measures: Measures, reference: Row) -> Grid | None:
    """Make the table of images that each row gained and lost against the reference row."""
    shown = [name for name in columns(rows) if name in measures.classes]
    lines = []
    for row in rows:
        pairs = [measures.pair(row.name, reference.name, name) for name in shown]
        if any(pair is not None for pair in pairs):
            cells = [
                ABSENT if pair is None else f"+{pair.gained:,} -{pair.lost:,}" for pair in pairs
            ]
            lines.append((row, cells))
    return Grid([heading(name) for name in shown], lines) if lines else None


class ClassChange(NamedTuple):
    """The difference in accuracy of two rows on one class, in points."""

    name: str
    images: int
    points: float
    label: int


def class_changes(
    measures: Measures, row: str, other: str, column: str
) -> tuple[list[ClassChange], list[ClassChange]]:
    """Find the classes that gained most and lost most, at most `CLASSES` each.

    For an average, the images of a class in all its sets are counted together.
    """
    both = [
        name for name in sets_of(column) if {(row, name), (other, name)} <= measures.sets.keys()
    ]
    if not both:
        return [], []
    of_sets = [measures.classes[name] for name in both]
    label_K, class_of = np.unique(
        np.concatenate([classes.label_K for classes in of_sets]), return_inverse=True
    )
    images_K, change_K = np.zeros((2, len(label_K)))
    np.add.at(images_K, class_of, np.concatenate([classes.images_K for classes in of_sets]))
    changes = [
        measures.sets[row, name].class_correct_K - measures.sets[other, name].class_correct_K
        for name in both
    ]
    np.add.at(change_K, class_of, np.concatenate(changes))
    points_K = 100 * change_K / images_K

    def named(place: int) -> ClassChange:
        label = int(label_K[place])
        name = of_sets[0].name_of(label)
        return ClassChange(name, int(images_K[place]), float(points_K[place]), label)

    # ties go to the class with more images, then to the first
    gains = [named(k) for k in np.lexsort((-images_K, -points_K))[:CLASSES] if points_K[k] > 0]
    losses = [named(k) for k in np.lexsort((-images_K, points_K))[:CLASSES] if points_K[k] < 0]
    return gains, losses


def per_class_csv(rows: Sequence[Row], measures: Measures) -> str:
    """Format the accuracy of each class of each set as CSV, in percent, with a column per row."""
    lines = [["set", "class id", "class", "images", *(row.name for row in rows)]]
    for column in columns(rows):
        if (classes := measures.classes.get(column)) is None:
            continue
        of_rows = [measures.sets.get((row.name, column)) for row in rows]
        for place, images in enumerate(classes.images_K.tolist()):
            cells = [
                "" if one is None else f"{100 * one.class_correct_K[place] / images:.4f}"
                for one in of_rows
            ]
            label = int(classes.label_K[place])
            known = [classes.id_of(label), classes.name_of(label)]
            lines.append([heading(column), *known, str(images), *cells])
    return tables.csv_lines(lines)


def diagrams(rows: Sequence[Row], measures: Measures) -> dict[tuple[str, str], Bins]:
    """Map (row, column) to a calibration diagram, for ID and for all OOD images together."""
    found = {}
    for row in rows:
        if (one := measures.sets.get((row.name, ID_COLUMN))) is not None:
            found[row.name, ID_COLUMN] = one.bins
        ood = [measures.sets.get((row.name, name)) for name in OOD_SETS]
        if all(one is not None for one in ood):
            found[row.name, OOD_COLUMN] = calibration.merge([o.bins for o in ood if o is not None])
    return found


def tex(rows: Sequence[Row]) -> str:
    """Format the result table as a LaTeX tabular that needs no packages."""
    shown, winners = columns(rows), tables.best(rows)
    lines = [rf"\begin{{tabular}}{{l{'r' * len(shown)}}}", r"\hline"]
    lines.append(_tex_line(["", *map(tex_escape, map(heading, shown))]))
    lines.append(r"\hline")
    for index, row in enumerate(rows):
        cells = []
        for name in shown:
            text = tables.cell_text(row, name)
            text = "--" if text == ABSENT else text.replace(PLUS_MINUS, r"$\pm$")
            cells.append(rf"\textbf{{{text}}}" if index in winners[name] else text)
        lines.append(_tex_line([tex_escape(row.name), *cells]))
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def _tex_line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cells)} \\"


TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # two of them would become a quotation mark
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    # at the start of a line, they would be an option of the line break before
    "[": "{[}",
    "*": "{*}",
    # two would become one letter, and in some languages of babel a quote is a command
    "`": r"\char96{}",
    '"': r"\char34{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


def tex_escape(text: str) -> str:
    """Escape text so that LaTeX prints it literally."""
    # in one pass, so that no escape is escaped; two hyphens or quotes would become one letter
    escaped = "".join(TEX.get(letter, letter) for letter in text)
    return re.sub(r"([-'])(?=\1)", r"\1{}", escaped)
