"""Data for the page's script that no table has, and the hash that permits the script. Pure.

The script is page.js. It reads the differences of all pairs of rows, the numbers of the rows in
figures, and the paths over alpha.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rft.report import details, plots, tables
from rft.report.measures import COMPARED, AveragePair, Measures, SetPair, significant
from rft.report.tables import Row, columns, heading

CELLS = 100_000  # limit of differences in a page, about 25 bytes each; 64 rows, six sets: 14,000
SCRIPT = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")


def source_hash(script: str) -> str:
    """Make the source expression that permits this script alone in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def page_data(rows: Sequence[Row], shown: Sequence[Row], measures: Measures) -> dict[str, Any]:
    """Make the data of page.js; `shown` are the rows of the accuracy table, in its order."""
    named = details.targets(rows)
    texts = {
        row.id: ", ".join(f"{heading(name)} {tables.cell_text(row, name)}" for name in named)
        for row in rows
    }
    found = columns(shown)
    paired = shown[:COMPARED]
    while math.comb(len(paired), 2) * len(found) > CELLS:
        paired = paired[:-1]
    return {
        "absent": tables.ABSENT,
        "mark": tables.SIGNIFICANT,
        "rows": {row.id: {"name": row.name, "numbers": texts[row.id]} for row in rows},
        "means": [
            [row.cells[name].mean if name in row.cells else None for name in found] for row in shown
        ],
        "pairs": [
            [
                [_pair(tables.pair_of(measures, row.name, other.name, name)) for name in found]
                for other in shown[:place]
            ]
            for place, row in enumerate(paired)
        ],
        "paths": _paths(rows),
    }


def _pair(pair: SetPair | AveragePair | None) -> list[float | bool] | None:
    """Round difference and interval in points as printed, and add whether it is significant."""
    if pair is None:
        return None
    value, (low, high), _ = pair.difference
    # rounded here, because JavaScript rounds halves differently
    return [*(round(100 * one, 2) for one in (value, low, high)), significant(pair)]


def _paths(rows: Sequence[Row]) -> dict[str, list[tuple[float, str]]]:
    """Map each WiSE family to (alpha, row) of the models on its path."""
    ids = {row.name: row.id for row in rows}
    paths = plots.wise_paths(plots.accuracy_points(rows))
    return {
        family: [(plots.alpha_of(name), ids[name]) for name in path]
        for family, path in paths.items()
    }
