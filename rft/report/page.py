"""Writes the report's files: index.html with everything, and files with the single parts.

Every file is replaced atomically; index.html is written last.
"""

import io
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console

from rft import recipes
from rft.config import MAX_PIXELS
from rft.paper import FIGURE_7
from rft.report import (
    colors,
    details,
    flips,
    gallery,
    interactive,
    measures,
    mistakes,
    plots,
    svg,
    tables,
)
from rft.report import comparison as beside
from rft.report.alarms import Photos
from rft.report.comparison import Beside
from rft.report.flips import Flips, find_flips
from rft.report.measures import Measures
from rft.report.mistakes import Pictures, RowMistakes
from rft.report.read import TRANSDUCTIVE, Run, load_runs, other_classes, shown_settings
from rft.report.summary import Summary, summarise
from rft.report.tables import OOD_COLUMN, Row, TextTable, heading, is_average
from rft.report.templates import data_url, environment
from rft.report.testbed import read_line
from rft.report.thumbnails import read_thumbnails
from rft.runs import choice
from rft.runs.gallery_file import read as read_gallery
from rft.runs.records import ORIGINS, Provenance
from rft.shards import photo_names
from rft.shards.folder import MANIFEST
from rft.shards.guard import shared_keys
from rft.statistics.robustness import Line
from rft.storage import files
from rft.text import plain

WIDTH = 80  # columns of text outside a terminal
UNKNOWN = "not recorded"
SVG_BYTES = 1_500_000  # limit of a figure in the page; a larger one is shown as PNG
PRINTED = 24  # most rows of a table of every row against every other that is printed on paper
FIGURES = ("scatter", "wise", "curves", "calibration")
PICTURES = (
    *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")),
    "gallery.png",
)


class Picture(NamedTuple):
    """A picture in its file formats; a gallery has no SVG."""

    png: bytes
    svg: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The complete content of a report."""

    runs: list[Run]
    rows: list[Row]
    """Every row."""
    shown: list[Row]
    """All rows but the WiSE models that appear only in files and Fig. 7."""
    measures: Measures
    summary: Summary
    tables: list[TextTable]
    """Results, and differences if there are any, of the rows that are shown."""
    beside: Beside | None
    pictures: dict[str, Picture]
    """Name -> picture, of those for which the runs have data."""
    frames: dict[int, bytes]
    """Step -> WebP of the gallery's images at that step, ascending."""
    gallery_run: Run | None
    chosen: Row | None = None
    """Row of the exported model."""
    by_held_out: bool = False
    """Whether held-out images chose it."""

    @property
    def mark(self) -> str:
        """Word beside the name of the exported model."""
        return "chosen" if self.by_held_out else "exported"

    @property
    def hidden(self) -> int:
        """Number of WiSE models that appear only in files and Fig. 7."""
        return len(self.rows) - len(self.shown)

    @property
    def reference(self) -> Row:
        """The row that others are compared with: the first baseline, or else the first row."""
        return next(iter(tables.baselines(self.shown)), self.shown[0])

    def text(self) -> str:
        """Format the tables as plain text."""
        stream = io.StringIO()
        # these arguments override FORCE_COLOR, TTY_COMPATIBLE and COLUMNS
        show(self, Console(file=stream, width=WIDTH, color_system=None, force_terminal=False))
        # rich pads each line to the table's width
        return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def write_report(
    runs: Sequence[Path],
    out: Path,
    testbed: Path | None = None,
    data: str = "",
    max_pixels: float = MAX_PIXELS,
    chosen: Path | None = None,
) -> Report:
    """Read run folders and write the report's files to the folder `out`.

    Files of an earlier report there are replaced or removed. With a data root, the page shows
    images that were gained and lost, each of at most `max_pixels` million pixels. For `chosen` see
    `compose`.

    Raises:
        ValueError: if the runs cannot be compared in one table, a file is malformed, or a set below
            `data` is not the one that was evaluated.
    """
    files.require_local(out, "--out")
    line = None if testbed is None else read_line(testbed)
    loaded = load_runs(runs)
    seen = seen_photos(loaded, data) if data else {}
    report = compose(loaded, line, chosen=chosen, photos=seen)
    images = flips_of(report, data, max_pixels) if data else None
    wrong = mistakes_of(report, data, max_pixels) if data else None
    names = photo_names.read(files.join(data, mistakes_set(report))) if data else {}
    page = render(report, images, wrong, names)
    # index.html is last: when it appears, all files beside it belong to this report
    for name, content in {**documents(report), "index.html": page.encode()}.items():
        if content is not None:
            files.write_bytes(str(out / name), content)
        else:
            (out / name).unlink(missing_ok=True)
    return report


