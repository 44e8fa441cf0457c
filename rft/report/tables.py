"""Counts to percentages, seeds to mean and spread, and both to text. Pure.

The OOD average is the unweighted mean of the five benchmarks' top-1, made for each seed; then the
mean over seeds (Tables 1 and 3). Where sets beyond these were declared OOD, the mean over all OOD
sets is one more column. Spread is the sample standard deviation (n - 1) over seeds: it
says nothing about the sampling of the test images, which all seeds share.
"""

import csv
import html
import io
import math
import re
import statistics
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

from rft import recipes
from rft.report.measures import AveragePair, Measures, SetPair, significant
from rft.report.read import TRANSDUCTIVE, Run
from rft.runs import filenames
from rft.runs.records import SetCount
from rft.sets import BENCHMARKS, ID_SET, OOD_SETS, TEST_SETS, Score
from rft.statistics import robustness
from rft.statistics.robustness import Line
from rft.storage import files

# columns go by the name of their set; no set has an empty name, or one that begins with a slash
ID_COLUMN, OOD_COLUMN, EFFECTIVE = ID_SET, "", "/effective robustness"
AVERAGE = "//"
"""Begins the column of an average over other sets than the five, and each of their names in it."""
SCORED = "/"
"""Begins the column of a set's declared score where that is not top-1, and stands
between the score and the set."""
COLUMNS = (*TEST_SETS, OOD_COLUMN)
"""Of the paper's tables."""
HEADINGS = {
    **{name: one.title for name, one in BENCHMARKS.items()},
    OOD_COLUMN: "OOD avg",
    EFFECTIVE: "eff. rob.",
}
SETS = 200  # columns of a report

BASELINES = ("vanilla", "no-mask")  # what paired differences are taken against
# first on sets of one's own, where nothing is known of what fine-tuning brings
UNTRAINED = "zero-shot"
OTHERS = (*recipes.LATER, *recipes.RESEARCH)  # those that came later, and rft's own
GRID = tuple(recipes.MASKED)  # as in Table 1

NUMBER = r"[+-]?[0-9]+(\.[0-9]+)?"
PLUS_MINUS = "\u00b1"
FIGURE_SPACE = "\u2007"  # as wide as a digit: keeps the points of numbers below each other
ABSENT = "-"
SIGNIFICANT = "*"
NAME_WIDTH = 24  # what the numbers of a result table leave of 80 columns

# recipe, where its numbers are from, and of each cell its text and whether it stands out
TextLine = tuple[str, str, list[tuple[str, bool]]]

# a rule under the heading, the third of rich's eight lines, and nothing else, in ASCII
RULED = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and their sample standard deviation if there are at least two."""

    mean: float
    sd: float | None

    def text(self, decimals: int = 1, sign: str = "") -> str:
        """Return `mean`, or `mean +- sd`; `sign` is "+" to show it on positive means too."""
        # z: a mean that rounds to zero has no minus
        mean = f"{self.mean:{sign}z.{decimals}f}"
        return mean if self.sd is None else f"{mean} {PLUS_MINUS} {self.sd:.{decimals}f}"


@dataclass(frozen=True)
class Wise:
    """A model on the line between the zero-shot and a fine-tuned one (rft.merge)."""

    family: str
    """The name without alpha: wise-ft, wise-object-mask-single-fill."""
    end: str
    """Recipe of the fine-tuned model."""
    alpha: float
    """Share of the fine-tuned model."""
    tower: bool = False
    """Whether the image tower alone is interpolated."""


@dataclass(frozen=True)
class Row:
    """The runs of one recipe with one setting."""

    recipe: str
    seeds: tuple[int, ...]
    cells: dict[str, Spread]
    """Column -> its number, of those that the row has."""
    precision: str = ""
    """What all of its runs were trained in; empty if they were not trained."""
    variant: str = ""
    """Settings in which it differs from other rows of its recipe, if there are any."""

    @property
    def name(self) -> str:
        """Return what the row is called, which no other row is."""
        return f"{self.recipe}, {self.variant}" if self.variant else self.recipe

    @property
    def id(self) -> str:
        """Return what ties the row's elements on a page together, the same in every report."""
        return files.sha256_bytes(self.name.encode())[:10]


