"""Speed of prediction relative to evaluation: `python -m benchmarks.predict [--save]`.

The same model predicts the same photographs (benchmarks/photos.py), as JPEG files and as a packed
set of these files, in turn:

- predict: the work of `rft predict` except printing (`rft.predict.images.read_squares`,
  `Model.forward`, `Model.predictions`), with threads that decode ahead.
- evaluate: the work of `rft.evaluate` (`rft.evaluate.count.predict`), with one loader process per
  core that decodes ahead.

Times are those of the complete pass, and of the first images alone. The first ratio is that of
complete passes, in which an evaluation starts loader processes. The second is that of the time
added by the other images: predict / evaluate there must stay near 1. Weights are random. The last
line is one JSON object.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import machine, photos, ratios
from benchmarks.step import WORLD
from rft import cli, cpus
from rft.clip.classifier import Classifier, save_classifier
from rft.clip.load import MINIATURE, architecture_of
from rft.config import MAX_PIXELS
from rft.evaluate.count import predict
from rft.evaluate.forward import TOGETHER
from rft.loading.dataset import PackedDataset
from rft.predict.images import read_squares
from rft.predict.model import Model, load
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
FIRST = TOGETHER  # images of the short pass, whose seconds are subtracted


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time predictions of photographs, and an evaluation of the same photographs packed."""

    images: int = 2000
    """Photographs; more than one forward holds."""
    rounds: int = 5
    """Rounds of both, in turn."""
    clip: str = MINIATURE
    """CLIP that provides the model's image tower. The miniature's is fast, so decoding counts;
    with ViT-B-32 on a CPU both only wait for the tower."""
    workers: int = cpus.available()
    """Loader processes of the evaluation."""
    work: Path = Path("build/predict")
    """Folder for photographs, packed set and weights."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


def make_model(arguments: Arguments, packed: PackedDataset) -> Model:
    """Write a model with random weights and the classes of a set, and load it."""
    architecture = architecture_of(arguments.clip)
    classes = packed.manifest.label_space
    head = nn.Linear(architecture.embed_dim, len(classes))
    path = arguments.work / "model.safetensors"
    model = Classifier(architecture.build_visual(), head, architecture)
    save_classifier(str(path), model, {"step": "0"}, classes)
    return load(path)


def predict_files(model: Model, paths: Sequence[Path]) -> int:
    """Predict files as `rft predict` does; return their number."""
    found = []
    for squares in read_squares(paths, model.image_size, TOGETHER, max_pixels=MAX_PIXELS):
        found += model.predictions(model.forward(squares.images_BCHW)[1], 5)
    return len(found)


def evaluate_packed(model: Model, packed: PackedDataset, images: int, workers: int) -> int:
    """Evaluate the first images of a packed set; return their number."""
    (found,) = predict(
        [model.classifier],
        packed,
        image_size=model.image_size,
        world=WORLD,
        device=model.device,
        samples=np.arange(images),
        workers=workers,
    )
    return found.count.total


def measure(arguments: Arguments) -> dict[str, Any]:
    """Collect the document to save."""
    (url,) = photos.pack_as(["original"], arguments.work, arguments.images).values()
    packed = PackedDataset(url)
    model = make_model(arguments, packed)
    paths = sorted((arguments.work / "photos" / "train").glob("*/*.JPEG"))
    parts: dict[str, Callable[[int], int]] = {
        "predict": lambda images: predict_files(model, paths[:images]),
        "evaluate": lambda images: evaluate_packed(model, packed, images, arguments.workers),
    }
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, work in parts.items():
            for part, images in ((name, arguments.images), (f"{name}_first", FIRST)):
                began = time.perf_counter()
                # the results are on the CPU, so the GPU is idle
                count = work(images)
                seconds.setdefault(part, []).append(time.perf_counter() - began)
                assert count == images, "an image was lost"
    added = {
        name: [
            whole - first
            for whole, first in zip(seconds[name], seconds[f"{name}_first"], strict=True)
        ]
        for name in parts
    }
    gpu = model.device.type == "cuda"
    return {
        "benchmark": "predict",
        **machine.describe(("rft/predict", "rft/evaluate", "rft/loading", "rft/shards")),
        "device": model.device.type,
        "accelerator": torch.cuda.get_device_name() if gpu else None,
        "threads_that_decode": cpus.available(),
        "workers": arguments.workers,
        "images": arguments.images,
        "clip": arguments.clip if arguments.clip == MINIATURE else "other",
        "seconds": {part: [round(s, 6) for s in all_] for part, all_ in seconds.items()},
        "predict_over_evaluate": ratios.of_rounds(seconds["predict"], seconds["evaluate"]),
        "added_over_added": ratios.of_rounds(added["predict"], added["evaluate"]),
    }


def main() -> None:
    """Measure, print and, with --save, write the result."""
    arguments = cli.parse(Arguments, prog="benchmarks.predict")
    result = measure(arguments)
    if arguments.save:
        where = RESULTS / f"predict_{'gpu' if result['accelerator'] else 'cpu'}.json"
        files.write_json(str(where), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
