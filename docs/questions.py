"""The paired tests that were announced for world 2: docs/results/reproduction/questions.md.

docs/results.md ("World 2", rule 6) names the pairs. Their differences come from the report of
`make reproduce`; p-values are corrected for the number of pairs.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from rft.recipes import DEFAULT, MASKED, OURS
from rft.report.measures import PAIR_REPLICATES
from rft.report.tables import (
    BASELINES,
    OOD_COLUMN,
    UNTRAINED,
    csv_lines,
    heading,
    markdown_escape,
    markdown_line,
)  # fmt: skip
from rft.sets import OOD_SETS
from rft.statistics.paired import holm
from rft.storage import files

TABLE = "questions.md"
DIFFERENCES = "differences.csv"
WORLD_1 = Path(__file__).parent / "results/world-1/reproduction/table.csv"
AVERAGE = heading(OOD_COLUMN)
LEVEL = 0.05
SMALLEST = 2 / (PAIR_REPLICATES + 1)  # of a two-sided p-value, before the correction

Line = Mapping[str, str]


class Difference(NamedTuple):
    """A difference and its interval, in points, and the line that it is from."""

    value: float
    low: float
    high: float
    line: Line


def pairs(rows: list[str]) -> Iterator[tuple[str, str]]:
    """List the announced pairs: a row, and the row that is subtracted from it.

    Args:
        rows: the paper's rows that have results, in the order of its tables.
    """
    same_fill = [name for name, one in MASKED.items() if one.fill == OURS.fill and one != OURS]
    yield from ((DEFAULT, other) for other in (*BASELINES, "wise-ft-0.5", *same_fill))
    for mask in dict.fromkeys(one.mask for one in MASKED.values()):
        fills = [name for name, one in MASKED.items() if one.mask == mask]
        yield from ((second, first) for first, second in combinations(fills, 2))
    yield from ((row, UNTRAINED) for row in rows if row != UNTRAINED)


def read(path: Path) -> list[Line]:
    """Read a table of the report."""
    return list(csv.DictReader(path.read_text().splitlines()))


def announced(folder: Path) -> list[tuple[str, str]]:
    """List the announced pairs of the rows that a report's folder has results of."""
    rows = [line["recipe"] for line in read(folder / "paper.csv") if line[AVERAGE]]
    return list(pairs(rows))


def select(folder: Path) -> list[Line]:
    """Select lines of a report's differences.csv.

    These are all columns of the announced pairs, and the OOD average of every pair of rows that
    table.md shows.
    """
    wanted = {frozenset(pair) for pair in announced(folder)}
    shown = re.findall(r"^\| ([\w.-]+) \|", (folder / "table.md").read_text(), re.MULTILINE)
    return [
        line
        for line in read(folder / DIFFERENCES)
        if (pair := {line["recipe"], line["against"]}) in wanted
        or (line["set"] == AVERAGE and pair <= {*shown})
    ]


def by_pair(lines: list[Line]) -> dict[tuple[str, str, str], Difference]:
    """Arrange differences by row, subtracted row and column, in both directions."""
    found = {}
    for line in lines:
        value, low, high = (float(line[name]) for name in ("difference", "low", "high"))
        row, other, column = line["recipe"], line["against"], line["set"]
        found[row, other, column] = Difference(value, low, high, line)
        found[other, row, column] = Difference(-value, -high, -low, line)
    return found


def table(folder: Path) -> str:
    """Make the table of the announced pairs from a folder of results, as Markdown.

    Raises:
        KeyError: if a pair was not measured.
    """
    paper = {line["recipe"]: line for line in read(folder / "paper.csv")}
    world_1 = {line["recipe"]: float(line[AVERAGE]) for line in read(WORLD_1)}
    measured = by_pair(read(folder / DIFFERENCES))
    asked = announced(folder)
    found = [measured[*pair, AVERAGE] for pair in asked]
    corrected = holm([float(one.line["p"]) for one in found])
    sets = [heading(name) for name in OOD_SETS]
    header = ["minus", AVERAGE, "p (Holm)", *sets, "world 1", "paper"]
    lines = [
        markdown_line("row", *header),
        markdown_line("---", "---", *["--:"] * (len(header) - 1)),
    ]
    separate = 0
    for (row, other), one, p in zip(asked, found, corrected, strict=True):
        separates = p < LEVEL and one.line["significant"] == "yes"
        separate += separates
        mark = "*" if separates else ""
        cells = [other, f"{one.value:+.2f} [{one.low:+.2f}, {one.high:+.2f}]{mark}", f"{p:.3f}"]
        cells += [f"{measured[row, other, name].value:+.1f}" for name in sets]
        cells.append(f"{world_1[row] - world_1[other]:+.2f}")
        printed = [paper[name][f"{AVERAGE} paper"] for name in (row, other)]
        cells.append(f"{float(printed[0]) - float(printed[1]):+.1f}" if all(printed) else "-")
        lines.append(markdown_line(row, *cells))
    caption = (
        f"Difference in {AVERAGE} and in each OOD set, in points, on the same test images. In "
        "brackets the 95% interval for resampled test images. p is two-sided, from the same "
        f"samples, corrected by Holm's rule for these {len(asked)} pairs; {PAIR_REPLICATES:,} "
        f"samples allow no p below {len(asked) * SMALLEST:.3f}. *: p is below {LEVEL:g}, "
        f"and every seed's own difference has its sign; {separate} of {len(asked)} pairs have it. "
        "World 1: means over three seeds there. Paper: its Tables 1 and 3."
    )
    return "\n".join([*lines, "", markdown_escape(caption), ""])


def write(report: Path, results: Path) -> None:
    """Copy the selected lines of a report to the folder of results, and make the table.

    The folder has the report's paper.csv already.
    """
    lines = select(report)
    text = csv_lines([list(lines[0]), *(list(line.values()) for line in lines)])
    files.write_bytes(str(results / DIFFERENCES), text.encode())
    files.write_bytes(str(results / TABLE), table(results).encode())
