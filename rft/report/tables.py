"""Counts to percentages, seeds to mean and spread, and both to text. Pure.

The OOD average is the unweighted mean of the five benchmarks' top-1, made for each seed; then the
mean over seeds (Tables 1 and 3). Spread is the sample standard deviation (n - 1) over seeds: it
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

from rft import recipes
from rft.report.read import Run
from rft.runs.records import SetCount
from rft.sets import BENCHMARKS, OOD_SETS, TEST_SETS

COLUMNS = (*(BENCHMARKS[name].title for name in TEST_SETS), "OOD avg")
ID_COLUMN, OOD_COLUMN = 0, len(COLUMNS) - 1

BASELINES = ("vanilla", "no-mask")  # what paired differences are taken against
GRID = tuple(recipes.MASKED)  # as in Table 1

NUMBER = r"[+-]?[0-9]+(\.[0-9]+)?"
PLUS_MINUS = "\u00b1"
FIGURE_SPACE = "\u2007"  # as wide as a digit: keeps the points of numbers below each other
ABSENT = "-"
NAME_WIDTH = 28  # what the numbers of a result table leave of 100 columns

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


@dataclass(frozen=True)
class Row:
    """One recipe: a cell for each of COLUMNS, None where a set was not evaluated."""

    recipe: str
    seeds: tuple[int, ...]
    cells: tuple[Spread | None, ...]
    precision: str = ""
    """What all of its runs were trained in; empty if they were not trained."""


@dataclass(frozen=True)
class DifferenceRow:
    """OOD average of a recipe minus that of each of BASELINES."""

    recipe: str
    seeds: tuple[int, ...]
    against: tuple[tuple[float, ...] | None, ...]
    """Seed by seed; None where seeds do not match or a set is absent."""


@dataclass(frozen=True)
class TextTable:
    """A table of recipes as text: what the console, Markdown and the page show."""

    caption: str
    header: Sequence[str]
    """Headings after the recipe: of what says where its numbers are from, and of its cells."""
    lines: list[TextLine]
    justify: JustifyMethod = "right"


def top1(count: SetCount) -> float:
    """Return the top-1 accuracy in percent."""
    return 100 * count.correct / count.total


def summarise(values: Sequence[float]) -> Spread:
    """Return the mean and, for two values or more, the sample standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def accuracies(run: Run) -> tuple[float | None, ...]:
    """Return a run's percentages in the order of COLUMNS."""
    sets = [run.counts.get(name) for name in TEST_SETS]
    values = [None if count is None else top1(count) for count in sets]
    return (*values, ood_average(run))


def ood_average(run: Run) -> float | None:
    """Return the unweighted mean of the five OOD accuracies, or None if one is missing."""
    if any(name not in run.counts for name in OOD_SETS):
        return None
    return statistics.fmean(top1(run.counts[name]) for name in OOD_SETS)


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return each recipe's runs by seed, recipes in the order of the paper's tables."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        groups.setdefault(run.recipe, []).append(run)
    return {recipe: groups[recipe] for recipe in sorted(groups, key=order)}


def order(recipe: str) -> tuple[int, str, float]:
    """Return the sort key that puts recipes in the order of the paper's tables, others last."""
    # the first number is the block of the table; the others sort within it
    first = ("zero-shot", "linear-probe", "vanilla", "lp-ft")
    if recipe in first:
        return 0, "", first.index(recipe)
    if (wise := wise_model(recipe)) is not None:
        return (1, "", wise.alpha) if wise.end == "vanilla" else (5, wise.family, wise.alpha)
    if recipe.endswith("-soup"):
        return 2, recipe, 0
    if recipe == "no-mask":
        return 3, "", 0
    if recipe in GRID:
        return 4, "", GRID.index(recipe)
    if recipe.startswith("wise-kd-"):
        return 6, "" if recipe == "wise-kd-vanilla" else recipe, 0
    return 7, recipe, 0


def wise_model(recipe: str) -> Wise | None:
    """Return what the name of a WiSE model says, or None for other recipes."""
    # alpha as {:g} prints it, 1e-05 included, at whose hyphen a greedy match would split;
    # ASCII: \d matches digits of every script
    match = re.fullmatch(r"(wise-(.+?))-(\d+(?:\.\d+)?(?:e-\d+)?)", recipe, re.ASCII)
    if match is None or float(match[3]) > 1:
        return None
    return Wise(match[1], "vanilla" if match[2] == "ft" else match[2], float(match[3]))


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


