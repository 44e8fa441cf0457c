"""The training command itself, as a user starts it: its rate, and a stop in its middle."""

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import inputs
from benchmarks.gpu.group import difference
from benchmarks.gpu.inputs import Settings
from benchmarks.gpu.runner import Record
from benchmarks.gpu.steps import PRECISION
from rft.clip.classifier import LAST, load_state
from rft.data import encode

ROOT = Path(__file__).parents[2]
KINDS: tuple[encode.Kind, ...] = ("pixels", "jpeg")
GROUPED = 64  # images of the step that is run in a process group


def trainer(record: Record, settings: Settings) -> None:
    """Time the whole training command, with loader, logs and checkpoint, one epoch."""
    largest = settings.models[-1]
    # the most telling first; where images come from a decoder, the fastest model shows it most
    cases = [(model, kind) for kind in KINDS for model in reversed(settings.models)]
    cases.sort(key=lambda case: case == (largest, "jpeg"))
    for model, encoding in cases:
        started = time.perf_counter()
        prepare(settings, model, encoding)
        made = time.perf_counter() - started
        folder = settings.work / f"run-{model}-{encoding}"
        forget(folder)
        started = time.perf_counter()
        in_fork(partial(run_module, "rft.train", train_command(settings, model, encoding, folder)))
        took = time.perf_counter() - started
        values = rates(folder, settings)
        record.put(model, encoding, **values, whole_seconds=round(took, 1), making=round(made, 1))
        forget(folder)  # gigabytes of checkpoints


def rates(folder: Path, settings: Settings) -> dict[str, float]:
    """Return a run's rate and its share of waiting for data, without the first third."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "images_per_s" in row]
    every = max(1, settings.steps // 6)
    warm = [row for row in rows if row["step"] > settings.steps / 3]
    seconds = [every * settings.batch_size / row["images_per_s"] for row in warm]
    waiting = sum(every * row["data_wait_ms"] / 1000 for row in warm)
    return {
        "images_per_s": round(len(warm) * every * settings.batch_size / sum(seconds), 1),
        "waiting_share": round(waiting / sum(seconds), 4),
        "steps": len(warm) * every,
    }


def resume(record: Record, settings: Settings) -> None:
    """Run one rank under torchrun: the group of several GPUs, then a stop and a resumed run."""
    model = settings.models[0]
    prepare(settings, model, "pixels")
    record.put(model=model)
    sizes = (str(min(settings.batch_size, GROUPED)), str(settings.classes))
    command = [*launcher(), "benchmarks.gpu.group", model, settings.device, *sizes]
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    record.put(group=json.loads(result.stdout.splitlines()[-1]))
    folders = {name: settings.work / f"resume-{name}" for name in ("whole", "again", "stopped")}
    for folder in folders.values():
        forget(folder)
    for name in ("whole", "again"):
        in_fork(partial(run_module, "rft.train", resume_command(settings, folders[name])))
    record.put(two_runs=compare_runs(folders["whole"], folders["again"]))
    record.put(stopped_after=stop_and_resume(settings, folders["stopped"]))
    record.put(resumed_run=compare_runs(folders["whole"], folders["stopped"]))


def stop_and_resume(settings: Settings, folder: Path) -> int:
    """Stop a run under torchrun after a third and run it to its end; return where it stopped."""
    words = resume_command(settings, folder)
    stopped = [*launcher(), "benchmarks.gpu.interrupted", str(settings.steps // 3), *words]
    # a run that stopped on request is no success for torchrun
    subprocess.run(stopped, cwd=ROOT, check=False)
    step = json.loads((folder / "progress.json").read_text())["step"]
    if (folder / "training.json").exists():
        raise RuntimeError("the run ended before it was stopped")
    subprocess.run([*launcher(), "rft.train", *words], cwd=ROOT, check=True)
    return step


def resume_command(settings: Settings, folder: Path) -> list[str]:
    """Return the training command that is stopped and resumed: the smallest model, on pixels."""
    return train_command(settings, settings.models[0], "pixels", folder)


def compare_runs(left: Path, right: Path) -> dict[str, Any]:
    """Return whether two runs' last weights are equal, and by how much they are not."""
    ours, theirs = (load_state(folder / LAST)[0] for folder in (left, right))
    return difference(ours, theirs)


def prepare(settings: Settings, model: str, encoding: encode.Kind) -> None:
    """Make the inputs of a training, in a process of its own, so that more can be forked from this.

    A fork of a process whose torch has begun to use several threads can hang.
    """

    def make() -> None:
        inputs.write_shards(settings, encoding, inputs.image_size(model))
        inputs.write_clip(settings, model)

    in_fork(make)


def train_command(settings: Settings, model: str, encoding: encode.Kind, folder: Path) -> list[str]:
    """Return the command line of a training, without the program."""
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


def launcher() -> list[str]:
    """Return torchrun's command for one rank, up to the module's name."""
    return [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=1",
            "-m",
        ),
    ]


def forget(folder: Path) -> None:
    """Delete what an earlier call left of a run."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def in_fork(work: Callable[[], object]) -> None:
    """Run `work` in a copy of this process, which has neither touched the GPU nor computed.

    Raises:
        RuntimeError: if it did not end well; what it printed is in the part's log.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise RuntimeError(f"it ended with {status}; its output is above")


def run_module(name: str, words: Sequence[str]) -> None:
    """Run a module as `python -m NAME WORDS`, in this process."""
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
