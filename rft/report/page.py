"""The report's files: index.html with everything in it, and each part on its own.

Every file is replaced atomically; index.html is written last.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from rft.paper import FIGURE_7
from rft.report import comparison as beside
from rft.report import gallery, plots, tables
from rft.report.comparison import Beside
from rft.report.read import Run, load_runs, shown_settings
from rft.report.tables import COLUMNS, Row, TextTable
from rft.runs.gallery_file import read as read_gallery
from rft.runs.records import Provenance
from rft.storage import files
from rft.text import plain

WIDTH = 100  # columns of text that are not a terminal
UNKNOWN = "not recorded"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report says."""

    runs: list[Run]
    rows: list[Row]
    """Every recipe."""
    hidden: int
    """How many WiSE models only the CSV and Fig. 7 have."""
    tables: list[TextTable]
    """Results, and differences if there are any, of the recipes that are not hidden."""
    beside: Beside | None
    pictures: dict[str, bytes | None]
    """File name -> PNG, or None where the runs have nothing to draw."""
    gallery_run: Run | None

    @property
    def miniature(self) -> bool:
        """Whether a run is at the scale of the embedded miniature world."""
        return any(run.config.scale == "miniature" for run in self.runs)

    def text(self) -> str:
        """Return the tables as plain text."""
        stream = io.StringIO()
        # the same text whatever FORCE_COLOR, TTY_COMPATIBLE and COLUMNS are set to
        show(self, Console(file=stream, width=WIDTH, color_system=None, force_terminal=False))
        # rich pads each line to the table's width
        return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def write_report(runs: Sequence[Path], out: Path) -> Report:
    """Read run folders and write the report's files to the folder `out`.

    Files of an earlier report there are replaced or removed.

    Raises:
        ValueError: if the runs do not belong in one table, or one of them is malformed.
    """
    files.require_local(out, "--out")
    report = build(runs)
    paper = report.beside
    documents = {
        "table.md": tables.markdown(report.tables),
        "table.csv": tables.csv_text(report.rows),
        "paper.md": None if paper is None else tables.markdown([paper.text]),
        "paper.csv": None if paper is None else beside.csv_text(paper),
        "index.html": render(report),
    }
    texts = {name: None if text is None else text.encode() for name, text in documents.items()}
    # index.html is the last of the texts: when it appears, everything beside it is of this report
    for name, content in {**report.pictures, **texts}.items():
        if content is not None:
            files.write_bytes(str(out / name), content)
        else:
            (out / name).unlink(missing_ok=True)
    return report


def build(paths: Sequence[Path]) -> Report:
    """Read run folders and make the tables and pictures; see `write_report`."""
    runs = load_runs(paths)
    rows = tables.result_rows(runs)
    names = tables.shown_recipes(row.recipe for row in rows)
    shown = [row for row in rows if row.recipe in names]
    hidden = len(rows) - len(shown)
    differences = [row for row in tables.difference_rows(runs) if row.recipe in names]
    example = next((run for run in runs if run.gallery_path.is_file()), None)
    with plots.explained():
        pictures = {
            "scatter.png": plots.scatter(rows),
            "wise.png": plots.wise_picture(rows),
            "curves.png": plots.curves(runs),
            "gallery.png": gallery.picture(read_gallery(example.gallery_path)) if example else None,
        }
    return Report(
        runs=runs,
        rows=rows,
        hidden=hidden,
        tables=tables.text_tables(shown, differences, hidden),
        beside=beside.beside(runs, rows),
        pictures=pictures,
        gallery_run=example,
    )


def show(report: Report, console: Console) -> None:
    """Print the tables."""
    if report.miniature:
        console.print("Miniature world: columns are stand-ins named after the real benchmarks.")
    for table in [*report.tables, *([report.beside.text] if report.beside else [])]:
        console.print(tables.console_table(table))
        console.print()


def render(report: Report) -> str:
    """Return index.html; everything that comes from a file is escaped."""
    # StrictUndefined: a misspelt name in the template is an error, not an empty text
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "settings": shown_settings}
    return environment.get_template("page.html").render(
        report=report,
        columns=COLUMNS,
        absent=tables.ABSENT,
        pictures={
            name.removesuffix(".png"): None if png is None else _picture(png)
            for name, png in report.pictures.items()
        },
        held_out=any(line.held_out_total for run in report.runs for line in run.metrics),
        figure_7=figure_7_names(report.rows),
        provenance=provenance_lines(report.runs),
        runs=[run for group in tables.by_recipe(report.runs).values() for run in group],
    )


def figure_7_names(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (ours, the paper's) name of each system of Fig. 7 among the rows, if they differ."""
    families = {wise.family for row in rows if (wise := tables.wise_model(row.recipe)) is not None}
    # FIGURE_7 names families: wise-ft, not wise-ft-0.5
    names = families | {row.recipe for row in rows}
    return [
        (name, label) for name, label in FIGURE_7.items() if name in names and name != label.lower()
    ]


def _picture(png: bytes) -> dict[str, Any]:
    """Return an image for the page, at half its pixels. The size is in the PNG's header."""
    # the first chunk of a PNG is its header, whose data begin at byte 16
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    data = base64.b64encode(png).decode("ascii")
    return {"source": f"data:image/png;base64,{data}", "width": width // 2, "height": height // 2}


def provenance_lines(runs: Sequence[Run]) -> list[str]:
    """List code and packages of the runs: one line, or one for each difference with its count."""
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
