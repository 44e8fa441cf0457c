"""Measure one GPU: `python -m benchmarks.gpu [--minutes 6]`; `--rehearse` needs no GPU."""

import sys
import time

if __name__ == "__main__":
    started = time.monotonic()
    try:
        from benchmarks.gpu import command
    except ModuleNotFoundError as error:
        # on a bare machine: one line, because the traceback does not name the remedy
        print(
            f"error: {error.name} is not installed. torch and torchvision must be there; "
            "`make wheels` elsewhere fills a folder with everything else (benchmarks/wheels.py)",
            file=sys.stderr,
        )
        sys.exit(2)
    command.start(started)