@dataclass(frozen=True)
class DifferenceRow:
    """One column of a row minus that of each of some baselines."""

    name: str
    seeds: tuple[int, ...]
    against: tuple[tuple[float, ...] | None, ...]
    """Seed by seed, in points; None where seeds do not match or a set is absent."""
    measured: tuple[SetPair | AveragePair | None, ...]
    """From images, a share; None without predictions."""


@dataclass(frozen=True)
class TextTable:
    """A table of recipes as text: what the console, Markdown and the page show."""

    caption: str
    header: Sequence[str]
    """Headings after the recipe: of what says where its numbers are from, and of its cells."""
    lines: list[TextLine]
    justify: JustifyMethod = "right"
    compact: frozenset[int] = frozenset()
    """Cells that a console shows without their spread."""


def top1(count: SetCount) -> float:
    """Return the top-1 accuracy in percent."""
    return 100 * count.correct / count.total


def summarise(values: Sequence[float]) -> Spread:
    """Return the mean and, for two finite values or more, the sample standard deviation.

    A log-likelihood may be infinite, and then its mean is.
    """
    several = len(values) > 1 and all(map(math.isfinite, values))
    return Spread(statistics.fmean(values), statistics.stdev(values) if several else None)


def sets_of(column: str) -> tuple[str, ...]:
    """Return the sets that a column is the mean of: those of an average, or its own."""
    if column == OOD_COLUMN:
        return OOD_SETS
    if is_score(column):
        return (column.split(SCORED, 2)[2],)
    # names of sets are normalised paths, which hold no two slashes
    return tuple(column.split(AVERAGE)[1:]) if column.startswith(AVERAGE) else (column,)


def score_column(score: Score, name: str) -> str:
    """Return the column of a set's declared score."""
    return f"{SCORED}{score}{SCORED}{name}"


def is_score(column: str) -> bool:
    """Whether a column is a set's declared score."""
    return column.startswith(SCORED) and column != EFFECTIVE and not is_average(column)


def own_scores(runs: Sequence[Run]) -> dict[str, Score]:
    """Return set -> its declared score, of the sets where that is not top-1.

    The mean over domains of one size is top-1.
    """
    return {
        name: count.score
        for run in runs
        for name, count in run.counts.items()
        if count.value is not None
        and not math.isclose(count.value, count.correct / count.total, abs_tol=1e-12)
    }


