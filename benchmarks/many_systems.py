"""What many systems cost beside their own compute: `python -m benchmarks.many_systems [--save]`.

WiSE-FT models between two ends, averaged in memory as `rft.evaluate --wise` does, see every test
set of the miniature world in one pass. Asked is how much longer the pass is than the reading and
decoding of one, the models' own compute aside:

- reading: every batch is read and decoded, and nothing else is done (`rft.loading.read`).
- beside: `predict` with systems that compute nothing: each answers with the logits that its model
  gave before. So this is reading, scoring, collecting and everything else that is not a model.
  beside / reading is the number that must stay below the bound.
- whole: `predict` with the models themselves.
- compute: the models' logits on the same batches, which are already in memory, and nothing else.
  (whole - compute) / reading is the same number by subtraction. It is the difference of two large
  times, so its range is wide: it is kept as a check of the first.

All are sums over the sets, taken in turn in each round, without loader processes, which would hide
reading behind compute. Loading, averaging and hashing the systems is timed apart: it is no part of
a pass over the data. Weights are drawn at random. The last line is one JSON object.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine, ratios
from benchmarks.step import WORLD
from rft import cli, dist
from rft.clip.classifier import Classifier, save_classifier
from rft.clip.load import MINIATURE, architecture_of
from rft.demo.miniature import prepare_data, shards
from rft.evaluate.checkpoints import load_checkpoints
from rft.evaluate.count import predict
from rft.evaluate.forward import TOGETHER
from rft.evaluate.unwritten import read_averages
from rft.loading.batches import EvaluationBatches
from rft.loading.dataset import PackedDataset
from rft.loading.read import read_batches
from rft.sets import TEST_SETS
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
BOUND = 1.3


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time one pass over many systems, less their own compute, and the reading alone."""

    systems: int = 20
    """WiSE-FT models; 2 or more."""
    rounds: int = 7
    """Times that everything is timed, in turn."""
    batch_size: int = 256
    """Images that are read together."""
    sets: tuple[str, ...] = TEST_SETS
    """Packed sets."""
    data: Path | None = None
    """Their data root; the miniature world, made in the work folder, if not given."""
    clip: str = MINIATURE
    """CLIP whose image tower the models have."""
    work: Path = Path("build/many_systems")
    """Folder for the world and the two ends."""
    save: bool = False
    """Write the result to benchmarks/results/ as well."""


class Answers(nn.Module):
    """A system that computes nothing: it gives its logits of a set in the order of the images."""

    def __init__(self, logits_NK: Tensor):
        super().__init__()
        self.logits_NK = logits_NK
        self.given = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the next rows."""
        self.given += len(images_BCHW)
        return self.logits_NK[self.given - len(images_BCHW) : self.given]


def load(arguments: Arguments, packed: PackedDataset) -> tuple[list[Classifier], float]:
    """Write two ends, average the systems; return them and the seconds of that."""
    classes = packed.manifest.label_space
    architecture = architecture_of(arguments.clip)
    ends = []
    for name, step in (("start", "0"), ("end", "100")):
        head = nn.Linear(architecture.embed_dim, len(classes))
        model = Classifier(architecture.build_visual(), head, architecture)
        ends.append(str(arguments.work / f"{name}.safetensors"))
        save_classifier(ends[-1], model, {"step": step}, classes)
    alphas = [f"{n / (arguments.systems - 1):.6f}" for n in range(arguments.systems)]
    began = time.perf_counter()
    systems = read_averages([[*ends, *alphas]], [], arguments.work / "out", "best")
    _, models = load_checkpoints(systems, WORLD, device())
    return models, time.perf_counter() - began


def device() -> torch.device:
    """Return where the models compute."""
    return dist.pick_device("auto", WORLD)


def batches_of(arguments: Arguments, packed: PackedDataset, size: int) -> list[Tensor]:
    """Read a set; return its images as they are forwarded together, each (B, C, H, W)."""
    return [
        part.clone()
        for batch in _read(arguments, packed, size)
        for part in batch.images_BCHW.split(TOGETHER)
    ]


def _read(arguments: Arguments, packed: PackedDataset, size: int) -> Any:
    # made up to whole forwards, as `predict` does
    whole = math.ceil(arguments.batch_size / TOGETHER) * TOGETHER
    samples = torch.arange(len(packed)).numpy()
    batches = EvaluationBatches(packed, samples, image_size=size, batch_size=whole)
    return read_batches(batches, range(len(batches)), workers=0, device=device())


@torch.no_grad()
def logits_of(models: Sequence[nn.Module], batches: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the logits of each model on each batch."""
    return [[model(images_BCHW) for images_BCHW in batches] for model in models]


def _seconds(work: Callable[[], object]) -> float:
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def measure_set(
    arguments: Arguments, packed: PackedDataset, models: Sequence[Classifier]
) -> Callable[[], Mapping[str, float]]:
    """Prepare a set; return what measures one round of it, seconds by part."""
    size = models[0].architecture.image_size
    batches = batches_of(arguments, packed, size)
    answers = [torch.cat(parts) for parts in logits_of(models, batches)]

    def run(systems: Sequence[nn.Module]) -> list[Any]:
        return predict(
            systems,
            packed,
            image_size=size,
            world=WORLD,
            device=device(),
            batch_size=arguments.batch_size,
        )

    def read() -> None:
        for _ in _read(arguments, packed, size):
            pass

    def compute() -> None:
        logits_of(models, batches)

    # what is timed is what is meant
    counts = [one.count for one in run(models)]
    assert counts == [one.count for one in run([Answers(one) for one in answers])]
    return lambda: {
        "reading": _seconds(read),
        "beside": _seconds(lambda: run([Answers(one) for one in answers])),
        "whole": _seconds(lambda: run(models)),
        "compute": _seconds(compute),
    }


def measure(arguments: Arguments) -> dict[str, Any]:
    """Return everything that is saved."""
    if arguments.data is None:
        prepare_data(arguments.work)
    root = arguments.data or shards(arguments.work)
    sets = {name: PackedDataset(str(root / name)) for name in arguments.sets}
    models, loading = load(arguments, next(iter(sets.values())))
    timed = [measure_set(arguments, packed, models) for packed in sets.values()]
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        found = [one() for one in timed]
        for part in found[0]:
            seconds.setdefault(part, []).append(sum(one[part] for one in found))
    rest = [a - b for a, b in zip(seconds["whole"], seconds["compute"], strict=True)]
    gpu = device().type == "cuda"
    return {
        "benchmark": "many_systems",
        **machine.describe(("rft/evaluate", "rft/loading", "rft/shards")),
        "device": device().type,
        "accelerator": torch.cuda.get_device_name() if gpu else None,
        "systems": arguments.systems,
        "batch_size": arguments.batch_size,
        "images": {name: len(packed) for name, packed in sets.items()},
        "clip": arguments.clip if arguments.clip == MINIATURE else "other",
        "load_seconds": round(loading, 3),
        "seconds": {part: [round(s, 6) for s in all_] for part, all_ in seconds.items()},
        "beside_over_reading": ratios.of_rounds(seconds["beside"], seconds["reading"]),
        "rest_over_reading": ratios.of_rounds(rest, seconds["reading"]),
        "bound": BOUND,
    }


def main() -> None:
    """Measure, print, and save if asked to."""
    arguments = cli.parse(Arguments, prog="benchmarks.many_systems")
    result = measure(arguments)
    if arguments.save:
        where = RESULTS / f"many_systems_{'gpu' if result['accelerator'] else 'cpu'}.json"
        files.write_json(str(where), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
