"""Imported in the process that loader processes are forked from, before it forks any.

A scheduler signals every process of a job, and which step is the last is not for these to decide:
what is ignored or held back here is so in each loader process from its first moment on. SIGTERM is
only held back, because a loader process takes it from its trainer (rft/loading/read.py).
"""

import signal

for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
# macOS has no call that says who sent a signal; there a SIGTERM ends a loader process at once
if hasattr(signal, "sigtimedwait"):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
