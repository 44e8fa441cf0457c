"""The table by kind, which `python -m tests.hostile [--rows | --save]` prints."""

import sys
from collections import Counter

from rft.storage import files
from tests.hostile.rows import by_kind
from tests.hostile.sandbox import ROOT
from tests.hostile.table import ROWS

RESULT = ROOT / "benchmarks" / "results" / "hostile.md"
ANSWERS = ("refused", "reported", "either", "accepted", "silent")


def to_markdown() -> str:
    """Count the rows of each kind, and their expected answers."""
    heads = ("kind", "rows", *ANSWERS, "`make programs` alone")
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for kind, count in [*by_kind(ROWS).items(), ("all", len(ROWS))]:
        mine = [row for row in ROWS if kind in ("all", row.kind)]
        told = Counter(row.answer for row in mine)
        thorough = sum(row.thorough for row in mine)
        cells = [kind, count, *(told[answer] for answer in ANSWERS), thorough]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print all rows, or the table by kind; --save also keeps it for docs/security.md."""
    if sys.argv[1:] == ["--rows"]:
        for row in ROWS:
            print(f"{row.answer:9s} {row.name}")
        return
    print(to_markdown(), end="")
    if sys.argv[1:] == ["--save"]:
        files.write_bytes(str(RESULT), to_markdown().encode())
