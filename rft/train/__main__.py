"""Fine-tune CLIP: `torchrun --nproc_per_node N -m rft.train [RECIPE --data URL --run-dir DIR]`."""

import contextlib
import copy
import dataclasses
import io
import itertools
import os
import sys
from pathlib import Path

import torch

from rft import cli, dist, files, recipes
from rft.clip.classifier import SELECTED, Classifier, build_classifier, load_state
from rft.clip.head import zero_shot_head
from rft.clip.load import load_clip
from rft.config import Config
from rft.data.cache import Cache
from rft.data.loader import PackedDataset, TrainingBatches, fingerprint, plan_training
from rft.dist import World
from rft.train.gallery import one_of_each_class, write_gallery
from rft.train.loop import Job, train
from rft.train.objective import Objective
from rft.train.run import RunFolder, is_finished

SMALL = "miniature"

USAGE = f"""Fine-tune CLIP so that it stays robust.

usage: torchrun --nproc_per_node N -m rft.train RECIPE --data URL --run-dir DIR [--any.option VALUE]

Without --data it trains on the embedded miniature world, {recipes.DEFAULT} if no recipe is named.
The defaults below are the paper's; --scale miniature starts from those for that world.
The same command again resumes a run that was stopped.

Recipes:
{recipes.describe()}
"""


def parse(arguments: list[str]) -> Config:
    """Return the configuration of a command line.

    Raises:
        ValueError: for an unknown recipe or scale, a value out of range, or a missing run folder.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments[0] if named else recipes.DEFAULT
    options = arguments[1:] if named else arguments
    # the recipe and the scale decide the defaults that the whole line is then parsed over
    wants_help = bool({"-h", "--help"} & set(options))
    papers = wants_help or bool(_value_of(options, "--data"))
    scale = _value_of(options, "--scale") or ("paper" if papers else SMALL)
    default = recipes.build(recipe, scale=scale)
    if wants_help:
        print(USAGE)
    config = cli.parse(Config, args=options, default=default, prog="rft.train", description="")
    if config.data and not config.run:
        raise ValueError(
            "--run-dir is missing; name a folder for this run, e.g. --run-dir runs/first"
        )
    files.require_local(config.run, "--run-dir")
    if not config.data and config.scale != SMALL:
        raise ValueError("--data is missing; give the URL that tools/shard_imagenet.py wrote to")
    return config


def _value_of(options: list[str], name: str) -> str:
    """Return the value of one option before the whole line can be parsed, or an empty string."""
    for option, following in itertools.pairwise([*options, ""]):
        if option == name:
            return following
        if option.startswith(f"{name}="):
            return option.removeprefix(f"{name}=")
    return ""


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
    packed = PackedDataset(files.join(config.data, config.train_set), cache=cache)
    plan, samples, held_out = plan_training(packed, config)
    pretrained = load_clip(config.model)
    # one image now, so that shards of the wrong size stop the run here and not inside it
    packed.image(int(samples[0]), pretrained.architecture.image_size)
    pretrained.model.to(device)
    head = zero_shot_head(pretrained, packed.manifest.classes, packed.manifest.templates)
    student = Classifier(pretrained.model.visual, head, pretrained.architecture)
    teacher = copy.deepcopy(student)
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
        objective=Objective(student, teacher, config.method).to(device),
        batches=batches,
        held_out=held_out,
        fingerprint=fingerprint(packed, plan, loader.held_out, config.held_out_seed),
    )


def run_job(job: Job) -> None:
    """Train one run to its end and leave a finished run folder."""
    config, world = job.config, job.world
    dist.require_agreement(world, "data fingerprint", job.fingerprint)
    if not world.is_main:
        train(job)
        return
    with RunFolder(config) as run:
        progress = train(job)
        if len(job.held_out) and config.method.mask != "none":
            packed = job.batches.packed
            shown = one_of_each_class(packed.index.label, job.held_out, 8)
            methods = {name: m for name, m in recipes.METHODS.items() if m.mask != "none"}
            state, architecture, _ = load_state(run.path / SELECTED)
            model = build_classifier(state, architecture)
            write_gallery(str(run.path / "gallery.npz"), model, packed, shown, methods)
        run.finish(
            {"steps": progress.step, "best_step": progress.best_step, "world_size": world.size}
        )
    print(f"run finished: {config.run} (model of step {progress.best_step} selected)")


def main() -> None:
    """Parse, check, train."""
    config = parse(sys.argv[1:])
    world = dist.world_from_env()
    config.micro_batch(world.size)
    if not config.data:
        config = use_embedded_world(config, world)
    if is_finished(config):
        if world.is_main:
            print(f"run already finished: {config.run}")
        return
    device = dist.pick_device(config.device, world)
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    # before the ranks join, so that a mistake that all of them see is told once
    job = prepare(config, world, device)
    if world.is_main:
        print(f"{config.run}: {config.recipe} on {world.size} x {device.type}", flush=True)
    with dist.process_group(world, device):
        run_job(job)
    if world.is_main:
        command = f"torchrun --nproc_per_node {world.size} -m rft.evaluate"
        # a set of the user's own comes with a test set (tools/shard_folder.py), not with ImageNet's
        sets = "" if config.train_set == "imagenet-train" else " --sets test"
        print(f"next: {command} {config.run} --data {config.data}{sets}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(main)
