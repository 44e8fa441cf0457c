"""A testbed: accuracies of models trained without robustness interventions, from a CSV file.

Its columns are `model`, `id` and `ood`, with accuracies in percent; other columns are ignored. A
line fitted to them gives the OOD accuracy to expect for an ID accuracy
(`rft.statistics.robustness`). Both averages must be over the same sets as the report's, which
cannot be checked from the file.
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
    """Fit the line to the models of a testbed file.

    Raises:
        ValueError: naming the file and the malformed line.
    """
    data = files.read_bytes(str(path), BYTES)
    try:
        # -sig, because spreadsheets start files with a byte order mark
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
            f"{path} is not a testbed file with columns {', '.join(COLUMNS)}: {error}"
        ) from error


def _percent(text: str | None, name: str, line: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    # `not` around the comparison, so that NaN fails it
    if not 0 < value < 100:
        raise ValueError(
            f"line {line}: {name} is {short(text)}; it must be a percentage above 0 and below 100"
        )
    return value
