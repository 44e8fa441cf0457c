"""One rank that takes batches at a given rate: the child process of `benchmarks.feeding`.

It reads lines of JSON (`Request`), takes batches for the requested time, and writes a line of JSON
(`Answer`) for each, until its input ends.
"""

import contextlib
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from rft import cli
from rft.loading.batches import TrainingBatches
from rft.loading.dataset import PackedDataset
from rft.loading.order import Plan
from rft.loading.read import BATCHES_AHEAD, read_batches

SIZE = 224
ENDLESS = range(10**7)  # batches; more than any measurement needs


@dataclass(frozen=True, kw_only=True)
class Request:
    """The set to read, and the rate."""

    url: str
    rank: int = 0
    ranks: int = 1
    batch_size: int
    """Images per batch of this rank."""
    workers: int = 0
    images_per_second: float = 0.0
    """Images per second that the consumer computes; 0 takes batches as fast as they come."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of one request."""

    images: int
    seconds: float
    waited: float
    """Seconds in which the consumer had no batch."""
    cpu_seconds: float
    """CPU seconds of this process and its loader processes."""
    bytes: int
    """Payload of the images."""


def training_batches(url: str, batch_size: int, rank: int = 0, ranks: int = 1) -> TrainingBatches:
    """Plan a complete packed set, for batches of so many images on each rank."""
    packed = PackedDataset(url)
    samples = np.arange(len(packed))
    sizes = packed.shard_sizes(samples)
    plan = Plan(shard_sizes=sizes, batch_size=ranks * batch_size, seed=0)
    return TrainingBatches(packed, samples, plan, image_size=SIZE, rank=rank, world_size=ranks)


def take(request: Request) -> Answer:
    """Read at the rate of `request`; batches made before the consumer starts are not counted."""
    batches = training_batches(request.url, request.batch_size, request.rank, request.ranks)
    pause = request.batch_size / request.images_per_second if request.images_per_second else 0.0
    images = payload = 0
    waited = 0.0
    cpu = torch.device("cpu")
    stream = read_batches(batches, ENDLESS, workers=request.workers, device=cpu)
    with contextlib.closing(stream):
        for _ in range(1 + BATCHES_AHEAD * request.workers):
            next(stream)
        busy, started = own_cpu_seconds() + loader_cpu_seconds(), time.perf_counter()
        now = started
        while now - started < request.seconds:
            batch = next(stream)
            waited += time.perf_counter() - now
            images += len(batch.labels_B)
            payload += batch.reading.bytes
            # the host sleeps while the GPU computes
            time.sleep(pause)
            now = time.perf_counter()
        busy = own_cpu_seconds() + loader_cpu_seconds() - busy
    return Answer(
        images=images, seconds=now - started, waited=waited, cpu_seconds=busy, bytes=payload
    )


def own_cpu_seconds() -> float:
    """Return the CPU time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def loader_cpu_seconds() -> float:
    """Sum the CPU time of this process's living children, recursively."""
    ticks = 0
    for pid in machine.descendants(os.getpid()):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Serve requests; libraries' output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # as in training, where the ranks of a node share its cores
    torch.set_num_threads(1)
    for line in sys.stdin:
        answer = take(Request(**json.loads(line)))
        print(json.dumps(asdict(answer)), file=answers, flush=True)


if __name__ == "__main__":
    cli.run(main)