def seen_photos(runs: Sequence[Run], data: str) -> Photos:
    """Name the photos of each test set that are in a training set too, by their files."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    trained_on = sorted({run.config.train_set for run in runs} - {""})
    for name in dict.fromkeys(name for run in runs for name in run.counts if run.counts[name].seen):
        if paths := photo_names.read(files.join(data, name)):
            same, other = shared_keys(data, trained_on, name)
            found[name] = (
                sorted(paths[key] for key in same if key in paths),
                sorted(paths[key] for key in other if key in paths),
            )
    return found


def documents(report: Report) -> dict[str, bytes | None]:
    """Make all files but the page, as file name -> content; None for files to remove."""
    measured, paper = report.measures, report.beside
    found: dict[str, bytes | None] = {}
    for name in PICTURES:
        stem, _, kind = name.partition(".")
        drawn = report.pictures.get(stem)
        found[name] = None
        if drawn is not None:
            found[name] = drawn.png if kind == "png" else svg.document(drawn.svg)
    texts = {
        "table.md": tables.markdown(report.tables),
        "table.csv": tables.csv_text(report.rows),
        "table.tex": details.tex(report.shown),
        "paper.md": None if paper is None else tables.markdown([paper.text]),
        "paper.csv": None if paper is None else beside.csv_text(paper),
        "statistics.csv": details.statistics_csv(report.rows, measured) if measured.sets else None,
        "per_class.csv": details.per_class_csv(report.rows, measured) if measured.sets else None,
        "differences.csv": details.differences_csv(report.rows, measured)
        if measured.pairs
        else None,
    }
    return found | {name: None if text is None else text.encode() for name, text in texts.items()}


def compose(
    runs: list[Run],
    line: Line | None = None,
    *,
    draw: bool = True,
    chosen: Path | None = None,
    photos: Photos = MappingProxyType({}),
) -> Report:
    """Make tables, statistics and, if `draw`, pictures of runs.

    `chosen` is the run folder of the exported model, or the record of a choice by held-out images
    (`rft choose --save`).

    Raises:
        ValueError: if a file of predictions or a gallery is malformed, or `chosen` does not name
            one of the runs.
    """
    rows = tables.result_rows(runs, line)
    by_held_out = chosen is not None and chosen.is_file()
    chosen_row = None if chosen is None else _row_of(chosen, runs, rows)
    names = tables.shown_recipes(row.recipe for row in rows)
    shown = [row for row in rows if row.recipe in names]
    counted = [name for name in tables.columns(rows) if any(name in run.counts for run in runs)]
    averages = {name: tables.sets_of(name) for name in tables.columns(rows) if is_average(name)}
    measured = measures.measure(tables.by_row(runs), counted, tables.of_images(averages, runs))
    differences = tables.difference_rows(runs, shown, measured)
    example = next((run for run in runs if run.gallery_path.is_file()), None)
    pictures, frames = {}, {}
    if draw:
        with plots.explained():
            pictures = _pictures(runs, rows, shown, measured)
            if example is not None:
                found = read_gallery(example.gallery_path)
                pictures["gallery"] = Picture(gallery.picture(found))
                frames = gallery.frames(found)
    return Report(
        runs=runs,
        rows=rows,
        shown=shown,
        measures=measured,
        summary=summarise(runs, rows, shown, measured, chosen_row, photos, by_held_out=by_held_out),
        tables=tables.text_tables(shown, differences, len(rows) - len(shown)),
        beside=beside.beside(runs, rows),
        pictures=pictures,
        frames=frames,
        gallery_run=example,
        chosen=chosen_row,
        by_held_out=by_held_out,
    )


def _row_of(chosen: Path, runs: Sequence[Run], rows: Sequence[Row]) -> Row:
    """Find the row of a run folder, or of the run that a choice names.

    Raises:
        ValueError: if it is not one of the runs, or no longer has the weights that were chosen.
    """
    made = choice.read(chosen) if chosen.is_file() else None
    path = Path(made.chosen) if made else chosen
    there = [one for one in runs if Path(one.path).resolve() == path.resolve()]
    if made is not None:
        # by weights, because the folders may have been moved since; copies have equal weights
        sha256 = {one.sha256 for one in made.candidates if one.path == made.chosen}
        there = [one for one in [*there, *runs] if one.results.checkpoint_sha256 in sha256]
    if not there:
        raise ValueError(
            f"--chosen {chosen} is not among the runs of the report"
            if made is None
            else f"--chosen {chosen} names {path}, whose weights no run of the report has; report "
            "on that run too, or rerun rft choose"
        )
    return next(row for row in rows if row.name == there[0].row)


def _pictures(
    runs: Sequence[Run], rows: Sequence[Row], shown: Sequence[Row], measured: Measures
) -> dict[str, Picture]:
    drawn: dict[str, Figure | None] = {
        "scatter": plots.scatter(rows),
        "wise": plots.wise_picture(rows),
        "curves": plots.curves(runs, rows),
        "calibration": plots.calibration_picture(shown, details.diagrams(shown, measured)),
    }
    assert tuple(drawn) == FIGURES
    return {
        name: Picture(plots.png(figure), svg.svg(figure, name))
        for name, figure in drawn.items()
        if figure is not None
    }


def show(report: Report, console: Console) -> None:
    """Print the tables of the runs, and a pointer to the paper's numbers."""
    if any(run.config.scale == "miniature" for run in report.runs):
        console.print("Miniature world: columns are stand-ins named after the real benchmarks.")
    if caveat := other_classes(report.runs):
        console.print(caveat)
    for table in report.tables:
        console.print(tables.console_table(table))
        console.print()
    if report.beside is not None:
        console.print("index.html and paper.md compare these numbers with the paper's.")


