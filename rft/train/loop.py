"""The training loop."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rft import dist
from rft.clip.classifier import SELECTED, Classifier, save_classifier
from rft.config import Config
from rft.data.loader import Batch, Reading, TrainingBatches, read_batches
from rft.dist import World
from rft.evaluate.accuracy import Count
from rft.evaluate.evaluator import count_correct
from rft.train import checkpoint
from rft.train.journal import Journal
from rft.train.objective import Objective, StepAddress
from rft.train.optim import build_optimizer, learning_rate
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
            lr = learning_rate(step, job.total_steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            terms = accumulate_gradients(job, module, batch, step)
            grad_norm = nn.utils.clip_grad_norm_(job.student.parameters(), config.optim.clip_norm)
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
    return progress


def accumulate_gradients(job: Job, module: nn.Module, batch: Batch, step: int) -> Tensor:
    """Leave the batch's averaged gradient in the parameters; return (cross-entropy, MSE, replaced).

    Each micro-batch goes backward once for the cross-entropy and once for the counterfactual, so
    only one graph is alive at a time; gradients are exchanged in the last backward only.
    """
    config = job.config
    parts = config.optim.accumulate
    terms = torch.zeros(3, device=job.device)
    micros = zip(batch.images_BCHW.chunk(parts), batch.labels_B.chunk(parts), strict=True)
    for micro, (images_BCHW, labels_B) in enumerate(micros):
        last = micro == parts - 1
        address = StepAddress(config.seed, step, job.world.rank, micro)
        with dist.skip_sync(module, job.objective.distils or not last), precision(job):
            cross_entropy, donor_BP = module(images_BCHW, labels_B, address)
            (cross_entropy / parts).backward()
        terms[0] += cross_entropy.detach() / parts
        if donor_BP is None:
            continue
        with dist.skip_sync(module, not last), precision(job):
            mse, _ = module(images_BCHW, labels_B, address, donor_BP)
            (config.method.distill_weight * mse / parts).backward()
        own_B1 = torch.arange(len(donor_BP), device=job.device)[:, None]
        terms[1] += mse.detach() / parts
        terms[2] += (donor_BP != own_B1).float().mean() / parts
    return terms


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
        metadata = {"recipe": job.config.recipe, "step": str(progress.step)}
        save_classifier(str(RunFolder(job.config).path / SELECTED), job.student, metadata)


class Meter:
    """Means of the loss terms between two log lines; touches the device only when read."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.restart()

    def restart(self) -> None:
        """Forget what was added: the clock starts now, evaluation and checkpoint not counted."""
        self._terms = torch.zeros(4, device=self._job.device)
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
        cross_entropy, mse, replaced, grad_norm = means.tolist()
        loss = cross_entropy + job.config.method.distill_weight * mse
        if not math.isfinite(loss + grad_norm):
            raise RuntimeError(
                f"the loss or its gradient stopped being finite within the {self._steps} steps "
                f"before step {step} (cross-entropy {cross_entropy}, MSE {mse}, gradient norm "
                f"{grad_norm}); the last checkpoint is from before that"
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
