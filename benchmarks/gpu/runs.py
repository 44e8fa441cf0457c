"""The training command itself, as a user starts it: its rate, and a stop half way."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gpu import inputs
from benchmarks.gpu.group import difference
from benchmarks.gpu.inputs import Settings
from benchmarks.gpu.runner import Record, each
from benchmarks.gpu.steps import PRECISION
from rft.clip.classifier import load_state
from rft.runs import filenames
from rft.runs.filenames import LAST
from rft.shards.images import Kind

ROOT = Path(__file__).parents[2]
KINDS: tuple[Kind, ...] = ("pixels", "jpeg")
LOG = Path("/proc/self/fd/2")  # a part's standard error is its log
# prefixes of rft's error messages and of a traceback's last line
ERROR = re.compile(r"error\b|[\w.]*(Error|Exception)\b")
GROUPED = 64  # images of the step in a process group


def trainer(record: Record, settings: Settings, *, compiled: bool = False) -> None:
    """Time the complete training command, with loader, logs and checkpoint, for one epoch.

    As written, or `compiled`: auto would not compile for so few steps.
    """
    largest = settings.models[-1]
    kinds = KINDS[:1] if compiled else KINDS
    # most informative first; if images need decoding, the fastest model shows it best
    cases = [(model, kind) for kind in kinds for model in reversed(settings.models)]
    cases.sort(key=lambda case: case == (largest, "jpeg"))

    def train(model: str, encoding: Kind) -> None:
        started = time.perf_counter()
        prepare(settings, model, encoding)
        folder = settings.work / f"run-{model}-{encoding}"
        forget(folder)
        made = time.perf_counter()
        command = train_command(settings, model, encoding, folder)
        command += ["--compile", "on" if compiled else "off"]
        in_fork(partial(run_module, "rft.train", command))
        took = {
            "making": round(made - started, 1),
            "whole_seconds": round(time.perf_counter() - made, 1),
        }
        record.put(model, encoding, **rates(folder, settings), **took)
        forget(folder)  # gigabytes of checkpoints

    each({f"{model} {encoding}": partial(train, model, encoding) for model, encoding in cases})


def rates(folder: Path, settings: Settings) -> dict[str, Any]:
    """Summarise a run's metrics, excluding its first third.

    A rate that the loader cannot keep up shows in the batches that wait to be taken: they grow
    fewer from the first row to the last while the rate is still the step's.
    """
    lines = (folder / filenames.METRICS).read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "images_per_s" in row]
    every = max(1, settings.steps // 6)
    warm = [row for row in rows if row["step"] > settings.steps / 3]
    seconds = [every * settings.batch_size / row["images_per_s"] for row in warm]
    waiting = sum(every * row["data_wait_ms"] / 1000 for row in warm)
    return {
        "images_per_s": round(len(warm) * every * settings.batch_size / sum(seconds), 1),
        "waiting_share": round(waiting / sum(seconds), 4),
        "batches_ready": [round(row["queue_depth"], 1) for row in (warm[0], warm[-1])],
        "steps": len(warm) * every,
    }


def resume(record: Record, settings: Settings) -> None:
    """Run one rank under torchrun: the process group of several GPUs, a stop and a resumed run."""
    model = settings.models[0]
    prepare(settings, model, "pixels")
    record.put(model=model)
    sizes = (str(min(settings.batch_size, GROUPED)), str(settings.classes))
    found = settings.work / "group.json"
    torchrun("benchmarks.gpu.group", str(found), model, settings.device, *sizes)
    record.put(group=json.loads(found.read_text()))
    folders = [settings.work / f"resume-{name}" for name in ("whole", "again", "stopped")]
    for folder in folders:
        forget(folder)
    whole, again, stopped = folders
    commands = {run: train_command(settings, model, "pixels", run) for run in folders}
    for run in (whole, again):
        in_fork(partial(run_module, "rft.train", commands[run]))
    record.put(two_runs=compare_runs(whole, again))
    # torchrun counts a run that stopped on request as failed
    words = (str(settings.steps // 3), *commands[stopped])
    torchrun("benchmarks.gpu.interrupted", *words, check=False)
    if (stopped / filenames.TRAINING).exists():
        raise RuntimeError("the run ended before it was stopped")
    record.put(stopped_after=json.loads((stopped / filenames.PROGRESS).read_text())["step"])
    torchrun("rft.train", *commands[stopped])
    record.put(resumed_run=compare_runs(whole, stopped))
    for folder in folders:
        forget(folder)


def compare_runs(left: Path, right: Path) -> dict[str, Any]:
    """Compare two runs' last weights."""
    ours, theirs = (load_state(folder / LAST)[0] for folder in (left, right))
    return difference(ours, theirs)


def prepare(settings: Settings, model: str, encoding: Kind) -> None:
    """Write the inputs of a training in a separate process, so that this one can still fork.

    A fork of a process whose torch has begun to use several threads can hang.
    """

    def make() -> None:
        inputs.write_shards(settings, encoding, inputs.image_size(model))
        inputs.write_clip(settings, model)

    in_fork(make)


def train_command(settings: Settings, model: str, encoding: Kind, folder: Path) -> list[str]:
    """Build the command line of a training, without the program."""
    data = inputs.write_shards(settings, encoding, inputs.image_size(model))
    options = {
        "data": data,
        "run-dir": folder,
        "model.clip": inputs.write_clip(settings, model),
        "device": settings.device,
        "precision": PRECISION,
        "loader.batch-size": settings.batch_size,
        "loader.held-out": 0,
        "loader.workers": settings.workers,
        "optim.epochs": 1,
        "log.every-steps": max(1, settings.steps // 6),
        "log.checkpoint-steps": 10**6,
        "log.image-steps": 0,
    }
    words = (word for name, value in options.items() for word in (f"--{name}", str(value)))
    return ["object-mask-single-fill", *words]


def torchrun(*words: str, check: bool = True) -> None:
    """Run a module and its arguments as one rank under torchrun.

    Raises:
        RuntimeError: with the last error that it printed, if it did not end well and `check` holds.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    said = log_size()
    die = machine.die_with_parent
    result = subprocess.run([*command, "-m", *words], cwd=ROOT, preexec_fn=die, check=False)
    if result.returncode and check:
        raise RuntimeError(last_error(said) or f"{words[0]} ended with {result.returncode}")


def forget(folder: Path) -> None:
    """Delete a run, so that a later one does not count as finished."""
    if folder.exists():
        shutil.rmtree(folder)


def in_fork(work: Callable[[], object]) -> None:
    """Run `work` in a copy of this process, which has neither touched the GPU nor computed.

    Raises:
        RuntimeError: with the last error that it printed, if it did not end well.
    """
    said = log_size()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            machine.die_with_parent()
            work()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise RuntimeError(last_error(said) or f"it ended with {status}")


def log_size() -> int:
    """Return the size of the part's log, to which this process and its children print."""
    sys.stdout.flush()
    sys.stderr.flush()
    return LOG.stat().st_size


def last_error(start: int) -> str:
    """Find the last error line in the part's log, from a position on."""
    if not LOG.is_file():  # a terminal or a pipe, outside of a part
        return ""
    with LOG.open(errors="replace") as stream:
        stream.seek(start)
        lines = [line.strip() for line in stream if ERROR.match(line)]
    return lines[-1][:300] if lines else ""


def run_module(name: str, words: Sequence[str]) -> None:
    """Run a module as `python -m NAME WORDS`, in this process."""
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
