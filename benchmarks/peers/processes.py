"""Ranks, kills and servers: every experiment runs in forked processes with a deadline.

The program imports its peer once and forks from there, so that eight ranks do not need eight
imports. It never reads data itself, so a forked process starts with the library in a fresh state.
"""

import contextlib
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.peers.samples import Batch

# benchmarks run from a checkout and use the servers of the tests
from benchmarks.servers import faults, ranges
from benchmarks.servers.loopback import free_port
from rft import dist

# seconds for a process to answer; eight ranks with their own loader processes take longest
PATIENCE = 60.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of a process."""

    value: Any = None
    """What its function returned."""
    error: str | None = None
    """The exception that it raised, or a description of how it ended."""


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """The samples of one rank."""

    numbers: list[list[int]]
    """By step."""
    checksums: list[list[int]]
    """CRC-32 of each image's tensor, by step."""
    states: list[dict[str, Any] | None]
    """By step."""
    error: str | None

    @property
    def samples(self) -> list[int]:
        """All numbers in order."""
        return [number for step in self.numbers for number in step]


class Child:
    """A function in a forked process."""

    def __init__(self, function: Callable[[], Any], out: Path, **variables: str) -> None:
        """Start it; its result goes to `out`, its output to a file beside it."""
        self.out = out
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(function, out, variables)

    def wait(self, deadline: float) -> Ended:
        """Wait until `time.monotonic()` reaches the deadline; then kill it."""
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return self._ended(status)
            time.sleep(0.01)
        self.kill()
        return Ended(error="did not end in time and was killed")

    def kill(self) -> None:
        """SIGKILL it and all its child processes."""
        for pid in [*machine.descendants(self.pid), self.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def _ended(self, status: int) -> Ended:
        try:
            return Ended(**json.loads(self.out.read_text()))
        except FileNotFoundError:
            return Ended(error=f"the process ended with status {status}")


def _child(function: Callable[[], Any], out: Path, variables: dict[str, str]) -> None:
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(variables)
    try:
        result = {"value": function()}
    except BaseException as error:  # report any exception of a peer
        result = {"error": f"{type(error).__name__}: {error}"}
        sys.excepthook(type(error), error, error.__traceback__)
    part = Path(f"{out}.part")
    part.write_text(json.dumps(result))
    part.rename(out)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # loader processes whose owner exits without stopping them
    for pid in machine.descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


def call(function: Callable[[], Any], folder: Path, seconds: float = PATIENCE) -> Ended:
    """Run a function in its own process, with a new file in `folder` for its result."""
    return Child(function, new_path(folder, "call")).wait(time.monotonic() + seconds)


def deliver(
    batches: Callable[[int], Iterator[Batch]],
    world_size: int,
    folder: Path,
    *,
    seconds: float = PATIENCE,
    kill_after: int | None = None,
) -> list[Delivered]:
    """Run the ranks of a job in parallel and return the samples of each.

    `batches` is called in each rank with its number, in the environment that torchrun would make.
    `kill_after`: SIGKILL all of them as soon as each has had so many batches.
    """
    port, deadline = str(free_port()), time.monotonic() + seconds
    ranks = []
    for rank in range(world_size):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        path = new_path(folder, f"rank{rank}")

        def read(rank: int = rank, path: Path = path) -> None:
            with dist.process_group(dist.world_from_env(), torch.device("cpu")):
                # a job to be killed half way must not finish first
                pause = 0.0 if kill_after is None else 0.1
                _write_batches(batches(rank), Path(f"{path}.jsonl"), pause)

        words = {name: str(value) for name, value in variables.items()}
        ranks.append((Child(read, path, **words), Path(f"{path}.jsonl")))
    errors: list[str | None] = [None] * world_size
    if kill_after is None:
        errors = [child.wait(deadline).error for child, _ in ranks]
    else:
        while time.monotonic() < deadline and any(
            len(_lines(log)) < kill_after for _, log in ranks
        ):
            time.sleep(0.005)
        for child, _ in ranks:
            child.kill()
    return [_delivered(log, error) for (_, log), error in zip(ranks, errors, strict=True)]


def _write_batches(batches: Iterator[Batch], path: Path, pause: float) -> None:
    with path.open("w") as log:
        for numbers_B, images_BCHW, state in batches:
            numbers = [int(number) for number in numbers_B]
            checksums = [zlib.crc32(image.numpy().tobytes()) for image in images_BCHW]
            log.write(json.dumps([numbers, checksums, state]) + "\n")
            log.flush()
            time.sleep(pause)


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _delivered(path: Path, error: str | None) -> Delivered:
    steps = [json.loads(line) for line in _lines(path)]
    return Delivered(
        numbers=[step[0] for step in steps],
        checksums=[step[1] for step in steps],
        states=[step[2] for step in steps],
        error=error,
    )


@contextlib.contextmanager
def server(folder: Path, state: Path, fault: faults.Fault | None) -> Iterator[tuple[str, Path]]:
    """Serve a folder over HTTP from another process; yield its URL and a file with its counts.

    Every third request of a shard meets the fault; None: none does. The file holds the number of
    requests of shards and of faults that happened.
    """
    told = new_path(state, "server")

    def serve() -> None:
        nothing = faults.Fault(kind="latency")
        with (
            ranges.range_server(folder) as upstream,
            faults.faulty(
                upstream,
                fault or nothing,
                schedule=faults.every_third if fault else lambda number: False,
                matching=r"^GET \S+\.(tar|mds|bin)",
            ) as proxy,
        ):
            while True:
                document = [proxy.url, proxy.requests, sum(proxy.fired.values())]
                part = Path(f"{told}.part")
                part.write_text(json.dumps(document))
                part.rename(f"{told}.json")
                time.sleep(0.02)

    child = Child(serve, told)
    counts = Path(f"{told}.json")
    try:
        deadline = time.monotonic() + 10
        while not counts.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield json.loads(counts.read_text())[0], counts
    finally:
        child.kill()


def new_path(folder: Path, stem: str) -> Path:
    """Return a path in the folder that does not exist yet."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{stem}-{time.monotonic_ns()}"