def result_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the result table: one row per recipe."""
    rows = []
    for recipe, members in by_recipe(runs).items():
        columns = zip(*(accuracies(run) for run in members), strict=True)
        # all seeds of a recipe have the same sets, so it is all or none
        cells = tuple(
            summarise(values) if (values := [v for v in column if v is not None]) else None
            for column in columns
        )
        # the same for all seeds, too (rft.report.read)
        precision = members[0].precision
        rows.append(Row(recipe, tuple(run.seed for run in members), cells, precision))
    return rows


def best(rows: Sequence[Row]) -> list[set[int]]:
    """Return for each column the rows that are best in it, by the numbers as they are printed.

    Numbers that look the same are equal: all of them are best. A single row is not best.
    """
    winners = []
    for column in range(len(COLUMNS)):
        shown = {
            index: round(cell.mean, 1)
            for index, row in enumerate(rows)
            if (cell := row.cells[column]) is not None
        }
        # NaN equals nothing: an empty column has no best
        top = max(shown.values(), default=math.nan)
        winners.append({i for i, value in shown.items() if value == top and len(rows) > 1})
    return winners


def difference_rows(runs: Sequence[Run]) -> list[DifferenceRow]:
    """Return each recipe's paired differences in OOD average; none if nothing can be paired."""
    groups = by_recipe(runs)
    averages = {
        recipe: {run.seed: average for run in members if (average := ood_average(run)) is not None}
        for recipe, members in groups.items()
    }
    rows = []
    for recipe, values in averages.items():
        # vanilla's difference to no-mask is no-mask's to vanilla, with the other sign
        if recipe == BASELINES[0]:
            continue
        against = tuple(
            None if recipe == baseline else paired(values, averages.get(baseline, {}))
            for baseline in BASELINES
        )
        if any(against):
            rows.append(DifferenceRow(recipe, tuple(values), against))
    return rows


def paired(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, ...] | None:
    """Return each seed's value minus its baseline's, or None unless both have the same seeds."""
    if not values or values.keys() != baseline.keys():
        return None
    return tuple(values[seed] - baseline[seed] for seed in sorted(values))


def difference_cells(row: DifferenceRow) -> list[str]:
    """Return for each baseline the mean difference and the seeds' own, as text."""
    cells = []
    for values in row.against:
        if values is None:
            cells += [ABSENT, ABSENT]
        else:
            by_seed = " ".join(f"{value:+z.2f}" for value in values)
            cells += [summarise(values).text(2, "+"), by_seed]
    return cells


def text_tables(
    rows: Sequence[Row], differences: Sequence[DifferenceRow], hidden: int = 0
) -> list[TextTable]:
    """Return results and differences as text; `hidden` WiSE models are left out of `rows`."""
    winners = best(rows)
    lines = []
    for index, row in enumerate(rows):
        texts = [ABSENT if cell is None else cell.text() for cell in row.cells]
        cells = [(text, index in winners[column]) for column, text in enumerate(texts)]
        lines.append((row.recipe, str(len(row.seeds)), cells))
    results = TextTable(caption(rows, hidden), ["n", *COLUMNS], lines)
    if not differences:
        return [results]
    lines = [
        (row.recipe, str(len(row.seeds)), [(text, False) for text in difference_cells(row)])
        for row in differences
    ]
    header = [text for name in BASELINES for text in (f"vs {name}", "by seed")]
    return [results, TextTable(DIFFERENCE_CAPTION, ["n", *header], lines)]


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
    numbers = [text for name in COLUMNS for text in (name, f"{name} sd")]
    lines = [["recipe", "n", "seeds", *numbers]]
    for row in rows:
        values = [text for cell in row.cells for text in csv_numbers(cell)]
        seeds = " ".join(map(str, row.seeds))
        lines.append([row.recipe, str(len(row.seeds)), seeds, *values])
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
            Text(
                text.replace(f" {PLUS_MINUS} ", "+-").replace(FIGURE_SPACE, " "),
                style="bold" if bold else "",
            )
            for text, bold in cells
        ]
        found.add_row(name, Text(source), *texts)
    return found


def caption(rows: Sequence[Row], hidden: int = 0) -> str:
    """Explain the numbers of the result table."""
    several = any(len(row.seeds) > 1 for row in rows)
    spread = "; mean and sample standard deviation over n seeds" if several else ""
    text = f"Top-1 accuracy in %{spread}. OOD avg is the unweighted mean of the five to its left."
    if hidden:
        text += (
            f" Of each WiSE family only the alpha nearest 0.5; table.csv has the other {hidden}."
        )
    return text + precisions(rows)


def precisions(rows: Sequence[Row]) -> str:
    """Return a warning, with a space before it, if rows were trained in different precisions."""
    trained = [row for row in rows if row.precision]
    found = sorted({row.precision for row in trained})
    if len(found) < 2:
        return ""
    parts = (
        f"{name} ({', '.join(row.recipe for row in trained if row.precision == name)})"
        for name in found
    )
    return f" Trained in different precisions: {'; '.join(parts)}."


DIFFERENCE_CAPTION = "Difference in OOD avg, in points, paired by seed: mean, then each seed's own."
