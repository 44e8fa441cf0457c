"""Time of a step and of a forward on this machine, measured in a few seconds on blank images.

Both times do not depend on the images' content. Reading, decoding, checkpoints and the exchange
between ranks are not included.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rft.clip.classifier import Classifier
from rft.config import Config
from rft.dist import World
from rft.small import DONORS
from rft.train.job import Job
from rft.train.objective import Objective
from rft.train.optim import build_optimizer
from rft.train.step import accumulate_gradients, blank_batch

ALONE = World(rank=0, size=1, local_rank=0)
SECONDS = 2.0  # no further round is started after this time
ROUNDS = 5
IMAGES = 8  # per measured forward


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Measure the median time of a few calls, without the first if there are others.

    The first call allocates memory and chooses kernels; if it takes longer than `SECONDS`, it is
    the only one.
    """
    times: list[float] = []
    began = time.perf_counter()
    while len(times) <= ROUNDS and (not times or time.perf_counter() - began < SECONDS):
        before = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
    return float(np.median(times[1:] or times))


def step_seconds(job: Job) -> float:
    """Estimate the time of an optimizer step of a job, without changing the job.

    A small batch is timed first. If the full batch would take too long, its gradient is
    extrapolated from the small one; the optimizer's part does not depend on the number of images.

    Raises:
        ValueError: with the reason, if it cannot be measured.
    """
    if job.world.size > 1:
        raise ValueError("one rank cannot measure a step that several share")
    job = replace(job, objective=copy.deepcopy(job.objective))
    optimizer = build_optimizer(job.objective, job.config.optim)
    whole = job.config.loader.batch_size
    # the smallest batch in which every fill has a donor
    few = min(DONORS * job.config.optim.accumulate, whole)
    try:
        gradient = seconds_of(lambda: _gradient(job, few), job.device) * whole / few
        if gradient < SECONDS:
            gradient = seconds_of(lambda: _gradient(job, whole), job.device)
        return gradient + seconds_of(optimizer.step, job.device)
    except torch.OutOfMemoryError as error:
        raise ValueError("the GPU's memory is too small for it") from error


def _gradient(job: Job, images: int) -> None:
    """Compute the gradient of a batch of blank images."""
    loader = replace(job.config.loader, batch_size=images)
    job = replace(job, config=replace(job.config, loader=loader))
    accumulate_gradients(job, job.objective, blank_batch(job), step=0)
    # keep zero gradients, because the optimizer reads them
    for parameter in job.objective.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def step_seconds_of(
    config: Config, student: Classifier, teacher: Classifier, device: torch.device
) -> float:
    """Estimate the time of a configuration's step before its data are packed."""
    objective = Objective(student, teacher, config.method, recompute=config.recompute).to(device)
    # a step needs no data except its batch
    batches: Any = None
    job = Job(
        config=config,
        world=ALONE,
        device=device,
        objective=objective,
        batches=batches,
        held_out=np.arange(0),
        fingerprint={},
    )
    return step_seconds(job)


@torch.no_grad()
def forward_seconds(model: nn.Module, image_size: int, device: torch.device) -> float:
    """Measure the forward time per image, in a batch of `IMAGES`."""
    shape = (IMAGES, 3, image_size, image_size)
    images_BCHW = torch.zeros(shape, dtype=torch.uint8, device=device)
    return seconds_of(lambda: model(images_BCHW), device) / IMAGES


def about(seconds: float, nearest: Callable[[float], int] = round) -> str:
    """Format a time roughly: to ten seconds, minutes, or a tenth of an hour.

    Measured rates are no more precise than that. With `math.ceil`, a total is not below the sum of
    its parts.
    """
    if seconds < 8:
        return "a few seconds"
    if seconds < 95:
        return f"about {max(10, 10 * nearest(seconds / 10))} s"
    if seconds < 95 * 60:
        return f"about {nearest(seconds / 60)} min"
    return f"about {nearest(seconds / 360) / 10:.1f} h"
