"""What asks a run to stop before its end: a signal, a file, the loss of the process above it."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STOPPED = 75  # exit code of a run that can go on (EX_TEMPFAIL)


class StopRequest:
    """Listens as long as it is open.

    Signals only leave a note: the step under way is finished. They come more than once (SLURM sends
    them to every process, torchrun again to its ranks).
    """

    def __init__(self, stop_file: str) -> None:
        self._file = Path(stop_file) if stop_file else None
        self._signal = ""
        self._old = {}
        self._parent = os.getppid()

    def __enter__(self) -> Self:
        for number in SIGNALS:
            # nohup, and a shell for what it runs in the background, ignore some on purpose
            if signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str:
        """What asks to stop; empty if nothing does."""
        if self._signal:
            return self._signal
        if self._file and self._file.exists():
            return str(self._file)
        # a launcher that was killed can tell its ranks nothing: they would train on unseen
        if "RANK" in os.environ and os.getppid() != self._parent:
            return "the process that started this one is gone"
        return ""
