"""Fine-tune CLIP: `torchrun --nproc_per_node N -m rft.train [RECIPE --data URL --run-dir DIR]`."""

import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from rft import cli, dist, recipes, rng, small
from rft import next_steps as commands
from rft.classes import Classes, check_head, compare_prompts
from rft.cli import warn
from rft.clip.classifier import Classifier, build_classifier, load_state, map_state
from rft.clip.head import zero_shot_head
from rft.clip.load import load_clip
from rft.config import Config, load_config, resolve_precision
from rft.dist import World
from rft.loading.batches import TrainingBatches, fingerprint, plan_training
from rft.loading.dataset import PackedDataset
from rft.method.averaging import require_alike
from rft.runs import filenames, trained_on
from rft.runs.filenames import SELECTED
from rft.runs.folder import checkpoint_path, require_own_weights, unfinished, weights_record
from rft.runs.records import Training
from rft.runs.trained_on import TrainedOn
from rft.shards.cache import Cache
from rft.shards.index import Index
from rft.shards.manifest import Manifest, warn_of_one_class
from rft.storage import files
from rft.train.estimate import describe, size_rule
from rft.train.gallery import one_of_each_class, write_gallery
from rft.train.logs import require_packages
from rft.train.loop import Job, train
from rft.train.objective import Objective
from rft.train.optim import schedule_warning
from rft.train.run import Finished, RunFolder, check_identity, finished
from rft.train.stop import STOPPED, StopRequest

SMALL = "miniature"
SMALL_POOL = 64  # a donor pool below this is worth a word

USAGE = f"""Fine-tune CLIP so that it stays robust.

usage: torchrun --nproc_per_node N -m rft.train RECIPE --data URL --run-dir DIR [--any.option VALUE]

Without --data it trains on the embedded miniature world, {recipes.DEFAULT} if no recipe is named.
The defaults below are the paper's; --scale miniature starts from those for that world, and
--preset official-parity from what the paper's released code does where it differs from its text.
With --scale small, for your own photos, held-out images, batch, warm-up and checkpoint interval
follow from the size of the set; --dry-run prints the rule and its values.
The same command again resumes a run that was stopped.

Recipes (the paper's numbers for each: rft/paper.py):
{recipes.describe()}
"""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Tell what the run would be (configuration, steps, memory, I/O) and start nothing."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Trace ten steps of the main rank into the run folder, for Perfetto or chrome://tracing."""


def parse(arguments: list[str]) -> Config:
    """Return the configuration of a command line; raises what `parse_command` does."""
    return parse_command(arguments).config


def parse_command(arguments: list[str], ranks: int = 1) -> Command:
    """Return what a command line says; `ranks` processes will share a batch.

    With `--scale small` the size of the set is read from it.

    Raises:
        ValueError: for an unknown recipe, scale or preset, a value out of range, a missing run
            folder, a recipe that builds on a run that was not named, or a set that is not there.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments[0] if named else recipes.DEFAULT
    options = arguments[1:] if named else arguments
    # recipe, scale and preset decide the defaults that the whole line is then parsed over
    wants_help = bool({"-h", "--help"} & set(options))
    papers = wants_help or bool(_value_of(options, "--data"))
    scale = _value_of(options, "--scale") or ("paper" if papers else SMALL)
    preset = _value_of(options, "--preset") or "paper"
    default = recipes.build(recipe, scale=scale, preset=preset)
    if wants_help:
        print(USAGE)
    command = cli.parse(
        Command,
        args=options,
        default=Command(config=default),
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
    if not config.data and config.scale != SMALL:
        raise ValueError("--data is missing; give the URL that tools/shard_imagenet.py wrote to")
    recipes.require_inputs(config)
    require_packages(config)
    if config.scale == "small":
        url = files.join(config.data, config.train_set)
        size = small.Size.of(Index.load(url, Manifest.load(url)).label)
        config = small.fit(config, size, ranks, _named(options, small.OPTIONS))
    return dataclasses.replace(command, config=config)


def _named(options: list[str], names: Sequence[str]) -> set[str]:
    """Return which of the names (`group.name`) a command line gives, in any spelling of tyro's."""
    words = {word.partition("=")[0].replace("-", "_") for word in options if word[:2] == "--"}
    return {name for name in names if f"__{name}" in words}


def _value_of(options: list[str], name: str) -> str:
    """Return the value of one option before the whole line can be parsed, or an empty string."""
    value = ""
    for option, following in itertools.pairwise([*options, ""]):
        if option == name:
            value = following
        if option.startswith(f"{name}="):
            value = option.removeprefix(f"{name}=")
    return value  # the last one, as the parser takes it


def use_embedded_world(config: Config, world: World) -> Config:
    """Make the miniature world where it is missing and point the run at it."""
    from rft.demo import miniature

    run = config.run or f"runs/miniature-{config.recipe}-seed{config.seed}"
    if world.is_main:
        print(
            f"No --data given: training {config.recipe} on the embedded miniature world. For "
            f"ImageNet: torchrun --nproc_per_node 8 -m rft.train {config.recipe} "
            "--data URL --run-dir DIR",
            flush=True,
        )
    # whichever rank is first makes it, the others wait for its lock; one of them tells
    with contextlib.nullcontext() if world.is_main else contextlib.redirect_stdout(io.StringIO()):
        miniature.prepare_data(miniature.FOLDER)
    return dataclasses.replace(config, data=str(miniature.shards(miniature.FOLDER)), run=run)


