"""Accuracy of the memory that `--dry-run` prints: `python -m benchmarks.memory`.

For each recipe and precision:
  counted   the dry run's figure for --batch-size images on one rank;
and for the main recipe:
  line      the dry run's figure for a number of ranks that is interpolated (rft/train/memory.py),
            over the count of torch's tracker there, in the middle of the table;
  real      the dry run's figure for few images, over the peak resident memory of the real step on
            this CPU, in its own process, as reported by the system independently of the tracker;
            and the same for the memory of one more image.
benchmarks.gpu compares the figure with a GPU's allocator. The last line is one JSON object.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine, step
from benchmarks.cam_memory import memory as resident
from rft import cli, recipes
from rft.clip.classifier import Classifier
from rft.config import Precision
from rft.storage import files
from rft.train import memory
from rft.train.estimate import possible_ranks
from rft.train.job import Job
from rft.train.optim import build_optimizer
from rft.train.step import accumulate_gradients

CASES = {recipes.DEFAULT: False, "vanilla": False, "recompute": True}
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Arguments:
    """Compare the dry run's memory with torch's tracker and with real steps."""

    model: str = "ViT-B-32"
    """open_clip model name; its weights are random."""
    batch_size: int = 512
    few: tuple[int, int] = (4, 12)
    """Images of the two real steps, whose difference gives the memory per image."""
    real: tuple[Precision, ...] = ("fp32",)
    """Precisions of the real steps."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


class Case(NamedTuple):
    """A kind of step."""

    model: str
    name: str
    """A recipe, or `recompute`: the main one with that option."""
    precision: Precision

    def job(self, student: Classifier, images: int) -> Job:
        """Build the job of a step with so many images."""
        recompute = CASES[self.name]
        arguments = step.Arguments(model=self.model, batch_size=images, recompute=recompute)
        name = recipes.DEFAULT if recompute else self.name
        recipe = recipes.build(name, data="-", run="-")
        return step.build_job(arguments, CPU, self.precision, student, recipe)


def real_bytes(case: Case, images: int) -> int:
    """Measure the peak resident memory of a real step, including weights and AdamW's state."""
    job = case.job(step.build_classifier(case.model, 1000), images)
    if case.precision == "bf16":
        memory.norms_as_on_a_gpu(job.objective)
    arguments = step.Arguments(model=case.model, batch_size=images)
    batch = step.random_batch(arguments, CPU, job.batches.image_size)
    optimizer = build_optimizer(job.objective, job.config.optim)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state = sum(value.nbytes for found in optimizer.state.values() for value in found.values())
    there = memory.module_bytes(job.objective) + state + batch.images_BCHW.nbytes
    # exclude the peak of building the model
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    accumulate_gradients(job, job.objective, batch, step=0)
    optimizer.step()
    return there + resident("VmHWM") - before


def in_own_process(case: Case, images: int) -> int:
    """Measure a real step in its own process.

    Raises:
        ValueError: if the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "child", *case, str(images)]
    # return freed memory at once and use no spare arenas, so that the peak is the memory in use
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{case} with {images} images failed: {result.stderr.strip()[-300:]}")
    return int(result.stdout.split()[-1])


def measure_case(case: Case, student: Classifier, arguments: Arguments) -> dict[str, Any]:
    """Measure a row of the result."""
    job = case.job(student, arguments.batch_size)
    # one recipe suffices: the interpolation is the same for all, and tests/train/test_memory.py
    # compares every recipe's step with a small model's real one
    shows = case.name == recipes.DEFAULT
    ranks = possible_ranks(job.config, 1) if shows else [1]
    need = memory.needs(job, ranks)
    if need.estimated:
        raise ValueError(f"nothing to compare: {need.estimated}")
    row: dict[str, Any] = {
        **case._asdict(),
        "images": arguments.batch_size,
        "dry_run_bytes": round(need.totals[0]),
        "line": None,
        "real": None,
    }
    if len(ranks) > 1:
        middle = len(ranks) // 2
        over = need.totals[middle] / memory.track(job, [ranks[middle]])[0]
        row["line"] = {"ranks": ranks[middle], "over_tracker": round(over, 4)}
    if shows and case.precision in arguments.real:
        low, high = arguments.few
        real = [in_own_process(case, images) for images in arguments.few]
        ours = [memory.track(case.job(student, images), [1])[0] for images in arguments.few]
        row["real"] = {
            "images": list(arguments.few),
            "bytes": real,
            "dry_run_over_real": [round(a / b, 4) for a, b in zip(ours, real, strict=True)],
            "bytes_per_image": round((real[1] - real[0]) / (high - low)),
            "per_image_over_real": round((ours[1] - ours[0]) / (real[1] - real[0]), 4),
        }
    return row


def measure(arguments: Arguments) -> dict[str, Any]:
    """Compare every case."""
    rows = []
    student = step.build_classifier(arguments.model, 1000)
    for name in CASES:
        for precision in PRECISIONS:
            case = Case(arguments.model, name, precision)
            rows.append(measure_case(case, student, arguments))
            print(json.dumps(rows[-1]), flush=True)
    return {"benchmark": "memory", **machine.describe(), "torch": torch.__version__, "rows": rows}


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["child"]:
        model, name, precision, images = sys.argv[2:]
        assert precision in PRECISIONS, precision
        print(real_bytes(Case(model, name, precision), int(images)))
        return
    arguments = cli.parse(Arguments, prog="benchmarks.memory")
    result = measure(arguments)
    if arguments.save:
        files.write_json(str(step.RESULTS / f"memory_{arguments.model}_cpu.json"), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
