"""Converts counts to percentages, seeds to mean and spread, and both to text. Pure.

The OOD average is the unweighted mean of the five benchmarks' top-1, computed per seed and then
averaged over seeds (Tables 1 and 3). If further sets were declared OOD, the mean over all OOD sets
is an additional column. Spread is the sample standard deviation (n - 1) over seeds. It does not
cover the sampling of the test images, which all seeds share.
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

# a column has the name of its set; no set's name is empty or begins with a slash
ID_COLUMN, OOD_COLUMN, EFFECTIVE = ID_SET, "", "/effective robustness"
AVERAGE = "//"
"""Precedes each set's name in the column of an average over sets other than the five."""
SCORED = "/"
"""Precedes the score and the set in the column of a set's declared score that is not top-1."""
COLUMNS = (*TEST_SETS, OOD_COLUMN)
"""The columns of the paper's tables."""
HEADINGS = {
    **{name: one.title for name, one in BENCHMARKS.items()},
    OOD_COLUMN: "OOD avg",
    EFFECTIVE: "eff. rob.",
}
SETS = 200  # limit of a report's columns

BASELINES = ("vanilla", "no-mask")  # paired differences are relative to these
# the first baseline on own sets, where the effect of fine-tuning is not known
UNTRAINED = "zero-shot"
OTHERS = (*recipes.LATER, *recipes.RESEARCH)  # methods after the paper, and rft's own
GRID = tuple(recipes.MASKED)  # as in Table 1

NUMBER = r"[+-]?[0-9]+(\.[0-9]+)?"
PLUS_MINUS = "\u00b1"
FIGURE_SPACE = "\u2007"  # as wide as a digit, to align the decimal points of numbers
ABSENT = "-"
SIGNIFICANT = "*"
NAME_WIDTH = 24  # the rest of 80 columns beside the numbers of a result table

# recipe, source of its numbers, and for each cell its text and whether it is emphasised
TextLine = tuple[str, str, list[tuple[str, bool]]]

# only a rule under the heading, the third of rich's eight lines, in ASCII
RULED = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and their sample standard deviation if there are at least two."""

    mean: float
    sd: float | None

    def text(self, decimals: int = 1, sign: str = "") -> str:
        """Format as `mean`, or `mean +- sd`; with `sign` "+", positive means have a sign too."""
        # z: a mean that rounds to zero gets no minus
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
    """Column -> number, for the columns that the row has."""
    precision: str = ""
    """Precision in which all of its runs were trained; empty if they were not trained."""
    variant: str = ""
    """Settings in which it differs from other rows of its recipe, if any."""

    @property
    def name(self) -> str:
        """Unique name of the row."""
        return f"{self.recipe}, {self.variant}" if self.variant else self.recipe

    @property
    def id(self) -> str:
        """Id that ties the row's elements on a page together, the same in every report."""
        return files.sha256_bytes(self.name.encode())[:10]


@dataclass(frozen=True)
class DifferenceRow:
    """The differences of a row to some baselines, in one column."""

    name: str
    seeds: tuple[int, ...]
    against: tuple[tuple[float, ...] | None, ...]
    """Differences per seed, in points; None if seeds do not match or a set is missing."""
    measured: tuple[SetPair | AveragePair | None, ...]
    """Differences from predictions, as shares; None without predictions."""


@dataclass(frozen=True)
class TextTable:
    """A table of recipes as text, for the console, Markdown and the page."""

    caption: str
    header: Sequence[str]
    """Headings after the recipe: that of the numbers' source, and those of the cells."""
    lines: list[TextLine]
    justify: JustifyMethod = "right"
    compact: frozenset[int] = frozenset()
    """Indices of cells that a console shows without their spread."""


def top1(count: SetCount) -> float:
    """Compute the top-1 accuracy in percent."""
    return 100 * count.correct / count.total


def summarise(values: Sequence[float]) -> Spread:
    """Compute the mean and, for two or more finite values, the sample standard deviation.

    A log-likelihood may be infinite, and so may its mean.
    """
    several = len(values) > 1 and all(map(math.isfinite, values))
    return Spread(statistics.fmean(values), statistics.stdev(values) if several else None)