def prepare(config: Config, world: World, device: torch.device) -> Job:
    """Load data and model and decide the plan; the same on every rank.

    Raises:
        ValueError: if the data, the model or the configuration do not fit together.
    """
    loader = config.loader
    cache = Cache(Path(loader.cache_dir), int(loader.cache_gb * 1e9)) if loader.cache_dir else None
    url = files.join(config.data, config.train_set)
    packed = PackedDataset(url, cache=cache, max_pixels=loader.max_pixels)
    warn_of_one_class(packed.url, packed.manifest.groups)
    plan, samples, held_out = plan_training(packed, config)
    pretrained = load_clip(config.model)
    # one image now, so that shards of the wrong size stop the run here and not inside it
    packed.image(int(samples[0]), pretrained.architecture.image_size)
    pretrained.model.to(device)
    head = zero_shot_head(pretrained, packed.manifest.classes, packed.manifest.templates)
    teacher = Classifier(pretrained.model.visual, head, pretrained.architecture)
    classes = packed.manifest.label_space
    student = starting_student(config, teacher, classes)
    ensemble = second_teacher(config, teacher, classes)
    objective = Objective(
        student,
        teacher,
        config.method,
        ensemble=ensemble,
        recompute=config.recompute,
        compile=config.compile,
    )
    batches = TrainingBatches(
        packed,
        samples,
        plan,
        image_size=pretrained.architecture.image_size,
        rank=world.rank,
        world_size=world.size,
        ranks_on_node=world.ranks_on_node,
    )
    return Job(
        config=config,
        world=world,
        device=device,
        objective=objective.to(device),
        batches=batches,
        held_out=held_out,
        fingerprint={
            **fingerprint(packed, plan, loader.held_out, config.held_out_seed),
            **inputs_fingerprint(config),
            "pretrained_sha256": tower_sha256(teacher),
        },
        start_seen=start_seen(config),
    )


def start_seen(config: Config) -> frozenset[TrainedOn]:
    """Return what the weights of --model.start were trained on."""
    if not config.model.start:
        return frozenset()
    path = Path(config.model.start)
    return trained_on.of_model(path, map_state(checkpoint_path(path)).metadata)


def starting_student(config: Config, pretrained: Classifier, classes: Classes) -> Classifier:
    """Return the model that learns, as it starts; `classes` are those of the training set.

    Raises:
        ValueError: if the weights to start from are not those of such a model.
    """
    student = copy.deepcopy(pretrained)
    if config.model.head == "random":
        bound = student.head.in_features**-0.5  # torch's own for a linear layer
        draw = rng.torch_generator(config.seed, "head")
        weight_KE = torch.rand(student.head.weight.shape, generator=draw) * 2 * bound - bound
        with torch.no_grad():
            student.head.weight.copy_(weight_KE)
    if config.model.start:
        load_alike(student, config.model.start, "--model.start", classes)
    if config.optim.trains == "head":
        student.visual.requires_grad_(False)
    return student


def second_teacher(config: Config, pretrained: Classifier, classes: Classes) -> Classifier | None:
    """Return WiSE-KD's teacher, or None for a method without one.

    `classes` are those of the training set.

    Raises:
        ValueError: if its weights are not those of such a model.
    """
    if config.method.kd_weight == 0:
        return None
    teacher = copy.deepcopy(pretrained)
    load_alike(teacher, config.method.kd_teacher, "--method.kd-teacher", classes)
    return teacher


def load_alike(model: Classifier, path: str, option: str, classes: Classes) -> None:
    """Load a run's selected weights into a model of the same architecture.

    Args:
        model: the model, with a head for `classes`.
        path: run folder or weights file.
        option: the command line's name of it, for messages.
        classes: of the training set.

    Raises:
        ValueError: naming the option, if the two differ, and the first class that does.
    """
    state, architecture, _, known = load_state(checkpoint_path(Path(path)))
    require_own_weights(Path(path))
    if reached := unfinished(Path(path)):
        warn(f"{option} {path} has not finished training ({reached})")
    if changed := model.architecture.difference(architecture):
        raise ValueError(f"{option} {path} is a different architecture: {changed[0]}")
    where = f"{option} {path}"
    pair = (known, where, classes, "the training set")
    rows = len(state["head.weight"])
    for warning in (
        *check_head(known, rows, where, classes, "the training set"),
        *compare_prompts(*pair),
    ):
        warn(warning)
    try:
        require_alike(model.state_dict(), state)
    except ValueError as error:
        raise ValueError(f"{option} {path}: {error}") from error
    model.load_state_dict(state)


