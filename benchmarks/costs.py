"""Cost of each method relative to plain fine-tuning: `python -m benchmarks.costs --save`.

Measures one optimizer step of the training loop (gradients, optimizer, update of a moving teacher)
for every recipe that trains all weights and is compared with others, on random images and random
weights of one open_clip model, without --compile. All recipes are interleaved in one process, so
that a busy machine slows all of them alike. fp32 on a CPU, bf16 on a GPU.

  time     of a step over that of `vanilla` in the same round;
  kept     the same with the frozen tower's features of the clean images read instead of computed,
           as rft does from the second epoch on (--loader.features-gb);
  memory   the peak of a step with more images over vanilla's, counted on tensors without values as
           in --dry-run (rft/train/memory.py).

The last line is one JSON object.
"""

import copy
import functools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, assert_never

import torch
import tyro

from benchmarks import machine, ratios, step
from rft import cli, dist, experiments, recipes
from rft.clip.classifier import Classifier
from rft.clip.load import PretrainedClip
from rft.config import Config, Precision
from rft.loading.dataset import Batch
from rft.method import moving_average
from rft.recipes import EnsembleKind, MergeKind
from rft.shards.label_space import LabelSpace
from rft.storage import files
from rft.train import memory, texts
from rft.train.job import Job
from rft.train.loop import update
from rft.train.optim import build_optimizer
from rft.train.step import accumulate_gradients

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "costs.md"
BASE = "vanilla"


class Case(NamedTuple):
    """A kind of step."""

    recipe: str
    options: Mapping[str, Any] = {}
    """Options of the method, beside the recipe's own."""

    @property
    def title(self) -> str:
        """Its name in the table."""
        words = [f"--method.{name.replace('_', '-')} {v}" for name, v in self.options.items()]
        return f"`{self.recipe}`" + (f" with `{' '.join(words)}`" if words else "")

    @property
    def config(self) -> Config:
        """The configuration of a run."""
        config = recipes.build(self.recipe, data="-", run="-")
        return replace(config, method=replace(config.method, **self.options))


def cases() -> dict[str, Case]:
    """List every kind of step by name: the recipes, and a moving teacher, which no recipe uses."""
    names = dict.fromkeys((BASE, *recipes.SUITE, "no-mask", *recipes.RESEARCH))
    every = {name: Case(name) for name in names}
    every["moving-teacher"] = Case(recipes.DEFAULT, {"teacher": "ema"})

    def trains_all(config: Config) -> bool:
        return config.optim.epochs > 0 and config.optim.trains == "all"

    return {name: case for name, case in every.items() if trains_all(case.config)}


@dataclass(frozen=True)
class Arguments:
    """Time one optimizer step of each method, and count its memory."""

    model: str = "ViT-B-32"
    """open_clip model name; its weights are random."""
    batch_size: int = 16
    """Images per timed step."""
    memory_images: int = 512
    """Images per step whose memory is counted: the paper's batch."""
    classes: int = 1000
    """The first classes of ImageNet, each with OpenAI's 80 prompts."""
    rounds: int = 5
    """Timed repetitions of each step, after one warm-up."""
    recipes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RECIPE...")] = ()
    """These, beside vanilla; all if not given. moving-teacher is object-mask-single-fill with
    --method.teacher ema."""
    save: bool = False
    """Also write the result and the page to benchmarks/results/."""

    def __post_init__(self) -> None:
        known = cases()
        for name in self.recipes:
            if name not in known:
                raise cli.unknown("recipe", name, list(known))
        if self.save and self.recipes:
            raise ValueError("--save wants a row for every recipe: leave --recipes out")
        if self.rounds < 1:
            raise ValueError(f"--rounds is {self.rounds}; it must be 1 or more")
        for option in ("batch_size", "memory_images"):
            if (images := getattr(self, option)) < 2:
                raise ValueError(
                    f"--{option.replace('_', '-')} is {images}; it must be 2 or more: a fill takes "
                    "patches from another image"
                )
        most = len(LabelSpace.imagenet().names)
        if not 2 <= self.classes <= most:
            raise ValueError(f"--classes is {self.classes}; it must be from 2 to {most:,}")

    def chosen(self) -> dict[str, Case]:
        """List the measured steps, vanilla first."""
        wanted = (BASE, *(self.recipes or cases()))
        return {name: case for name, case in cases().items() if name in wanted}


