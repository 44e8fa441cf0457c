"""Fine-tune CLIP: `torchrun --nproc_per_node N -m rft.train [RECIPE --data URL --run-dir DIR]`."""

import dataclasses
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from rft import cli, commands, dist, recipes, small
from rft.config import NEUTRAL, Config, load_config, resolve_precision
from rft.dist import World
from rft.runs import choice, records
from rft.shards.index import Index
from rft.shards.manifest import Manifest
from rft.storage import files
from rft.train.build import prepare
from rft.train.estimate import estimate, shots
from rft.train.finish import run_job, tell_finished
from rft.train.job import Job
from rft.train.journal import require_packages
from rft.train.optim import schedule_warning
from rft.train.run import check_identity, finished
from rft.train.stop import StopRequest

SMALL = "miniature"
LIKE = "--like"
GROUPS = ("model", "loader", "method", "optim")
SMALL_POOL = 64  # a donor pool below this is worth a word

USAGE = f"""Fine-tune CLIP so that it stays robust.

usage: torchrun --nproc_per_node N -m rft.train RECIPE --data URL --run-dir DIR
       [--any.option VALUE]

The recipe is {recipes.DEFAULT} if none is named. Without --data it
trains on the embedded miniature world. The defaults below are the paper's.
--scale miniature starts from those for that world, --preset official-parity
from what the paper's released code does where it differs from its text. With
--scale small, for your own photos, held-out images, batch, warm-up and
checkpoint interval follow from the size of the set; --dry-run prints the rule
and its values. The same command again resumes a run that was stopped.

Recipes (the paper's numbers for each: rft/paper.py):
{recipes.list_in_words()}
"""

