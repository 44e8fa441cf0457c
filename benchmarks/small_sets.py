"""`--scale small` by the current rule and by earlier numbers: `python -m benchmarks.small_sets`.

Sets of 60, 300 and 3,000 training images are cut from the miniature world, a different cut per
seed, packed like own photos, and used to train the tiny CLIP. Accuracy is measured on the world's
test sets. Model, learning rate and beta are the miniature's, everything else is `--scale small`'s.
Compared:

before, fixed: no held-out images, batch 64, 50 steps of warm-up, as the README showed the command;
before, proposed: held-out images and batch from the `next:` line of `tools/shard_folder.py`;
rule: the numbers of rft/small.py.

Commands run sequentially in this process, and finished work is skipped, so that an interrupted
measurement resumes.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import machine
from rft import cli, recipes
from rft.demo.render import IMAGE_SIZE
from rft.demo.world import write_world
from rft.evaluate import command as evaluation
from rft.packing.own_folder import read_folder
from rft.packing.pack import Options, pack, pack_source
from rft.rng import numpy_generator
from rft.runs import filenames
from rft.sets import ID_SET, OOD_SETS, TEST_SETS
from rft.shards.label_space import LabelSpace
from rft.storage import files
from rft.train import command as training

RESULTS = Path(__file__).parent / "results"
NAME = "small_sets"
SIZES = (60, 300, 3000)
WORLD_SCALE = 1.5  # of the miniature's 2,000 training images
RECIPES = ("vanilla", recipes.DEFAULT)
NUMBERS = ("before, fixed", "before, proposed", "rule")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train on small cuts of the miniature world, by the rule and by the earlier numbers."""

    folder: Path = Path("build/small_sets")
    """Folder for the world, the cuts and the runs."""
    sizes: tuple[int, ...] = SIZES
    """Training images per cut."""
    seeds: int = 3
    """Seeds per size: of the cut, the sample order and the fills."""
    save: bool = False
    """Also write the result to benchmarks/results/."""


