"""The report's files: index.html with everything in it, and each part on its own.

Every file appears whole or not at all; index.html is written last.
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table as RichTable

from rft import files
from rft.report import gallery, plots, tables
from rft.report.runs import Run, load_runs
from rft.report.tables import COLUMNS, DifferenceRow, Row

WIDTH = 100  # columns of text that are not a terminal
UNKNOWN = "not recorded"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report says, not yet written."""

    runs: list[Run]
    rows: list[Row]
    differences: list[DifferenceRow]
    pictures: dict[str, bytes | None]
    """File name -> PNG, or None where the runs have nothing to draw."""
    gallery_run: Run | None

    @property
    def miniature(self) -> bool:
        """Whether a run is at the scale of the embedded miniature world."""
        return any(run.config.get("scale") == "miniature" for run in self.runs)

    def text_tables(self) -> list[RichTable]:
        """Return the tables for a console."""
        return tables.rich_tables(self.rows, self.differences)

    def text(self) -> str:
        """Return the tables as plain text."""
        stream = io.StringIO()
        show(self, Console(file=stream, width=WIDTH, color_system=None, force_terminal=False))
        return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def write_report(runs: Sequence[Path], out: Path) -> str:
    """Read run folders, write the report to the folder `out`, and return its tables as plain text.

    Raises:
        ValueError: if the runs do not belong in one table, or one of them is malformed.
    """
    files.require_local(out, "--out")
    report = build(runs)
    write(report, out)
    return report.text()


def build(paths: Sequence[Path]) -> Report:
    """Read run folders and make the tables and pictures.

    Raises:
        ValueError: if the runs do not belong in one table, or one of them is malformed.
    """
    runs = load_runs(paths)
    rows = tables.result_rows(runs)
    shown = next((run for run in runs if run.gallery_path.is_file()), None)
    return Report(
        runs=runs,
        rows=rows,
        differences=tables.difference_rows(runs),
        pictures={
            "scatter.png": plots.scatter(rows),
            "curves.png": plots.curves(runs),
            "gallery.png": gallery.picture(gallery.load_gallery(shown.gallery_path))
            if shown
            else None,
        },
        gallery_run=shown,
    )


def write(report: Report, out: Path) -> None:
    """Write the report's files to a folder; a picture left by an earlier report does not stay."""
    for name, png in report.pictures.items():
        if png is not None:
            files.write_bytes(str(out / name), png)
        else:
            (out / name).unlink(missing_ok=True)
    documents = {
        "table.md": tables.markdown(report.rows, report.differences),
        "table.csv": tables.csv_text(report.rows),
        "index.html": render(report),
    }
    for name, text in documents.items():
        files.write_bytes(str(out / name), text.encode())


def show(report: Report, console: Console) -> None:
    """Print the tables."""
    if report.miniature:
        console.print("Miniature world: columns are stand-ins named after the real benchmarks.")
    for table in report.text_tables():
        console.print(table)
        console.print()


def render(report: Report) -> str:
    """Return index.html; everything that comes from a file is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        columns=COLUMNS,
        rows=_result_cells(report.rows),
        caption=tables.caption(report.rows),
        difference_header=tables.difference_header(),
        differences=[
            (row.recipe, len(row.seeds), tables.difference_cells(row)) for row in report.differences
        ],
        difference_caption=tables.DIFFERENCE_CAPTION,
        pictures={
            name.removesuffix(".png"): None if png is None else _picture(png)
            for name, png in report.pictures.items()
        },
        gallery_run=report.gallery_run,
        miniature=report.miniature,
        provenance=provenance_lines(report.runs),
        runs=[_describe(run) for group in tables.by_recipe(report.runs).values() for run in group],
    )


def _result_cells(rows: Sequence[Row]) -> list[tuple[str, int, list[tuple[str, bool]]]]:
    """Return (recipe, n, (text, is best) of each column) of each row."""
    winners = tables.best(rows)
    return [
        (
            row.recipe,
            len(row.seeds),
            [
                (tables.ABSENT if cell is None else cell.text(), index in winners[column])
                for column, cell in enumerate(row.cells)
            ],
        )
        for index, row in enumerate(rows)
    ]


def _picture(png: bytes) -> dict[str, Any]:
    """Return an image for the page, at half its pixels. The size is in the PNG's header."""
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    data = base64.b64encode(png).decode("ascii")
    return {"source": f"data:image/png;base64,{data}", "width": width // 2, "height": height // 2}


def provenance_lines(runs: Sequence[Run]) -> list[str]:
    """Return what made the runs: one line, or one for each different answer with its count."""
    lines = Counter(_provenance(run.provenance) for run in runs)
    if len(lines) == 1:
        return list(lines)
    return [f"{line} ({count} of {len(runs)} runs)" for line, count in lines.items()]


def _provenance(document: dict[str, Any]) -> str:
    if not document:
        return f"code and packages {UNKNOWN}"
    packages = document.get("packages") or {}
    parts = [
        f"rft {document.get('rft', UNKNOWN)}",
        f"git {document.get('git') or UNKNOWN}",
        f"python {document.get('python', UNKNOWN)}",
        *(f"{name} {version}" for name, version in packages.items()),
        str(document.get("machine", "")),
    ]
    return ", ".join(part for part in parts if part)


def _describe(run: Run) -> dict[str, Any]:
    return {
        "recipe": run.recipe,
        "seed": run.seed,
        "step": run.step,
        "checkpoint": run.checkpoint_sha256[:12],
        "config_sha256": run.config_sha256[:12] or tables.ABSENT,
        "path": str(run.path),
        "command": " ".join(map(str, run.provenance.get("command", []))),
        "config": json.dumps(run.config, indent=2, sort_keys=True),
    }
