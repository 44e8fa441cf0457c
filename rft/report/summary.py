"""The sentences at the top of a report: what was compared, conclusions and warnings. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rft.report import alarms, details, tables
from rft.report.measures import IMAGES, Measures, significant
from rft.report.read import TRANSDUCTIVE, Run
from rft.report.tables import (
    OOD_COLUMN,
    Row,
    columns,
    heading,
    is_average,
    pair_of,
    target,
)
from rft.runs import filenames
from rft.sets import OOD_SETS, TEST_SETS

NAMED = 8  # most rows or sets that a sentence lists

# blocks of the paper's tables without the paper's own systems (`tables.order`)
BASELINE_BLOCKS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Summary:
    """Sentences for the top of the page."""

    compared: str
    conclusions: list[str]
    warnings: list[str]
    alarms: list[str]
    """The first of the warnings: results that should not be used before they are understood."""


def summarise(
    runs: Sequence[Run],
    rows: Sequence[Row],
    shown: Sequence[Row],
    measures: Measures,
    chosen: Row | None = None,
    photos: alarms.Photos = MappingProxyType({}),
    *,
    by_held_out: bool = False,
) -> Summary:
    """Write the sentences; `shown` has one row per WiSE family.

    `chosen` is the row of the exported model, if there is one, and `by_held_out` whether held-out
    images chose it; for `photos` see `alarms.of_report`.
    """
    found = alarms.of_report(runs, shown, measures, chosen, photos)
    return Summary(
        _compared(runs, rows),
        [
            *_choice(chosen, shown, measures, by_held_out=by_held_out),
            *_conclusions(shown, measures),
        ],
        [*found, *_warnings(runs, rows, measures)],
        found,
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _compared(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    seeds = sorted({len(row.seeds) for row in rows})
    of_each = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    alone = " (the variation between trainings is not known)" if _is_single(rows) else ""
    images = {name: count.total for run in runs for name, count in run.counts.items()}
    sets = [f"{heading(name)} ({images[name]:,})" for name in columns(rows) if name in images]
    clips = sorted({run.clip for run in runs} - {""})
    of_clips = f", CLIP {_listed(clips)}" if clips else ""
    return (
        f"{_plural(len(rows), 'system')} from {_plural(len(runs), 'run')}, {of_each} "
        f"seed{'' if seeds == [1] else 's'} of each{alone}{of_clips}. "
        f"Test images: {_listed(sets) or 'none'}."
    )


def _is_single(rows: Sequence[Row]) -> bool:
    return all(len(row.seeds) == 1 for row in rows)


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _choice(
    chosen: Row | None, rows: Sequence[Row], measures: Measures, *, by_held_out: bool
) -> Iterator[str]:
    """State the accuracy of the exported model, and its difference to the untrained one."""
    column = target(rows)
    if chosen is None or column not in chosen.cells:
        return
    found = details.interval(measures, chosen.name, column)
    images = "" if found is None else f" (95% interval {details.interval_percent(found)})"
    accuracy = f"{chosen.name}, {chosen.cells[column].text()}%{images} on {heading(column)}"
    if by_held_out:
        yield f"Chosen without any test image: {accuracy}."
    else:
        yield f"Exported: {accuracy} (named with --chosen)."
    for row in rows:
        if row.recipe == tables.UNTRAINED and row != chosen and column in row.cells:
            yield f"{chosen.name}: {_against(chosen, row, '', column, measures)}"


def _conclusions(rows: Sequence[Row], measures: Measures) -> Iterator[str]:
    """State the best row, and its differences to the baselines."""
    column = target(rows)
    there = [row for row in rows if column in row.cells]
    if len(there) < 2:
        return
    # ties go to the first in the order of the table
    best = max(there, key=lambda row: row.cells[column].mean)
    found = details.interval(measures, best.name, column)
    images = "" if found is None else f" (95% interval {details.interval_percent(found)})"
    yield (
        f"Highest {heading(column)}: {best.name}, {best.cells[column].text()}%{images}. As the "
        f"maximum of {len(there)} rows on the same test images, it is slightly too optimistic."
    )
    baselines = [row for row in there if tables.order(row.recipe)[0] in BASELINE_BLOCKS]
    vanilla = [row for row in tables.baselines(rows) if row.recipe == "vanilla"]
    others = sorted(
        (row for row in baselines if row != best), key=lambda row: -row.cells[column].mean
    )
    named = {row.name: "" for row in vanilla if row != best}
    if others:
        named[others[0].name] = ", the best baseline" if len(others) > 1 else ""
    by_name = {row.name: row for row in rows}
    for name, role in named.items():
        yield f"{best.name}: {_against(best, by_name[name], role, column, measures)}"


def _against(best: Row, other: Row, role: str, column: str, measures: Measures) -> str:
    pair = pair_of(measures, best.name, other.name, column)
    points = best.cells[column].mean - other.cells[column].mean
    if pair is None:
        names = [(row.name, name) for row in (best, other) for name in tables.sets_of(column)]
        there = all(name in measures.sets for name in names)
        why = "declared scores have no intervals" if there else "there are no predictions"
        return (
            f"{points:+z.1f} points over {other.name}{role}; significance unknown, because {why}."
        )
    _, (low, high), p = pair.difference
    judged = "significant" if significant(pair) else "not significant"
    if low > 0 and judged != "significant":
        judged += ", because not every seed's own difference has this sign"
    return (
        f"{points:+z.1f} points over {other.name}{role} (95% interval {100 * low:+z.1f} to "
        f"{100 * high:+z.1f}, p {'<' if p < 0.001 else '='} {max(p, 0.001):.2g}): {judged}."
    )


def _warnings(runs: Sequence[Run], rows: Sequence[Row], measures: Measures) -> Iterator[str]:
    if any(run.config.scale == "miniature" for run in runs):
        yield (
            "Miniature world: a tiny CLIP on procedural images. Columns are stand-ins named after "
            "the benchmarks, and their numbers do not apply to ImageNet."
        )
    single = [row.name for row in rows if len(row.seeds) == 1 and row.recipe != "zero-shot"]
    if single and not _is_single(rows):
        which = f"{_listed(single)}:" if len(single) <= NAMED else f"{len(single)} systems have"
        yield f"{which} one seed: the variation between trainings is not known."
    if marked := [row.name for row in rows if row.recipe.endswith(TRANSDUCTIVE)]:
        yield (
            f"{_listed(marked)}: predictions depend on the other test images; state this in any "
            "comparison with systems that see one image at a time."
        )
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        of = [f"{run.row} (seed {run.seed})" for run in runs if note in run.notes]
        yield f"{_listed(of)}: {note}."
    yield from _missing_sets(rows)
    for name, other in sorted(tables.copies(runs).items()):
        yield (
            f"{heading(name)} is the same packed data as {heading(other)}; the average over all "
            "declared OOD sets counts it once."
        )
    if large := [heading(name) for name in measures.too_large]:
        yield (
            f"{_listed(large)}: more than {IMAGES:,} images, so there are no intervals, p-values "
            "or other numbers computed from predictions."
        )
    if drawn_together := [heading(name) for name in measures.versions]:
        yield (
            f"{_listed(drawn_together)}: for intervals, images with the same name in several "
            "domains are drawn together, as versions of one image."
        )
    if measures.without:
        of = [f"{run.row} (seed {run.seed})" for run in measures.without]
        which = "All runs" if len(of) == len(runs) else _listed(of)
        yield (
            f"{which}: no predictions in the run folder, only the counts in "
            f"{filenames.RESULTS}. Intervals, p-values, top-5, accuracies per class and "
            "calibration are missing for them; evaluate them again."
        )
    if precisions := tables.precisions(rows).strip():
        yield precisions


def _missing_sets(rows: Sequence[Row]) -> Iterator[str]:
    counted = set(columns(rows))
    # a report on own sets alone is not an incomplete benchmark
    if counted & set(TEST_SETS):
        if absent := [heading(name) for name in TEST_SETS if name not in counted]:
            yield f"Not evaluated: {', '.join(absent)}."
        if OOD_COLUMN not in counted and counted & set(OOD_SETS):
            yield f"No OOD average: no system has all {len(OOD_SETS)} of its sets."
    for column in filter(is_average, columns(rows)):
        if lacking := [row.name for row in rows if column not in row.cells]:
            yield f"No {heading(column)} because a set is missing: {_listed(lacking)}."
