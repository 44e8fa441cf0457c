"""`--dry-run`: what a run would be, before anything is written or started.

Sizes of weights, data and checkpoints are exact. The memory of activations is measured on this
machine: what autograd really keeps for one image and for two, on the real model, gives what it
keeps for any number. Temporary tensors and the GPU's own context come on top.
"""

import contextlib
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor, nn

from rft import recipes, small
from rft.clip import vit
from rft.config import Config
from rft.device import to_device
from rft.loading.order import Plan
from rft.method.counterfactual import StepAddress, draw
from rft.method.relevance import MAP_BYTES
from rft.runs import filenames, records
from rft.train import features
from rft.train.job import Job
from rft.train.objective import Objective
from rft.train.optim import schedule_warning
from rft.train.step import autocast

RANKS = [2**power for power in range(8)]  # rows of the table, as far as the batch can be shared
MAPS = 3  # of one layer that the CAM has at once: attention, its gradient, their product
LINE_BYTES = 450  # of metrics.jsonl, about

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """Bytes that one graph keeps until its backward."""

    fixed: float
    """For any number of images: weights in another precision."""
    image: float

    def bytes(self, images: int) -> float:
        """Extrapolate to so many images."""
        return self.fixed + images * self.image


@dataclass(frozen=True)
class Memory:
    """What one rank needs, in bytes."""

    weights: int
    teachers: int
    trained: int
    """Of the weights that learn; their gradient is as large, AdamW's state twice."""
    clean: Kept
    counterfactual: Kept
    map_image: int
    """One layer's attention maps of an image, fp32; 0 without a CAM."""

    def total(self, images: int, ranks: int) -> float:
        """Add it all up, for so many images forwarded at once."""
        # gradient and both moments of AdamW
        copies = 3 if ranks == 1 else 4  # data parallelism exchanges a copy of the gradient
        cam = MAPS * min(images * self.map_image, MAP_BYTES)
        # the larger of the two, because a step never has both graphs alive
        graph = max(self.clean.bytes(images) + cam, self.counterfactual.bytes(images))
        return self.weights + self.teachers + copies * self.trained + graph


def estimate(job: Job, arguments: Sequence[str], why: str = "") -> str:
    """Describe what a job would be: configuration, data, steps, memory, I/O, next command.

    `arguments` are those of the command line without `--dry-run`; `why` is the reason for the
    precision, where `auto` chose it.
    """
    config, ranks, packed = job.config, job.world.size, job.batches.packed
    set_size = small.Size.of(packed.index.label)
    manifest = packed.manifest
    stored = size(sum(shard.bytes for shard in manifest.shards))
    gpus = ranks if ranks > 1 else max(1, torch.cuda.device_count())
    start = ["torchrun", "--nproc_per_node", str(gpus), "-m", "rft.train", *arguments]
    sections = {
        "Configuration (* differs from the recipe's default)": configuration(
            config, why, small.rule(config, set_size, ranks)
        ),
        "Data": [
            f"{config.train_set}: {len(packed):,} samples of {len(manifest.classes):,} classes in "
            f"{len(manifest.shards):,} shards, {stored} ({manifest.encoding['kind']})",
            f"{job.batches.plan.samples:,} to train on, {len(job.held_out):,} held out",
            *small.rule_in_words(config, set_size, ranks),
        ],
        "Steps": steps(config, job.batches.plan, job.total_steps),
        "Memory of a rank (an estimate: temporary tensors and the GPU's context come on top)": (
            memory_table(config, ranks, measure(job)) if job.total_steps else ["nothing is trained"]
        ),
        "I/O": traffic(job),
        "Next": [shlex.join(start)],
    }
    blocks = ["\n".join([title, *(f"  {line}" for line in ls)]) for title, ls in sections.items()]
    return "\n\n".join(blocks)