def inputs_fingerprint(config: Config) -> dict[str, str]:
    """Return the hashes of the runs' weights that a run builds on."""
    paths = {"start": config.model.start, "kd_teacher": config.method.kd_teacher}
    return {
        f"{name}_sha256": files.sha256_file(checkpoint_path(Path(path)))
        for name, path in paths.items()
        if path
    }


def require_same_inputs(config: Config, done: Finished) -> None:
    """Check that a finished run was built on the weights that are named now.

    Raises:
        ValueError: with the difference.
    """
    if changed := files.difference(done.record.inputs, inputs_fingerprint(config)):
        raise ValueError(
            f"{config.run} is a finished run that was built on other weights: "
            f"{'; '.join(changed)}. Name those again, or choose another --run-dir"
        )


def tower_sha256(model: Classifier) -> str:
    """Return the hash of the image tower's weights, whatever file or name they came from.

    The head is left out: text embeddings may differ in their last bits from device to device.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run_job(job: Job, request: StopRequest, *, profile: bool = False) -> int:
    """Train one run to its end and leave a finished run folder.

    Returns:
        The exit code: 0, or `STOPPED` if something asked to stop before the end.
    """
    config, world = job.config, job.world
    # one node's GPUs may have what another's lack
    advice = "name one for all of them, e.g. --precision fp32"
    dist.require_agreement(world, "precision", config.precision, advice)
    dist.require_agreement(world, "data fingerprint", job.fingerprint)
    run = RunFolder(config)
    with run.taken(world, request):
        # the job that was in the folder until now may have finished it
        if done := dist.from_main(world, dist.on_main(world, lambda: finished(config))):
            tell_finished(config, done, world)
            return 0
        traces = run.path / filenames.PROFILE if profile and world.is_main else None
        progress = train(job, request, traces)
        if progress.step < job.total_steps:
            return STOPPED
        dist.on_main(world, run.require_there)
        dist.on_main(world, lambda: show(job))
        if world.is_main:
            run.finish(
                Training(
                    steps=progress.step,
                    best_step=progress.best_step,
                    world_size=world.size,
                    manifest_sha256=job.fingerprint["manifest_sha256"],
                    inputs=inputs_fingerprint(config),
                    weights_sha256=weights_record(run.path),
                )
            )
            cli.say(f"run finished: {config.run} ({job.chosen(progress.best_step)})")
            tell_next(config, world)
    return 0


def show(job: Job) -> None:
    """Write the gallery of what the selected model's masks and fills make of held-out images."""
    packed, folder = job.batches.packed, RunFolder(job.config).path
    shown = one_of_each_class(packed.index.label, job.held_out, 8)
    # a picture of a fill needs another image
    if job.config.method.masks and len(shown) > 1:
        saved = load_state(folder / SELECTED)
        model = build_classifier(saved.state, saved.architecture)
        write_gallery(
            str(folder / filenames.GALLERY), model, packed, shown, recipes.masked_methods()
        )


def tell_finished(config: Config, done: Finished, world: World) -> None:
    """Check a finished run's inputs and say that it is finished."""
    require_same_inputs(config, done)
    if world.is_main:
        notes = [f"in {load_config(Path(config.run)).precision}"]
        if done.uncompared:
            notes.append(f"its data could not be compared: {done.uncompared}")
        cli.say(f"run already finished: {config.run} ({'; '.join(notes)})")


def tell_next(config: Config, world: World) -> None:
    """Print the command that evaluates a finished run, with the finished other seeds beside it."""
    runs = commands.with_seeds([Path(config.run)], filenames.TRAINING)
    cli.say(commands.evaluation(runs, config.data, config.train_set, ranks=world.local_size))


def tell_start(job: Job, why: str) -> None:
    """Print what starts, and why in this precision."""
    config, world, device = job.config, job.world, job.device
    precision = f"{config.precision} ({why})" if why else config.precision
    cli.say(f"{config.run}: {config.recipe} on {world.size} x {device.type}, {precision}")
    if config.method.masks and not config.method.drops:
        pool = config.donor_pool(world.size)
        few = " (few: the paper's has 512)" if pool < SMALL_POOL else ""
        print(f"fills choose from {pool} images{few}", flush=True)
    for line in size_rule(job):
        print(line, flush=True)
    if warning := schedule_warning(job.total_steps, config.optim):
        warn(warning)


def main() -> None:
    """Parse, check, train."""
    world = dist.world_from_env()
    command = parse_command(sys.argv[1:], world.size)
    config = command.config
    config.micro_batch(world.size)
    if not config.data:
        config = use_embedded_world(config, world)
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
        torch.set_float32_matmul_precision("high")
    with StopRequest(config.cluster.stop_file) as request:
        # before the ranks join, so that a mistake that all of them see is told once
        job = prepare(config, world, device)
        if command.dry_run:
            if world.is_main:
                words = [word for word in sys.argv[1:] if word != "--dry-run"]
                cli.say(describe(job, words, why))
            return
        if world.is_main:
            tell_start(job, why)
        with dist.process_group(world, device, config.cluster.timeout) as world:
            job = dataclasses.replace(job, world=world)
            status = run_job(job, request, profile=command.profile)
        if status:
            sys.exit(status)
