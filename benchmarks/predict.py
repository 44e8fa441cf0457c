"""Is a prediction as fast as an evaluation? `python -m benchmarks.predict [--save]`.

The same photographs (benchmarks/photos.py) as JPEG files and as a packed set of these files are
predicted by the same model in turn:

- predict: what `rft predict` does for each image but print (`rft.predict.images.read_squares`,
  `Model.forward`, `Model.predictions`), threads decoding ahead.
- evaluate: what `rft.evaluate` does (`rft.evaluate.count.predict`), one loader process for each
  core decoding ahead.

Seconds are of the whole pass, and of what comes after its first forward: until then an evaluation
starts loader processes. predict / evaluate is the number that must stay near 1. Weights are drawn
at random. The last line is one JSON object.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time predictions of photographs, and an evaluation of the same ones packed."""

    images: int = 2000
    """Photographs."""
    rounds: int = 5
    """Times that both are timed, in turn."""
    clip: str = MINIATURE
    """CLIP whose image tower the model has. The miniature's takes little time, so decoding counts;
    with ViT-B-32 on a CPU both only wait for the tower."""
    work: Path = Path("build/predict")
    """Folder for photographs, packed set and weights."""
    save: bool = False
    """Write the result to benchmarks/results/ as well."""


def make_model(arguments: Arguments, packed: PackedDataset) -> Model:
    """Write a model of random weights with the classes of a set, and load it."""
    architecture = architecture_of(arguments.clip)
    classes = packed.manifest.label_space
    head = nn.Linear(architecture.embed_dim, len(classes))
    path = arguments.work / "model.safetensors"
    model = Classifier(architecture.build_visual(), head, architecture)
    save_classifier(str(path), model, {"step": "0"}, classes)
    return load(path)


class Clock:
    """Times a pass: all of it, and what comes after its first forward."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []

    def forwarded(self, _: int) -> None:
        """Note that a forward is through."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._times.append(time.perf_counter())

    def seconds(self, work: Callable[["Clock"], None]) -> tuple[float, float]:
        """Return the seconds of both."""
        self._times = []
        began = time.perf_counter()
        work(self)
        ended = time.perf_counter()
        return ended - began, ended - self._times[0]


def predict_files(model: Model, paths: list[Path], clock: Clock) -> int:
    """Predict files as `rft predict` does; return their number."""
    found = []
    for squares in read_squares(paths, model.image_size, TOGETHER, max_pixels=MAX_PIXELS):
        found += model.predictions(model.forward(squares.images_BCHW)[1], 5)
        clock.forwarded(len(squares.numbers))
    return len(found)


def evaluate_packed(model: Model, packed: PackedDataset, clock: Clock) -> int:
    """Evaluate a packed set; return the number of its images."""
    (found,) = predict(
        [model.classifier],
        packed,
        image_size=model.image_size,
        world=WORLD,
        device=model.device,
        workers=cpus.available(),
        progress=clock.forwarded,
    )
    return found.count.total


def measure(arguments: Arguments) -> dict[str, Any]:
    """Return everything that is saved."""
    (url,) = photos.pack_as(["original"], arguments.work, arguments.images).values()
    packed = PackedDataset(url)
    model = make_model(arguments, packed)
    paths = sorted((arguments.work / "photos" / "train").glob("*/*.JPEG"))
    clock = Clock(model.device)
    counts: set[int] = set()
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, whole, rest in (
            ("predict", *clock.seconds(lambda c: counts.add(predict_files(model, paths, c)))),
            ("evaluate", *clock.seconds(lambda c: counts.add(evaluate_packed(model, packed, c)))),
        ):
            seconds.setdefault(name, []).append(whole)
            seconds.setdefault(f"{name}_after_first", []).append(rest)
    assert counts == {arguments.images}, "both see every image"
    gpu = model.device.type == "cuda"
    return {
        "benchmark": "predict",
        **machine.describe(("rft/predict", "rft/evaluate", "rft/loading", "rft/shards")),
        "device": model.device.type,
        "accelerator": torch.cuda.get_device_name() if gpu else None,
        "decoding": cpus.available(),
        "images": arguments.images,
        "clip": arguments.clip if arguments.clip == MINIATURE else "other",
        "seconds": {part: [round(s, 6) for s in all_] for part, all_ in seconds.items()},
        "predict_over_evaluate": ratios.of_rounds(seconds["predict"], seconds["evaluate"]),
        "after_first": ratios.of_rounds(
            seconds["predict_after_first"], seconds["evaluate_after_first"]
        ),
    }


def main() -> None:
    """Measure, print, and save if asked to."""
    arguments = cli.parse(Arguments, prog="benchmarks.predict")
    result = measure(arguments)
    if arguments.save:
        where = RESULTS / f"predict_{'gpu' if result['accelerator'] else 'cpu'}.json"
        files.write_json(str(where), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