def flips_of(report: Report, data: str, max_pixels: float) -> Flips:
    """Find the images behind the classes that the page lists, in the sets of a data root."""
    targets = details.targets(report.shown)
    return find_flips(
        tables.by_row(report.runs),
        report.measures,
        report.reference.name,
        class_changes(report, targets),
        targets,
        data,
        max_pixels,
    )


def mistakes_set(report: Report) -> str:
    """Choose the set whose mistakes are shown: the first set of the main columns."""
    name = details.targets(report.shown)[0]
    return next(one for one in tables.sets_of(name))


def mistakes_of(report: Report, data: str, max_pixels: float) -> Pictures:
    """Make thumbnails of the most confident mistakes, from the set of a data root."""
    name = mistakes_set(report)
    found = report.measures.sets
    wanted = {
        (name, one.sample): one.key
        for row in _chosen_first(report)[: mistakes.ROWS]
        if (row.name, name) in found
        for one in found[row.name, name].mistakes.confident
    }
    # a missing set is reported with the gained and lost images (rft.report.flips)
    if not wanted or not files.exists(files.join(data, name, MANIFEST)):
        return Pictures()
    count = next(run.counts[name] for run in report.runs if name in run.counts)
    pictures, _ = read_thumbnails(data, wanted, {name: count}, max_pixels)
    return Pictures.of({sample: picture for (_, sample), picture in pictures.items()})


def render(
    report: Report,
    images: Flips | None = None,
    wrong: Pictures | None = None,
    names: Mapping[str, str] | None = None,
) -> str:
    """Render index.html; all text from files is escaped.

    `names` maps the keys of own photos to their paths.
    """
    made = environment()
    made.filters |= {"brief": mistakes.brief, "settings": shown_settings, "heading": heading}
    shown, measured, reference = report.shown, report.measures, report.reference
    targets = details.targets(shown)
    grids = _named(targets, lambda name: details.statistics_grid(shown, measured, name))
    return made.get_template("page.html").render(
        report=report,
        columns=tables.columns(shown),
        ids={row.name: row.id for row in report.rows},
        last=OOD_COLUMN,
        benchmarks=tables.of_benchmarks(shown),
        meanings=meanings(shown),
        absent=tables.ABSENT,
        pictures=dict.fromkeys((*FIGURES, "gallery"))
        | {name: _shown(picture) for name, picture in report.pictures.items()},
        frames=[
            (f"step {step}", data_url("webp", content)) for step, content in report.frames.items()
        ],
        held_out=any(line.held_out_total for run in report.runs for line in run.metrics),
        figure_7=figure_7_names(report.rows),
        averages=any(map(is_average, targets)),
        grids=grids,
        scaled=any("scaled" in title for _, made in grids for title in made.header),
        matrices=_named(targets, lambda name: details.matrix(shown, measured, name)),
        flips=details.flips_grid(shown, measured, reference),
        changes=class_changes(report, targets),
        images=images,
        per_class=flips.PER_CLASS,
        mistakes=rows_mistakes(report),
        names=names or {},
        mistakes_heading=heading(mistakes_set(report)),
        mistaken=measured.classes.get(mistakes_set(report)),
        wrong=wrong,
        most=details.CLASSES,
        points=plots.POINTS,
        provenance=provenance_lines(report.runs),
        commands={run.path: command(run) for run in report.runs},
        runs=[run for group in tables.by_row(report.runs).values() for run in group],
        grounds=colors,
        data=interactive.page_data(report.rows, shown, measured),
        script=interactive.SCRIPT,
        script_hash=interactive.source_hash(interactive.SCRIPT),
        printed=PRINTED,
    )