class Shared:
    """Weights, optimizers and images shared by all cases: fifteen copies would fill a machine.

    What a step takes does not depend on the weights' values.
    """

    def __init__(
        self,
        arguments: Arguments,
        device: torch.device,
        clip: PretrainedClip,
        prompts: tuple[Sequence[str], Sequence[str]],
    ) -> None:
        """Start with `clip`, whose tower learns, and the names and prompts of the classes."""
        clip.model.to(device)
        self.clip, self.prompts, self.device = clip, prompts, device
        self.precision: Precision = "bf16" if device.type == "cuda" else "fp32"
        options = step.Arguments(batch_size=arguments.batch_size, classes=arguments.classes)
        self.options = options
        self.student = step.with_head(clip, arguments.classes).to(device)
        self.teacher = copy.deepcopy(self.student)
        self.batch = step.random_batch(options, device, clip.architecture.image_size)
        self.optimizers: dict[Any, torch.optim.Optimizer] = {}

    def job(self, config: Config) -> Job:
        """Build the job of a configuration, with only the weights that cannot be shared."""
        method, student, classes = config.method, self.student, self.prompts[0]
        if method.loss == "contrastive":
            # its head does not learn (rft/train/build.py)
            head = copy.deepcopy(student.head).requires_grad_(False)
            student = Classifier(student.visual, head, student.architecture)
        if method.context_weight > 0:
            # contexts are means over classes: one costs the same, all take an hour
            classes = classes[:1]
        changes = method.teacher != "frozen" or self.precision == "bf16"
        return step.build_job(
            self.options,
            self.device,
            self.precision,
            student,
            config,
            teacher=copy.deepcopy(self.teacher) if changes else self.teacher,
            texts=texts.build(self.clip, classes, self.prompts[1], method),
        )

    def optimizer(self, job: Job) -> torch.optim.Optimizer:
        """Return the optimizer of a job, shared by all jobs with the same weights and options."""
        key = job.config.optim, job.config.method.loss
        if key not in self.optimizers:
            self.optimizers[key] = build_optimizer(job.objective, job.config.optim)
        return self.optimizers[key]


