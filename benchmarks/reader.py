"""Benefit of rft's shared memory: `python -m benchmarks.reader [--save]`.

Three ways from the same packed set in the page cache to a batch that a GPU can read by itself:

    page-locked   rft: loader processes fill memory that the trainer page-locks once
    copied        the same if page-locking is refused: the trainer copies each batch
    DataLoader    torch: a loader process sends each batch as a tensor in torch's shared memory, and
                  a thread of the trainer copies it to pinned memory

Without a GPU nothing can be pinned, so both copies go to reused memory, like torch's pinned memory.
Rounds are interleaved. Besides the rate, CPU time matters: in the trainer, where it delays the
launch of a step, and in all processes, which share a node's cores. The last line is one JSON
object.
"""

import contextlib
import itertools
import json
import multiprocessing
import queue
import statistics
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import machine, photos
from benchmarks.one_rank import (
    ENDLESS,
    SIZE,
    loader_cpu_seconds,
    own_cpu_seconds,
    training_batches,
)
from rft import cli, cpus
from rft.loading.batches import TrainingBatches
from rft.loading.read import BATCHES_AHEAD, read_batches
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
BUFFERS = 3  # of the pinning thread: one being filled, one waiting, one in use
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare ways from loader processes to the trainer."""

    images: int = 1000
    """Photographs to generate and to pack as `pixels`."""
    batch_size: int = 512
    """Images per batch."""
    rounds: int = 3
    """Measurements per variant."""
    seconds: float = 2.0
    """Seconds per measurement."""
    work: Path = Path("build/feeding")
    """Folder for the photographs and their packed set."""
    save: bool = False
    """Also write the result to benchmarks/results/."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.seconds <= 0:
            raise ValueError("--rounds must be at least 1 and --seconds above 0")


def page_locked(batches: TrainingBatches, workers: int) -> Generator[Tensor, None, None]:
    """Yield batches as a GPU would find them, in the memory that loader processes filled."""
    with contextlib.closing(read_batches(batches, ENDLESS, workers=workers, device=CPU)) as stream:
        for batch in stream:
            yield batch.images_BCHW


def copied(batches: TrainingBatches, workers: int) -> Generator[Tensor, None, None]:
    """Yield batches after the copy that the trainer makes if page-locking is refused."""
    buffer_BCHW = torch.empty(batches.largest, 3, SIZE, SIZE, dtype=torch.uint8)
    with contextlib.closing(page_locked(batches, workers)) as stream:
        for images_BCHW in stream:
            yield buffer_BCHW.copy_(images_BCHW)


class Sent(Dataset[Tensor]):
    """Batches as tensors sent by a loader process, filled like torch's own collation."""

    def __init__(self, batches: TrainingBatches) -> None:
        self._batches = batches

    def __getitem__(self, index: int) -> Tensor:
        batches = self._batches
        shape = (batches.largest, 3, SIZE, SIZE)
        # in shared memory from the start, so that sending copies nothing
        storage = torch.UntypedStorage._new_shared(int(np.prod(shape)), device="cpu")
        images_BCHW = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
        return batches.packed.batch(batches.samples_of(index), SIZE, images_BCHW).images_BCHW


def data_loader(batches: TrainingBatches, workers: int) -> Generator[Tensor, None, None]:
    """Yield batches of torch's DataLoader, each copied by a thread like its pinning thread."""
    options: dict[str, Any] = {}
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rft.loading.forkserver", "rft.loading.read"])
        options = {"prefetch_factor": BATCHES_AHEAD, "multiprocessing_context": context}
    loader = DataLoader(
        Sent(batches),
        batch_size=None,
        sampler=ENDLESS,
        num_workers=workers,
        collate_fn=_as_it_is,
        **options,
    )
    buffers = itertools.cycle(
        [torch.empty(batches.largest, 3, SIZE, SIZE, dtype=torch.uint8) for _ in range(BUFFERS)]
    )
    # without loader processes, torch pins in the trainer itself
    pinned = (
        buffer.copy_(images_BCHW) for buffer, images_BCHW in zip(buffers, loader, strict=False)
    )
    yield from _in_a_thread(pinned) if workers else pinned