# the options that --help prints; --help-all prints all
SHOWN = (
    *("data", "run-dir", "train-set", "scale", "seed", "precision", "device", "dry-run"),
    *("model.clip", "model.pretrained", "model.start"),
    *("loader.batch-size", "loader.held-out", "loader.shots", "loader.workers", "loader.cache-dir"),
    *("method.threshold", "method.rate", "method.distill-weight"),
    *("optim.lr", "optim.epochs", "optim.warmup-steps", "optim.weight-decay", "tracker"),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    like: Path | None = None
    """JSON file of `rft choose`: options that decide a result start from those of the run that it
    chose, of the same recipe, scale and preset, instead of from the recipe's."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Tell what the run would be (configuration, steps, memory, I/O) and start nothing."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Trace ten steps of the main rank into the run folder, for Perfetto or chrome://tracing."""


def parse(arguments: list[str]) -> Config:
    """Return the configuration of a command line; raises what `parse_command` does."""
    return parse_command(arguments).config


def parse_command(arguments: list[str], ranks: int = 1) -> Command:
    """Turn a command line into a configuration; `ranks` processes will share a batch.

    With `--scale small` the size of the set is read from it.

    Raises:
        ValueError: for an unknown recipe, scale or preset, a value out of range, a missing run
            folder, a recipe that builds on a run that was not named, or a set that is not there.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments[0] if named else recipes.DEFAULT
    options = arguments[1:] if named else arguments
    # recipe, scale and preset decide the defaults that the whole line is then parsed over
    wants_help = bool({"-h", "--help", commands.HELP_ALL} & set(options))
    # without --data the miniature is trained; --help shows the defaults of ImageNet all the same
    papers = wants_help or bool(_value_of(options, "--data"))
    scale = _value_of(options, "--scale") or ("paper" if papers else SMALL)
    preset = _value_of(options, "--preset") or "paper"
    default = recipes.build(recipe, scale=scale, preset=preset)
    like = _value_of(options, LIKE)
    if like and not wants_help:
        default = _chosen(Path(like), default)
    if wants_help:
        cli.print_help(USAGE)
    command = cli.parse(
        Command,
        args=options,
        default=Command(config=default),
        shown=SHOWN,
        prog="rft.train",
        description="",
    )
    config = command.config
    if config.data and not config.run:
        raise ValueError(
            "--run-dir is missing; name a folder for this run, e.g. --run-dir runs/first"
        )
    files.require_local(config.run, "--run-dir")
    files.require_local(config.loader.cache_dir, "--loader.cache-dir")
    files.require_local(config.loader.features_dir, "--loader.features-dir")
    if not config.data and config.scale != SMALL:
        raise ValueError("--data is missing; give the URL that tools/shard_imagenet.py wrote to")
    recipes.require_inputs(config)
    require_packages(config)
    if config.scale == "small":
        url = files.join(config.data, config.train_set)
        size = small.Size.of(Index.load(url, Manifest.load(url)).label)
        # of a chosen run they are numbers that it was compared with
        named = set(small.OPTIONS) if like else _named(options, small.OPTIONS)
        config = small.fit(config, size, ranks, named)
    return dataclasses.replace(command, config=config)


def _chosen(path: Path, recipe: Config) -> Config:
    """Give a recipe the deciding options of the run that a choice names.

    Raises:
        ValueError: if the choice or the run cannot be read, or the run is of a different recipe.
    """
    chosen = choice.read(path)
    run = Path(chosen.chosen)
    if records.read_config(run).is_derived:
        raise ValueError(
            f"{LIKE} {path} chose {run}, a merged or imported model, which has no options of a "
            "training; choose among trainings"
        )
    if not choice.is_current(chosen):
        raise ValueError(
            f"{LIKE} {path}: a model that was counted has other weights now, or none; choose again "
            "with rft.merge.choose"
        )
    found = load_config(run)
    for name in ("recipe", "scale", "preset"):
        own, other = getattr(recipe, name), getattr(found, name)
        if own != other:
            raise ValueError(
                f"{LIKE} {path} chose {run}, whose {name} is {other}, and this run's is {own}; "
                "settings are carried over between runs of one recipe"
            )
    kept = {name: _deciding(getattr(recipe, name), getattr(found, name), name) for name in GROUPS}
    return dataclasses.replace(recipe, precision=found.precision, **kept)


def _deciding(own: Any, found: Any, group: str) -> Any:
    """Take the options of a group that decide a result; runs that it builds on are a seed's own."""
    names = {field.name for field in dataclasses.fields(own)} - NEUTRAL.get(group, set())
    return dataclasses.replace(own, **{name: getattr(found, name) for name in names})


def _named(options: list[str], names: Sequence[str]) -> set[str]:
    """Find the options (`group.name`) that a command line gives, in any spelling of tyro's."""
    # tyro takes --loader.batch-size and --loader.batch_size; both become __loader.batch_size
    words = {word.partition("=")[0].replace("-", "_") for word in options if word[:2] == "--"}
    return {name for name in names if f"__{name}" in words}


def _value_of(options: list[str], name: str) -> str:
    """Look up one option before the line can be parsed as a whole; empty if it is not given."""
    value = ""
    for option, following in itertools.pairwise([*options, ""]):
        if option == name:
            value = following
        if option.startswith(f"{name}="):
            value = option.removeprefix(f"{name}=")
    return value  # the last one, as the parser takes it


def use_embedded_world(config: Config, world: World) -> Config:
    """Make the miniature world where it is missing and point the run at it."""
    # here, because no other run needs it; the one import of a room above (docs/architecture.md)
    from rft.demo import miniature

    run = config.run or f"runs/miniature-{config.recipe}-seed{config.seed}"
    if world.is_main:
        log.info(
            f"No --data given: training {config.recipe} on the embedded miniature world. For "
            f"ImageNet: torchrun --nproc_per_node 8 -m rft.train {config.recipe} "
            "--data URL --run-dir DIR"
        )
    # whichever rank is first makes it, the others wait for its lock
    miniature.prepare_data(miniature.FOLDER)
    return dataclasses.replace(config, data=str(miniature.shards(miniature.FOLDER)), run=run)


def tell_start(job: Job, why: str) -> None:
    """Print what starts, and why in this precision."""
    config, world, device = job.config, job.world, job.device
    precision = f"{config.precision} ({why})" if why else config.precision
    log.info(f"{config.run}: {config.recipe} on {world.size} x {device.type}, {precision}")
    if config.method.masks and not config.method.drops:
        pool = config.donor_pool(world.size)
        few = " (few: the paper's has 512)" if pool < SMALL_POOL else ""
        log.info(f"fills choose from {pool} images{few}")
    if config.loader.shots:
        images = job.batches.plan.samples
        log.info(f"few-shot: {images:,} images to train on{shots(config)}")
    set_size = small.Size.of(job.batches.packed.index.label)
    for line in small.rule_in_words(config, set_size, world.size):
        log.info(line)
    if warning := schedule_warning(job.total_steps, config.optim):
        log.warning(warning)


def main() -> None:
    """Parse, check, train."""
    # or the tokenizer warns of each loader process that is forked after its use
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    world = dist.world_from_env()
    command = parse_command(sys.argv[1:], world.size)
    config = command.config
    # called for its error: whether these ranks can share the batch, before any data is read
    config.micro_batch(world.size)
    if not config.data:
        config = use_embedded_world(config, world)
    # before a device is looked for: a finished run is reported on a machine without a GPU too
    if done := finished(config):
        tell_finished(config, done, world)
        return
    device = dist.pick_device(config.device, world)
    precision, why = resolve_precision(
        config.precision, gpu=device.type == "cuda", bf16=dist.has_bf16(device)
    )
    config = dataclasses.replace(config, precision=precision)
    # ranks whose devices differ are named when they have joined, and only the first checks then
    if world.size == 1 or command.dry_run:
        check_identity(config)
    if config.precision == "tf32":
        # torch's name for TF32 in matrix products
        torch.set_float32_matmul_precision("high")
    with StopRequest(config.cluster.stop_file) as request:
        # before the ranks join, so that a mistake that all of them see is printed once
        job = prepare(config, world, device)
        if command.dry_run:
            if world.is_main:
                words = [word for word in sys.argv[1:] if word != "--dry-run"]
                cli.say(estimate(job, words, why))
            return
        if world.is_main:
            tell_start(job, why)
        with dist.process_group(world, device, config.cluster.timeout) as world:
            job = dataclasses.replace(job, world=world)
            status = run_job(job, request, profile=command.profile)
        if status:
            sys.exit(status)
