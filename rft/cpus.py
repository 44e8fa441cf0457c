"""How many processors this process may use."""

import os


def available() -> int:
    """Return the number of cores: a job of a cluster rarely owns the whole machine."""
    # macOS has none, and no job there is bound to some of the cores
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
