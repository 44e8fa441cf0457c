"""Runs a target with hypothesis and counts the outcomes."""

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

REFUSED = (ValueError, OSError)  # the errors that rft/cli.py prints in one line


class Target(NamedTuple):
    """The strategy, the check, and examples to try first."""

    strategy: SearchStrategy[Any]
    check: Callable[[Any], object]
    examples: tuple[Any, ...] = ()


@dataclass
class Counts:
    """The outcomes of the tries; crashes are counted by location."""

    tries: int = 0
    refused: int = 0
    accepted: int = 0
    crashes: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)
    """Per crash: the smallest example, and the seed."""

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a JSON document."""
        # asdict turns a Counter's keys into pairs
        return {**vars(self), "crashes": dict(self.crashes)}


def place_of(error: BaseException) -> str:
    """Return kind and location of a crash: the last frame of rft or of the fuzzer."""
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
        # called repeatedly while the example shrinks; the last one is the smallest
        shown = f"{str(error)[:300]!r} with {example!r}"
        counts.details[where] = f"seed {seed}: {shown[:1500]}"
        raise CrashError(where, is_slow=isinstance(error, SlowHarm)) from error
    else:
        counts.accepted += 1


class CrashError(AssertionError):
    """A try ended in an error that is not a clear refusal."""

    def __init__(self, where: str, *, is_slow: bool = False) -> None:
        super().__init__(where)
        self.is_slow = is_slow


def explore(
    target: Target, folder: Path, counts: Counts, *, tries: int, seed: int, known: frozenset[str]
) -> None:
    """Make some tries; `known` crashes do not end them.

    Raises:
        CrashError: for the first one that is not.
    """
    label = str(seed)
    # shrinking would repeat the slow call many times
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
    """Make tries until the time is over; count every crash, and skip its kind afterwards."""
    counts, deadline, seed = Counts(), time.monotonic() + seconds, first_seed
    while time.monotonic() < deadline:
        known = frozenset(counts.crashes)
        # it is counted
        with contextlib.suppress(CrashError, Harm, hypothesis.errors.Flaky, BaseExceptionGroup):
            explore(target, folder, counts, tries=300, seed=seed, known=known)
        seed += 1
    return counts
