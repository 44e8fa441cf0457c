"""The training loop."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from rft import dist
from rft.classes import Classes
from rft.clip.classifier import Classifier, load_state, save_classifier, save_state
from rft.config import Config, Precision
from rft.dist import World
from rft.evaluate.accuracy import Count
from rft.evaluate.count import count_correct
from rft.loading.batches import TrainingBatches
from rft.loading.dataset import Batch, Reading
from rft.loading.read import read_batches
from rft.runs import trained_on
from rft.runs.filenames import LAST, SELECTED
from rft.runs.trained_on import TrainedOn
from rft.train import checkpoint
from rft.train.checkpoint import Progress
from rft.train.logs import Journal
from rft.train.objective import Draws, Objective, StepAddress, draw
from rft.train.optim import build_optimizer, set_schedule
from rft.train.pictures import Counterfactuals
from rft.train.profile import profiling
from rft.train.run import RunFolder, vanished
from rft.train.stop import StopRequest

COUNTED = ("range_retries", "cache_hits", "cache_misses", "cache_repairs")
READING = ("wait", "ready", *Reading._fields)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run trains, on what, and where."""

    config: Config
    world: World
    device: torch.device
    objective: Objective
    batches: TrainingBatches
    held_out: np.ndarray
    fingerprint: dict[str, Any]
    start_seen: frozenset[TrainedOn] = frozenset()
    """What the weights that the student starts with were trained on."""

    def __post_init__(self) -> None:
        # anything else would be computed, and recorded, as if it were fp32
        if self.config.precision not in get_args(Precision):
            raise RuntimeError(
                f"a job's precision is {self.config.precision!r}; resolve_precision comes before it"
            )

    @property
    def must_agree(self) -> dict[str, Any]:
        """What two jobs must have the same of, for the second to go on where the first stopped."""
        return {"config": self.config.identity(), "data": self.fingerprint}

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.optim.epochs * self.batches.plan.steps_per_epoch

    @property
    def selects(self) -> bool:
        """Whether held-out images choose among the models of several epochs."""
        return len(self.held_out) > 0 and self.config.optim.epochs > 1

    def chosen(self, step: int) -> str:
        """Say in a few words which model the run is left with, and by what."""
        if self.total_steps == 0:
            return "the model it started with"
        if self.selects:
            return f"model of step {step} selected by {len(self.held_out):,} held-out images"
        why = "one epoch" if len(self.held_out) else "no held-out images"
        return f"the last model, of step {step}: {why}"

    @property
    def classes(self) -> Classes:
        """Classes of the training set, which are the head's."""
        return self.batches.packed.manifest.label_space

    @property
    def student(self) -> Classifier:
        """The model that learns."""
        return self.objective.student


