"""Ratios of two measurements, divided round by round, with their range.

A temporary slowdown affects both sides of a round, so ratios per round are steadier than the ratio
of two medians.
"""

import statistics
from collections.abc import Sequence

WIDEST = 1.5  # largest / smallest round of a ratio whose middle is still worth printing
NOT_MEASURED = "not measured"
Ratio = dict[str, float]


def of_rounds(above: Sequence[float], below: Sequence[float]) -> Ratio | None:
    """Divide measurements of the same rounds; None if a side has none."""
    if not above or not below:
        return None
    found = [a / b for a, b in zip(above, below, strict=True)]
    return {
        "median": round(statistics.median(found), 3),
        "lowest": round(min(found), 3),
        "highest": round(max(found), 3),
    }


def shown(ratio: Ratio | None) -> str:
    """Format a ratio with its range, and without its middle if the range is wide."""
    if ratio is None:
        return NOT_MEASURED
    low, high = ratio["lowest"], ratio["highest"]
    if high > WIDEST * low:
        return f"{low:.2f} to {high:.2f}"
    return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"
