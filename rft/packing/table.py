"""A set described by a table: a CSV with one row per image, as in WILDS.

A row gives an image's file, its label, its split and its domain, such as the country where it was
taken. Options name the columns. One split is packed as one set; the label space covers all rows, so
that all splits of a table share it.
"""

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rft.classes import composed
from rft.packing.domains import SHOWN, Listed, require_domain
from rft.packing.layouts import LISTING_THREADS
from rft.packing.names import Links, has_image_suffix, regular_size, require_utf8
from rft.packing.own_folder import name_classes
from rft.packing.source import Found, Source, make_items
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import CLASSES
from rft.storage import local
from rft.storage.documents import Name, document
from rft.text import shown

TABLE_BYTES = 2**30  # FMoW's table, with the outline of each image, has some hundred MB
LINE_LETTERS = 2**20
COLUMN = re.compile(r"\{([^{}]+)\}")
ROW = "row"  # in a pattern: the number of a row, from 0, unless the table has such a column


@document(name="--")
class Table:
    """The columns of a CSV to use; a pattern has column names in braces."""

    metadata: str = ""
    """CSV file with a header line and one row per image, instead of class folders."""
    file: Name = "{filename}"
    """Pattern of an image's path below --source, with columns of --metadata in braces. {row} is the
    row's number from 0, as in FMoW's 'images/rgb_img_{row}.png'."""
    label: Name = "y"
    """Column of --metadata with the label: a class's id in --classes."""
    domain: str = ""
    """Pattern of the domain, such as '{location_remapped}'; empty for a set without domains."""
    split_column: str = "split"
    """Column of --metadata with the split; '' packs all rows."""
    split: str = ""
    """The split to pack, such as test."""


class Row(NamedTuple):
    """The table's entry for one image."""

    line: int
    path: str
    label: str
    domain: str


def read_table(name: str, source: Path, table: Table, labels: LabelSpace | None) -> Listed:
    """List the images of one split of a table.

    Without a label space the values of the label column are the classes: numbers in numeric order,
    texts sorted.

    Raises:
        ValueError: naming file and line, if a column, a label, an image or the split is missing.
    """
    if not source.is_dir():
        raise ValueError(f"no such folder: {source}")
    values: set[str] = set()
    splits: dict[str, int] = {}
    rows = list(_rows(Path(table.metadata), table, values, splits))
    total = sum(splits.values())
    if not rows:
        some = ", ".join(map(shown, sorted(splits)[:SHOWN]))
        raise ValueError(
            f"{table.metadata} has no row with {shown(table.split)} as its {table.split_column}; "
            + (f"--split must be one of {some}" if some else "the table has no rows")
        )
    labels = labels or _name_values(values)
    links = Links(source)
    class_of = labels.class_of
    for row in rows:
        if composed(row.label) not in class_of:
            raise ValueError(
                f"{table.metadata} line {row.line}: {table.label} is {shown(row.label)}, which is "
                f"not one of the {len(labels)} classes; add it to --classes"
            )

    def measure(row: Row) -> Found:
        try:
            size = regular_size(source / row.path, links)
        except FileNotFoundError:
            raise ValueError(
                f"{table.metadata} line {row.line}: no such image: {source / row.path}"
            ) from None
        return Found(row.path, size, domain=row.domain)

    # in threads: look-ups are latency-bound on network file systems
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        images = list(pool.map(measure, rows))
    classes: dict[str, list[Found]] = {}
    for row, image in zip(rows, images, strict=True):
        classes.setdefault(composed(row.label), []).append(image)
    found = Source(
        dataset=name,
        root=source,
        items=make_items(classes, class_of),
        groups=labels.groups,
        layout=f"{len(rows):,} of the {total:,} rows of {table.metadata}",
        links=links.said(),
    )
    return Listed(found, labels, [])


