"""Our rows and the paper's, one above the other, and whether they come in the same order. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable
from rich.text import Text
from scipy.stats import spearmanr

from rft.paper import Published, all_published, model_name, published
from rft.report import tables
from rft.report.read import Run
from rft.report.tables import ABSENT, COLUMNS, OOD_COLUMN, PLUS_MINUS, Row

MIN_RANKED = 3  # the order of fewer rows says nothing
HERE, PAPER = "here", "paper"


@dataclass(frozen=True)
class Pair:
    """A row of the paper and ours, if the recipe was run."""

    published: Published
    ours: Row | None


@dataclass(frozen=True)
class Line:
    """One line of the table as text."""

    recipe: str
    """Empty on the second line of a pair."""
    source: str
    cells: tuple[str, ...]
    ours: bool


@dataclass(frozen=True)
class Beside:
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
    parts = (
        _what(model, clips, pairs),
        _warning(scales),
        _notes(pairs),
        _ranks(pairs),
        tables.precisions(rows).strip(),
    )
    return Beside(pairs, " ".join(part for part in parts if part))


def _what(model: str, clips: Sequence[str], pairs: Sequence[Pair]) -> str:
    numbers = sorted({number for pair in pairs for number in pair.published.tables})
    where = f"Table{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}"
    named = f", here {', '.join(clips)}" if clips else ""
    return (
        f"Top-1 accuracy in %, here and in the paper's {where} (CLIP {model}{named}). The paper's "
        "are means over three seeds, without a spread; rows that it has alone were not run here."
    )


def _warning(scales: set[str]) -> str:
    """Return what must not be read out of runs that are not at the paper's scale."""
    if "miniature" in scales:
        return (
            "Ours are the miniature world's: compare their order with the paper's, "
            "never their levels."
        )
    if scales - {"paper"}:
        return "Ours are of another training set: compare their order with the paper's, not levels."
    return ""


def _notes(pairs: Sequence[Pair]) -> str:
    """Return what some of the paper's rows are."""
    rows = [pair.published for pair in pairs if pair.published.note]
    return f"In the paper, {', and '.join(f'{row.recipe} is {row.note}' for row in rows)}."


def rank_correlation(pairs: Sequence[Pair]) -> tuple[float, int] | None:
    """Return Spearman's rank correlation of the OOD average here and in the paper, and of how many.

    Equal averages share their rank. None for fewer than three rows, or where all averages of one
    side are equal and there is no order.
    """
    averages = [
        (cell.mean, printed)
        for pair in pairs
        if pair.ours is not None
        and (cell := pair.ours.cells[OOD_COLUMN]) is not None
        and (printed := pair.published.percent[OOD_COLUMN]) is not None
    ]
    if len(averages) < MIN_RANKED:
        return None
    here, paper = zip(*averages, strict=True)
    if len(set(here)) == 1 or len(set(paper)) == 1:
        return None
    return float(spearmanr(here, paper).statistic), len(averages)


def _ranks(pairs: Sequence[Pair]) -> str:
    found = rank_correlation(pairs)
    if found is None:
        return ""
    rho, count = found
    where = "of OOD avg, here and in the paper"
    return f"Spearman's rank correlation {where}: {rho:.2f} (n = {count} rows)."


def table_lines(pairs: Sequence[Pair], join: str = f" {PLUS_MINUS} ") -> list[Line]:
    """Return the table as text: two lines a recipe, ours first, or the paper's alone."""
    lines = []
    for pair in pairs:
        row = pair.published
        if pair.ours is not None:
            cells = tuple(
                ABSENT if cell is None else _aligned(cell.text(join=join))
                for cell in pair.ours.cells
            )
            lines.append(Line(row.recipe, HERE, cells, ours=True))
        printed = tuple(
            ABSENT if value is None else _aligned(f"{value:.1f}") for value in row.percent
        )
        name = row.recipe if pair.ours is None else ""
        lines.append(Line(name, PAPER, printed, ours=False))
    return lines


def _aligned(text: str) -> str:
    """Return a number so that its point is below that of one with two digits before it."""
    return f" {text}" if text.index(".") == 1 else text


def rich_table(table: Beside) -> RichTable:
    """Return the table for a console of 100 columns, in ASCII."""
    found = tables.rich_table(table.caption, "", *COLUMNS, justify="left")
    for line in table_lines(table.pairs, join="+-"):
        cells = [Text(text, style="bold" if line.ours else "") for text in line.cells]
        found.add_row(tables.rich_name(line.recipe), Text(line.source), *cells)
    return found


def markdown(table: Beside) -> str:
    """Return the table as Markdown."""
    lines = [
        tables.markdown_line("recipe", "", *COLUMNS),
        tables.markdown_line(*["---"] * (2 + len(COLUMNS))),
    ]
    for line in table_lines(table.pairs):
        cells = [text.strip() for text in line.cells]
        lines.append(tables.markdown_line(line.recipe, line.source, *cells))
    return "\n".join([*lines, "", tables.markdown_escape(table.caption)]) + "\n"


def csv_text(table: Beside) -> str:
    """Return the table as CSV, one line a recipe; what is absent is empty."""
    numbers = [text for name in COLUMNS for text in (name, f"{name} sd", f"{name} paper")]
    lines = [["recipe", "tables", "n", *numbers, "note"]]
    for pair in table.pairs:
        row, ours = pair.published, pair.ours
        cells = ours.cells if ours is not None else (None,) * len(COLUMNS)
        values: list[str] = []
        for cell, printed in zip(cells, row.percent, strict=True):
            values += [*tables.csv_numbers(cell), "" if printed is None else f"{printed:.1f}"]
        n = "0" if ours is None else str(len(ours.seeds))
        lines.append([row.recipe, " ".join(map(str, row.tables)), n, *values, row.note])
    return tables.csv_lines(lines)
