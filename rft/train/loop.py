"""The training loop: resume, run the remaining steps, log, select and write checkpoints."""

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from rft import dist
from rft.clip.classifier import save_classifier
from rft.dist import World
from rft.method import moving_average
from rft.runs.filenames import LAST, SELECTED
from rft.train import checkpoint, features
from rft.train.checkpoint import Progress
from rft.train.fastest import choose
from rft.train.job import Job
from rft.train.journal import Journal
from rft.train.kernels import Choice
from rft.train.meter import Meter
from rft.train.optim import build_optimizer, set_schedule
from rft.train.pictures import keep_frame
from rft.train.profile import profiling
from rft.train.run import RunFolder, vanished
from rft.train.select import metadata, restore_selected, select, write_selected
from rft.train.step import accumulate_gradients, settle_buckets
from rft.train.stop import StopRequest

log = logging.getLogger(__name__)


def train(job: Job, request: StopRequest, traces: Path | None = None) -> Progress:
    """Train to the end, or until a stop request; resume from the newest checkpoint.

    `request` has been listening since the process began, so that no signal is lost; `traces` is a
    folder for a profile of some steps. Returns the progress at the end or at the stop.

    Raises:
        ValueError: if the loss is not finite, naming the step.
        OSError: if a checkpoint could not be written.
    """
    config, world = job.config, job.world
    optimizer = build_optimizer(job.objective, config.optim)
    folder = RunFolder(config)
    # scratch files are in the run folder, where leftovers of a killed job are swept away
    store = checkpoint.Store(folder.checkpoints, config.log.keep, scratch=folder.path)
    own = checkpoint.Own(
        student=job.student,
        optimizer=optimizer,
        must_agree=job.must_agree,
        total_steps=job.total_steps,
        # without held-out images the step selects, instead of a count (rft/train/select.py)
        most_correct=len(job.held_out) or job.total_steps,
        others=job.others,
    )
    progress, began_with = checkpoint.resume(store, world, own, config.donor_pool(world.size))
    module = settled(job, progress.step, began_with)
    dist.on_main(world, lambda: restore_selected(job, store, own, progress.best_step))
    # frames of later steps are kept by `select`
    keep_frame(job, progress.step)

    steps_per_epoch, saved, reason = job.batches.plan.steps_per_epoch, progress.step, ""
    # batches, draws and learning rate depend only on the step's number, so only that is resumed
    steps = range(progress.step, job.total_steps)
    kept = features.held_out(job)
    shares = moving_average.shares(config.method, job.total_steps)
    meter = Meter(config, world, job.device, steps_per_epoch)
    with (
        contextlib.closing(features.read_batches(job, steps)) as stream,
        Journal(config, progress.step, job.total_steps, writes=world.is_main) as journal,
        checkpoint.Writer(store) as writer,
        profiling(traces, progress.step, job.total_steps) as end_profiled_step,
    ):
        # not earlier: checkpoint, kernels and logs may have refused to resume
        dist.on_main(world, folder.write_records)
        for step in steps:
            # all ranks stop after the same step; a rank that does not arrive is noticed here
            if stops(world, request, writer):
                # any rank may have received the request, and the main rank prints the reason
                reason = next(filter(None, dist.gather_objects(world, request.reason)))
                break
            batch = meter.wait_for(stream)
            lr = set_schedule(optimizer, step, job.total_steps, config.optim)
            shown = journal.collects(step + 1)
            terms, grad_norm = accumulate_gradients(job, module, batch, step, shown)
            update(job, optimizer, shares[step] if shares else 0.0)
            meter.add(terms, grad_norm, lr)
            journal.pictures(step + 1, shown, job.student.patch_side)

            # steps are numbered from 0; logs and checkpoints count finished steps
            progress = replace(progress, step=step + 1)
            ends_epoch = progress.step % steps_per_epoch == 0
            saves = ends_epoch or progress.step % config.log.checkpoint_steps == 0
            # a checkpoint is only written after its losses were checked to be finite
            if saves or progress.step % config.log.every_steps == 0:
                journal.metrics(progress.step, meter.read(progress.step))
            if ends_epoch:
                # before the checkpoint, which records the selected model
                progress = select(job, progress, journal, kept)
            if saves:
                journal.require_folder()
                save(job, writer, optimizer, progress)
                saved = progress.step
                # the speed counts training alone
                meter.restart()
            end_profiled_step()
        if job.total_steps == 0:
            # zero-shot: no epoch ended, but the held-out count is needed
            progress = select(job, progress, journal, kept)
        if saved < progress.step:
            # on every rank, because it sums over ranks; there is nothing to read right after a log
            # line
            values = meter.read(progress.step) if meter.steps else None
            journal.require_folder()
            # save first: time may be short, and the cause of the stop may prevent logging
            save(job, writer, optimizer, progress)
            if values:
                journal.metrics(progress.step, values)
        # before any rank leaves, because an error of the last checkpoint is an error of the run
        dist.on_main(world, writer.wait)
    dist.on_main(world, lambda: end(job, progress, reason))
    return progress