def sets_of(column: str) -> tuple[str, ...]:
    """List the sets of a column: those of an average, or its own set."""
    if column == OOD_COLUMN:
        return OOD_SETS
    if is_score(column):
        return (column.split(SCORED, 2)[2],)
    # names of sets are normalised paths, which never contain two slashes in a row
    return tuple(column.split(AVERAGE)[1:]) if column.startswith(AVERAGE) else (column,)


def score_column(score: Score, name: str) -> str:
    """Make the column of a set's declared score."""
    return f"{SCORED}{score}{SCORED}{name}"


def is_score(column: str) -> bool:
    """Whether a column is a set's declared score."""
    return column.startswith(SCORED) and column != EFFECTIVE and not is_average(column)


def own_scores(runs: Sequence[Run]) -> dict[str, Score]:
    """Map sets to their declared scores, for sets whose score differs from top-1.

    The mean over domains of equal size equals top-1.
    """
    return {
        name: count.score
        for run in runs
        for name, count in run.counts.items()
        if count.value is not None
        and not math.isclose(count.value, count.correct / count.total, abs_tol=1e-12)
    }


def of_images(averages: Mapping[str, Sequence[str]], runs: Sequence[Run]) -> dict[str, list[str]]:
    """Select the averages over sets with top-1 scores, because images are bootstrapped for them."""
    scores = own_scores(runs)
    return {name: list(sets) for name, sets in averages.items() if not scores.keys() & set(sets)}


def is_average(column: str) -> bool:
    """Whether a column is the mean over several sets."""
    return column == OOD_COLUMN or column.startswith(AVERAGE)


def all_ood(runs: Sequence[Run]) -> str | None:
    """Make the column of the average over all OOD sets of some runs.

    None if no set beyond the five benchmarks was declared OOD, or if the average would be over a
    single set. One packed set under several names counts once (`copies`).
    """
    declared = {name for run in runs for name, one in run.counts.items() if one.ood}
    declared -= BENCHMARKS.keys() | copies(runs).keys()
    counted = {name for run in runs for name in run.counts}
    names = [*(name for name in OOD_SETS if name in counted), *sorted(declared)]
    return AVERAGE + AVERAGE.join(names) if declared and len(names) > 1 else None


def copies(runs: Sequence[Run]) -> dict[str, str]:
    """Map OOD sets to an earlier set of the same packed data, with benchmarks first."""
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
    """Compute a set's own score, in percent: the declared one, or top-1."""
    return top1(count) if count.value is None else 100 * count.value


def percent(run: Run, column: str) -> float | None:
    """Compute a run's number in a column, in percent; None if it lacks one of the column's sets.

    An average is over the sets' own scores.
    """
    names = sets_of(column)
    if any(name not in run.counts for name in names):
        return None
    shown = declared if is_score(column) or is_average(column) else top1
    return statistics.fmean(shown(run.counts[name]) for name in names)


