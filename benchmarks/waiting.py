"""Waiting for an event, shared by tests and benchmarks."""

import time
from collections.abc import Callable

# After this time a test reports the missing event, before pytest would end it. It does not measure
# speed: the event happens even on the slowest machine, or never.
SECONDS = 240


def until(
    holds: Callable[[], object], what: str = "what the test waits for", pause: float = 0.01
) -> None:
    """Return as soon as a condition holds; check it again after each pause, in seconds.

    Raises:
        AssertionError: naming `what`, if it does not come to hold.
    """
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"not after {SECONDS} s: {what}"
        time.sleep(pause)