def train(job: Job, request: StopRequest, traces: Path | None = None) -> Progress:
    """Train to the end, or until something asks to stop; go on from the newest checkpoint.

    Args:
        job: what to train.
        request: open since the process began, so that nothing that was asked is lost.
        traces: folder for a profile of some steps; None profiles nothing.

    Returns:
        How far the run is; it has not ended if that is not `job.total_steps`.

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
        most_correct=len(job.held_out) or job.total_steps,
    )
    progress = checkpoint.resume(store, world, own, config.donor_pool(world.size))
    module = dist.data_parallel(world, job.objective, job.device)
    settle_buckets(job, module)
    dist.on_main(world, lambda: restore_selected(job, store, own, progress))

    steps_per_epoch, saved, reason = job.batches.plan.steps_per_epoch, progress.step, ""
    steps = range(progress.step, job.total_steps)
    batches = read_batches(job.batches, steps, workers=config.loader.workers, device=job.device)
    meter = Meter(job)
    with (
        contextlib.closing(batches) as stream,
        Journal(config, progress.step, job.total_steps, writes=world.is_main) as journal,
        checkpoint.Writer(store) as writer,
        profiling(traces, progress.step, job.total_steps) as profiler,
    ):
        for step in steps:
            # all ranks stop after the same step; one that does not come here is missed here
            if stops(job, request, writer):
                reason = next(filter(None, dist.gather_objects(world, request.reason)))
                break
            batch = meter.wait_for(stream)
            lr = set_schedule(optimizer, step, job.total_steps, config.optim)
            shown = journal.collects(step + 1)
            terms, grad_norm = accumulate_gradients(job, module, batch, step, shown)
            with record_function("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
            meter.add(terms, grad_norm)
            journal.pictures(step + 1, shown, job.student.patch_side)

            progress = replace(progress, step=step + 1)
            ends_epoch = progress.step % steps_per_epoch == 0
            saves = ends_epoch or progress.step % config.log.checkpoint_steps == 0
            # a checkpoint is only written after its losses were seen to be finite
            if saves or progress.step % config.log.every_steps == 0:
                journal.metrics(progress.step, {**meter.read(progress.step), "lr": lr})
            if ends_epoch:
                progress = select(job, progress, journal)
            if saves:
                journal.require_folder()
                save(job, writer, optimizer, progress)
                saved = progress.step
                meter.restart()
            profiler.step()
        if job.total_steps == 0:
            progress = select(job, progress, journal)
        if saved < progress.step:
            values = meter.read(progress.step) if meter.steps else None
            journal.require_folder()
            # first: there may be little time left, and what ends the run may have ended its logs
            save(job, writer, optimizer, progress)
            if values:
                journal.metrics(progress.step, values)
        dist.on_main(world, writer.wait)
    dist.on_main(world, lambda: end(job, progress, reason))
    return progress


def end(job: Job, progress: Progress, reason: str) -> None:
    """Write the last weights, or say that they are not the last."""
    if progress.step < job.total_steps:
        print(
            f"stopped after step {progress.step} of {job.total_steps} ({reason}); the same command "
            "goes on from there",
            flush=True,
        )
        return
    RunFolder(job.config).require_there()
    folder = RunFolder(job.config).path
    for name in (LAST, SELECTED) if job.total_steps == 0 else (LAST,):
        save_classifier(str(folder / name), job.student, metadata(job, progress), job.classes)


def stops(job: Job, request: StopRequest, writer: checkpoint.Writer) -> bool:
    """Whether any rank was asked to stop.

    Raises:
        OSError: if the last checkpoint could not be written.
    """
    verdict = dist.largest(job.world, 2 if writer.failed else int(bool(request.reason)))
    if verdict == 2:
        dist.on_main(job.world, writer.wait)
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
            write_selected(job, progress, saved["model"])
        elif progress.best_step >= 0 and not (folder.path / SELECTED).exists():
            raise ValueError(vanished(folder.path / SELECTED, "was deleted"))
        folder.note_progress(record, job.total_steps)

    pool = job.config.donor_pool(job.world.size)
    writer.write(checkpoint.content(job.student, optimizer, progress, job.must_agree, pool), finish)


def accumulate_gradients(
    job: Job,
    module: nn.Module,
    batch: Batch,
    step: int,
    shown: list[Counterfactuals] | None = None,
) -> tuple[Tensor, Tensor]:
    """Leave the batch's averaged, clipped gradient in the parameters.

    Each micro-batch goes backward once for the clean losses and once for the counterfactual, so
    only one graph is alive at a time; gradients are exchanged in the last backward only, or with
    clipping after every micro-batch, in the last one of each. Each micro-batch's counterfactuals
    are appended to `shown` if it is given.

    Returns:
        The terms (cross-entropy, logit distillation, MSE, share of patches replaced), and the
        gradient's norm before it was clipped (for the last time).
    """
    optim, weight = job.config.optim, job.config.method.distill_weight
    parts = optim.accumulate
    terms, grad_norm = torch.zeros(4, device=job.device), torch.zeros((), device=job.device)
    pool_ZCHW = donor_pool(job, batch.images_BCHW)
    micros = zip(batch.images_BCHW.chunk(parts), batch.labels_B.chunk(parts), strict=True)
    for micro, (images_BCHW, labels_B) in enumerate(micros):
        ends = micro == parts - 1 or optim.clip == "micro-step"
        draws = draw_micro_batch(job, step, micro, len(images_BCHW))
        with dist.skip_sync(module, draws is not None or not ends):
            # not around backward, which has its forward's precision by itself
            with precision(job):
                clean = module(images_BCHW, labels_B, draws)
            with record_function("clean backward"):
                (clean.loss / parts).backward()
        terms[0] += clean.cross_entropy.detach() / parts
        terms[1] += clean.logit_distillation.detach() / parts
        terms[2] += clean.mse.detach() / parts
        if draws is not None:
            pool = images_BCHW if pool_ZCHW is None else pool_ZCHW
            with dist.skip_sync(module, not ends):
                with precision(job):
                    mse = module(pool, labels_B, draws, clean.donor_BP)
                with record_function("counterfactual backward"):
                    (weight * mse / parts).backward()
            terms[2] += mse.detach() / parts
            if shown is not None and clean.donor_BP is not None:
                shown.append(Counterfactuals(pool, clean.donor_BP, draws.own_B1))
            terms[3] += (clean.donor_BP != draws.own_B1).float().mean() / parts
        if ends:
            with record_function("clip"):
                grad_norm = nn.utils.clip_grad_norm_(job.student.parameters(), optim.clip_norm)
    return terms, grad_norm


def donor_pool(job: Job, images_BCHW: Tensor) -> Tensor | None:
    """Return the whole global batch if fills choose from it; None if from the micro-batch."""
    if not (job.config.method.masks and job.config.method.donors == "global"):
        return None
    with record_function("gather donors"):
        return dist.gather_rows(job.world, images_BCHW)


def draw_micro_batch(job: Job, step: int, micro: int, images: int) -> Draws | None:
    """Return the draws of one micro-batch of this rank; None where nothing is masked.

    From a global pool all ranks draw the same numbers for the whole batch, so that the result does
    not depend on how many ranks or micro-batches it is cut into.
    """
    config, world = job.config, job.world
    if not config.method.masks:
        return None
    pool = config.donor_pool(world.size)
    own, rank, part = range(images), world.rank, micro
    if config.method.donors == "global":
        first = (world.rank * config.optim.accumulate + micro) * images
        own, rank, part = range(first, first + images), 0, 0
    if config.method.same_draws:
        rank = 0
    address = StepAddress(config.seed, step, rank, part)
    patches = (job.batches.image_size // job.student.patch_side) ** 2
    return draw(config.method, own, patches, pool, address).to(job.device)


def precision(job: Job) -> torch.autocast:
    """Return the autocast context of the configured precision."""
    return torch.autocast(job.device.type, torch.bfloat16, enabled=job.config.precision == "bf16")


def settle_buckets(job: Job, module: nn.Module) -> None:
    """Run one step's backward on blank images and throw its gradients away.

    Data parallelism regroups its gradient buckets after the first backward, which changes the order
    of sums on three or more ranks; a resumed run must regroup before its first step, as the
    uninterrupted one did.
    """
    if job.world.alone or job.total_steps == 0:
        return
    count = job.config.micro_batch(job.world.size) * job.config.optim.accumulate
    size = job.batches.image_size
    images_BCHW = torch.zeros(count, 3, size, size, dtype=torch.uint8, device=job.device)
    labels_B = torch.zeros(count, dtype=torch.int64, device=job.device)
    accumulate_gradients(job, module, Batch(images_BCHW, labels_B, labels_B), step=-1)
    job.objective.zero_grad()


def select(job: Job, progress: Progress, journal: Journal) -> Progress:
    """Count held-out accuracy; select the model if it is strictly the best so far.

    Without held-out images the latest model counts as the best: it is the run's model in the end.
    """
    count = Count(progress.step, 1)
    if len(job.held_out):
        (count,) = count_correct(
            [job.student],
            job.batches.packed,
            image_size=job.batches.image_size,
            world=job.world,
            device=job.device,
            samples=job.held_out,
            workers=job.config.loader.workers,
            names=[f"{job.config.run} (step {progress.step}, held-out images)"],
        )
        journal.held_out(progress.step, count)
    return progress.selecting(count.correct)


def write_selected(job: Job, progress: Progress, state: dict[str, Tensor]) -> None:
    """Write the student of `progress.best_step` to the run folder."""
    selected = replace(progress, step=progress.best_step)
    path = RunFolder(job.config).path / SELECTED
    known = metadata(job, selected)
    save_state(str(path), state, job.student.architecture, known, job.classes)


def restore_selected(
    job: Job, store: checkpoint.Store, own: checkpoint.Own, progress: Progress
) -> None:
    """Write the selected model again where the run folder has none, or a later one.

    A later one stays behind by a checkpoint that was damaged afterwards; none, by a kill right
    after the checkpoint, or where only the checkpoints outlived the machine.
    """
    if progress.best_step < 0:
        return
    with contextlib.suppress(ValueError):
        found = load_state(RunFolder(job.config).path / SELECTED)
        if found.metadata["step"] == str(progress.best_step):
            return
    step = progress.best_step
    if step not in store.steps() or store.damage(step):
        raise ValueError(
            f"the run's model, of step {step}, is neither in {RunFolder(job.config).path} nor, "
            f"whole, in {store.url}; restore one, or use a new run folder to start again"
        )
    write_selected(job, progress, checkpoint.load(store, store.record(step), own).model)


def metadata(job: Job, progress: Progress) -> dict[str, str]:
    """Return what a weights file says of where it comes from."""
    seen = set(job.start_seen)
    if progress.step > 0:
        seen.add(TrainedOn(job.config.train_set, job.fingerprint["manifest_sha256"]))
    return {
        "recipe": job.config.recipe,
        "step": str(progress.step),
        **trained_on.entries(seen),
    }


class Meter:
    """Means of the loss terms between two log lines; touches the device only when read."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.restart()

    def restart(self) -> None:
        """Forget what was added: the clock starts now, evaluation and checkpoint not counted."""
        self._terms: list[Tensor] = []
        self._reading = np.zeros(len(READING))
        self._started = time.perf_counter()

    def wait_for(self, stream: Iterator[Batch]) -> Batch:
        """Return the stream's next batch and remember how long that took."""
        before = time.perf_counter()
        batch = next(stream)
        self._reading += (time.perf_counter() - before, batch.ready, *batch.reading)
        return batch

    def add(self, terms: Tensor, grad_norm: Tensor) -> None:
        """Add one step's terms."""
        self._terms.append(torch.cat([terms, grad_norm.reshape(1)]))

    @property
    def steps(self) -> int:
        """Steps since the last read."""
        return len(self._terms)

    def read(self, step: int) -> dict[str, float]:
        """Return the means since the last read, over all ranks, and start anew.

        Raises:
            ValueError: if a loss or gradient since then was not finite.
        """
        job = self._job
        terms_ST = dist.sum_over_ranks(job.world, torch.stack(self._terms)).cpu() / job.world.size
        finite_S = terms_ST.isfinite().all(dim=1)
        if not finite_S.all():
            if not job.world.is_main:
                dist.step_aside(job.world)
            first = int(finite_S.long().argmin())
            raise ValueError(not_finite(step - self.steps + first + 1, terms_ST[first].tolist()))
        cross_entropy, kd, mse, replaced, grad_norm = terms_ST.mean(dim=0).tolist()
        method = job.config.method
        loss = cross_entropy + method.kd_weight * kd + method.distill_weight * mse
        seconds = time.perf_counter() - self._started
        reading_R = torch.from_numpy(self._reading).to(job.device)
        summed = dict(zip(READING, dist.sum_over_ranks(job.world, reading_R).tolist(), strict=True))
        batches = self.steps * job.world.size
        values = {
            "epoch": round(step / job.batches.plan.steps_per_epoch, 4),
            "loss": loss,
            "ce": cross_entropy,
            "mse": mse,
            "kd": kd,
            "replaced": replaced,
            "grad_norm": grad_norm,
            "images_per_s": self.steps * job.config.loader.batch_size / seconds,
            # means over batches and ranks, in milliseconds; then sums over both
            "data_wait_ms": 1000 * summed["wait"] / batches,
            "read_ms": 1000 * summed["seconds"] / batches,
            "decode_ms": 1000 * summed["decode_seconds"] / batches,
            "queue_depth": summed["ready"] / batches,
            "read_mb": summed["bytes"] / 1e6,
            **{name: int(summed[name]) for name in COUNTED},
        }
        self.restart()
        return values


def not_finite(step: int, terms: list[float]) -> str:
    """Return what to say when training diverged at `step`."""
    cross_entropy, kd, mse, _, grad_norm = terms
    return (
        f"the loss or its gradient is not finite at step {step} (cross-entropy {cross_entropy:g}, "
        f"MSE {mse:g}, logit distillation {kd:g}, gradient norm {grad_norm:g}). Checkpoints from "
        "before that stay, but the same command would meet the same step again: lower "
        "--optim.lr in a new --run-dir"
    )