def accuracies(
    run: Run, average: str | None = None, scores: Mapping[str, Score] | None = None
) -> dict[str, float]:
    """Map columns to a run's percentages: the paper's first, then other sets, then an average.

    `scores` are the declared scores that get an additional column (`own_scores`).
    """
    own = sorted(run.counts.keys() - set(TEST_SETS))
    columns = [score_column(score, name) for name, score in (scores or {}).items()]
    names = [*COLUMNS, *own, *columns, *([] if average is None else [average])]
    values = {name: percent(run, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def columns(rows: Sequence[Row]) -> list[str]:
    """List the columns of rows: the paper's in its order, own sets by name, then averages.

    Raises:
        ValueError: if there are too many to show.
    """
    there = {name for row in rows for name in row.cells}
    known = [name for name in (*COLUMNS, EFFECTIVE) if name in there]
    sets = [name for name in there if not is_score(name) and not is_average(name)]
    if len(sets) > SETS:
        raise ValueError(
            f"the runs were evaluated on {len(sets):,} sets; the limit of a report is {SETS}: "
            f"remove some from their {filenames.RESULTS}"
        )

    def place(column: str) -> tuple[bool, str, bool]:
        """Sort a set's score after its top-1, and averages last."""
        name = column if is_average(column) else sets_of(column)[0]
        return is_average(column), name, is_score(column)

    return [*known, *sorted(there - set(known), key=place)]


def heading(column: str) -> str:
    """Make the heading of a column; for an own set this is its name."""
    if column in HEADINGS:
        return HEADINGS[column]
    if is_average(column):
        return f"{HEADINGS[OOD_COLUMN]} ({len(sets_of(column))} sets)"
    if is_score(column):
        return f"{heading(*sets_of(column))}, {column.split(SCORED, 2)[1]}"
    known = column in HEADINGS.values() or column.startswith(HEADINGS[OOD_COLUMN])
    return f"{column} (own set)" if known else column


def target(rows: Sequence[Row]) -> str:
    """Choose the column that rows are compared by: an OOD average, or else the first column."""
    found = columns(rows)
    # the benchmarks' average comes before that of all sets
    if (average := next(filter(is_average, found), None)) is not None:
        return average
    # the first set's declared score, or its top-1; without any set nothing is compared
    return next((one for one in found[1:2] if is_score(one)), found[0] if found else OOD_COLUMN)


def ood_average(run: Run) -> float | None:
    """Compute the unweighted mean of the five OOD accuracies; None if one is missing."""
    return percent(run, OOD_COLUMN)


def by_row(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by row, sorted by seed, with rows in the order of the paper's tables."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (order(run.recipe), by_number(run.variant), run.seed)):
        groups.setdefault(run.row, []).append(run)
    return groups


def by_number(text: str) -> list[tuple[float, str]]:
    """Make a sort key that orders texts by their numbers: 3e-05 before 0.001."""
    # re.split alternates words and numbers, and begins with a word
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text, flags=re.ASCII)
    return [(float(part), "") if n % 2 else (0.0, part) for n, part in enumerate(parts)]


def order(recipe: str) -> tuple[int, str, float]:
    """Make a sort key that orders recipes as in the paper's tables, with others last."""
    # the first number is the block of the table; the rest sorts within the block
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
    """Find the kind of an ensemble: vrf for vrf and vrf-RECIPE; None for other recipes."""
    # longer names first, in case one begins with another
    names = sorted(recipes.ENSEMBLES, key=len, reverse=True)
    recipe = recipe.removesuffix(TRANSDUCTIVE)
    return next((name for name in names if recipe == name or recipe.startswith(f"{name}-")), None)


def wise_model(recipe: str) -> Wise | None:
    """Parse the name of a WiSE model; None for other recipes."""
    # alpha as {:g} prints it, including 1e-05, at whose hyphen a greedy match would split;
    # ASCII, because \d otherwise matches the digits of every script
    match = re.fullmatch(r"(wise-(.+?))-(\d+(?:\.\d+)?(?:e-\d+)?)", recipe, re.ASCII)
    if match is None or float(match[3]) > 1:
        return None
    tower = match[2] == "tower" or match[2].startswith("tower-")
    end = match[2].removeprefix("tower").removeprefix("-") if tower else match[2]
    return Wise(match[1], "vanilla" if end in ("", "ft") else end, float(match[3]), tower)


def shown_recipes(recipes: Iterable[str]) -> set[str]:
    """Keep of each WiSE family only the model nearest to alpha 0.5, and all other recipes.

    Paths over alpha belong in a picture. Picking the best point would be selection on test images.
    """
    kept = set()
    families: dict[str, list[tuple[float, str]]] = {}
    for recipe in sorted(recipes, key=order):
        if (wise := wise_model(recipe)) is None:
            kept.add(recipe)
        else:
            families.setdefault(wise.family, []).append((abs(wise.alpha - 0.5), recipe))
    # 0.4 and 0.6 are equally near: the name decides for 0.4
    return kept | {min(members)[1] for members in families.values()}


def result_rows(runs: Sequence[Run], line: Line | None = None) -> list[Row]:
    """Make the result table; with a testbed's line, effective robustness is a column."""
    rows, average, scores = [], all_ood(runs), own_scores(runs)
    for members in by_row(runs).values():
        found = [accuracies(run, average, scores) for run in members]
        by_seed = [values | effective(values, line) for values in found]
        # all seeds of a row have the same sets (rft.report.read), so the first one's are enough
        cells = {name: summarise([values[name] for values in by_seed]) for name in by_seed[0]}
        first = members[0]
        seeds = tuple(run.seed for run in members)
        # settings are the same for all seeds too
        rows.append(Row(first.recipe, seeds, cells, first.precision, first.variant))
    return rows


def effective(percent: Mapping[str, float], line: Line | None) -> dict[str, float]:
    """Compute effective robustness in points, as a column; empty if a run has none."""
    in_, out = percent.get(ID_COLUMN), percent.get(OOD_COLUMN)
    # the line is fitted to logits, which are infinite at 0 and 100%
    if line is None or in_ is None or out is None or not 0 < in_ < 100:
        return {}
    return {EFFECTIVE: 100 * robustness.effective_robustness(line, in_ / 100, out / 100)}


def best(rows: Sequence[Row]) -> dict[str, set[int]]:
    """Find the best rows of each column, by the numbers as printed.

    Rows with the same printed number are all best. A single row is never best.
    """
    winners = {}
    for column in columns(rows):
        shown = {
            index: round(row.cells[column].mean, 1)
            for index, row in enumerate(rows)
            if column in row.cells
        }
        # NaN is unequal to everything, so an empty column has no best row
        top = max(shown.values(), default=math.nan)
        winners[column] = {i for i, value in shown.items() if value == top and len(rows) > 1}
    return winners


def baselines(rows: Sequence[Row]) -> list[Row]:
    """Select the rows of `BASELINES`, each with its best settings in the compared column.

    Methods should be compared with the strongest baseline. On own sets, the first baseline is the
    pre-trained model.
    """
    column = target(rows) if rows else ""
    found = []
    for recipe in BASELINES if of_benchmarks(rows) else (UNTRAINED, *BASELINES):
        members = [row for row in rows if row.recipe == recipe and column in row.cells]
        if members:
            found.append(max(members, key=lambda row: row.cells[column].mean))
    return found


def of_benchmarks(rows: Sequence[Row]) -> bool:
    """Whether any row was evaluated on one of the paper's test sets."""
    return not set(columns(rows)).isdisjoint(TEST_SETS)


def difference_rows(
    runs: Sequence[Run], rows: Sequence[Row], measures: Measures
) -> list[DifferenceRow]:
    """Make the rows of differences to the baselines; empty if nothing can be paired."""
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
        # the first baseline is left out: others have the difference to it, with the opposite sign
        others = [row.name for row in against]
        if others[:1] == [name]:
            continue
        own = tuple(None if o == name else paired(values, by_seed[o]) for o in others)
        measured = tuple(None if o == name else pair_of(measures, name, o, column) for o in others)
        if any(own) or any(measured):
            found.append(DifferenceRow(name, tuple(values), own, measured))
    return found


def pair_of(measures: Measures, row: str, other: str, column: str) -> SetPair | AveragePair | None:
    """Look up the difference of two rows in one column, as measured from predictions."""
    if is_average(column):
        return measures.average_pair(row, other, column)
    return measures.pair(row, other, column)


def paired(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, ...] | None:
    """Subtract the baseline's value for each seed; None unless both have the same seeds."""
    if not values or values.keys() != baseline.keys():
        return None
    return tuple(values[seed] - baseline[seed] for seed in sorted(values))


def difference_cells(row: DifferenceRow, seeds: bool = True) -> list[list[str]]:
    """Format the difference to each baseline and, if `seeds`, the differences per seed."""
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
    """Format a difference in points with its interval, and a mark if it is `significant`."""
    value, (low, high), _ = pair.difference
    mark = SIGNIFICANT if significant(pair) else ""
    return f"{100 * value:+z.2f} [{100 * low:+z.2f}, {100 * high:+z.2f}]{mark}"


def text_tables(
    rows: Sequence[Row], differences: Sequence[DifferenceRow], hidden: int = 0
) -> list[TextTable]:
    """Format results and differences; `hidden` is the number of WiSE models missing in `rows`."""
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
    # with one seed, its difference is already the mean; differences.csv has those of each seed
    several = not measured and any(len(row.seeds) > 1 for row in differences)
    cells = [difference_cells(row, several) for row in differences]
    # a baseline without any difference gets no column
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
    """Format a row's number in a column."""
    if column not in row.cells:
        return ABSENT
    return row.cells[column].text(sign="+" if column == EFFECTIVE else "")


def compact(shown: Sequence[str]) -> frozenset[int]:
    """Choose the columns without spread on a narrow console: all but ID and OOD average."""
    kept = {ID_COLUMN, OOD_COLUMN}
    if len(shown) <= 3 or not kept & set(shown):
        return frozenset()
    return frozenset(place for place, name in enumerate(shown) if name not in kept)


def markdown(tables: Sequence[TextTable]) -> str:
    """Format tables as Markdown."""
    lines = []
    for table in tables:
        # the comparison with the paper is left-aligned and has no bold: its second column names
        # the source
        right = table.justify == "right"
        lines.append(markdown_line("recipe", *table.header))
        lines.append(markdown_line("---", *["--:" if right else "---"] * len(table.header)))
        for recipe, source, cells in table.lines:
            texts = [f"**{text}**" if bold and right else text.strip() for text, bold in cells]
            lines.append(markdown_line(markdown_escape(recipe), source, *texts))
        lines += ["", markdown_escape(table.caption), ""]
    return "\n".join(lines)


def markdown_line(*cells: str) -> str:
    """Format one line of a table."""
    return f"| {' | '.join(cells)} |"


def markdown_escape(text: str) -> str:
    """Escape text so that Markdown shows it literally."""
    # HTML first, because Markdown passes it on; entities contain no character escaped after it
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text, quote=False))


