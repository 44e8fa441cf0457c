"""The training loop."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from rft import dist
from rft.clip.classifier import LAST, SELECTED, Classifier, save_classifier
from rft.config import Config
from rft.data.loader import Batch, Reading, TrainingBatches, read_batches
from rft.dist import World
from rft.evaluate.accuracy import Count
from rft.evaluate.evaluator import count_correct
from rft.train import checkpoint
from rft.train.journal import Journal
from rft.train.objective import Draws, Objective, StepAddress, draw
from rft.train.optim import build_optimizer, set_schedule
from rft.train.run import RunFolder

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

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.optim.epochs * self.batches.plan.steps_per_epoch

    @property
    def student(self) -> Classifier:
        """The model that learns."""
        return self.objective.student


def train(job: Job) -> checkpoint.Progress:
    """Train to the end, going on from the run folder's newest checkpoint."""
    config, world = job.config, job.world
    optimizer = build_optimizer(job.objective, config.optim)
    folder = RunFolder(config).checkpoints
    progress = checkpoint.resume(folder, job.student, optimizer, job.fingerprint)
    dist.require_agreement(world, "checkpoint", progress)
    module = dist.data_parallel(world, job.objective, job.device)
    settle_buckets(job, module)
    # a job killed right after a checkpoint may not have written the model that it selected
    keep_selected(job, progress)

    steps = range(progress.step, job.total_steps)
    stream = read_batches(job.batches, steps, workers=config.loader.workers, device=job.device)
    meter = Meter(job)
    with Journal(config, progress.step, job.total_steps, writes=world.is_main) as journal:
        for step in steps:
            batch = meter.wait_for(stream)
            lr = set_schedule(optimizer, step, job.total_steps, config.optim)
            terms, grad_norm = accumulate_gradients(job, module, batch, step)
            with record_function("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
            meter.add(terms, grad_norm)

            progress.step = step + 1
            ends_epoch = progress.step % job.batches.plan.steps_per_epoch == 0
            saves = ends_epoch or progress.step % config.log.checkpoint_steps == 0
            # a checkpoint is only written after its losses were seen to be finite
            if saves or progress.step % config.log.every_steps == 0:
                journal.metrics(progress.step, {**meter.read(progress.step), "lr": lr})
            if ends_epoch:
                select(job, progress, journal)
            if saves and world.is_main:
                checkpoint.save(
                    folder, job.student, optimizer, progress, job.fingerprint, config.log.keep
                )
            keep_selected(job, progress)
            if saves:
                meter.restart()
        if job.total_steps == 0:
            select(job, progress, journal)
            keep_selected(job, progress)
    if world.is_main:
        save_classifier(str(folder.parent / LAST), job.student, metadata(job, progress))
    return progress


def accumulate_gradients(
    job: Job, module: nn.Module, batch: Batch, step: int
) -> tuple[Tensor, Tensor]:
    """Leave the batch's averaged, clipped gradient in the parameters.

    Each micro-batch goes backward once for the clean losses and once for the counterfactual, so
    only one graph is alive at a time; gradients are exchanged in the last backward only, or with
    clipping after every micro-batch, in the last one of each.

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
    if job.world.size == 1 or job.total_steps == 0:
        return
    count = job.config.micro_batch(job.world.size) * job.config.optim.accumulate
    size = job.batches.image_size
    images_BCHW = torch.zeros(count, 3, size, size, dtype=torch.uint8, device=job.device)
    labels_B = torch.zeros(count, dtype=torch.int64, device=job.device)
    accumulate_gradients(job, module, Batch(images_BCHW, labels_B, labels_B), step=-1)
    job.objective.zero_grad()


def select(job: Job, progress: checkpoint.Progress, journal: Journal) -> None:
    """Count held-out accuracy; select the model if it is strictly the best so far."""
    count = Count(progress.step, 1)  # with nothing to select by, the last model is the one
    if len(job.held_out):
        (count,) = count_correct(
            [job.student],
            job.batches.packed,
            image_size=job.batches.image_size,
            world=job.world,
            device=job.device,
            samples=job.held_out,
            workers=job.config.loader.workers,
        )
        journal.held_out(progress.step, count)
    if count.correct > progress.best_correct:
        progress.best_correct, progress.best_step = count.correct, progress.step


def keep_selected(job: Job, progress: checkpoint.Progress) -> None:
    """Write the student if this step's is the selected one.

    Comes after the checkpoint that says so: in the other order, a kill in between could leave a
    selected model that the resumed run does not know of.
    """
    if job.world.is_main and progress.best_step == progress.step:
        path = RunFolder(job.config).path / SELECTED
        save_classifier(str(path), job.student, metadata(job, progress))


def metadata(job: Job, progress: checkpoint.Progress) -> dict[str, str]:
    """Return what a weights file says of where it comes from."""
    return {"recipe": job.config.recipe, "step": str(progress.step)}


class Meter:
    """Means of the loss terms between two log lines; touches the device only when read."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.restart()

    def restart(self) -> None:
        """Forget what was added: the clock starts now, evaluation and checkpoint not counted."""
        self._terms = torch.zeros(5, device=self._job.device)
        self._reading = np.zeros(len(READING))
        self._steps = 0
        self._started = time.perf_counter()

    def wait_for(self, stream: Iterator[Batch]) -> Batch:
        """Return the stream's next batch and remember how long that took."""
        before = time.perf_counter()
        batch = next(stream)
        self._reading += (time.perf_counter() - before, batch.ready, *batch.reading)
        return batch

    def add(self, terms: Tensor, grad_norm: Tensor) -> None:
        """Add one step's terms."""
        self._terms += torch.cat([terms, grad_norm.reshape(1)])
        self._steps += 1

    def read(self, step: int) -> dict[str, float]:
        """Return the means since the last read, over all ranks, and start anew.

        Raises:
            RuntimeError: if a loss or gradient since then was not finite.
        """
        job = self._job
        means = dist.sum_over_ranks(job.world, self._terms) / (self._steps * job.world.size)
        cross_entropy, kd, mse, replaced, grad_norm = means.tolist()
        method = job.config.method
        loss = cross_entropy + method.kd_weight * kd + method.distill_weight * mse
        if not math.isfinite(loss + grad_norm):
            raise RuntimeError(
                f"the loss or its gradient stopped being finite within the {self._steps} steps "
                f"before step {step} (cross-entropy {cross_entropy}, MSE {mse}, logit "
                f"distillation {kd}, gradient norm {grad_norm}); the last checkpoint is from "
                "before that"
            )
        seconds = time.perf_counter() - self._started
        reading_R = torch.from_numpy(self._reading).to(job.device)
        summed = dict(zip(READING, dist.sum_over_ranks(job.world, reading_R).tolist(), strict=True))
        batches = self._steps * job.world.size
        values = {
            "epoch": round(step / job.batches.plan.steps_per_epoch, 4),
            "loss": loss,
            "ce": cross_entropy,
            "mse": mse,
            "kd": kd,
            "replaced": replaced,
            "grad_norm": grad_norm,
            "images_per_s": self._steps * job.config.loader.batch_size / seconds,
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
