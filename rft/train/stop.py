"""Requests to stop a run early: a signal, a file, or the loss of the parent process."""

import os
import signal
import time
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# within this time, a second SIGINT is a copy of the first, from SLURM or torchrun
SECONDS_TO_WONDER = 2


class StopRequest:
    """Listens while it is open; a stop request is sticky.

    Signals are only recorded, and the current step is finished. They arrive several times, because
    SLURM sends them to every process and torchrun forwards them to its ranks. Only a second Ctrl-C,
    from a user who does not want to wait, ends the process in the middle of a step.
    """

    def __init__(self, stop_file: str) -> None:
        self._file = stop_file
        self._reason = ""
        self._interrupted: float | None = None
        self._old = {}
        self._parent = os.getppid()

    def __enter__(self) -> Self:
        for number in SIGNALS:
            # nohup, and shells for background jobs, ignore some signals on purpose
            if signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        elif now - self._interrupted > SECONDS_TO_WONDER:
            raise KeyboardInterrupt

    @property
    def reason(self) -> str:
        """The reason to stop; empty without a request."""
        # not Path.exists, which raises on temporary errors of a network file system
        if not self._reason and self._file and os.path.exists(self._file):  # noqa: PTH110
            self._reason = self._file
        # A killed launcher sends its ranks no signal, and they would keep training unnoticed. Only
        # with RANK: without torchrun a parent may end on purpose, as a shell does after nohup.
        if not self._reason and "RANK" in os.environ and os.getppid() != self._parent:
            self._reason = "the process that started this one is gone"
        return self._reason
