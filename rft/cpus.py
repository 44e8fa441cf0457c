"""The number of processors that this process may use."""

import os


def available() -> int:
    """Count the cores available to this process: a cluster job rarely owns all of them."""
    # macOS lacks it, and does not bind processes to cores
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