def before(numbers: str, images: int, classes: int) -> list[str]:
    """Return the options that reproduce the numbers before the rule."""
    held_out, batch = 0, 64
    if numbers == "before, proposed":
        held_out = max(images // 10, classes)
        while batch > images - held_out:
            batch //= 2
    return [
        *("--loader.held-out", str(held_out), "--loader.batch-size", str(batch)),
        *("--optim.warmup-steps", "50", "--log.checkpoint-steps", "100"),
    ]


def cut(world: Path, out: Path, images: int, seed: int) -> None:
    """Link so many of the world's training images below `out`, taking classes in turn."""
    rng = numpy_generator(NAME, images, seed)
    by_class = [sorted(one.iterdir()) for one in sorted((world / "imagenet/train").iterdir())]
    columns = [[one[n] for n in rng.permutation(len(one))] for one in by_class]
    order = rng.permutation(len(columns))  # the classes with one more image
    chosen = [columns[c][n] for n in range(max(map(len, columns))) for c in order
              if n < len(columns[c])]  # fmt: skip
    for path in chosen[:images]:
        target = out / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.hardlink_to(path)


def prepare(arguments: Arguments) -> LabelSpace:
    """Write the world and pack its test sets and every cut."""
    world, shards = arguments.folder / "world", arguments.folder / "shards"
    write_world(world, scale=WORLD_SCALE)
    labels = LabelSpace.load(str(world / "classes.json"))
    options = Options(encoding="pixels", size=IMAGE_SIZE, workers=1)
    for name in TEST_SETS:
        pack(name, str(world), str(shards), labels, options)
    for images in arguments.sizes:
        for seed in range(arguments.seeds):
            photos = arguments.folder / "photos" / f"{images}-{seed}"
            cut(world, photos, images, seed)
            (source,), *_ = read_folder(photos, labels, 0, 0)
            pack_source(source, str(shards / photos.name), labels, options)
    return labels


def call(command: Callable[[], None], *arguments: object) -> None:
    """Run a command's `main` with these arguments."""
    with mock.patch.object(sys, "argv", ["rft", *map(str, arguments)]):
        command()


def train(folder: Path, recipe: str, images: int, seed: int, numbers: str) -> tuple[Path, str]:
    """Train one run; return its folder, and the reason if it was refused."""
    run = folder / "runs" / f"{images}-{recipe}-{numbers.replace(', ', '-')}-{seed}"
    tiny = recipes.build(recipe, scale="miniature")
    options = ["--model.clip", tiny.model.clip, "--optim.lr", tiny.optim.lr, "--seed", seed]
    options += ["--method.distill-weight", tiny.method.distill_weight, "--loader.workers", 0]
    if numbers != "rule":
        options += before(numbers, images, len(list((folder / "world/imagenet/train").iterdir())))
    data = folder / "shards" / f"{images}-{seed}"
    where = ("--data", data, "--train-set", "train", "--run-dir", run, "--scale", "small")
    try:
        call(training.main, recipe, *where, *options)
    except ValueError as error:
        if "a batch of" not in str(error):
            raise
        return run, str(error)
    return run, ""


def accuracies(run: Path) -> dict[str, float]:
    """Return accuracy in % on ImageNet's stand-in, and the mean over the other five sets."""
    sets = files.read_json(str(run / filenames.RESULTS))["sets"]
    share = {name: 100 * entry["correct"] / entry["total"] for name, entry in sets.items()}
    return {"id": share[ID_SET], "ood": statistics.mean(share[name] for name in OOD_SETS)}


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """List one row per size, choice of numbers and recipe, with every seed's result."""
    rows: list[dict[str, Any]] = []
    for images in arguments.sizes:
        for numbers in NUMBERS:
            for recipe in RECIPES:
                done = [
                    train(arguments.folder, recipe, images, seed, numbers)
                    for seed in range(arguments.seeds)
                ]
                row = {"images": images, "numbers": numbers, "recipe": recipe}
                rows.append(
                    row | {"refused": done[0][1], "runs": [run for run, why in done if not why]}
                )
    runs = [run for row in rows for run in row["runs"]]
    call(evaluation.main, *runs, "--data", arguments.folder / "shards", "--workers", 0)
    for row in rows:
        row["seeds"] = [describe(run) for run in row.pop("runs")]
    return rows


def describe(run: Path) -> dict[str, Any]:
    """Describe a run and its score."""
    config = files.read_json(str(run / filenames.CONFIG))
    ended = files.read_json(str(run / filenames.TRAINING))
    return {
        "held_out": config["loader"]["held_out"],
        "batch_size": config["loader"]["batch_size"],
        "warmup_steps": config["optim"]["warmup_steps"],
        "steps": ended["steps"],
        "model_of_step": ended["best_step"],
        **accuracies(run),
    }


def zero_shot(arguments: Arguments) -> dict[str, float]:
    """Return the accuracies of the model that all runs start from."""
    run = arguments.folder / "runs" / "zero-shot"
    data = arguments.folder / "shards" / f"{arguments.sizes[0]}-0"
    where = ("--data", data, "--train-set", "train", "--run-dir", run, "--scale", "small")
    clip = recipes.build("zero-shot", scale="miniature").model.clip
    call(training.main, "zero-shot", *where, "--model.clip", clip, "--loader.workers", 0)
    call(evaluation.main, run, "--data", arguments.folder / "shards", "--workers", 0)
    return accuracies(run)


def spread(values: Sequence[float]) -> str:
    """Return mean and sample standard deviation."""
    if len(values) < 2:
        return f"{statistics.mean(values):.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(result: dict[str, Any]) -> str:
    """Format the result as Markdown: one row per size and choice of numbers."""
    head = ["images", "numbers", "held out", "batch", "warm-up of steps"]
    head += [f"{recipe} {what}" for recipe in RECIPES for what in ("ID", "OOD avg")]
    lines = [" | ".join(head), " | ".join(["--:", "---", *["--:"] * (len(head) - 2)])]
    by_key = {(row["images"], row["numbers"], row["recipe"]): row for row in result["rows"]}
    for images, numbers in dict.fromkeys((one[0], one[1]) for one in by_key):
        rows = [by_key[images, numbers, recipe] for recipe in RECIPES]
        cells = [f"{images:,}", numbers]
        if rows[0]["refused"]:
            cells += ["0", "64", "-", *["refused"] * 4]
        else:
            first = rows[0]["seeds"][0]
            cells += [str(first["held_out"]), str(first["batch_size"])]
            cells.append(f"{first['warmup_steps']} of {first['steps']}")
            cells += [spread([s[k] for s in row["seeds"]]) for row in rows for k in ("id", "ood")]
        lines.append(" | ".join(cells))
    start, seeds = result["zero_shot"], result["seeds"]
    note = (
        f"Top-1 accuracy in %, mean and sample standard deviation over {seeds} seeds, each with "
        f"its own cut. All start from a model with {start['id']:.1f} in distribution (ID) and "
        f"{start['ood']:.1f} OOD avg. A batch larger than the set is refused."
    )
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{note}\n"


def main() -> None:
    """Measure, print, and keep the result."""
    arguments = cli.parse(Arguments, prog="benchmarks.small_sets")
    prepare(arguments)
    result = {
        **machine.describe(),
        "seeds": arguments.seeds,
        "zero_shot": zero_shot(arguments),
        "rows": measure(arguments),
    }
    text = table(result)
    print(text)
    if arguments.save:
        files.write_json(str(RESULTS / f"{NAME}.json"), result)
        files.write_bytes(str(RESULTS / f"{NAME}.md"), text.encode())


if __name__ == "__main__":
    cli.run(main)
