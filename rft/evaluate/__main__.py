"""Evaluate checkpoints exactly: `torchrun ... -m rft.evaluate CHECKPOINT... --data URL`.

All checkpoints see each image in the same pass over the data.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from rft import cli, dist, files
from rft.clip.classifier import build_classifier, checkpoint_path, load_state
from rft.config import Device
from rft.data.loader import PackedDataset
from rft.data.sources import LAYOUTS
from rft.dist import World
from rft.evaluate.evaluator import count_correct

SETS = tuple(name for name in LAYOUTS if name != "imagenet-train")


@dataclass(frozen=True)
class Arguments:
    """Count top-1 correct predictions on ImageNet and the five OOD benchmarks.

    A run folder's counts go to its results.json, those of FILE.safetensors to FILE.results.json.
    Checkpoints whose counts are already there, for the same weights and data, are left alone.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders (the selected model; the last without held-out images) or .safetensors files."""
    data: str
    """Data root: the URL under which the tools wrote the packed sets."""
    sets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SET...")] = SETS
    """Packed sets to evaluate on: these, or any other below the data root."""
    batch_size: int = 256
    """Images in one forward."""
    workers: int = 4
    """Loader processes of each rank; 0 reads in the evaluating process."""
    device: Device = "auto"


def result_path(checkpoint: Path) -> Path:
    """Return where the counts of a run folder or weights file are kept."""
    if checkpoint.is_dir():
        return checkpoint / "results.json"
    return checkpoint.with_suffix(".results.json")


def recorded_sets(checkpoint: Path) -> dict[str, Any]:
    """Return the counts recorded for the weights as they are now; empty if there are none."""
    path, weights = result_path(checkpoint), checkpoint_path(checkpoint)
    if not path.is_file() or not weights.is_file():
        return {}
    recorded = files.read_json(str(path))
    same = recorded["checkpoint_sha256"] == files.sha256_file(weights)
    return recorded["sets"] if same else {}


def is_current(checkpoint: Path, manifests: dict[str, str]) -> bool:
    """Whether the recorded counts belong to these weights and these sets (name -> sha256)."""
    recorded = recorded_sets(checkpoint)
    found = {name: entry["manifest_sha256"] for name, entry in recorded.items()}
    return all(found.get(name) == sha256 for name, sha256 in manifests.items())


def evaluate(
    checkpoints: list[Path],
    packed: dict[str, PackedDataset],
    *,
    batch_size: int,
    workers: int,
    world: World,
    device: torch.device,
) -> None:
    """Evaluate every checkpoint on every set and write the counts from the main rank."""
    loaded = [load_state(checkpoint_path(path)) for path in checkpoints]
    sizes = {architecture.image_size for _, architecture, _ in loaded}
    if len(sizes) > 1:
        raise ValueError(f"the checkpoints want images of {sorted(sizes)} px; evaluate them apart")
    for path, (state, _, _) in zip(checkpoints, loaded, strict=True):
        require_classes(path, len(state["head.weight"]), packed)
    models = [build_classifier(state, arch).to(device) for state, arch, _ in loaded]
    sets: list[dict[str, Any]] = [{} for _ in models]
    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not (world.is_main and console.is_terminal)) as bar:
        for name, dataset in packed.items():
            task = bar.add_task(name, total=len(dataset) / world.size)
            counts = count_correct(
                models,
                dataset,
                image_size=sizes.copy().pop(),
                world=world,
                device=device,
                batch_size=batch_size,
                workers=workers,
                progress=lambda done, task=task: bar.advance(task, done),
            )
            for entry, count in zip(sets, counts, strict=True):
                entry[name] = {
                    "correct": count.correct,
                    "total": count.total,
                    "manifest_sha256": dataset.manifest.sha256,
                }
    if world.is_main:
        for path, entry, (_, _, metadata) in zip(checkpoints, sets, loaded, strict=True):
            write_results(path, entry, metadata)


def require_classes(checkpoint: Path, classes: int, packed: dict[str, PackedDataset]) -> None:
    """Check that a checkpoint's head and the sets' label spaces have the same classes.

    Raises:
        ValueError: naming the checkpoint and the set.
    """
    for dataset in packed.values():
        if len(dataset.manifest.classes) != classes:
            raise ValueError(
                f"{checkpoint} tells {classes} classes apart, {dataset.url} was packed with "
                f"{len(dataset.manifest.classes)}; evaluate it on data of its own label space"
            )


def write_results(checkpoint: Path, sets: dict[str, Any], metadata: dict[str, str]) -> None:
    """Record and print one checkpoint's counts."""
    config = checkpoint / "config.json"
    document = {
        "schema": 1,
        "checkpoint": str(checkpoint_path(checkpoint).relative_to(checkpoint.parent)),
        "checkpoint_sha256": files.sha256_file(checkpoint_path(checkpoint)),
        "step": int(metadata["step"]),
        "config_sha256": files.sha256_file(config) if config.is_file() else None,
        # what an earlier call counted for the same weights stays
        "sets": {**recorded_sets(checkpoint), **sets},
        "provenance": files.provenance(),
    }
    files.write_json(str(result_path(checkpoint)), document)
    shares = (f"{name} {100 * e['correct'] / e['total']:.2f}" for name, e in sets.items())
    print(f"{checkpoint}: {', '.join(shares)}", flush=True)


def main() -> None:
    """Parse, skip what is done, evaluate the rest."""
    arguments = cli.parse(Arguments, prog="rft.evaluate")
    if not arguments.checkpoints:
        raise ValueError("name at least one run folder or .safetensors file to evaluate")
    for name in arguments.sets:
        manifest = files.join(arguments.data, name, "manifest.json")
        if name not in SETS and not files.exists(manifest):
            raise cli.unknown("set", name, SETS)
    if arguments.batch_size < 1 or arguments.workers < 0:
        raise ValueError("--batch-size must be at least 1 and --workers at least 0")
    packed = {name: PackedDataset(files.join(arguments.data, name)) for name in arguments.sets}
    manifests = {name: dataset.manifest.sha256 for name, dataset in packed.items()}
    world = dist.world_from_env()
    device = dist.pick_device(arguments.device, world)
    with dist.process_group(world, device) as world:
        dist.require_agreement(world, "set of packed data", manifests)
        # rank 0 decides, because files may change while the others look at them
        waiting = dist.gather_objects(
            world, [path for path in arguments.checkpoints if not is_current(path, manifests)]
        )[0]
        if waiting:
            evaluate(
                waiting,
                packed,
                batch_size=arguments.batch_size,
                workers=arguments.workers,
                world=world,
                device=device,
            )
        elif world.is_main:
            print("all counts are already there, nothing to do")
    runs = [str(path) for path in arguments.checkpoints if path.is_dir()]
    # the report's tables are the paper's: ImageNet and its five benchmarks
    if world.is_main and runs and set(arguments.sets) & set(SETS):
        print(f"next: python -m rft.report {' '.join(runs)} --out report")


if __name__ == "__main__":
    cli.run(main)
