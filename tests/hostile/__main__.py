"""Print the table by kind: `python -m tests.hostile [--rows]`."""

import sys
from collections import Counter

from tests.hostile.rows import by_kind
from tests.hostile.table import ROWS


def main() -> None:
    """Print how many rows of each kind there are, and what their answers are; or all rows."""
    if sys.argv[1:] == ["--rows"]:
        for row in ROWS:
            print(f"{row.answer:9s} {row.name}")
        return
    answers = ("refused", "reported", "either", "accepted", "silent")
    heads = ("kind", "rows", *answers, "`make programs` alone")
    print(f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 1)}")
    for kind, count in [*by_kind(ROWS).items(), ("all", len(ROWS))]:
        mine = [row for row in ROWS if kind in ("all", row.kind)]
        told = Counter(row.answer for row in mine)
        thorough = sum(row.thorough for row in mine)
        cells = [kind, count, *(told[answer] for answer in answers), thorough]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