def of_images(averages: Mapping[str, Sequence[str]], runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the averages whose sets are all scored by top-1: a bootstrap of images is of these."""
    scores = own_scores(runs)
    return {name: list(sets) for name, sets in averages.items() if not scores.keys() & set(sets)}


def is_average(column: str) -> bool:
    """Whether a column is the mean over several sets."""
    return column == OOD_COLUMN or column.startswith(AVERAGE)


def all_ood(runs: Sequence[Run]) -> str | None:
    """Return the column of the average over all OOD sets of some runs.

    None if that is the benchmarks' own, or of a single set: sets beyond the five count as declared.
    One packed set under several names counts once (`copies`).
    """
    declared = {name for run in runs for name, one in run.counts.items() if one.ood}
    declared -= BENCHMARKS.keys() | copies(runs).keys()
    counted = {name for run in runs for name in run.counts}
    names = [*(name for name in OOD_SETS if name in counted), *sorted(declared)]
    return AVERAGE + AVERAGE.join(names) if declared and len(names) > 1 else None


def copies(runs: Sequence[Run]) -> dict[str, str]:
    """Return OOD set -> that of another name which is the same packed data, benchmarks first."""
    found = {
        name: count.manifest_sha256
        for run in runs
        for name, count in run.counts.items()
        if count.ood or name in OOD_SETS
    }
    first: dict[str, str] = {}
    for name in sorted(found, key=lambda name: (name not in BENCHMARKS, name)):
        first.setdefault(found[name], name)
    return {name: first[sha256] for name, sha256 in found.items() if first[sha256] != name}


def declared(count: SetCount) -> float:
    """Return the score that a set is known by, in percent."""
    return top1(count) if count.value is None else 100 * count.value


def percent(run: Run, column: str) -> float | None:
    """Return a run's number in a column of sets, in percent; None if it lacks one of them.

    An average is one of the scores that its sets are known by.
    """
    names = sets_of(column)
    if any(name not in run.counts for name in names):
        return None
    shown = declared if is_score(column) or is_average(column) else top1
    return statistics.fmean(shown(run.counts[name]) for name in names)


def accuracies(
    run: Run, average: str | None = None, scores: Mapping[str, Score] | None = None
) -> dict[str, float]:
    """Return a run's percentages by column: the paper's first, then other sets, then an average.

    `scores` are those of sets with a column of their own for it (`own_scores`).
    """
    own = sorted(run.counts.keys() - set(TEST_SETS))
    columns = [score_column(score, name) for name, score in (scores or {}).items()]
    names = [*COLUMNS, *own, *columns, *([] if average is None else [average])]
    values = {name: percent(run, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns that a row has: the paper's in its order, own sets by name, an average.

    Raises:
        ValueError: if there are too many to be shown.
    """
    there = {name for row in rows for name in row.cells}
    known = [name for name in (*COLUMNS, EFFECTIVE) if name in there]
    sets = [name for name in there if not is_score(name) and not is_average(name)]
    if len(sets) > SETS:
        raise ValueError(
            f"the runs were evaluated on {len(sets):,} sets; a report shows {SETS}: take some out "
            f"of their {filenames.RESULTS}"
        )

    def place(column: str) -> tuple[bool, str, bool]:
        """Put a set's score behind its top-1, and averages last."""
        name = column if is_average(column) else sets_of(column)[0]
        return is_average(column), name, is_score(column)

    return [*known, *sorted(there - set(known), key=place)]


def heading(column: str) -> str:
    """Return a column's heading; an own set is called by its name."""
    if column in HEADINGS:
        return HEADINGS[column]
    if is_average(column):
        return f"{HEADINGS[OOD_COLUMN]} ({len(sets_of(column))} sets)"
    if is_score(column):
        return f"{heading(*sets_of(column))}, {column.split(SCORED, 2)[1]}"
    known = column in HEADINGS.values() or column.startswith(HEADINGS[OOD_COLUMN])
    return f"{column} (own set)" if known else column


def target(rows: Sequence[Row]) -> str:
    """Return the column that rows are compared by: an OOD average, or the first there is."""
    found = columns(rows)
    # the benchmarks' average stands before that of all sets
    if (average := next(filter(is_average, found), None)) is not None:
        return average
    # the score that the first set is known by; of no set at all there is nothing to compare
    return next((one for one in found[1:2] if is_score(one)), found[0] if found else OOD_COLUMN)


def ood_average(run: Run) -> float | None:
    """Return the unweighted mean of the five OOD accuracies, or None if one is missing."""
    return percent(run, OOD_COLUMN)


def by_row(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each row by seed, rows in the order of the paper's tables."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (order(run.recipe), by_number(run.variant), run.seed)):
        groups.setdefault(run.row, []).append(run)
    return groups


def by_number(text: str) -> list[tuple[float, str]]:
    """Return the sort key that puts texts in the order of their numbers: 3e-05 before 0.001."""
    # words and numbers in turn, words first
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text, flags=re.ASCII)
    return [(float(part), "") if n % 2 else (0.0, part) for n, part in enumerate(parts)]


def order(recipe: str) -> tuple[int, str, float]:
    """Return the sort key that puts recipes in the order of the paper's tables, others last."""
    # the first number is the block of the table; the others sort within it
    first = ("zero-shot", "linear-probe", "vanilla", "lp-ft")
    if recipe in first:
        return 0, "", first.index(recipe)
    if (wise := wise_model(recipe)) is not None:
        block = 1 if wise.end == "vanilla" else 5
        return block, "" if wise.family == "wise-ft" else wise.family, wise.alpha
    if recipe.endswith("-soup") or recipe == "model-stock":
        return 2, recipe, 0
    if recipe == "no-mask":
        return 3, "", 0
    if recipe in GRID:
        return 4, "", GRID.index(recipe)
    if recipe.startswith("wise-kd-"):
        return 6, "" if recipe == "wise-kd-vanilla" else recipe, 0
    if ensemble_kind(recipe) is not None:
        return 8, recipe, 0
    if recipe in OTHERS:
        return 7, "", OTHERS.index(recipe)
    return 7, recipe, 0


def ensemble_kind(recipe: str) -> str | None:
    """Return which ensemble a recipe is: vrf and vrf-RECIPE are vrf; None for other recipes."""
    # those of longer names first, should one begin with the name of another
    names = sorted(recipes.ENSEMBLES, key=len, reverse=True)
    recipe = recipe.removesuffix(TRANSDUCTIVE)
    return next((name for name in names if recipe == name or recipe.startswith(f"{name}-")), None)


def wise_model(recipe: str) -> Wise | None:
    """Return what the name of a WiSE model says, or None for other recipes."""
    # alpha as {:g} prints it, 1e-05 included, at whose hyphen a greedy match would split;
    # ASCII: \d matches digits of every script
    match = re.fullmatch(r"(wise-(.+?))-(\d+(?:\.\d+)?(?:e-\d+)?)", recipe, re.ASCII)
    if match is None or float(match[3]) > 1:
        return None
    tower = match[2] == "tower" or match[2].startswith("tower-")
    end = match[2].removeprefix("tower").removeprefix("-") if tower else match[2]
    return Wise(match[1], "vanilla" if end in ("", "ft") else end, float(match[3]), tower)


def shown_recipes(recipes: Iterable[str]) -> set[str]:
    """Return the recipes without a WiSE family's models but the one nearest to alpha 0.5.

    A path over alpha is a picture's; picking its best point would be selecting on test accuracy.
    """
    kept = set()
    families: dict[str, list[tuple[float, str]]] = {}
    for recipe in sorted(recipes, key=order):
        if (wise := wise_model(recipe)) is None:
            kept.add(recipe)
        else:
            families.setdefault(wise.family, []).append((abs(wise.alpha - 0.5), recipe))
    # of 0.4 and 0.6, equally near, 0.4: the name decides
    return kept | {min(members)[1] for members in families.values()}


def result_rows(runs: Sequence[Run], line: Line | None = None) -> list[Row]:
    """Return the result table; with a testbed's line, effective robustness is a column."""
    rows, average, scores = [], all_ood(runs), own_scores(runs)
    for members in by_row(runs).values():
        found = [accuracies(run, average, scores) for run in members]
        by_seed = [values | effective(values, line) for values in found]
        # all seeds of a row have the same sets, so it is all or none
        cells = {name: summarise([values[name] for values in by_seed]) for name in by_seed[0]}
        first = members[0]
        seeds = tuple(run.seed for run in members)
        # settings are the same for all seeds, too (rft.report.read)
        rows.append(Row(first.recipe, seeds, cells, first.precision, first.variant))
    return rows


def effective(percent: Mapping[str, float], line: Line | None) -> dict[str, float]:
    """Return effective robustness in points, as a column, where a run has one."""
    in_, out = percent.get(ID_COLUMN), percent.get(OOD_COLUMN)
    # the line is one of logits
    if line is None or in_ is None or out is None or not 0 < in_ < 100:
        return {}
    return {EFFECTIVE: 100 * robustness.effective_robustness(line, in_ / 100, out / 100)}


def best(rows: Sequence[Row]) -> dict[str, set[int]]:
    """Return for each column the rows that are best in it, by the numbers as they are printed.

    Numbers that look the same are equal: all of them are best. A single row is not best.
    """
    winners = {}
    for column in columns(rows):
        shown = {
            index: round(row.cells[column].mean, 1)
            for index, row in enumerate(rows)
            if column in row.cells
        }
        # NaN equals nothing: an empty column has no best
        top = max(shown.values(), default=math.nan)
        winners[column] = {i for i, value in shown.items() if value == top and len(rows) > 1}
    return winners


def baselines(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of `BASELINES`, with the best of each one's settings in the column compared.

    The strongest baseline is the one that a method has to be better than. On sets of one's own the
    first is the model as it was pre-trained.
    """
    column = target(rows) if rows else ""
    found = []
    for recipe in BASELINES if of_benchmarks(rows) else (UNTRAINED, *BASELINES):
        members = [row for row in rows if row.recipe == recipe and column in row.cells]
        if members:
            found.append(max(members, key=lambda row: row.cells[column].mean))
    return found


def of_benchmarks(rows: Sequence[Row]) -> bool:
    """Whether any row was counted on one of the paper's test sets."""
    return not set(columns(rows)).isdisjoint(TEST_SETS)


def difference_rows(
    runs: Sequence[Run], rows: Sequence[Row], measures: Measures
) -> list[DifferenceRow]:
    """Return each row's differences to the baselines; none if nothing can be paired."""
    column, against = target(rows), baselines(rows)
    groups = by_row(runs)
    by_seed = {
        row.name: {
            run.seed: value
            for run in groups[row.name]
            if (value := percent(run, column)) is not None
        }
        for row in rows
        if column in row.cells
    }
    found = []
    for name, values in by_seed.items():
        # a baseline's difference to a later one is that one's to it, with the other sign
        others = [row.name for row in against]
        if others[:1] == [name]:
            continue
        own = tuple(None if o == name else paired(values, by_seed[o]) for o in others)
        measured = tuple(None if o == name else pair_of(measures, name, o, column) for o in others)
        if any(own) or any(measured):
            found.append(DifferenceRow(name, tuple(values), own, measured))
    return found


def pair_of(measures: Measures, row: str, other: str, column: str) -> SetPair | AveragePair | None:
    """Return what the images say of two rows in one column."""
    if is_average(column):
        return measures.average_pair(row, other, column)
    return measures.pair(row, other, column)


def paired(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, ...] | None:
    """Return each seed's value minus its baseline's, or None unless both have the same seeds."""
    if not values or values.keys() != baseline.keys():
        return None
    return tuple(values[seed] - baseline[seed] for seed in sorted(values))


def difference_cells(row: DifferenceRow, seeds: bool = True) -> list[list[str]]:
    """Return for each baseline the difference, and the seeds' own if wanted, as text."""
    cells = []
    for values, measured in zip(row.against, row.measured, strict=True):
        if measured is not None:
            own = [interval_text(measured)]
        else:
            own = [ABSENT if values is None else summarise(values).text(2, "+")]
        if seeds:
            own.append(" ".join(f"{value:+z.2f}" for value in values) if values else ABSENT)
        cells.append(own)
    return cells


def interval_text(pair: SetPair | AveragePair) -> str:
    """Return a difference in points, its interval, and a mark if it counts (`significant`)."""
    value, (low, high), _ = pair.difference
    mark = SIGNIFICANT if significant(pair) else ""
    return f"{100 * value:+z.2f} [{100 * low:+z.2f}, {100 * high:+z.2f}]{mark}"


def text_tables(
    rows: Sequence[Row], differences: Sequence[DifferenceRow], hidden: int = 0
) -> list[TextTable]:
    """Return results and differences as text; `hidden` WiSE models are left out of `rows`."""
    winners, shown = best(rows), columns(rows)
    lines = []
    for index, row in enumerate(rows):
        cells = [(cell_text(row, name), index in winners[name]) for name in shown]
        lines.append((row.name, str(len(row.seeds)), cells))
    header = ["n", *map(heading, shown)]
    results = TextTable(caption(rows, hidden), header, lines, compact=compact(shown))
    if not differences:
        return [results]
    measured = any(pair is not None for row in differences for pair in row.measured)
    # with one seed, its own difference is the one that stands before; differences.csv has each
    several = not measured and any(len(row.seeds) > 1 for row in differences)
    cells = [difference_cells(row, several) for row in differences]
    # a baseline that nothing is compared with is no column
    kept = [
        place
        for place in range(len(cells[0]))
        if any(own[place][0] != ABSENT for own in cells)
    ]  # fmt: skip
    lines = [
        (row.name, str(len(row.seeds)), [(text, False) for place in kept for text in own[place]])
        for row, own in zip(differences, cells, strict=True)
    ]
    names = [row.name for row in baselines(rows)]
    header = ["n"]
    for place in kept:
        header += [f"vs {names[place]}", *(["by seed"] if several else [])]
    text = difference_caption(heading(target(rows)), measured=measured, several=several)
    return [results, TextTable(text, header, lines)]


def cell_text(row: Row, column: str) -> str:
    """Return a row's number in a column."""
    if column not in row.cells:
        return ABSENT
    return row.cells[column].text(sign="+" if column == EFFECTIVE else "")


def compact(shown: Sequence[str]) -> frozenset[int]:
    """Return which columns have no spread where there is little room: all but those compared."""
    kept = {ID_COLUMN, OOD_COLUMN}
    if len(shown) <= 3 or not kept & set(shown):
        return frozenset()
    return frozenset(place for place, name in enumerate(shown) if name not in kept)


def markdown(tables: Sequence[TextTable]) -> str:
    """Return tables as Markdown."""
    lines = []
    for table in tables:
        # beside the paper's, a word on the left says which lines are ours
        right = table.justify == "right"
        lines.append(markdown_line("recipe", *table.header))
        lines.append(markdown_line("---", *["--:" if right else "---"] * len(table.header)))
        for recipe, source, cells in table.lines:
            texts = [f"**{text}**" if bold and right else text.strip() for text, bold in cells]
            lines.append(markdown_line(markdown_escape(recipe), source, *texts))
        lines += ["", markdown_escape(table.caption), ""]
    return "\n".join(lines)


def markdown_line(*cells: str) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def markdown_escape(text: str) -> str:
    """Return text that Markdown shows as it is."""
    # HTML first: Markdown passes it on; its entities hold none of the letters escaped after it
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text, quote=False))


