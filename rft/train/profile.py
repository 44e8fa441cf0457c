"""`--profile`: what ten steps of the main rank did, operation by operation; no result changes."""

import gzip
import logging
import tempfile
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from rft.storage import files, local

STEPS = 10
SKIPPED = 5  # the first ones allocate, compile and fill the loader's queue
OPERATORS = 25  # rows of the table
HOST = '"host_name":'  # a line of its own in a trace

log = logging.getLogger(__name__)


class profiling:  # noqa: N801 (used as a context)
    """Profiles some steps of the body, which calls `step` after each of its own.

    Where fewer steps are left than are wanted, those that there are. Writes to `folder` a trace
    for chrome://tracing or Perfetto, and the operators that took the most time as text, and prints
    where they are as soon as the last profiled step is done.

    Args:
        folder: where to write; None profiles nothing.
        first_step: steps of the run that are already done.
        total: steps of the whole run.
    """

    def __init__(self, folder: Path | None, first_step: int, total: int) -> None:
        self._folder = folder
        self._done = first_step
        left = total - first_step
        wanted = min(STEPS, left)
        skipped = min(SKIPPED, left - wanted)
        self._first = first_step + skipped
        self._last = self._first + wanted
        self._profiler: profile | None = None
        if folder is not None and wanted:
            # the step before the first one starts the tools, which takes them long
            warmup = min(1, skipped)
            self._profiler = profile(
                activities=[ProfilerActivity.CPU]
                + [ProfilerActivity.CUDA] * torch.cuda.is_available(),
                schedule=schedule(wait=skipped - warmup, warmup=warmup, active=wanted, repeat=1),
                on_trace_ready=self._write,
            )

    def __enter__(self) -> Self:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        # a run that stops or fails meanwhile leaves the steps that it did
        if self._profiler is not None:
            self._profiler.stop()
        if self._folder is not None and self._done <= self._first:
            log.info(f"--profile: no step was done after step {self._first}, no trace")

    def step(self) -> None:
        """Count a step."""
        self._done += 1
        if self._profiler is not None:
            self._profiler.step()
            if self._done == self._last:
                self._profiler.stop()
                self._profiler = None

    def _write(self, profiler: profile) -> None:
        steps = self._done - self._first
        if self._folder is None or steps < 1:
            return
        name = f"steps-{self._first + 1}-{self._done}"
        write_profile(profiler, self._folder, name)
        fewer = "" if steps == STEPS else f" (not {STEPS}: there were no more)"
        log.info(f"profile of {steps} steps{fewer}: {self._folder / name}.json.gz")


def write_profile(profiler: profile, folder: Path, name: str) -> None:
    """Write the trace (NAME.json.gz) and the table of operators (NAME.txt)."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    table = profiler.key_averages().table(
        sort_by=f"self_{where}_time_total", row_limit=OPERATORS, max_name_column_width=40
    )
    files.write_bytes(str(folder / f"{name}.txt"), table.encode())
    with tempfile.TemporaryDirectory() as temporary:
        trace = Path(temporary) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        with (
            files.publish(str(folder / f"{name}.json.gz")) as path,
            trace.open() as source,
            local.writer(path) as packed,
            gzip.open(packed, "wt", compresslevel=5) as target,
        ):
            # what is shared of a run does not name the machine
            target.writelines(line for line in source if not line.strip().startswith(HOST))
