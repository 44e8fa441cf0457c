"""Runs a target with hypothesis and counts what came of it."""

import contextlib
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.strategies import SearchStrategy

from rft.storage import remote
from tests.hostile.fuzz.guard import Harm, SlowHarm, bounded_memory, watched

REFUSED = (ValueError, OSError)  # what rft/cli.py prints in one line


class Target(NamedTuple):
    """What is drawn, what is done with it, and examples that are tried first."""

    strategy: SearchStrategy[Any]
    check: Callable[[Any], object]
    examples: tuple[Any, ...] = ()


@dataclass
class Counts:
    """What came of the tries; a crash is counted by where it happened."""

    tries: int = 0
    refused: int = 0
    accepted: int = 0
    crashes: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)
    """Of each crash: the smallest example that was found, and the seed."""

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a JSON document."""
        # asdict makes pairs of a Counter's keys
        return {**vars(self), "crashes": dict(self.crashes)}


def place_of(error: BaseException) -> str:
    """Return kind and place of a crash: the last frame of ours, or of the fuzzer."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/rft/" in frame.filename] or list(frames)
    where = ours[-1]
    name = where.filename.rpartition("/rft/")[2] if "/rft/" in where.filename else where.filename
    return f"{type(error).__name__} in {name.rsplit('/tests/', 1)[-1]}:{where.name}"


def attempt(target: Target, example: Any, folder: Path, counts: Counts, seed: str) -> None:
    """Make one try.

    Raises:
        AssertionError: for a crash that is not counted yet.
    """
    counts.tries += 1
    try:
        with watched(folder):
            target.check(example)
    except REFUSED:
        counts.refused += 1
    except (KeyboardInterrupt, hypothesis.errors.HypothesisException):
        raise
    except BaseException as error:
        where = place_of(error)
        counts.crashes[where] += 1
        # again and again while it is made smaller; the last one is the smallest
        shown = f"{str(error)[:300]!r} with {example!r}"
        counts.details[where] = f"seed {seed}: {shown[:1500]}"
        raise CrashError(where, is_slow=isinstance(error, SlowHarm)) from error
    else:
        counts.accepted += 1


class CrashError(AssertionError):
    """A try ended in something that is no clear refusal."""

    def __init__(self, where: str, *, is_slow: bool = False) -> None:
        super().__init__(where)
        self.is_slow = is_slow


def explore(
    target: Target, folder: Path, counts: Counts, *, tries: int, seed: int, known: frozenset[str]
) -> None:
    """Make some tries; a crash that is `known` ends none of them.

    Raises:
        CrashError: for the first one that is not.
    """
    label = str(seed)
    # making one smaller would be as slow again and again
    slow: list[CrashError] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=tries,
        deadline=None,
        database=None,
        derandomize=False,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @hypothesis.given(target.strategy)
    def one(example: Any) -> None:
        try:
            attempt(target, example, folder, counts, label)
        except CrashError as crash:
            if crash.is_slow:
                slow.append(crash)
            elif str(crash) not in known:
                raise

    for example in target.examples:
        one = hypothesis.example(example)(one)
    before = remote.PATIENCE
    remote.PATIENCE = remote.Patience(tries=1, stall_seconds=1.0, longest_pause=0.01)
    try:
        with bounded_memory():
            one()
    finally:
        remote.PATIENCE = before
    for crash in slow:
        if str(crash) not in known:
            raise crash


def explore_for(seconds: float, target: Target, folder: Path, first_seed: int) -> Counts:
    """Make tries until the time is over; every crash is kept, and its kind is passed over then."""
    counts, deadline, seed = Counts(), time.monotonic() + seconds, first_seed
    while time.monotonic() < deadline:
        known = frozenset(counts.crashes)
        # it is counted
        with contextlib.suppress(CrashError, Harm, hypothesis.errors.Flaky, BaseExceptionGroup):
            explore(target, folder, counts, tries=300, seed=seed, known=known)
        seed += 1
    return counts
