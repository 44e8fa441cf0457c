"""Cost of many systems beside their own compute: `python -m benchmarks.many_systems [--save]`.

WiSE-FT models between two ends, averaged in memory as by `rft.evaluate --wise`, see every test set
of the miniature world in one pass. The benchmark measures how much longer this pass takes than
reading and decoding, excluding the models' own compute. Own compute is the unavoidable work per
model and image: the logits, the check that they are finite, and their scores (prediction, rank,
probabilities).

- reading: every batch is only read and decoded (`rft.loading.read`).
- answered: `predict` with systems that return random logits from memory. This includes reading,
  scoring, collecting and everything else except the forwards.
- own: the same systems are called for the same batches in memory, and their logits are scored in as
  few calls as in `predict`.
  (answered - own) / reading must stay below the bound. answered / reading is saved too: the
  miniature's raw pixels are read faster than logits are scored in fp64, so it is well above.
- whole: `predict` with the models themselves.
- logits: only the models' logits on the same batches in memory.
  (whole - logits - own) / reading is the same number for real models. As the difference of two
  large times it has a wide range, so it serves as a check with fewer rounds.

All are sums over the sets, taken in turn in each round, without loader processes, which would hide
reading behind compute. Loading, averaging and hashing the systems is timed separately, because it
is not part of a pass over the data. Weights are random. The last line is one JSON object.
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
    """Time one pass over many systems, less their own compute, and reading alone."""

    systems: int = 20
    """WiSE-FT models; 2 or more."""
    rounds: int = 15
    """Rounds of reading, answers and own compute, in turn."""
    whole_rounds: int = 2
    """Rounds among these that also time complete passes and logits, which take minutes."""
    batch_size: int = 256
    """Images per batch."""
    sets: tuple[str, ...] = TEST_SETS
    """Packed sets."""
    data: Path | None = None
    """Data root of the sets; by default the miniature world, created in the work folder."""
    clip: str = MINIATURE
    """CLIP that provides the models' image tower."""
    work: Path = Path("build/many_systems")
    """Folder for the world and the two ends."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


class Answers(nn.Module):
    """A system without compute: returns its stored logits of a set in the order of the images."""

    def __init__(self, logits_NK: Tensor):
        super().__init__()
        # an iterator, because setting an integer attribute of a module is slow
        self.rows = iter(logits_NK.split(TOGETHER))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the rows of the next images."""
        rows_BK = next(self.rows)
        assert len(rows_BK) == len(images_BCHW)
        return rows_BK


def load(arguments: Arguments, packed: PackedDataset) -> tuple[list[Classifier], float]:
    """Write two ends and average the systems; return them and the seconds taken."""
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
    """Return the device on which the models compute."""
    return dist.pick_device("auto", WORLD)


def batches_of(arguments: Arguments, packed: PackedDataset, size: int) -> list[Tensor]:
    """Read a set; return its images in batches as they are forwarded, each (B, C, H, W)."""
    return [
        part.clone()
        for batch in _read(arguments, packed, size)
        for part in batch.images_BCHW.split(TOGETHER)
    ]


def _read(arguments: Arguments, packed: PackedDataset, size: int) -> Any:
    # padded to complete forwards, as in `predict`
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
    """Prepare a set; return a function that measures one round of it: seconds by part."""
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
    """Collect the document to save."""
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
    """Measure, print and, with --save, write the result."""
    arguments = cli.parse(Arguments, prog="benchmarks.many_systems")
    result = measure(arguments)
    if arguments.save:
        where = RESULTS / f"many_systems_{'gpu' if result['accelerator'] else 'cpu'}.json"
        files.write_json(str(where), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
