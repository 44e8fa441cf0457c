"""All rows, by kind; tests/hostile/rows.py defines a row."""

from tests.hostile.rows import Row
from tests.hostile.table import (
    commands,
    costs,
    documents,
    environments,
    images,
    indexes,
    paths,
    samples,
    tars,
    terminals,
    urls,
    weights,
)

MODULES = (
    documents,
    urls,
    paths,
    costs,
    images,
    tars,
    weights,
    indexes,
    samples,
    terminals,
    environments,
    commands,
)
ROWS: tuple[Row, ...] = tuple(row for module in MODULES for row in module.rows())
