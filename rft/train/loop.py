"""The training loop: resume, then step by step to the end, with logs, selection and checkpoints."""

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
    """Train to the end, or until something asks to stop; resume from the newest checkpoint.

    `request` is open since the process began, so that none is lost; `traces` is a folder for a
    profile of some steps. Returns how far the run is: to its end, or to where it was stopped.

    Raises:
        ValueError: if the loss stopped being finite, naming the step.
        OSError: if a checkpoint could not be written.
    """
    config, world = job.config, job.world
    optimizer = build_optimizer(job.objective, config.optim)
    folder = RunFolder(config)
    # in the run folder what a killed job left is swept away
    store = checkpoint.Store(folder.checkpoints, config.log.keep, scratch=folder.path)
    own = checkpoint.Own(
        student=job.student,
        optimizer=optimizer,
        must_agree=job.must_agree,
        total_steps=job.total_steps,
        # without held-out images the count that selects is the step (rft/train/select.py)
        most_correct=len(job.held_out) or job.total_steps,
        others=job.others,
    )
    progress, began_with = checkpoint.resume(store, world, own, config.donor_pool(world.size))
    module = settled(job, progress.step, began_with)
    dist.on_main(world, lambda: restore_selected(job, store, own, progress.best_step))
    # those of later steps come with the selection
    keep_frame(job, progress.step)

    steps_per_epoch, saved, reason = job.batches.plan.steps_per_epoch, progress.step, ""
    # batches, draws and learning rate follow from the step's number, so only it is resumed from
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
        for step in steps:
            # all ranks stop after the same step; one that does not come here is missed here
            if stops(world, request, writer):
                # any rank may be the one that was asked, and the main one prints why
                reason = next(filter(None, dist.gather_objects(world, request.reason)))
                break
            batch = meter.wait_for(stream)
            lr = set_schedule(optimizer, step, job.total_steps, config.optim)
            shown = journal.collects(step + 1)
            terms, grad_norm = accumulate_gradients(job, module, batch, step, shown)
            update(job, optimizer, shares[step] if shares else 0.0)
            meter.add(terms, grad_norm, lr)
            journal.pictures(step + 1, shown, job.student.patch_side)

            # a step is numbered from 0; what is logged and saved counts the steps that are done
            progress = replace(progress, step=step + 1)
            ends_epoch = progress.step % steps_per_epoch == 0
            saves = ends_epoch or progress.step % config.log.checkpoint_steps == 0
            # a checkpoint is only written after its losses were seen to be finite
            if saves or progress.step % config.log.every_steps == 0:
                journal.metrics(progress.step, meter.read(progress.step))
            if ends_epoch:
                # before the checkpoint, which records which model is selected
                progress = select(job, progress, journal, kept)
            if saves:
                journal.require_folder()
                save(job, writer, optimizer, progress)
                saved = progress.step
                # the speed is that of training alone
                meter.restart()
            end_profiled_step()
        if job.total_steps == 0:
            # zero-shot: no epoch ended, and the held-out count is wanted all the same
            progress = select(job, progress, journal, kept)
        if saved < progress.step:
            # on every rank, because it sums over them; no steps are left right after a log line
            values = meter.read(progress.step) if meter.steps else None
            journal.require_folder()
            # first: there may be little time left, and what ends the run may have ended its logs
            save(job, writer, optimizer, progress)
            if values:
                journal.metrics(progress.step, values)
        # before any rank leaves: an error of the last checkpoint is an error of the run
        dist.on_main(world, writer.wait)
    dist.on_main(world, lambda: end(job, progress, reason))
    return progress


def settled(job: Job, done: int, began_with: Choice | None) -> nn.Module:
    """Choose the objective's kernels and make it data-parallel; raises what `choose` does."""
    # before the buckets settle, whose order follows from that of the kernels' gradients
    job.objective.kernels = choose(job, done, began_with)
    module = dist.data_parallel(job.world, job.objective, job.device)
    settle_buckets(job, module)
    return module


def update(job: Job, optimizer: torch.optim.Optimizer, share: float) -> None:
    """Take the optimizer's step, and move a moving teacher by `share` of the way to the student."""
    with record_function("optimizer"):
        optimizer.step()
        # zeros keep the gradients in the memory that ranks exchange: new ones would lie beside it
        # until the backward that exchanges them
        optimizer.zero_grad(set_to_none=job.world.alone)
    if share:
        with record_function("teacher"):
            teacher, student = job.objective.teacher.visual, job.student.visual
            moving_average.follow(teacher.parameters(), student.parameters(), share)


def end(job: Job, progress: Progress, reason: str) -> None:
    """Write the last weights, or report where the run stopped before them."""
    if progress.step < job.total_steps:
        log.info(
            f"stopped after step {progress.step} of {job.total_steps} ({reason}); the same command "
            "resumes there"
        )
        return
    RunFolder(job.config).require_there()
    folder = RunFolder(job.config).path
    if not job.config.loader.features_dir:
        features.folder(job.config).clear()  # nothing reads them any more
    # a run without steps saves no checkpoint, with which the selected weights come otherwise
    for name in (LAST, SELECTED) if job.total_steps == 0 else (LAST,):
        save_classifier(str(folder / name), job.student, metadata(job, progress.step), job.classes)


def stops(world: World, request: StopRequest, writer: checkpoint.Writer) -> bool:
    """Whether any rank was asked to stop.

    Raises:
        OSError: if the last checkpoint could not be written.
    """
    # the larger one wins: a failed checkpoint is an error, whatever else asks to stop
    verdict = dist.largest(world, 2 if writer.failed else int(bool(request.reason)))
    if verdict == 2:
        dist.on_main(world, writer.wait)
    return verdict == 1


def save(
    job: Job, writer: checkpoint.Writer, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Have a checkpoint written, then the student if this step's is the selected one.

    In the other order, a kill in between could leave a selected model that the resumed run does not
    know of.
    """
    # the one before may still be on its way to a slow store
    dist.on_main(job.world, writer.wait)
    if not job.world.is_main:
        return
    folder = RunFolder(job.config)

    def finish(record: checkpoint.Record, saved: dict[str, Any]) -> None:
        folder.require_there()
        if progress.best_step == progress.step:
            # the copy that was written: the student has learnt on since
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
