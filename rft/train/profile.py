"""`--profile`: a trace of the operations in ten steps of the main rank; no result changes."""

import gzip
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from rft.storage import files, local

STEPS = 10
SKIPPED = 5  # the first steps allocate, compile and fill the loader's queue
OPERATORS = 25  # rows of the table
HOST = '"host_name":'  # a line of its own in a trace

log = logging.getLogger(__name__)


@contextmanager
def profiling(folder: Path | None, first_step: int, total: int) -> Iterator[Callable[[], object]]:
    """Profile some steps of the body, which calls the yielded function after each step.

    If fewer of the run's `total` steps are left, all of them are profiled. A trace for
    chrome://tracing or Perfetto and a text table of the slowest operators are written to `folder`
    (None: no profile), and their path is logged when the last profiled step is done. If the run
    stops or fails earlier, the finished steps are written.
    """
    if folder is None:
        yield lambda: None
        return
    left = total - first_step
    wanted = min(STEPS, left)
    skipped = min(SKIPPED, left - wanted)
    # one warm-up step before the first profiled one, because starting the profiler is slow
    warmup = min(1, skipped)
    first = first_step + skipped

    def write(profiler: profile) -> None:
        steps = profiler.step_num - skipped
        if steps < 1:
            return
        name = f"steps-{first + 1}-{first + steps}"
        write_profile(profiler, folder, name)
        fewer = "" if steps == STEPS else f" (not {STEPS}: the run had no more)"
        log.info(f"profile of {steps} steps{fewer}: {folder / name}.json.gz")

    profiler = profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available(),
        # torch refuses a schedule without an active step, as in a run without remaining steps
        schedule=schedule(wait=skipped - warmup, warmup=warmup, active=max(wanted, 1), repeat=1),
        on_trace_ready=write,
    )
    try:
        with profiler:
            yield profiler.step
    finally:
        if profiler.step_num <= skipped:
            log.info(f"--profile: no step was done after step {first}, so no trace was written")


def write_profile(profiler: profile, folder: Path, name: str) -> None:
    """Write the trace (NAME.json.gz) and the table of operators (NAME.txt)."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    table = profiler.key_averages().table(
        sort_by=f"self_{where}_time_total", row_limit=OPERATORS, max_name_column_width=40
    )
    files.write_bytes(str(folder / f"{name}.txt"), table.encode())
    # not directly into the run folder: torch writes in pieces, and includes the host name
    with tempfile.TemporaryDirectory() as temporary:
        trace = Path(temporary) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        with (
            files.publish(str(folder / f"{name}.json.gz")) as path,
            trace.open() as source,
            local.writer(path) as packed,
            gzip.open(packed, "wt", compresslevel=5) as target,
        ):
            # remove the host name, because run folders are shared
            target.writelines(line for line in source if not line.strip().startswith(HOST))
