"""Our rows above the paper's, and the rank correlation of the two. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import spearmanr

from rft.paper import Published, all_published, model_name, published
from rft.report import tables
from rft.report.read import Run, other_classes
from rft.report.tables import (
    ABSENT,
    COLUMNS,
    FIGURE_SPACE,
    OOD_COLUMN,
    Row,
    TextLine,
    TextTable,
    cell_text,
    heading,
)

MIN_RANKED = 3  # the order of fewer rows is meaningless
HERE, PAPER = "here", "paper"


class Pair(NamedTuple):
    """A row of the paper and ours, if the recipe was run."""

    published: Published
    ours: Row | None


class Beside(NamedTuple):
    """The comparison with the paper."""

    pairs: list[Pair]
    text: TextTable


def beside(runs: Sequence[Run], rows: Sequence[Row]) -> Beside | None:
    """Pair every row of Tables 1 and 3 for the runs' CLIP with ours.

    None if no recipe of the paper was evaluated on a set of the paper, or if the runs' CLIPs belong
    to different rows of Table 3. A merged model does not record its CLIP; the others do. The
    miniature's CLIP stands for both CLIPs of the paper. A recipe with several settings has a pair
    for each.
    """
    clips = sorted({run.clip for run in runs} - {""})
    models = {model_name(clip) for clip in clips} or {model_name("")}
    if len(models) > 1:
        return None
    (model,) = models
    scales = {run.config.scale for run in runs}
    # the name of an unfinished run differs from its recipe, so it pairs with no row of the paper
    ours: dict[str, list[Row]] = {}
    for row in rows:
        if row.cells.keys() & set(COLUMNS):
            ours.setdefault(row.recipe, []).append(row)
    theirs = all_published() if "miniature" in scales else published(model)
    pairs = [Pair(row, own) for row in theirs for own in ours.get(row.recipe, [None])]
    # ordered like the result table; in rft.paper, rows that only ViT-B/16 has come last
    pairs.sort(key=lambda pair: tables.order(pair.published.recipe))
    if all(pair.ours is None for pair in pairs):
        return None
    named = f"{model}, here {', '.join(clips)}" if clips else model
    parts = [*_caption(pairs, named, scales), other_classes(runs), tables.precisions(rows).strip()]
    caption = " ".join(part for part in parts if part)
    # left-aligned: cells with a spread are longer, and only the numbers before it line up
    text = TextTable(caption, ["", *map(heading, COLUMNS)], text_lines(pairs), justify="left")
    return Beside(pairs, text)


def _caption(pairs: Sequence[Pair], model: str, scales: set[str]) -> list[str]:
    """Explain the numbers, and warn against invalid comparisons."""
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
    elif scales - {"paper"}:  # "small": own photos
        parts.append(
            "Ours are of another training set: compare their order with the paper's, not levels."
        )
    # every model of the paper has rows with a note, so the sentence is never empty
    notes = dict.fromkeys(f"{row.recipe} is {row.note}" for row, _ in pairs if row.note)
    parts.append(f"In the paper, {', and '.join(notes)}.")
    if (found := rank_correlation(pairs)) is not None:
        rho, count = found
        where = "of OOD avg, here and in the paper"
        parts.append(f"Spearman's rank correlation {where}: {rho:.2f} (n = {count} rows).")
    return parts


def rank_correlation(pairs: Sequence[Pair]) -> tuple[float, int] | None:
    """Compute Spearman's rank correlation of the OOD averages with the paper's, and count the rows.

    Equal averages share their rank. A recipe with several settings is left out, because the paper
    has one. None for fewer than three rows, or if all averages of one side are equal.
    """
    averages = [
        (ours.cells[OOD_COLUMN].mean, printed)
        for row, ours in pairs
        if ours is not None
        and not ours.variant
        and OOD_COLUMN in ours.cells
        and (printed := row.percent[COLUMNS.index(OOD_COLUMN)]) is not None
    ]
    if len(averages) < MIN_RANKED:
        return None
    here, paper = zip(*averages, strict=True)
    # scipy would return NaN, with a warning, if one side is constant
    if len(set(here)) == 1 or len(set(paper)) == 1:
        return None
    return float(spearmanr(here, paper).statistic), len(averages)


def text_lines(pairs: Sequence[Pair]) -> list[TextLine]:
    """Format the lines of the table: ours and then the paper's, or the paper's alone.

    Ours are emphasised. A row's name is on the first of its lines only.
    """
    lines = []
    for row, ours in pairs:
        if ours is not None:
            texts = [cell_text(ours, name) for name in COLUMNS]
            lines.append((ours.name, HERE, [(_aligned(text), True) for text in texts]))
        texts = [ABSENT if value is None else f"{value:.1f}" for value in row.percent]
        name = row.recipe if ours is None else ""
        lines.append((name, PAPER, [(_aligned(text), False) for text in texts]))
    return lines


def _aligned(number: str) -> str:
    """Pad a number with one digit before its point to the width of one with two."""
    # no number is negative: the first letter is a digit
    return FIGURE_SPACE + number if number.find(".") == 1 else number


def csv_text(table: Beside) -> str:
    """Format the table as CSV, one line per row; missing numbers are empty."""
    headings = map(heading, COLUMNS)
    numbers = [text for name in headings for text in (name, f"{name} sd", f"{name} paper")]
    lines = [["recipe", "tables", "n", *numbers, "note"]]
    for row, ours in table.pairs:
        cells = {} if ours is None else ours.cells
        # a missing number has two empty cells, mean and spread, so that columns line up
        values: list[str] = []
        for name, printed in zip(COLUMNS, row.percent, strict=True):
            own = tables.csv_numbers(cells.get(name))
            values += [*own, "" if printed is None else f"{printed:.1f}"]
        n = "0" if ours is None else str(len(ours.seeds))
        recipe = row.recipe if ours is None else ours.name
        lines.append([recipe, " ".join(map(str, row.tables)), n, *values, row.note])
    return tables.csv_lines(lines)
