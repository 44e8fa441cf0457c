"""Preloaded in the process that forks the loader processes, before the first fork.

A scheduler signals every process of a job, but loader processes must not stop on their own. The
signals ignored or blocked here are so in each loader process from its start. SIGTERM is only
blocked, because a loader process accepts it from its trainer (rft/loading/read.py).
"""

import signal

for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
# macOS has no call that reports the sender of a signal; there SIGTERM ends a loader process
if hasattr(signal, "sigtimedwait"):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
