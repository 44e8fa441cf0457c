"""Imported in the process that loader processes are forked from, before it forks any.

A scheduler signals every process of a job, and which step is the last is not for this one to
decide. What it ignores, loader processes ignore from their first moment on; it ends with the
training process.
"""

import signal

for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
