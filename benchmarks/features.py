"""Savings by kept features: `python -m benchmarks.features [--save]`.

Complete trainings by the command, on generated images and random weights, with and without
features, in turn. The time of an epoch is that of its steps, including waits for data; selection
and checkpoints are excluded, as in a run's own images per second. A second number per epoch
includes both, and with so few images it is mostly the checkpoint. Finally one model is evaluated on
one set, twice. The last line is one JSON object.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import machine, step
from benchmarks.gpu import inputs
from rft import cli, dist
from rft.evaluate.count import count_correct
from rft.evaluate.forward import Kept
from rft.loading.dataset import PackedDataset
from rft.loading.features import FeatureFolder
from rft.runs import filenames
from rft.storage import files
from rft.train import command as training

RESULTS = Path(__file__).parent / "results"
RECIPES = ("linear-probe", "no-mask")
WAYS = {"without": ("--loader.features-gb", "0"), "kept": ()}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time linear-probe and no-mask epochs, and an evaluation, with and without features."""

    model: str = "ViT-B-32"
    """open_clip model name; its weights are random."""
    batch_size: int = 32
    """Images per step; a quarter of the held-out images."""
    steps: int = 8
    """Steps per epoch."""
    epochs: int = 4
    """Epochs per training; the first one writes the features."""
    rounds: int = 2
    """Trainings of each recipe and variant, in turn."""
    workers: int = 1
    """Loader processes."""
    work: Path = Path("build/features")
    """Folder for images, weights and runs."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """Seconds of each epoch of a training."""

    steps: list[float]
    with_selection: list[float]
    """Including the checkpoint at its end."""


def settings_of(arguments: Arguments) -> inputs.Settings:
    """Describe the inputs: complete batches plus the held-out images, so that no image remains."""
    return inputs.Settings(
        device="cpu",
        models=(arguments.model,),
        large=arguments.model,
        batch_size=arguments.batch_size,
        classes=10,
        rounds=arguments.rounds,
        # four steps' images are held out
        steps=arguments.steps + 4,
        workers=arguments.workers,
        work=arguments.work,
    )


def train(arguments: Arguments, recipe: str, way: Sequence[str]) -> Epochs:
    """Train once and read the run's own timing."""
    settings = settings_of(arguments)
    run = arguments.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    size = inputs.image_size(arguments.model)
    options = {
        "data": inputs.write_shards(settings, "pixels", size),
        "run-dir": run,
        "model.clip": inputs.write_clip(settings, arguments.model),
        "loader.batch-size": arguments.batch_size,
        "loader.held-out": 4 * arguments.batch_size,
        "loader.workers": arguments.workers,
        "optim.epochs": arguments.epochs,
        "log.every-steps": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with mock.patch.object(sys, "argv", ["rft.train", recipe, *words, *way]):
        began = time.time()
        training.main()
    lines = [json.loads(line) for line in (run / filenames.METRICS).open()]
    spent = [arguments.batch_size / line["images_per_s"] for line in lines if "loss" in line]
    ends = [line["time"] for line in lines if "held_out_correct" in line]
    assert len(spent) == arguments.steps * arguments.epochs
    assert len(ends) == arguments.epochs
    starts = [began, *ends]
    return Epochs(
        steps=[
            sum(spent[first : first + arguments.steps])
            for first in range(0, len(spent), arguments.steps)
        ],
        # the first one includes the start of the command and is left out
        with_selection=[b - a for a, b in zip(starts[1:-1], ends[1:], strict=True)],
    )


def evaluations(arguments: Arguments) -> list[float]:
    """Time the evaluation of the complete set, twice with one folder of features."""
    settings, size = settings_of(arguments), inputs.image_size(arguments.model)
    device = dist.pick_device("auto", step.WORLD)
    packed = PackedDataset(str(inputs.write_shards(settings, "pixels", size) / inputs.SET))
    model = step.build_classifier(arguments.model, settings.classes).eval().to(device)
    folder = FeatureFolder(arguments.work / "kept", 10**9)
    seconds, counts = [], []
    for _ in range(2):
        began = time.perf_counter()
        counts += count_correct(
            [model],
            packed,
            image_size=size,
            world=step.WORLD,
            device=device,
            workers=arguments.workers,
            kept=Kept.of(folder, [model]),
        )
        seconds.append(time.perf_counter() - began)
    folder.clear()
    assert counts[0] == counts[1]
    return seconds


def measure(arguments: Arguments) -> dict[str, Any]:
    """Collect the document to save."""
    found: dict[str, dict[str, list[Epochs]]] = {
        recipe: {way: [] for way in WAYS} for recipe in RECIPES
    }
    for _ in range(arguments.rounds):
        for recipe, ways in found.items():
            for way, epochs in ways.items():
                epochs.append(train(arguments, recipe, WAYS[way]))
    evaluated = [evaluations(arguments) for _ in range(arguments.rounds)]

    def first(runs: Sequence[Epochs]) -> float:
        return statistics.median(run.steps[0] for run in runs)

    def later(runs: Sequence[Epochs]) -> float:
        return statistics.median(seconds for run in runs for seconds in run.steps[1:])

    def whole(runs: Sequence[Epochs]) -> float:
        return statistics.median(seconds for run in runs for seconds in run.with_selection)

    probe, no_mask = (found[recipe] for recipe in RECIPES)
    device = dist.pick_device("auto", step.WORLD)
    gpu = device.type == "cuda"
    return {
        "benchmark": "features",
        **machine.describe(),
        "device": device.type,
        "accelerator": torch.cuda.get_device_name(device) if gpu else None,
        **{name: value for name, value in asdict(arguments).items() if name in SETTINGS},
        "seconds": {
            recipe: {way: [_rounded(run) for run in runs] for way, runs in ways.items()}
            for recipe, ways in found.items()
        },
        "evaluation_seconds": [[round(value, 3) for value in pair] for pair in evaluated],
        "probe_first_over_later": round(first(probe["kept"]) / later(probe["kept"]), 1),
        "probe_without_over_kept": round(later(probe["without"]) / later(probe["kept"]), 1),
        "probe_with_selection": round(whole(probe["without"]) / whole(probe["kept"]), 2),
        "probe_first_over_without": round(first(probe["kept"]) / first(probe["without"]), 3),
        "no_mask_without_over_kept": round(later(no_mask["without"]) / later(no_mask["kept"]), 3),
        "no_mask_first_over_without": round(first(no_mask["kept"]) / first(no_mask["without"]), 3),
        "evaluation_first_over_second": round(
            statistics.median(one / two for one, two in evaluated), 1
        ),
    }


SETTINGS = ("model", "batch_size", "steps", "epochs", "rounds", "workers")


def _rounded(run: Epochs) -> dict[str, list[float]]:
    return {name: [round(value, 4) for value in values] for name, values in asdict(run).items()}


ROWS = {
    "probe_first_over_later": "linear probe: the epoch that writes / a later one",
    "probe_without_over_kept": "linear probe: a later epoch without features / with them",
    "probe_with_selection": "the same with the epoch's evaluation and checkpoint",
    "no_mask_without_over_kept": "no-mask: a later epoch without features / with them",
    "no_mask_first_over_without": "no-mask: the epoch that writes / one without features",
    "evaluation_first_over_second": "`rft.evaluate`: the first evaluation / a second of the tower",
}


def table(result: dict[str, Any]) -> str:
    """Format a saved result as Markdown."""
    lines = [
        f"{result['model']}, batches of {result['batch_size']}, epochs of {result['steps']} steps "
        f"on the {result['device']}; medians of {result['rounds']} trainings each way, in turn; "
        f"{machine.made(result)}.",
        "",
        "| time | ratio |",
        "|---|--:|",
        *(f"| {meaning} | {result[name]:.3g} |" for name, meaning in ROWS.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and, with --save, write the result."""
    arguments = cli.parse(Arguments, prog="benchmarks.features")
    result = measure(arguments)
    if arguments.save:
        where = RESULTS / f"features_{'gpu' if result['accelerator'] else 'cpu'}"
        files.write_json(f"{where}.json", result)
        files.write_bytes(f"{where}.md", table(result).encode())
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
