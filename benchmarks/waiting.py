"""Waiting for what must happen, in the one way that tests and benchmarks share."""

import time
from collections.abc import Callable

# After this a test says what did not happen, sooner than pytest would end it. It is no measure of
# how long anything takes: what it waits for happens on the slowest machine, or never.
SECONDS = 240


def until(
    holds: Callable[[], object], what: str = "what the test waits for", pause: float = 0.01
) -> None:
    """Return as soon as a condition holds; look at it again after each pause, in seconds.

    Raises:
        AssertionError: naming `what`, if it does not come to hold.
    """
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"not after {SECONDS} s: {what}"
        time.sleep(pause)
