"""What many systems cost beside their own compute: `python -m benchmarks.many_systems [--save]`.

WiSE-FT models between two ends, averaged in memory as `rft.evaluate --wise` does, see every test
set of the miniature world in one pass. Asked is how much longer the pass is than the reading and
decoding of one, the models' own compute aside. Own compute is what is done for each model and image
whatever else there is: the logits, whether they are finite, and the scores of them (prediction,
rank, probabilities).

- reading: every batch is read and decoded, and nothing else is done (`rft.loading.read`).
- answered: `predict` with systems that compute no logits: each answers with random ones that are in
  memory. So this is reading, scoring, collecting and everything else that is not a forward.
- own: the same systems are called for the same batches, which are in memory, and their logits are
  scored in as few calls as `predict` makes; nothing else is done.
  (answered - own) / reading is the number that must stay below the bound. answered / reading is
  saved beside it: the miniature's raw pixels are read faster than logits are scored in fp64, so it
  is well above.
- whole: `predict` with the models themselves.
- logits: the models' logits on the same batches, which are already in memory, and nothing else.
  (whole - logits - own) / reading is the same number for real models. It is the difference of two
  large times, so its range is wide: it is kept as a check, of fewer rounds.

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

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import machine, ratios
from benchmarks.step import WORLD
from rft import cli, dist
from rft.clip.classifier import Classifier, save_classifier
from rft.clip.load import MINIATURE, architecture_of
from rft.demo.miniature import prepare_data, shards
from rft.evaluate.checkpoints import load_checkpoints
from rft.evaluate.count import SCORED_TOGETHER, is_finite, predict, score
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
    rounds: int = 15
    """Times that reading, answers and own compute are timed, in turn."""
    whole_rounds: int = 2
    """Of these, rounds that time whole passes and the models' logits too, which take minutes."""
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
        # an iterator, because a module is slow to set a number of its own
        self.rows = iter(logits_NK.split(TOGETHER))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the rows of the next images."""
        rows_BK = next(self.rows)
        assert len(rows_BK) == len(images_BCHW)
        return rows_BK


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
def compute_logits(models: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
    """Compute the logits of each model on each batch."""
    for images_BCHW in batches:
        for model in models:
            model(images_BCHW)


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
) -> Callable[[int], Mapping[str, float]]:
    """Prepare a set; return what measures a round of it by its number: seconds by part."""
    size = models[0].architecture.image_size
    batches = batches_of(arguments, packed, size)
    class_to_group_K = torch.from_numpy(packed.manifest.class_to_group()).to(device())
    shape = (len(models), len(packed), len(class_to_group_K))
    answers_SNK = 100 * torch.randn(shape, device=device())
    # every system's rows, in groups as `predict` scores them
    rows = answers_SNK.flatten(0, 1).split(max(1, SCORED_TOGETHER // shape[2]))
    labels = torch.from_numpy(packed.index.label.astype(np.int64)).repeat(len(models)).to(device())

    def run(systems: Sequence[nn.Module]) -> None:
        predict(
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

    def work_alone() -> None:
        compute_logits([Answers(one_NK) for one_NK in answers_SNK], batches)
        for logits_BK, labels_B in zip(rows, labels.split(len(rows[0])), strict=True):
            is_finite(logits_BK)
            score(logits_BK, labels_B, class_to_group_K)

    parts = {
        "reading": read,
        "answered": lambda: run([Answers(one_NK) for one_NK in answers_SNK]),
        "own": work_alone,
    }
    whole_parts = {"whole": lambda: run(models), "logits": lambda: compute_logits(models, batches)}

    def measure_round(number: int) -> dict[str, float]:
        chosen = parts | (whole_parts if number < arguments.whole_rounds else {})
        return {name: _seconds(work) for name, work in chosen.items()}

    return measure_round


def measure(arguments: Arguments) -> dict[str, Any]:
    """Return everything that is saved."""
    if arguments.data is None:
        prepare_data(arguments.work)
    root = arguments.data or shards(arguments.work)
    sets = {name: PackedDataset(str(root / name)) for name in arguments.sets}
    models, loading = load(arguments, next(iter(sets.values())))
    timed = [measure_set(arguments, packed, models) for packed in sets.values()]
    seconds: dict[str, list[float]] = {}
    for number in range(arguments.rounds):
        found = [one(number) for one in timed]
        for part in found[0]:
            seconds.setdefault(part, []).append(sum(one[part] for one in found))
    reading, own = seconds["reading"], seconds["own"]
    rest = [a - b for a, b in zip(seconds["answered"], own, strict=True)]
    pairs = zip(seconds.get("whole", []), seconds.get("logits", []), own, strict=False)
    subtracted = [whole - logits - one for whole, logits, one in pairs]
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
        "rest_over_reading": ratios.of_rounds(rest, reading),
        "answered_over_reading": ratios.of_rounds(seconds["answered"], reading),
        "subtracted_over_reading": ratios.of_rounds(subtracted, reading[: len(subtracted)]),
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
