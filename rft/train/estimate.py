"""`--dry-run`: description of a run before anything is written or started.

Sizes of weights, data and checkpoints are exact; rft/train/memory.py counts the memory of a step.
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal

from rft import cli, recipes, small
from rft.config import Config
from rft.loading.order import Plan
from rft.runs import filenames, records
from rft.text import counted
from rft.train import features
from rft.train.job import Job
from rft.train.memory import counts_all_tokens, module_bytes, needs, state_bytes
from rft.train.optim import schedule_warning
from rft.train.rate import about, step_seconds

RANKS = [2**power for power in range(8)]  # rows of the table, if they can share the batch
LINE_BYTES = 450  # approximate size of a line of metrics.jsonl
OPTIMIZERS = {
    "adamw": "AdamW",
    "spd": "AdamW",
    "ftp": "AdamW and FTP",
}  # name of the state in the table

log = logging.getLogger(__name__)


def estimate(job: Job, arguments: Sequence[str], why: str = "") -> str:
    """Describe a job: configuration, data, steps, memory, I/O, next command.

    `arguments` are the command line without `--dry-run`; `why` is the reason for the precision, if
    `auto` chose it.
    """
    config, ranks, packed = job.config, job.world.size, job.batches.packed
    set_size = small.Size.of(packed.index.label)
    manifest = packed.manifest
    stored = size(sum(shard.bytes for shard in manifest.shards))
    gpus = ranks if ranks > 1 else max(1, torch.cuda.device_count())
    start = cli.next_step(["-m", "rft.train", *arguments], ranks=gpus)
    sections = {
        "Configuration (* differs from the recipe's default)": configuration(
            config, why, small.rule(config, set_size, ranks)
        ),
        "Data": [
            f"{config.train_set}: {counted(len(packed), 'sample')} of {len(manifest.classes):,} "
            f"classes in {counted(len(manifest.shards), 'shard')}, {stored} "
            f"({manifest.encoding['kind']})",
            f"{job.batches.plan.samples:,} to train on{shots(config)}, "
            f"{len(job.held_out):,} held out",
            *small.rule_in_words(config, set_size, ranks),
        ],
        "Steps": steps(config, job.batches.plan, job.total_steps),
        "Memory of a rank": memory_table(job) if job.total_steps else ["nothing is trained"],
        "Time": expected_time(job),
        "I/O": traffic(job),
        "Next": [start.removeprefix("next: ")],
    }
    blocks = ["\n".join([title, *(f"  {line}" for line in ls)]) for title, ls in sections.items()]
    return "\n\n".join(blocks)


def shots(config: Config) -> str:
    """Format the few-shot setting, to append to the number of images; empty without one."""
    return f" ({config.loader.shots} of each class)" if config.loader.shots else ""


def configuration(
    config: Config, why: str = "", by_size: Mapping[str, int] | None = None
) -> list[str]:
    """List the configuration by field, marking differences from the recipe's defaults.

    A precision chosen by `auto` is not marked; `why` is appended to it. `by_size` are the defaults
    that follow from the size of the set.
    """
    default = recipes.build(config.recipe, scale=config.scale, preset=config.preset)
    usual = {**_leaves(default.to_dict()), **(by_size or {})}
    lines = []
    for name, value in _leaves(config.to_dict()).items():
        if name == "precision" and why:
            lines.append(f"  {name:24s} {value}  ({why})")
            continue
        # data and run folder have no defaults
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
    """Count the run's optimizer steps and the finished ones; warn of an unsuitable schedule."""
    lines = [
        f"{plan.steps_per_epoch:,} per epoch, {total:,} in {counted(config.optim.epochs, 'epoch')} "
        f"of global batch {plan.batch_size:,}"
    ]
    if warning := schedule_warning(total, config.optim):
        log.warning(warning)
    reached = records.find(Path(config.run) / filenames.PROGRESS, records.Reached)
    if reached is not None:
        lines.append(f"{reached.step:,} of them are done: the run would resume there")
    return lines