def settled(job: Job, done: int, began_with: Choice | None) -> nn.Module:
    """Choose the objective's kernels and make it data-parallel; raises the errors of `choose`."""
    # before the buckets settle, because their order depends on the kernels' order of gradients
    job.objective.kernels = choose(job, done, began_with)
    module = dist.data_parallel(job.world, job.objective, job.device)
    settle_buckets(job, module)
    return module


def update(job: Job, optimizer: torch.optim.Optimizer, share: float) -> None:
    """Take the optimizer step, and move a moving teacher by `share` towards the student."""
    with record_function("optimizer"):
        optimizer.step()
        # zeroing keeps gradients in the buffers that ranks exchange: new ones would need extra
        # memory until the next exchange
        optimizer.zero_grad(set_to_none=job.world.alone)
    if share:
        with record_function("teacher"):
            teacher, student = job.objective.teacher.visual, job.student.visual
            moving_average.follow(teacher.parameters(), student.parameters(), share)


def end(job: Job, progress: Progress, reason: str) -> None:
    """Write the last weights, or report at which step the run stopped."""
    if progress.step < job.total_steps:
        log.info(
            f"stopped after step {progress.step} of {job.total_steps} ({reason}); the same command "
            "resumes there"
        )
        return
    RunFolder(job.config).require_there()
    folder = RunFolder(job.config).path
    if not job.config.loader.features_dir:
        features.folder(job.config).clear()  # no longer needed
    # the selected weights are otherwise written with a checkpoint, which a run without steps lacks
    for name in (LAST, SELECTED) if job.total_steps == 0 else (LAST,):
        save_classifier(str(folder / name), job.student, metadata(job, progress.step), job.classes)


def stops(world: World, request: StopRequest, writer: checkpoint.Writer) -> bool:
    """Whether any rank received a stop request.

    Raises:
        OSError: if the last checkpoint could not be written.
    """
    # the larger value wins: a failed checkpoint is an error, even if a stop was requested too
    verdict = dist.largest(world, 2 if writer.failed else int(bool(request.reason)))
    if verdict == 2:
        dist.on_main(world, writer.wait)
    return verdict == 1


def save(
    job: Job, writer: checkpoint.Writer, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write a checkpoint, then the student's weights if this step is the selected one.

    In the opposite order, a kill in between could leave a selected model that the resumed run does
    not know.
    """
    # the previous checkpoint may still be on its way to a slow store
    dist.on_main(job.world, writer.wait)
    if not job.world.is_main:
        return
    folder = RunFolder(job.config)

    def finish(record: checkpoint.Record, saved: dict[str, Any]) -> None:
        folder.require_there()
        if progress.best_step == progress.step:
            # the written copy: the student has been trained further since
            write_selected(job, progress.step, saved["model"])
        elif progress.best_step >= 0 and not (folder.path / SELECTED).exists():
            raise ValueError(vanished(folder.path / SELECTED, "was deleted"))
        folder.note_progress(record, job.total_steps)

    content = checkpoint.content(
        job.student,
        optimizer,
        progress,
        job.must_agree,
        donor_pool=job.config.donor_pool(job.world.size),
        kernels=job.objective.kernels.choice,
        others=job.others,
    )
    writer.write(content, finish)