def one_step(job: Job, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Take a step as in the training loop."""
    accumulate_gradients(job, job.objective, batch, step=0)
    update(job, optimizer, next(iter(moving_average.shares(job.config.method, 1)), 0.0))


def build_steps(
    jobs: Mapping[str, Job], shared: Shared
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """List the steps by name, and the names of those whose recipe reads features."""
    steps, kept = {}, {}
    for name, job in jobs.items():
        optimizer = shared.optimizer(job)
        steps[name] = functools.partial(one_step, job, optimizer, shared.batch)
        if job.objective.frozen:
            kept[name] = f"{name}, features read"
            with step.autocast(job.device, shared.precision):
                features = job.objective.frozen_features(shared.batch.images_BCHW)
            # as rft/train/features.py keeps them
            rows = {tower: rows_BE.float() for tower, rows_BE in features.items()}
            batch = shared.batch._replace(features=rows)
            steps[kept[name]] = functools.partial(one_step, job, optimizer, batch)
    return steps, kept


def count_memory(job: Job, images: int) -> int:
    """Count the bytes at the peak of a step of so many images, as --dry-run does.

    Raises:
        ValueError: if this torch can only estimate them.
    """
    loader = replace(job.config.loader, batch_size=images)
    need = memory.needs(replace(job, config=replace(job.config, loader=loader)), [1])
    if need.estimated:
        raise ValueError(f"the memory of {job.config.recipe} is not counted: {need.estimated}")
    return round(need.totals[0])


def measure(
    arguments: Arguments,
    device: torch.device,
    clip: PretrainedClip,
    prompts: tuple[Sequence[str], Sequence[str]],
) -> dict[str, Any]:
    """Measure the costs by recipe; `prompts` are the class names and their templates."""
    shared, chosen = Shared(arguments, device, clip, prompts), arguments.chosen()
    jobs = {name: shared.job(case.config) for name, case in chosen.items()}
    # first, because it takes no time from the steps and fails early if torch cannot count
    counted = {name: count_memory(job, arguments.memory_images) for name, job in jobs.items()}
    steps, kept = build_steps(jobs, shared)
    seconds = step.time_steps(steps, arguments.rounds, device)

    def row(name: str) -> dict[str, Any]:
        reads = seconds[kept[name]] if name in kept else []
        return {
            "title": chosen[name].title,
            "seconds": round(statistics.median(seconds[name]), 4),
            "time": ratios.of_rounds(seconds[name], seconds[BASE]),
            "kept": ratios.of_rounds(reads, seconds[BASE]),
            "bytes": counted[name],
            "memory": round(counted[name] / counted[BASE], 3),
        }

    gpu = device.type == "cuda"
    return {
        "benchmark": "costs",
        **machine.describe(machine.STEP),
        "accelerator": torch.cuda.get_device_name(device) if gpu else None,
        "torch": torch.__version__,
        "precision": shared.precision,
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "memory_images": arguments.memory_images,
        "classes": arguments.classes,
        "rounds": arguments.rounds,
        "recipes": {name: row(name) for name in chosen},
    }


class Besides(NamedTuple):
    """The cost of a system made of trained models, in addition to their trainings."""

    forwards: int
    """Of an image tower, for each test image."""
    once: str = ""
    """Work done once per system."""


def besides(kind: MergeKind | EnsembleKind) -> Besides:
    """Look up the cost of a kind of merge or ensemble."""
    held_out = "both models on the held-out images (temperatures)"
    match kind:
        case "wise" | "uniform-soup" | "model-stock":
            return Besides(1)
        case "greedy-soup":
            return Besides(1, "every model and every soup that is tried on the held-out images")
        case "ose":
            return Besides(2)
        case "vrf":
            return Besides(2, f"both models on the training images; {held_out}")
        case "dawin":
            # both models for the clusters, then the weights of the image's cluster
            return Besides(3, held_out)
        case _:
            assert_never(kind)


def trainings(name: str, after: Iterable[str]) -> str:
    """List the models that a system needs, by recipe; zero-shot is not trained."""
    inputs = (recipes.MERGED.get(name) or recipes.ENSEMBLES[name]).inputs
    # a soup's are vanilla-seed0 and vanilla-lr1e-05-seed0
    found = Counter(next(one for one in inputs if run.startswith(f"{one}-")) for run in after)
    trained = [one for one in inputs if recipes.build(one).optim.epochs > 0]
    return ", ".join(f"{found[one]} x `{one}`" for one in trained)


def made_of_trained() -> str:
    """Format the table of merges and ensembles, which are facts of the plan and not measured."""
    study = experiments.Study(runs="-", data="-", suite="post-2023", seeds=1)
    kinds: dict[str, MergeKind | EnsembleKind]
    kinds = {name: one.kind for name, one in recipes.MERGED.items()}
    kinds |= {name: one.kind for name, one in recipes.ENSEMBLES.items()}
    lines = ["| system | trainings | forwards per test image | once |", "|---|---|--:|---|"]
    for name, kind in kinds.items():
        plan = experiments.merge if name in recipes.MERGED else experiments.ensemble
        made, cost = trainings(name, plan(study, name, 0).after), besides(kind)
        lines.append(f"| `{name}` | {made} | {cost.forwards} | {cost.once or '-'} |")
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> str:
    """Format the costs of a result, below a line with its provenance."""
    where = result["accelerator"] or "CPU"
    lines = [
        f"{result['model']}, {result['batch_size']} images, {result['precision']}, {where}, "
        f"{result['rounds']} rounds; {machine.made(result)}.",
        "",
        "| recipe | time / vanilla | time, frozen features read | "
        f"memory / vanilla, {result['memory_images']} images |",
        "|---|--:|--:|--:|",
    ]
    for row in result["recipes"].values():
        kept = "-" if row["kept"] is None else ratios.shown(row["kept"])
        cells = (row["title"], ratios.shown(row["time"]), kept, f"{row['memory']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


NOTE = (
    "Time is that of one optimizer step (gradients, optimizer, a moving teacher's update) on "
    "random images and weights, without --compile: the median of interleaved rounds, each over "
    "`vanilla` of the same round, with the lowest and the highest in parentheses. Where a frozen "
    "tower sees the clean images, its features are computed in the first epoch (with "
    "--loader.augment in every epoch) and read in later ones. Memory is the peak of a step of the "
    "first epoch that --dry-run prints; the frozen pre-trained model is in memory with every "
    "recipe, vanilla too. Not in the table: reading images, checkpoints, held-out images; FLYP's "
    "embedding of all prompts at the end of each epoch; work that is done once before training "
    "(the zero-shot head, CAR-FT's contexts); the trainings that choose a setting."
)
FACTS = (
    "Merges and ensembles cost no training step of their own. They cost trainings, forwards of an "
    "image tower for each test image, and forwards that are done once:"
)


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """Format one or several results as a page."""
    return "\n\n".join([*map(table, results), NOTE, FACTS, made_of_trained()]) + "\n"


def saved() -> list[dict[str, Any]]:
    """Load the saved results in the order of their names."""
    return [files.read_json(str(path)) for path in sorted(RESULTS.glob("costs_*.json"))]


def main() -> None:
    """Measure, print and save."""
    arguments = cli.parse(Arguments, prog="benchmarks.costs")
    device = dist.pick_device("auto", step.WORLD)
    clip, labels = step.build_clip(arguments.model), LabelSpace.imagenet()
    prompts = labels.names[: arguments.classes], labels.templates
    result = measure(arguments, device, clip, prompts)
    print(page([result]))
    if arguments.save:
        kind = "gpu" if device.type == "cuda" else "cpu"
        files.write_json(str(RESULTS / f"costs_{arguments.model}_{kind}.json"), result)
        files.write_bytes(str(PAGE), page(saved()).encode())
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
