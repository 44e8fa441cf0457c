"""A testbed: accuracies of models that were trained without robustness in mind, from a CSV file.

Columns `model`, `id` and `ood`, the accuracies in percent; other columns are ignored. A line
through them says which OOD accuracy an ID accuracy lets expect (`rft.statistics.robustness`). The
two averages must be over the same sets as the report's: the file cannot show that they are.
"""

import csv
import io
import math
from pathlib import Path

from rft.statistics import robustness
from rft.statistics.robustness import Line
from rft.storage import files
from rft.text import short

BYTES = 2**20
MODELS = 10_000
COLUMNS = ("model", "id", "ood")


def read_line(path: Path) -> Line:
    """Fit the line through a testbed file.

    Raises:
        ValueError: naming the file and the line of it that is wrong.
    """
    data = files.read_bytes(str(path), BYTES)
    try:
        # a spreadsheet begins its files with a byte order mark
        text = data.decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if missing := set(COLUMNS) - set(reader.fieldnames or ()):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        points = []
        for row in reader:
            points.append(tuple(_percent(row[name], name, reader.line_num) for name in COLUMNS[1:]))
            if len(points) > MODELS:
                raise ValueError(f"it has more than {MODELS:,} models")
        in_, out = zip(*points, strict=True) if points else ((), ())
        return robustness.fit([x / 100 for x in in_], [y / 100 for y in out])
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is no testbed file of columns {', '.join(COLUMNS)}: {error}"
        ) from error


def _percent(text: str | None, name: str, line: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    # written so that NaN does not pass
    if not 0 < value < 100:
        raise ValueError(
            f"line {line}: {name} is {short(text)}; it must be a percentage above 0 and below 100"
        )
    return value