def _rows(path: Path, table: Table, values: set[str], splits: dict[str, int]) -> Iterator[Row]:
    """Yield the rows of the split; collect the labels and row counts of all splits."""
    with local.reader(path) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > TABLE_BYTES:
            raise ValueError(f"{path} has {size:,} bytes, more than the limit of {TABLE_BYTES:,}")
        # utf-8-sig: spreadsheets write a byte order mark first
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        lines = csv.reader(_lines(text, path), strict=True)
        try:
            header = next(lines, [])
            _require_columns(path, header, table)
            for number, cells in enumerate(line for line in lines if line):
                where = f"{path} line {lines.line_num}"
                if len(cells) != len(header):
                    raise ValueError(
                        f"{where} has {len(cells)} cells, but the header has {len(header)} columns"
                    )
                row = {ROW: str(number), **dict(zip(header, cells, strict=True))}
                split = row[table.split_column] if table.split_column else ""
                splits[split] = splits.get(split, 0) + 1
                values.add(row[table.label])
                if len(values) > CLASSES:
                    raise ValueError(f"{where}: more than {CLASSES:,} labels in {table.label}")
                if split == table.split:
                    yield _row(where, lines.line_num, row, table)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
        except csv.Error as error:
            raise ValueError(f"{path} line {lines.line_num} cannot be read: {error}") from error


def _lines(text: io.TextIOWrapper, path: Path) -> Iterator[str]:
    # bounded: an untrusted file may be one long line
    for line in iter(partial(text.readline, LINE_LETTERS), ""):
        if len(line) == LINE_LETTERS:
            raise ValueError(f"{path} has a line of {LINE_LETTERS:,} letters or more")
        yield line


def _require_columns(path: Path, header: list[str], table: Table) -> None:
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"{path} has two columns named {shown(twice)}")
    # ROW counts rows, and needs no column
    wanted = {
        "--label": [table.label],
        "--split-column": [table.split_column] if table.split_column else [],
        "--file": [one for one in COLUMN.findall(table.file) if one != ROW],
        "--domain": [one for one in COLUMN.findall(table.domain) if one != ROW],
    }
    for option, columns in wanted.items():
        for column in columns:
            if column not in header:
                some = ", ".join(map(shown, header[:SHOWN]))
                raise ValueError(
                    f"{path} has no column {shown(column)}, which {option} names; it has {some}"
                )
    # a pattern without a column would be the same for every image: most likely the braces are
    # missing
    for option, pattern in (("--file", table.file), ("--domain", table.domain)):
        if pattern and not COLUMN.search(pattern):
            raise ValueError(
                f"{option} is {shown(pattern)}, which names no column; write it as {{column}}"
            )
    if table.split_column and not table.split:
        raise ValueError(
            f"{path} has a column {table.split_column}: choose the rows to pack with --split, such "
            f"as test; --split-column '' packs all"
        )


def _row(where: str, line: int, row: Mapping[str, str], table: Table) -> Row:
    """Read one row of the split; raise if it cannot describe an image."""
    path, domain = _filled(table.file, row), _filled(table.domain, row)
    parts = PurePosixPath(path).parts
    # an untrusted table could otherwise name any local file
    if path.startswith("/") or ".." in parts or "\0" in path or not parts:
        raise ValueError(f"{where}: {shown(path)} is not a path below --source")
    if not has_image_suffix(path):
        raise ValueError(f"{where}: {shown(path)} does not have a suffix of JPEG, PNG or WebP")
    require_utf8(path)
    if not row[table.label].strip():
        raise ValueError(f"{where} has no label in column {shown(table.label)}")
    if table.domain:
        if not domain.strip():
            raise ValueError(f"{where} has no domain")
        require_domain(domain, where)
    return Row(line, str(PurePosixPath(path)), row[table.label], domain)


def _filled(pattern: str, row: Mapping[str, str]) -> str:
    """Fill a pattern with a row's cells; braces inside a cell are not expanded."""
    return COLUMN.sub(lambda match: row[match[1]], pattern)


def _name_values(values: set[str]) -> LabelSpace:
    """Make a label space from the values of the label column."""
    named = name_classes(values)
    if all(re.fullmatch("[0-9]{1,18}", one) for one in named.ids):
        # as text, class 10 would come before class 2
        ids = tuple(sorted(named.ids, key=lambda one: (int(one), one)))
        return LabelSpace(ids=ids, names=ids, templates=named.templates)
    return named
