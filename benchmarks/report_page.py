"""Size and time of a report of many runs: `python -m benchmarks.report_page`.

Run folders are synthetic: weights of one small tensor, curves, and predictions on sets of the
benchmarks' sizes, in which all systems find the same images hard. The report command then runs in
its own process. The last line is one JSON object.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save

from benchmarks import machine
from rft import cli
from rft.classes import Classes
from rft.recipes import MASKED
from rft.runs import filenames
from rft.runs.predictions import Predictions, path_of
from rft.sets import BENCHMARKS, TEST_SETS
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
NAME = "report_page"
CLASSES = 1000
RECIPES = ("zero-shot", "vanilla", "wise-ft-0.5", "uniform-soup", "no-mask", *MASKED)
EPOCHS = 10  # of the synthetic trainings
LINES = 2500  # of each run's metrics, as many as a training of the paper logs


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Report on synthetic runs; measure its bytes and seconds."""

    runs: int = 40
    """Run folders; after the recipes come further learning rates of vanilla."""
    images: float = 1.0
    """Share of each benchmark's images."""
    folder: Path | None = None
    """Folder for runs and report; a temporary folder by default."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


def invent(name: str, images: int, skill: float, seed: int) -> Predictions:
    """Generate a system's predictions of a set; `skill` is roughly its accuracy."""
    # of the set: the same for every system
    of_set = np.random.default_rng(list(name.encode()))
    hard_N, label_N = of_set.uniform(size=images), of_set.integers(0, CLASSES, images, np.int32)
    draws = np.random.default_rng([seed, *name.encode()])
    margin_N = skill - hard_N + draws.normal(0, 0.1, images)
    right_N = margin_N > 0
    confidence_N = (0.3 + 0.7 / (1 + np.exp(-6 * np.abs(margin_N)))).clip(0, 1)
    other_N = (label_N + draws.integers(1, CLASSES, images, np.int32)) % CLASSES
    rank_N = np.where(right_N, 0, draws.geometric(0.3, images))
    likelihood_N = np.log(np.where(right_N, confidence_N, (1 - confidence_N) / rank_N.clip(1)))
    return Predictions(
        key=np.array([f"{name}/image_{n:08d}" for n in range(images)]),
        label=label_N,
        prediction=np.where(right_N, label_N, other_N).astype(np.int32),
        rank=rank_N.astype(np.int32),
        confidence=confidence_N.astype(np.float32),
        log_likelihood=likelihood_N.clip(-50, 0).astype(np.float32),
    )


def make_run(path: Path, number: int, share: float) -> None:
    """Write one run folder, complete and evaluated."""
    recipe = RECIPES[number] if number < len(RECIPES) else "vanilla"
    skill = 0.5 + 0.2 * float(np.random.default_rng(number).uniform())
    config: dict[str, Any] = {
        "recipe": recipe,
        "seed": 0,
        "precision": "bf16",
        "model": {"clip": "ViT-B-32"},
    }
    if recipe != "uniform-soup" and not recipe.startswith("wise-"):
        # rounded: 1.1e-05, not 1.0999999999999999e-05, and never equal to a recipe's own
        rate = 3e-5 if number < len(RECIPES) else round(1e-4 + number * 1e-6, 9)
        config["optim"] = {"lr": rate, "epochs": EPOCHS}
        files.write_json(
            str(path / filenames.TRAINING), {"steps": LINES, "best_step": LINES, "world_size": 8}
        )
        files.write_bytes(str(path / filenames.METRICS), metrics(number).encode())
    files.write_json(str(path / filenames.CONFIG), config)
    files.write_json(str(path / filenames.PROVENANCE), {"rft": "0", "command": ["rft.train"]})
    entries = {"recipe": recipe, "step": str(LINES), "classes": classes()}
    weights = save(
        {"head.weight": np.full((2, 2), number, np.float32)}, {"rft": json.dumps(entries)}
    )
    files.write_bytes(str(path / filenames.SELECTED), weights)
    files.write_json(
        str(path / filenames.RESULTS),
        {
            "schema": 1,
            "step": LINES,
            "checkpoint_sha256": files.sha256_bytes(weights),
            "config_sha256": files.sha256_file(path / filenames.CONFIG),
            "sets": {name: count(path, name, skill, number, share) for name in TEST_SETS},
        },
    )


def classes() -> dict[str, Any]:
    """Generate as many classes as ImageNet has."""
    names = tuple(f"class of some words {n}" for n in range(CLASSES))
    return dataclasses.asdict(Classes(ids=tuple(f"n{n:08d}" for n in range(CLASSES)), names=names))


def metrics(number: int) -> str:
    """Generate the curves of a training."""
    draws = np.random.default_rng(number)
    step_L = np.arange(1, LINES + 1)
    ce_L = 0.5 + np.exp(-step_L / 500) + draws.normal(0, 0.05, LINES)
    lines = [
        {"step": int(step), "ce": float(ce), "mse": float(ce) / 10}
        for step, ce in zip(step_L, ce_L, strict=True)
    ]
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def count(path: Path, name: str, skill: float, number: int, share: float) -> dict[str, Any]:
    """Write the predictions of a set; return its entry in results.json."""
    images = max(1, round(share * BENCHMARKS[name].images))
    rows = invent(name, images, skill, number)
    data = rows.to_bytes()
    files.write_bytes(str(path_of(path, name)), data)
    return {
        "correct": int(rows.right.sum()),
        "total": images,
        "manifest_sha256": files.sha256_bytes(name.encode()),
        "predictions_sha256": files.sha256_bytes(data),
    }


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Write the runs and their report; return its time, memory and bytes."""
    runs, out = folder / "runs", folder / "report"
    for number in range(arguments.runs):
        path = runs / f"run{number:03d}"
        if not (path / filenames.RESULTS).is_file():
            make_run(path, number, arguments.images)
    words = [sys.executable, "-m", "rft.report", str(runs), "--out", str(out)]
    before, started = _cpu_of_children(), time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"the report failed: {done.stderr.strip()}")
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    total = sum(round(max(1, arguments.images * BENCHMARKS[name].images)) for name in TEST_SETS)
    return {
        **machine.describe(("rft/report", "rft/statistics", "rft/runs")),
        "runs": arguments.runs,
        "images": total,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(_cpu_of_children() - before, 1),
        "page_bytes": sizes["index.html"],
        "file_bytes": sizes,
    }


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    return (
        f"{machine.made(result)}.\n\n"
        "| runs | test images of each | seconds | of one core | page |\n"
        "| --: | --: | --: | --: | --: |\n"
        f"| {result['runs']} | {result['images']:,} | {result['seconds']:.1f} | "
        f"{result['cpu_seconds']:.1f} | {result['page_bytes'] / 1e6:.2f} MB |\n"
    )


def main() -> None:
    """Measure, print, and keep the result."""
    arguments = cli.parse(Arguments, prog=f"benchmarks.{NAME}")
    with TemporaryDirectory() as temporary:
        result = measure(arguments, arguments.folder or Path(temporary))
    text = table(result)
    print(text)
    print(json.dumps(result))
    if arguments.save:
        files.write_json(str(RESULTS / f"{NAME}.json"), result)
        files.write_bytes(str(RESULTS / f"{NAME}.md"), text.encode())


if __name__ == "__main__":
    cli.run(main)
