"""Our rows and the paper's, one above the other, and whether they come in the same order. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table as RichTable
from rich.text import Text
from scipy.stats import spearmanr

from rft.paper import Published, all_published, model_name, published
from rft.report import tables
from rft.report.read import Run
from rft.report.tables import ABSENT, COLUMNS, OOD_COLUMN, PLUS_MINUS, Row

MIN_RANKED = 3  # the order of fewer rows says nothing
HERE, PAPER = "here", "paper"


class Pair(NamedTuple):
    """A row of the paper and ours, if the recipe was run."""

    published: Published
    ours: Row | None


class Line(NamedTuple):
    """One line of the table as text."""

    recipe: str
    """Empty on the second line of a pair."""
    source: str
    """HERE or PAPER."""
    cells: tuple[str, ...]


class Beside(NamedTuple):
    """The table beside the paper's."""

    pairs: list[Pair]
    caption: str


def beside(runs: Sequence[Run], rows: Sequence[Row]) -> Beside | None:
    """Return every row of Tables 1 and 3 for the runs' CLIP with ours, or None.

    None if no recipe was run that the paper has, or the runs are of CLIPs that belong to different
    rows of Table 3. A merged model does not say which CLIP it is of; the others do. The miniature's
    CLIP stands for both of the paper's.
    """
    clips = sorted({run.clip for run in runs} - {""})
    models = {model_name(clip) for clip in clips} or {model_name("")}
    if len(models) > 1:
        return None
    (model,) = models
    scales = {run.config.scale for run in runs}
    ours = {row.recipe: row for row in rows}
    theirs = all_published() if "miniature" in scales else published(model)
    pairs = [Pair(row, ours.get(row.recipe)) for row in theirs]
    pairs.sort(key=lambda pair: tables.order(pair.published.recipe))
    if all(pair.ours is None for pair in pairs):
        return None
    named = f"{model}, here {', '.join(clips)}" if clips else model
    parts = [*_caption(pairs, named, scales), tables.precisions(rows).strip()]
    return Beside(pairs, " ".join(part for part in parts if part))


def _caption(pairs: Sequence[Pair], model: str, scales: set[str]) -> list[str]:
    """Return what the numbers are, and what must not be read out of them."""
    numbers = sorted({number for pair in pairs for number in pair.published.tables})
    where = f"Table{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}"
    parts = [
        f"Top-1 accuracy in %, here and in the paper's {where} (CLIP {model}). The paper's "
        "are means over three seeds, without a spread; rows that it has alone were not run here."
    ]
    if "miniature" in scales:
        parts.append(
            "Ours are the miniature world's: compare their order with the paper's, "
            "never their levels."
        )
    elif scales - {"paper"}:
        parts.append(
            "Ours are of another training set: compare their order with the paper's, not levels."
        )
    notes = [f"{row.recipe} is {row.note}" for row, _ in pairs if row.note]
    parts.append(f"In the paper, {', and '.join(notes)}.")
    if (found := rank_correlation(pairs)) is not None:
        rho, count = found
        where = "of OOD avg, here and in the paper"
        parts.append(f"Spearman's rank correlation {where}: {rho:.2f} (n = {count} rows).")
    return parts


def rank_correlation(pairs: Sequence[Pair]) -> tuple[float, int] | None:
    """Return Spearman's rank correlation of the OOD average here and in the paper, and of how many.

    Equal averages share their rank. None for fewer than three rows, or where all averages of one
    side are equal and there is no order.
    """
    averages = [
        (cell.mean, printed)
        for row, ours in pairs
        if ours is not None
        and (cell := ours.cells[OOD_COLUMN]) is not None
        and (printed := row.percent[OOD_COLUMN]) is not None
    ]
    if len(averages) < MIN_RANKED:
        return None
    here, paper = zip(*averages, strict=True)
    if len(set(here)) == 1 or len(set(paper)) == 1:
        return None
    return float(spearmanr(here, paper).statistic), len(averages)


def table_lines(pairs: Sequence[Pair], join: str = f" {PLUS_MINUS} ", pad: str = " ") -> list[Line]:
    """Return the table as text: two lines a recipe, ours first, or the paper's alone.

    `pad` stands before a single digit, so that the points of all numbers are below each other.
    """

    def aligned(text: str) -> str:
        return f"{pad}{text}" if text.index(".") == 1 else text

    lines = []
    for row, ours in pairs:
        if ours is not None:
            cells = (
                ABSENT if cell is None else aligned(cell.text(join=join)) for cell in ours.cells
            )
            lines.append(Line(row.recipe, HERE, tuple(cells)))
        printed = (ABSENT if value is None else aligned(f"{value:.1f}") for value in row.percent)
        lines.append(Line(row.recipe if ours is None else "", PAPER, tuple(printed)))
    return lines


def rich_table(table: Beside) -> RichTable:
    """Return the table for a console of 100 columns, in ASCII."""
    found = tables.rich_table(table.caption, "", *COLUMNS, justify="left")
    for recipe, source, texts in table_lines(table.pairs, join="+-"):
        cells = [Text(text, style="bold" if source == HERE else "") for text in texts]
        found.add_row(tables.rich_name(recipe), Text(source), *cells)
    return found


def markdown(table: Beside) -> str:
    """Return the table as Markdown."""
    lines = [
        tables.markdown_line("recipe", "", *COLUMNS),
        tables.markdown_line(*["---"] * (2 + len(COLUMNS))),
    ]
    for recipe, source, cells in table_lines(table.pairs, pad=""):
        lines.append(tables.markdown_line(recipe, source, *cells))
    return "\n".join([*lines, "", tables.markdown_escape(table.caption)]) + "\n"


def csv_text(table: Beside) -> str:
    """Return the table as CSV, one line a recipe; what is absent is empty."""
    numbers = [text for name in COLUMNS for text in (name, f"{name} sd", f"{name} paper")]
    lines = [["recipe", "tables", "n", *numbers, "note"]]
    for row, ours in table.pairs:
        cells = ours.cells if ours is not None else (None,) * len(COLUMNS)
        values: list[str] = []
        for cell, printed in zip(cells, row.percent, strict=True):
            values += [*tables.csv_numbers(cell), "" if printed is None else f"{printed:.1f}"]
        n = "0" if ours is None else str(len(ours.seeds))
        lines.append([row.recipe, " ".join(map(str, row.tables)), n, *values, row.note])
    return tables.csv_lines(lines)