def configuration(
    config: Config, why: str = "", by_size: Mapping[str, int] | None = None
) -> list[str]:
    """List the configuration by field, with a mark where it differs from the recipe's default.

    A precision that `auto` chose is none of them; `why` stands behind it. `by_size` are the
    defaults that follow from the size of the set.
    """
    default = recipes.build(config.recipe, scale=config.scale, preset=config.preset)
    usual = {**_leaves(default.to_dict()), **(by_size or {})}
    lines = []
    for name, value in _leaves(config.to_dict()).items():
        if name == "precision" and why:
            lines.append(f"  {name:24s} {value}  ({why})")
            continue
        # where data and run lie has no default
        changed = value != usual[name] and name not in ("data", "run")
        was = f"  (the recipe's is {_shown(usual[name])})" if changed else ""
        lines.append(f"{'*' if changed else ' '} {name:24s} {_shown(value)}{was}")
    return lines


def _leaves(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for name, value in document.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def _shown(value: Any) -> str:
    return "-" if value in ("", None) else str(value)


def steps(config: Config, plan: Plan, total: int) -> list[str]:
    """Count the optimizer steps of the run, and those that are done; warn of a bad schedule."""
    lines = [
        f"{plan.steps_per_epoch:,} an epoch, {total:,} in {config.optim.epochs} epochs of "
        f"global batch {plan.batch_size:,}"
    ]
    if warning := schedule_warning(total, config.optim):
        log.warning(warning)
    reached = records.find(Path(config.run) / filenames.PROGRESS, records.Reached)
    if reached is not None:
        lines.append(f"{reached.step:,} of them are done: the run would resume there")
    return lines


def memory_table(config: Config, own: int, memory: Memory) -> list[str]:
    """Tabulate the memory of a rank, for this run's number of ranks and other possible ones."""
    parts = {
        "student": memory.weights,
        "teachers": memory.teachers,
        "gradient": memory.trained,
        "AdamW": 2 * memory.trained,
    }
    fixed = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    each = max(memory.clean.image, memory.counterfactual.image)
    lines = [f"{fixed}; for each image {size(each)}"]
    lines.append("ranks  images at once  fills choose from  clean graph  counterfactual   in all")
    for ranks in possible_ranks(config, own):
        images = config.micro_batch(ranks)
        pool = config.donor_pool(ranks) if config.method.masks and not config.method.drops else "-"
        clean, other = memory.clean.bytes(images), memory.counterfactual.bytes(images)
        lines.append(
            f"{ranks:5d}  {images:14d}  {pool:>17}  {size(clean):>11}  "
            f"{size(other) if other else '-':>14}  {size(memory.total(images, ranks)):>7}"
        )
    return lines


def possible_ranks(config: Config, own: int) -> list[int]:
    """List the numbers of ranks that can share the batch, this run's among them, rising."""
    found = {own}
    # where one power of two cannot share the batch, no larger one can
    with contextlib.suppress(ValueError):
        for ranks in RANKS:
            config.micro_batch(ranks)
            found.add(ranks)
    return sorted(found)


def traffic(job: Job) -> list[str]:
    """Estimate what the run reads per epoch and second, and what it writes."""
    config, plan, packed = job.config, job.batches.plan, job.batches.packed
    image = float(np.mean(packed.index.length[job.batches.samples]))
    epoch = plan.steps_per_epoch * plan.batch_size
    lines = [
        f"reads {size(epoch * image)} an epoch: {size(1000 * image)}/s for every 1,000 images/s",
        *features.in_words(job),
    ]
    if len(job.held_out):
        held_out = float(np.sum(packed.index.length[job.held_out]))
        lines.append(f"reads {size(held_out)} more after each epoch (held out)")
    saved = checkpoint_steps(job.total_steps, plan.steps_per_epoch, config.log.checkpoint_steps)
    results = config.optim.epochs * bool(len(job.held_out))
    count = len(saved)
    weights = _bytes(job.student)
    each = weights + 2 * _bytes(job.student, trained=True)
    kept = (
        "those of the models that these selected, and the selected and the last weights"
        if job.selects
        else "and the last weights under both names"
    )
    lines.append(
        f"writes {count:,} checkpoints of {size(each)} and keeps {min(count, config.log.keep)} of "
        f"them, {kept} ({size(weights)} each)"
    )
    every = config.log.every_steps
    logged = len(saved.union(range(every, job.total_steps + 1, every))) + results
    lines.append(f"writes {logged:,} lines of metrics, about {size(logged * LINE_BYTES)}")
    return lines


def checkpoint_steps(total: int, epoch: int, between: int) -> set[int]:
    """List the steps after which a checkpoint is written if nothing stops the run."""
    return {*range(epoch, total + 1, epoch), *range(between, total + 1, between)}


def measure(job: Job) -> Memory:
    """Measure the memory of a rank: weights by size, activations by running both graphs."""
    objective, method = job.objective, job.config.method
    teachers = (objective.teacher, objective.ensemble)
    one, two = (graph_bytes(job, images) for images in (1, 2))
    # a line through both; less than nothing fixed can only be the rounding of small tensors
    clean, counterfactual = (
        Kept(fixed=max(0.0, 2 * low - high), image=high - low)
        for low, high in zip(one, two, strict=True)
    )
    tokens = 1 + (job.batches.image_size // job.student.patch_side) ** 2
    heads = vit.blocks(job.student.visual)[0].attn.num_heads
    return Memory(
        weights=_bytes(objective.student),
        teachers=sum(_bytes(teacher) for teacher in teachers if teacher is not None),
        trained=_bytes(objective.student, trained=True),
        clean=clean,
        counterfactual=counterfactual,
        map_image=4 * heads * tokens**2 if method.needs_cam and method.cam == "relevance" else 0,
    )


def graph_bytes(job: Job, images: int) -> tuple[int, int]:
    """Measure what the clean and the counterfactual graph of a step keep for so many images.

    The student's gradients and weights stay as they are.
    """
    batches, method = job.batches, job.config.method
    # one more is the other image that a fill needs
    batch = batches.packed.batch(batches.samples[: images + 1], batches.image_size)
    pool_ZCHW = batch.images_BCHW.to(job.device)
    images_BCHW, labels_B = pool_ZCHW[:images], batch.labels_B[:images].to(job.device)
    # not the job's own: it may be compiled, which takes minutes and keeps about the same
    objective = Objective(
        job.student,
        job.objective.teacher,
        method,
        ensemble=job.objective.ensemble,
        recompute=job.config.recompute,
    )
    draws = None
    if method.masks:
        patches = (batches.image_size // job.student.patch_side) ** 2
        # any address: a graph depends on the draws only where random masks drop unequal numbers
        address = StepAddress(job.config.seed, 0, 0, 0)
        draws = draw(method, range(images), patches, len(pool_ZCHW), address)
        draws = draws.copied(partial(to_device, device=job.device))
    with autocast(job.device, job.config.precision):
        clean, first = kept_bytes(objective, lambda: objective(images_BCHW, labels_B, draws))
    donor_BP = clean.donor_BP
    if donor_BP is None:
        return first, 0
    # the first graph goes before the second comes, as in a step
    del clean
    with autocast(job.device, job.config.precision):
        _, second = kept_bytes(objective, lambda: objective(pool_ZCHW, labels_B, draws, donor_BP))
    return first, second


def kept_bytes(module: nn.Module, call: Callable[[], Any]) -> tuple[Any, int]:
    """Return what `call` returns, and the bytes that autograd keeps for its backward.

    Tensors that share a storage count once, the module's own parameters not at all.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # what is returned keeps the storage alive, so that no other tensor gets its address
            kept[storage.data_ptr()] = storage.nbytes()
        # the tensor itself would hold its own graph for ever
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return result, sum(kept.values())


def _bytes(module: nn.Module, *, trained: bool = False) -> int:
    """Return the size of a module's parameters, or of those among them that learn."""
    return sum(
        parameter.nbytes
        for parameter in module.parameters()
        if parameter.requires_grad or not trained
    )


def size(count: float) -> str:
    """Format a number of bytes in kB, MB or GB."""
    return decimal(round(count))