def _as_it_is(item: Any) -> Any:
    return item


def _in_a_thread(source: Iterator[Tensor]) -> Generator[Tensor, None, None]:
    ready: queue.Queue[Tensor] = queue.Queue(maxsize=1)
    ends = threading.Event()

    def work() -> None:
        for item in source:
            if ends.is_set():
                break
            ready.put(item)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while True:
            yield ready.get()
    finally:
        ends.set()
        with contextlib.suppress(queue.Empty):
            ready.get_nowait()
        thread.join()


WAYS = {"page-locked": page_locked, "copied": copied, "DataLoader": data_loader}


@dataclass(frozen=True)
class Rate:
    """One measurement."""

    images_per_second: float
    trainer: float
    """CPU seconds of the training process per 1,000 images."""
    all: float
    """CPU seconds of the training process and its loader processes per 1,000 images."""


def measure(stream: Generator[Tensor, None, None], workers: int, seconds: float) -> Rate:
    """Take batches for a given time; those made while processes started are not counted."""
    for _ in range(2 + BATCHES_AHEAD * workers):
        next(stream)
    count, trainer, loaders = 0, own_cpu_seconds(), loader_cpu_seconds()
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        count += len(next(stream))
    trainer, loaders = own_cpu_seconds() - trainer, loader_cpu_seconds() - loaders
    # loader processes end with the stream that owns them
    stream.close()
    thousands = count / 1000
    return Rate(count / elapsed, trainer / thousands, (trainer + loaders) / thousands)


def summarise(rates: list[Rate]) -> dict[str, float]:
    """Return medians, and the lowest and highest rate."""
    speeds = [rate.images_per_second for rate in rates]
    return {
        "images_per_second": round(statistics.median(speeds), 1),
        "lowest": round(min(speeds), 1),
        "highest": round(max(speeds), 1),
        "trainer_cpu_s": round(statistics.median(rate.trainer for rate in rates), 4),
        "all_cpu_s": round(statistics.median(rate.all for rate in rates), 4),
    }


def table(result: dict[str, Any]) -> str:
    """Format a saved result as a page."""
    lines = [
        f"{result['processor']}, {result['cpus']} CPUs, `pixels` in the page cache, batches of "
        f"{result['batch_size']}; medians of {result['rounds']} interleaved rounds; "
        f"{result['date'][:10]}. Memory is copied where a GPU's would be pinned.",
        "",
        "| batches | loader processes | images/s (lowest to highest round) "
        "| CPU s of the trainer per 1,000 images | of all processes |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['way']} | {row['workers']} | {row['images_per_second']:,.0f} "
        f"({row['lowest']:,.0f} to {row['highest']:,.0f}) | {row['trainer_cpu_s']:.3f} "
        f"| {row['all_cpu_s']:.3f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    arguments = cli.parse(Arguments, prog="benchmarks.reader")
    if arguments.images < arguments.batch_size:
        raise ValueError("--images must be at least --batch-size")
    # as in training, where each rank has one core for its own work
    torch.set_num_threads(1)
    sets = photos.pack_as(("pixels",), arguments.work / str(arguments.images), arguments.images)
    batches = training_batches(sets["pixels"], arguments.batch_size)
    cases = [(way, workers) for workers in range(3) for way in WAYS]
    found: dict[tuple[str, int], list[Rate]] = {case: [] for case in cases}
    for _, (way, workers) in itertools.product(range(arguments.rounds), cases):
        rate = measure(WAYS[way](batches, workers), workers, arguments.seconds)
        found[way, workers].append(rate)
        print(f"{way}, {workers} loader processes: {rate.images_per_second:,.0f} images/s")
    result = {
        "benchmark": "reader",
        **machine.describe(),
        "versions": machine.versions(["torch", "numpy"]),
        "cpus": cpus.available(),
        "images": arguments.images,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "rows": [
            {"way": way, "workers": workers, **summarise(found[way, workers])}
            for way, workers in cases
        ],
    }
    print(f"\n{table(result)}")
    if arguments.save:
        files.write_json(str(RESULTS / "reader_cpu.json"), result)
        files.write_bytes(str(RESULTS / "reader.md"), table(result).encode())
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