def rows_mistakes(report: Report) -> list[RowMistakes]:
    """Collect the mistakes of rows that the page shows."""
    measured, name = report.measures, mistakes_set(report)
    classes = measured.classes.get(name)
    if classes is None:
        return []
    return mistakes.of_rows(_chosen_first(report), measured.sets, classes, name)


def _chosen_first(report: Report) -> list[Row]:
    """Sort the rows that are shown, the chosen one first."""
    return sorted(report.shown, key=lambda row: row != report.chosen)


def meanings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """List (row, description) of the rows whose recipe is one of rft's."""
    found = []
    for row in rows:
        wise = tables.wise_model(row.recipe)
        name = row.recipe.removesuffix(TRANSDUCTIVE) if wise is None else wise.family
        known = recipes.MERGED.get(name) or recipes.TRAINED.get(name) or recipes.ENSEMBLES.get(name)
        if known is not None:
            found.append((row.name, known.about))
    return found


def _named(targets: Sequence[str], make: Any) -> list[tuple[str, Any]]:
    """List (heading, result of `make`) of each column whose result is not empty."""
    return [(heading(name), made) for name in targets if (made := make(name))]


def class_changes(report: Report, targets: Sequence[str]) -> list[tuple[Row, list[Any]]]:
    """List (row, (heading, gains, losses) of each column) against the reference row."""
    found = []
    for row in report.shown[: measures.COMPARED]:
        lists = [
            (heading(name), *details.class_changes(
                report.measures, row.name, report.reference.name, name
            ))
            for name in targets
        ]  # fmt: skip
        if row != report.reference and any(gains or losses for _, gains, losses in lists):
            found.append((row, lists))
    return found


MODULES = {"merge": "rft.merge", "import": "rft.convert", "ensemble": "rft.ensemble"}


def command(run: Run) -> str:
    """Rebuild the command that started a run, ready to paste; empty if it was not recorded."""
    words = list(run.provenance.command)
    # python -m records the module as __main__.py
    if words[:1] == ["__main__.py"]:
        config = run.config
        made = [by for name, by in ORIGINS.items() if getattr(config, name) is not None]
        words[:1] = ["python", "-m", MODULES[made[0]] if made else "rft.train"]
    # invisible characters are escaped after quoting; a line with them is for reading only
    return plain(shlex.join(words))


def figure_7_names(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """List (our name, the paper's name) of each system of Fig. 7 among the rows, if they differ."""
    families = {wise.family for row in rows if (wise := tables.wise_model(row.recipe)) is not None}
    # FIGURE_7 names families: wise-ft, not wise-ft-0.5
    names = families | {row.recipe for row in rows}
    return [
        (name, label) for name, label in FIGURE_7.items() if name in names and name != label.lower()
    ]


def _shown(picture: Picture) -> dict[str, Any]:
    """Prepare a picture for the page: its SVG if that is small, or else its PNG at half its pixels.

    The size of a PNG is read from its header.
    """
    if picture.svg and len(picture.svg) <= SVG_BYTES:
        # the template marks it as safe, because the SVG writer escapes its texts (rft.report.svg)
        return {"svg": svg.themed(picture.svg, plots.NEUTRAL)}
    # the first chunk of a PNG is its header; width and height are at bytes 16 and 20
    width, height = (int.from_bytes(picture.png[at : at + 4], "big") for at in (16, 20))
    source = data_url("png", picture.png)
    return {"svg": "", "source": source, "width": width // 2, "height": height // 2}


def provenance_lines(runs: Sequence[Run]) -> list[str]:
    """List code and packages of the runs: one line, or one per difference with its count."""
    lines = Counter(_provenance(run.provenance) for run in runs)
    if len(lines) == 1:
        return list(lines)
    return [f"{line} ({count} of {len(runs)} runs)" for line, count in lines.items()]


def _provenance(made: Provenance) -> str:
    if made == Provenance():
        return f"code and packages {UNKNOWN}"
    parts = [
        f"rft {made.rft or UNKNOWN}",
        f"git {made.git or UNKNOWN}",
        f"python {made.python or UNKNOWN}",
        *(f"{name} {version}" for name, version in made.packages.items()),
        made.machine,
    ]
    # the template escapes HTML, not control characters
    return plain(", ".join(part for part in parts if part))
