"""The numbers in a run's log lines: means over the steps since the last line, and timings."""

import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from rft import dist
from rft.config import Config
from rft.dist import World
from rft.loading.dataset import Batch, Reading
from rft.method import losses
from rft.train.step import terms_of

COUNTED = ("range_retries", "cache_hits", "cache_misses", "cache_repairs")
# names of the terms in an error message, in this order
WORDS = {
    "ce": "cross-entropy",
    "contrastive": "contrastive loss",
    "mse": "MSE",
    "kd": "logit distillation",
    "context": "KL of the contexts",
    "lipsum": "distance of random texts",
    "head": "distillation of the head",
    "grad_norm": "gradient norm",
}
READING = ("wait", "ready", *Reading._fields)


class Meter:
    """Means of the loss terms between two log lines; waits for the device only when read."""

    def __init__(
        self, config: Config, world: World, device: torch.device, steps_per_epoch: int
    ) -> None:
        self._config, self._world, self._device = config, world, device
        self._steps_per_epoch = steps_per_epoch
        self._names = (*terms_of(config.method), "grad_norm")
        self.restart()

    def restart(self) -> None:
        """Reset the sums and the clock, so that evaluation and checkpoints do not count."""
        self._terms: list[Tensor] = []
        self._reading = np.zeros(len(READING))
        self._started = time.perf_counter()

    def wait_for(self, stream: Iterator[Batch]) -> Batch:
        """Take the stream's next batch and record the waiting time."""
        before = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - before - batch.computing
        self._reading += (waited, batch.ready, *batch.reading)
        return batch

    def add(self, terms: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Add one step's terms; the learning rate of the last step is logged."""
        self._lr = lr
        self._terms.append(torch.cat([terms, grad_norm.reshape(1)]))

    @property
    def steps(self) -> int:
        """Steps since the last read."""
        return len(self._terms)

    def read(self, step: int) -> dict[str, float]:
        """Compute the means since the last read, over all ranks, and reset.

        Raises:
            ValueError: if a loss or gradient since then was not finite.
        """
        world = self._world
        # the first wait for the device: until here the host ran ahead of it
        terms_ST = dist.sum_over_ranks(world, torch.stack(self._terms)).cpu() / world.size
        finite_S = terms_ST.isfinite().all(dim=1)
        # the sums are the same on every rank, so all ranks decide alike
        if not finite_S.all():
            if not world.is_main:
                dist.step_aside(world)
            # the first False
            first = int(finite_S.long().argmin())
            raise ValueError(
                not_finite(step - self.steps + first + 1, self._named(terms_ST[first]))
            )
        means = self._named(terms_ST.mean(dim=0))
        # after the wait for the device, so that this is the time of the steps, not of their launch
        seconds = time.perf_counter() - self._started
        # on the device, because NCCL only sums GPU tensors
        reading_R = torch.from_numpy(self._reading).to(self._device)
        summed = dict(zip(READING, dist.sum_over_ranks(world, reading_R).tolist(), strict=True))
        batches = self.steps * world.size
        values = {
            "epoch": round(step / self._steps_per_epoch, 4),
            # the loss is linear in its terms, so the loss of the means is the mean of the losses
            "loss": losses.total(self._config.method, means),
            **means,
            "images_per_s": self.steps * self._config.loader.batch_size / seconds,
            # means over batches and ranks, in milliseconds; the counts further down are sums
            "data_wait_ms": 1000 * summed["wait"] / batches,
            "read_ms": 1000 * summed["seconds"] / batches,
            "decode_ms": 1000 * summed["decode_seconds"] / batches,
            "queue_depth": summed["ready"] / batches,
            "read_mb": summed["bytes"] / 1e6,
            **{name: int(summed[name]) for name in COUNTED},
            "lr": self._lr,
        }
        self.restart()
        return values

    def _named(self, terms_T: Tensor) -> dict[str, float]:
        return dict(zip(self._names, terms_T.tolist(), strict=True))


def not_finite(step: int, terms: Mapping[str, float]) -> str:
    """Format the error message of a training that diverged at `step`."""
    found = ", ".join(f"{words} {terms[name]:g}" for name, words in WORDS.items() if name in terms)
    return (
        f"the loss or its gradient is not finite at step {step} ({found}). Earlier checkpoints are "
        "kept, but the same command would fail at the same step: lower --optim.lr in a new "
        "--run-dir"
    )
