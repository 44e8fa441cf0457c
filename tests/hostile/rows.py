"""Rows of the table, and the conditions under which they hold."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from tests import tiny
from tests.hostile import sandbox
from tests.hostile.world import Place, Ran

# refused: one line, nothing written. reported: verify_shards lists a problem. accepted: unusual but
# correct. either: may be accepted, as long as it does no harm.
# silent: the reader is gone, so nothing is printed.
Answer = Literal["refused", "reported", "accepted", "either", "silent"]
CODES = {"refused": 2, "reported": 1, "accepted": 0, "either": 2, "silent": 1}
LONGEST_LINE = 2000  # characters of a line, which must stay readable


@dataclass(frozen=True, kw_only=True)
class Row:
    """One hostile or broken input, a command that reads it, and the required outcome."""

    kind: str
    what: str
    """The hostile property; the name of the row."""
    words: Sequence[str]
    """The command line; `{url}` is the address of the row's server."""
    damage: Callable[[Place], object] = lambda _: None
    """Damages a copy of the world."""
    says: Sequence[str] = ()
    """Patterns that the line must match, ignoring case: which file, which position."""
    answer: Answer = "refused"
    code: int | None = None
    """Exit code, if it differs from the answer's usual one."""
    variables: dict[str, str] = field(default_factory=dict)
    """Additional environment variables."""
    stdout: Literal["", "closed", "left"] = ""
    server: str = ""
    """How the server of tests/hostile/server.py answers; empty for a row without one."""
    writes: Sequence[str] = ()
    """Patterns of files in the working folder that may be written despite the refusal."""
    holds: Callable[[Place, Ran], object] = lambda *_: None
    """Further conditions, as assertions."""
    slow: bool = False
    """Takes more than 0.3 s."""
    thorough: bool = False
    """Similar to another row, or long: for `make programs`, so that `make test` stays short."""

    @property
    def name(self) -> str:
        """Name of the test."""
        return f"{self.kind}: {self.what}"


def complaints(row: Row, ran: Ran, before: dict, after: dict) -> Iterator[str]:
    """Yield the conditions that do not hold."""
    outcome, output = ran.outcome, ran.stdout + ran.stderr
    if outcome.ended:
        spent = f"{outcome.seconds:.0f} s and {outcome.peak / 2**20:,.0f} MiB"
        yield f"ended after {spent}: too much {outcome.ended}"
    if outcome.peak > sandbox.PEAK:
        yield f"took {outcome.peak / 2**20:,.0f} MiB"
    if "Traceback (most recent call last)" in output:
        yield f"traceback: {ran.stderr.strip().splitlines()[-1][:300]}"
    if sandbox.CANARY in output:
        yield "a secret of the environment is shown"
    if controls := {c for c in output if not (c.isprintable() or c in "\n\t")}:
        yield f"control characters are shown: {sorted(map(ascii, controls))[:5]}"
    changed = sorted(name for name in before.keys() | after.keys() if differs(name, before, after))
    yield from _changes(row, changed, outcome.code)
    yield from _lines(row, ran)


def _lines(row: Row, ran: Ran) -> Iterator[str]:
    code = ran.outcome.code
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    # lines below a log line that is a warning may be indented
    errors = [line for line in lines if not tiny.STAMP.match(line) and not line.startswith("  ")]
    wanted = CODES[row.answer] if row.code is None else row.code
    accepted = code == 0 and row.answer in ("accepted", "either", "silent")
    if code != wanted and not accepted:
        yield f"exit code {code}, not {wanted}"
    if too_long := [line for line in lines if len(line) > LONGEST_LINE]:
        yield f"a line of {len(too_long[0]):,} letters"
    if accepted or row.answer in ("reported", "silent"):
        if errors:
            yield f"on stderr: {errors[0][:300]}"
        text = ran.stdout
    else:
        if len(errors) != 1 or not errors[0].startswith("error"):
            yield f"{len(errors)} lines and not one error: {' / '.join(errors)[-600:]}"
        text = " ".join(errors)
    for pattern in () if accepted else row.says:
        if not re.search(pattern, text, re.IGNORECASE):
            yield f"does not say {pattern!r}: {text[:400]}"


def differs(name: str, before: dict, after: dict) -> bool:
    """Whether a file is new, deleted or changed."""
    return before.get(name) != after.get(name)


def _changes(row: Row, changed: Sequence[str], code: int) -> Iterator[str]:
    allowed = (
        ["work/*"]
        if code == 0 or row.answer == "silent"
        else [f"work/{pattern}" for pattern in row.writes]
    )
    if row.answer == "reported":
        allowed = []
    if wrong := [name for name in changed if not any(fnmatchcase(name, p) for p in allowed)]:
        yield f"changed: {', '.join(wrong[:4])}"


def by_kind(rows: Sequence[Row]) -> Counter[str]:
    """Count the rows of each kind."""
    return Counter(row.kind for row in rows)