def csv_text(rows: Sequence[Row]) -> str:
    """Return the result table as CSV: means and standard deviations, absent ones empty."""
    shown = columns(rows)
    numbers = [text for name in map(heading, shown) for text in (name, f"{name} sd")]
    lines = [["recipe", "n", "seeds", *numbers]]
    for row in rows:
        values = [text for name in shown for text in csv_numbers(row.cells.get(name))]
        seeds = " ".join(map(str, row.seeds))
        lines.append([row.name, str(len(row.seeds)), seeds, *values])
    return csv_lines(lines)


def csv_lines(lines: Iterable[Sequence[str]]) -> str:
    """Return lines of cells as CSV, in which no name is a formula to a spreadsheet."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([csv_cell(text) for text in line] for line in lines)
    return stream.getvalue()


def csv_cell(text: str) -> str:
    """Return a cell's text; an apostrophe makes one that would be computed a text.

    A number may begin with a sign. In some languages a spreadsheet takes full-width signs, too.
    """
    start = unicodedata.normalize("NFKC", text.lstrip(" "))[:1]
    if start not in tuple("=+-@|%\t\r\n") or re.fullmatch(NUMBER, text):
        return text
    return f"'{text}"


def csv_numbers(cell: Spread | None) -> tuple[str, str]:
    """Return mean and standard deviation, empty where there is none."""
    if cell is None:
        return "", ""
    return f"{cell.mean:.6f}", "" if cell.sd is None else f"{cell.sd:.6f}"


def console_table(table: TextTable) -> RichTable:
    """Return a table for a console of 100 columns, in ASCII for any encoding."""
    # Text, not str, here and below: rich reads [words] in a str as markup
    found = RichTable(
        title=Text(table.caption),
        title_justify="left",
        title_style="",
        header_style="",
        box=RULED,
        show_edge=False,
        padding=0,
    )
    # fold: rich would otherwise cut a number that does not fit and end it with dots
    found.add_column("recipe", overflow="fold")
    for name in table.header:
        found.add_column(name, justify=table.justify, overflow="fold")
    for recipe, source, cells in table.lines:
        # a long name takes several lines, which break at its hyphens
        name = Text("\n".join(textwrap.wrap(recipe, NAME_WIDTH)))
        texts = [
            Text(_for_console(text, place in table.compact), style="bold" if bold else "")
            for place, (text, bold) in enumerate(cells)
        ]
        found.add_row(name, Text(source), *texts)
    return found


def _for_console(text: str, compact: bool) -> str:
    if compact:
        text = text.partition(f" {PLUS_MINUS} ")[0]
    return text.replace(f" {PLUS_MINUS} ", "+-").replace(FIGURE_SPACE, " ")


def caption(rows: Sequence[Row], hidden: int = 0) -> str:
    """Explain the numbers of the result table."""
    several = any(len(row.seeds) > 1 for row in rows)
    spread = "; mean and sample standard deviation over n seeds" if several else ""
    shown = columns(rows)
    own = ", or the score that a heading names" if any(map(is_score, shown)) else ""
    text = f"Top-1 accuracy in %{own}{spread}."
    for column in filter(is_average, shown):
        scores = {sets_of(one)[0]: one for one in shown if is_score(one)}
        names = ", ".join(heading(scores.get(name, name)) for name in sets_of(column))
        text += f" {heading(column)} is the unweighted mean of {names}."
    if own:
        text += " Declared scores have no intervals."
    if EFFECTIVE in columns(rows):
        text += " eff. rob. is the OOD average minus that of the testbed's line, in points."
    if hidden:
        text += (
            f" Of each WiSE family only the alpha nearest 0.5; table.csv has the other {hidden}."
        )
    if any(row.recipe.endswith(TRANSDUCTIVE) for row in rows):
        text += (
            " Transductive: the answer to a test image depends on the other test images; no other "
            "row has seen them."
        )
    return text + precisions(rows)


def precisions(rows: Sequence[Row]) -> str:
    """Return a warning, with a space before it, if rows were trained in different precisions."""
    trained = [row for row in rows if row.precision]
    found = sorted({row.precision for row in trained})
    if len(found) < 2:
        return ""
    parts = (
        f"{name} ({', '.join(row.name for row in trained if row.precision == name)})"
        for name in found
    )
    return f" Trained in different precisions: {'; '.join(parts)}."


def difference_caption(column: str, *, measured: bool, several: bool) -> str:
    """Explain the numbers of the table of differences."""
    if measured:
        return (
            f"Difference in {column}, in points, with the 95% interval of test images drawn anew. "
            f"{SIGNIFICANT}: the interval excludes 0, and every seed's own difference has its sign."
        )
    by_seed = ": mean and sample standard deviation, then each seed's own" if several else ""
    return f"Difference in {column}, in points, paired by seed{by_seed}."