def csv_text(rows: Sequence[Row]) -> str:
    """Format the result table as CSV: means and standard deviations, empty if missing."""
    shown = columns(rows)
    numbers = [text for name in map(heading, shown) for text in (name, f"{name} sd")]
    lines = [["recipe", "n", "seeds", *numbers]]
    for row in rows:
        values = [text for name in shown for text in csv_numbers(row.cells.get(name))]
        seeds = " ".join(map(str, row.seeds))
        lines.append([row.name, str(len(row.seeds)), seeds, *values])
    return csv_lines(lines)


def csv_lines(lines: Iterable[Sequence[str]]) -> str:
    """Format lines of cells as CSV, in which spreadsheets take no name for a formula."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([csv_cell(text) for text in line] for line in lines)
    return stream.getvalue()


def csv_cell(text: str) -> str:
    """Put an apostrophe before text that a spreadsheet would compute as a formula.

    Numbers may begin with a sign. In some languages spreadsheets also accept full-width signs.
    """
    start = unicodedata.normalize("NFKC", text.lstrip(" "))[:1]
    if start not in tuple("=+-@|%\t\r\n") or re.fullmatch(NUMBER, text):
        return text
    return f"'{text}"


def csv_numbers(cell: Spread | None) -> tuple[str, str]:
    """Format mean and standard deviation, each empty if missing."""
    if cell is None:
        return "", ""
    return f"{cell.mean:.6f}", "" if cell.sd is None else f"{cell.sd:.6f}"


def console_table(table: TextTable) -> RichTable:
    """Make a table for a console of 100 columns, in ASCII for any encoding."""
    # Text, not str, here and below: rich takes [words] in a str for markup
    found = RichTable(
        title=Text(table.caption),
        title_justify="left",
        title_style="",
        header_style="",
        box=RULED,
        show_edge=False,
        padding=0,
    )
    # fold, because rich would otherwise cut numbers that do not fit
    found.add_column("recipe", overflow="fold")
    for name in table.header:
        found.add_column(name, justify=table.justify, overflow="fold")
    for recipe, source, cells in table.lines:
        # a long name is wrapped at its hyphens
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
    """Make a warning, after a space, if rows were trained in different precisions; or empty."""
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
            f"Difference in {column}, in points, with the 95% interval for resampled test images. "
            f"{SIGNIFICANT}: the interval excludes 0, and every seed's own difference has its sign."
        )
    by_seed = ": mean and sample standard deviation, then each seed's own" if several else ""
    return f"Difference in {column}, in points, paired by seed{by_seed}."