def memory_table(job: Job) -> list[str]:
    """Tabulate the memory per rank, for this run's number of ranks and other possible ones."""
    config, ranks = job.config, possible_ranks(job.config, job.world.size)
    objective = job.objective
    trained = module_bytes(objective, trained=True)
    texts = [*filter(None, (objective.contrast, objective.random_texts))]
    parts = {
        "student": module_bytes(objective.student),
        "teachers": sum(map(module_bytes, filter(None, (objective.teacher, objective.ensemble)))),
        **({"text towers": sum(map(module_bytes, texts))} if texts else {}),
        "gradient": trained,
        OPTIMIZERS[config.optim.optimizer]: state_bytes(job),
    }
    if objective.pretrained is not None:
        parts["pre-trained weights in fp32"] = module_bytes(objective.pretrained)
    need = needs(job, ranks)
    how = (
        f"ESTIMATE ({need.estimated}): activations only, temporary tensors come on top"
        if need.estimated
        else "the peak of one step, counted by torch's tracker"
    )
    if counts_all_tokens(config.method):
        how += ", as if no token were dropped"
    lines = [
        ", ".join(f"{name} {size(value)}" for name, value in parts.items()),
        f"total: {how}; GPU context and allocator fragmentation come on top",
        "ranks  images at once  fills choose from    total",
    ]
    for count, total in zip(ranks, need.totals, strict=True):
        pool = config.donor_pool(count) if config.method.masks and not config.method.drops else "-"
        lines.append(f"{count:5d}  {config.micro_batch(count):14d}  {pool:>17}  {size(total):>7}")
    return lines


def expected_time(job: Job) -> list[str]:
    """Estimate the time of the run by timing steps for a few seconds."""
    if not job.total_steps:
        return ["nothing is trained"]
    try:
        seconds = step_seconds(job)
    except ValueError as error:
        return [f"not measured: {error}"]
    return [
        f"{about(seconds * job.total_steps)} for {counted(job.total_steps, 'step')}, at "
        f"{seconds:.3g} s per step, measured on this machine just now;",
        "reading images, held-out images and checkpoints come on top",
    ]


def possible_ranks(config: Config, own: int) -> list[int]:
    """List the numbers of ranks that can share the batch, including this run's, ascending."""
    found = {own}
    # if one power of two cannot share the batch, no larger one can
    with contextlib.suppress(ValueError):
        for ranks in RANKS:
            config.micro_batch(ranks)
            found.add(ranks)
    return sorted(found)


def traffic(job: Job) -> list[str]:
    """Estimate the run's reads per epoch and per second, and its writes."""
    config, plan, packed = job.config, job.batches.plan, job.batches.packed
    image = float(np.mean(packed.index.length[job.batches.samples]))
    epoch = plan.steps_per_epoch * plan.batch_size
    lines = [
        f"reads {size(epoch * image)} per epoch: {size(1000 * image)}/s for every 1,000 images/s",
        *features.in_words(job),
    ]
    if len(job.held_out):
        held_out = float(np.sum(packed.index.length[job.held_out]))
        lines.append(f"reads another {size(held_out)} after each epoch (held-out images)")
    saved = checkpoint_steps(job.total_steps, plan.steps_per_epoch, config.log.checkpoint_steps)
    results = config.optim.epochs * bool(len(job.held_out))
    count = len(saved)
    weights = module_bytes(job.student)
    each = weights + state_bytes(job)
    each += sum(module_bytes(module) for module in job.others.values())
    kept = (
        "the checkpoints of the models that these selected, and the selected and the last weights"
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
    """List the steps after which an uninterrupted run writes a checkpoint."""
    return {*range(epoch, total + 1, epoch), *range(between, total + 1, between)}


def size(count: float) -> str:
    """Format a number of bytes in kB, MB or GB."""
    return decimal(round(count))
