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
SMALL_POOL = 64  # a smaller donor pool is noted in the log

USAGE = f"""Fine-tune CLIP so that it stays robust.

usage: torchrun --nproc_per_node N -m rft.train RECIPE --data URL --run-dir DIR
       [--any.option VALUE]

The default recipe is {recipes.DEFAULT}. Without --data it
trains on the embedded miniature world. The defaults below are the paper's.
--scale miniature starts from those for that world, --preset official-parity
from the paper's released code where it differs from the paper's text. With
--scale small, for your own photos, held-out images, batch, warm-up and
checkpoint interval follow from the size of the set; --dry-run prints the rule
and its values. To resume a stopped run, repeat its command.

Recipes (the paper's numbers for each are in rft/paper.py):
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
    """The parsed command line."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    like: Path | None = None
    """JSON file of `rft choose`: options that decide a result default to those of the chosen run,
    which must have the same recipe, scale and preset."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print configuration, steps, memory and I/O without training."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write a trace of ten steps of the main rank to the run folder, for Perfetto or
    chrome://tracing."""


def parse(arguments: list[str]) -> Config:
    """Parse a command line to its configuration; raises the errors of `parse_command`."""
    return parse_command(arguments).config


def parse_command(arguments: list[str], ranks: int = 1) -> Command:
    """Parse a command line; `ranks` processes will share a batch.

    With `--scale small` the size of the set is read from the data.

    Raises:
        ValueError: for an unknown recipe, scale or preset, a value out of range, a missing run
            folder, a recipe whose base run is not named, or a missing set.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments[0] if named else recipes.DEFAULT
    options = arguments[1:] if named else arguments
    # recipe, scale and preset decide the defaults with which the full line is parsed below
    wants_help = bool({"-h", "--help", commands.HELP_ALL} & set(options))
    # without --data the miniature is trained, but --help always shows the defaults of ImageNet
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
    if command.dry_run and not config.data:
        raise ValueError(
            "--dry-run needs --data; without --data, rft train first draws the miniature world"
        )
    if not config.data and config.scale != SMALL:
        raise ValueError(
            "--data is missing; name the folder or URL of the packed sets (docs/data.md)"
        )
    recipes.require_inputs(config)
    require_packages(config)
    if config.scale == "small":
        url = files.join(config.data, config.train_set)
        size = small.Size.of(Index.load(url, Manifest.load(url, "--train-set")).label)
        # with --like, keep the chosen run's numbers, with which it was compared
        named = set(small.OPTIONS) if like else _named(options, small.OPTIONS)
        config = small.fit(config, size, ranks, named)
    return dataclasses.replace(command, config=config)


def _chosen(path: Path, recipe: Config) -> Config:
    """Apply the options of a chosen run that decide its result to a recipe.

    Raises:
        ValueError: if the choice or the run cannot be read, or the run has a different recipe.
    """
    chosen = choice.read(path)
    run = Path(chosen.chosen)
    if records.read_config(run).is_derived:
        raise ValueError(
            f"{LIKE} {path} chose {run}, a merged or imported model without training options; "
            "choose among trainings"
        )
    if not choice.is_current(chosen):
        raise ValueError(
            f"{LIKE} {path}: the weights of a compared model have changed or are missing; rerun "
            "rft.merge.choose"
        )
    found = load_config(run)
    for name in ("recipe", "scale", "preset"):
        own, other = getattr(recipe, name), getattr(found, name)
        if own != other:
            raise ValueError(
                f"{LIKE} {path} chose {run}, whose {name} is {other}, but this run's is {own}; "
                "settings are only carried over within one recipe"
            )
    kept = {name: _deciding(getattr(recipe, name), getattr(found, name), name) for name in GROUPS}
    return dataclasses.replace(recipe, precision=found.precision, **kept)


def _deciding(own: Any, found: Any, group: str) -> Any:
    """Copy the options of a group that decide a result, without paths of base runs."""
    names = {field.name for field in dataclasses.fields(own)} - NEUTRAL.get(group, set())
    return dataclasses.replace(own, **{name: getattr(found, name) for name in names})


def _named(options: list[str], names: Sequence[str]) -> set[str]:
    """Find which options (`group.name`) a command line sets, in any spelling that tyro takes."""
    # tyro takes --loader.batch-size and --loader.batch_size; both become __loader.batch_size
    words = {word.partition("=")[0].replace("-", "_") for word in options if word[:2] == "--"}
    return {name for name in names if f"__{name}" in words}


def _value_of(options: list[str], name: str) -> str:
    """Look up one option before the full line can be parsed; empty if it is not given."""
    value = ""
    for option, following in itertools.pairwise([*options, ""]):
        if option == name:
            value = following
        if option.startswith(f"{name}="):
            value = option.removeprefix(f"{name}=")
    return value  # the last one wins, as in the parser


def use_embedded_world(config: Config, world: World) -> Config:
    """Make the miniature world if it is missing, and use it as the run's data."""
    # here, because no other run needs it; the one import of a higher-level package
    from rft.demo import miniature

    run = config.run or f"runs/miniature-{config.recipe}-seed{config.seed}"
    if world.is_main:
        log.info(
            f"Without --data: training {config.recipe} on the embedded miniature world. For "
            f"ImageNet: torchrun --nproc_per_node 8 -m rft.train {config.recipe} --data URL "
            "--run-dir DIR"
        )
    # the first rank makes it while the others wait for its lock
    miniature.prepare_data(miniature.FOLDER)
    return dataclasses.replace(config, data=str(miniature.shards(miniature.FOLDER)), run=run)


def tell_start(job: Job, why: str) -> None:
    """Log the start of a run, with the reason for its precision."""
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
    # otherwise the tokenizer warns for each loader process forked after its use
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    world = dist.world_from_env()
    command = parse_command(sys.argv[1:], world.size)
    config = command.config
    # called for its error, if these ranks cannot share the batch, before any data is read
    config.micro_batch(world.size)
    if not config.data:
        config = use_embedded_world(config, world)
    # before the device is chosen, so that a finished run is reported on a machine without a GPU
    if done := finished(config):
        tell_finished(config, done, world)
        return
    device = dist.pick_device(config.device, world)
    precision, why = resolve_precision(
        config.precision, gpu=device.type == "cuda", bf16=dist.has_bf16(device)
    )
    config = dataclasses.replace(config, precision=precision)
    # several ranks check after joining, so that ranks with different devices can be named
    if world.size == 1 or command.dry_run:
        check_identity(config)
    if config.precision == "tf32":
        # "high" is torch's name for TF32 in matrix products
        torch.set_float32_matmul_precision("high")
    with StopRequest(config.cluster.stop_file) as request:
        # before the ranks join, so that a mistake shared by all is printed once
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
