"""Each row of the table holds: one clear line, no harm, no cost."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import world
from tests.hostile.page import RESULT, to_markdown
from tests.hostile.rows import Row, complaints
from tests.hostile.sandbox import Sandbox, snapshot
from tests.hostile.server import hostile_server
from tests.hostile.table import ROWS
from tests.hostile.world import Place

LEAST = 120  # rows that the table must have
QUICK_SHARE = 100


def parameters() -> Iterator[Any]:
    """Yield all rows; `make quick` takes a regular subset of the cheap ones of each kind."""
    cheap: Counter[str] = Counter()
    for row in ROWS:
        cheap[row.kind] += not (row.slow or row.thorough)
        quick = not (row.slow or row.thorough) and cheap[row.kind] % QUICK_SHARE == 1
        marks = [] if quick else [pytest.mark.slow]
        marks += [pytest.mark.program] if row.thorough else []
        yield pytest.param(row, marks=marks, id=row.name)


@pytest.fixture
def root(made_world: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the world, deleted after the row, because there are many."""
    yield world.copy(made_world, tmp_path / "world")
    shutil.rmtree(tmp_path / "world")


@pytest.mark.parametrize("row", list(parameters()))
def test_row(row: Row, root: Path, sandbox: Sandbox) -> None:
    serve = hostile_server(root / "work", row.server) if row.server else contextlib.nullcontext("")
    with serve as url:
        place = Place(root, url)
        row.damage(place)
        before = snapshot(root)
        words = [word.replace("{url}", url) for word in row.words]
        ran = place.run(sandbox, words, variables=row.variables, stdout=row.stdout)
        found = list(complaints(row, ran, before, snapshot(root)))
    assert not found, "; ".join(found)
    row.holds(place, ran)


def test_names_of_rows_differ() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) >= LEAST


def test_the_saved_table_counts_these_rows() -> None:
    """docs/security.md shows it; `python -m tests.hostile --save` rewrites it."""
    assert RESULT.read_text() == to_markdown()
