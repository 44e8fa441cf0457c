"""`rft.train`, stopped within a step: `python -m benchmarks.gpu.interrupted STEP RECIPE ...`.

The signal is sent from inside the step, so that the run stops after the same step on any machine.
"""

import runpy
import signal
import sys
from typing import Any

from rft.train import loop


def main() -> None:
    """Train, and send this process SIGTERM within a step (0-based)."""
    wanted = int(sys.argv.pop(1))
    real = loop.accumulate_gradients

    def accumulate_gradients(*arguments: Any, **options: Any) -> Any:
        if arguments[3] == wanted:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **options)

    loop.accumulate_gradients = accumulate_gradients
    runpy.run_module("rft.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
