"""Rate of batches from the loader: `python -m benchmarks.loader --save`.

Compares rft's loader with a plain memcpy, a bare decoding loop and other loaders, on the same
photographs (benchmarks/photos.py), confined to the same few CPUs, with all data in the page cache.
Every contender runs in its own process, which is stopped while another is measured. Rounds are
interleaved, so that a temporarily busy machine slows all of them, and ratios are taken round by
round. benchmarks/contenders.py describes the contenders; no epoch ends within a measurement. The
peers need `python -m benchmarks.environments`; a missing one is omitted, with the reason. The last
line is one JSON object.

    pixels_over_memcpy   rft on --encoding pixels / one thread copying as many random payloads
    pixels_over_npy_cls  rft on --encoding pixels / webdataset on the same arrays, npy + cls
    jpeg_over_bare       rft on --encoding original / CPUs x one process that only decodes and
                         crops (the same in so many processes at once is in the table too)
    simd_over_pillow     rft on --encoding original with Pillow-SIMD / the same with Pillow
"""

import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import environments, machine, photos, ratios
from rft import cli
from rft.packing import pack
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
PARTING = 10.0  # seconds for a contender to end by itself
PATIENCE = 180.0  # seconds to wait for an answer; preparing a peer's format takes longest


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare loaders on one rank's share of a few CPUs."""

    images: int = 2000
    """Photographs to generate and read."""
    cpus: int = 2
    """CPUs to which all contenders are confined, and loader processes of those that decode."""
    batch_size: int = 64
    """Images per batch."""
    rounds: int = 5
    """Measurements per contender."""
    seconds: float = 4.0
    """Seconds per measurement."""
    work: Path = Path("build/loader")
    """Folder for the photographs and data derived from them."""
    quick: bool = False
    """Smoke test: 200 images, one round of a second."""
    save: bool = False
    """Also write the result to benchmarks/results/."""

    def __post_init__(self) -> None:
        available = len(os.sched_getaffinity(0))
        if not 1 <= self.cpus <= available:
            raise ValueError(f"--cpus must be 1 to {available}, what there is, not {self.cpus}")
        if self.rounds < 1 or self.seconds <= 0:
            raise ValueError("--rounds must be at least 1 and --seconds above 0")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of the table: some processes of a contender, measured at the same time."""

    contender: str
    workers: int
    environment: str | None = None
    processes: int = 1


@dataclass(kw_only=True)
class Outcome:
    """The result of a run: one figure per round, or the reason why none was measured."""

    images_per_second: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    absent: str | None = None

    def median(self) -> float | None:
        """Return the median rate in images per second, if measured."""
        return statistics.median(self.images_per_second) if self.images_per_second else None


def runs(cpus: int) -> dict[str, Run]:
    """List the rows of the table by name."""
    return {
        "memcpy": Run(contender="memcpy", workers=0),
        "rft pixels, no worker": Run(contender="rft_pixels", workers=0),
        f"rft pixels, {cpus} workers": Run(contender="rft_pixels", workers=cpus),
        "webdataset npy + cls, no worker": Run(contender="webdataset_pixels", workers=0),
        f"webdataset npy + cls, {cpus} workers": Run(contender="webdataset_pixels", workers=cpus),
        "bare": Run(contender="bare", workers=0),
        f"bare, {cpus} at once": Run(contender="bare", workers=0, processes=cpus),
        "rft": Run(contender="rft_original", workers=cpus),
        "rft, Pillow-SIMD": Run(contender="rft_original", workers=cpus, environment="pillow-simd"),
        "webdataset, jpg + cls": Run(contender="webdataset", workers=cpus),
        "open_clip": Run(contender="open_clip", workers=cpus, environment="open_clip"),
        "mosaicml-streaming": Run(
            contender="mosaicml_streaming", workers=cpus, environment="mosaicml-streaming"
        ),
        "litdata": Run(contender="litdata", workers=cpus, environment="litdata"),
    }


def prepare(arguments: Arguments) -> Path:
    """Generate the photographs, unless they exist, and pack them both ways; return the folder."""
    work = (arguments.work / f"{arguments.images}").resolve()
    labels = photos.write(work / "photos", arguments.images)
    for encoding in ("original", "pixels"):
        shutil.rmtree(work / encoding, ignore_errors=True)  # never reuse older sets
        options = pack.Options(encoding=encoding, shard_mb=16, workers=arguments.cpus)
        pack.pack("imagenet-train", str(work / "photos"), str(work / encoding), labels, options)
    return work


class Contender:
    """A process that measures one pass per request."""

    def __init__(self, run: Run, work: Path, arguments: Arguments, log: Path) -> None:
        self._log = log
        options = {
            "name": run.contender,
            "work": work,
            "workers": run.workers,
            "batch-size": arguments.batch_size,
            "seconds": arguments.seconds,
        }
        command = [sys.executable, "-m", "benchmarks.contenders"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**environments.variables(run.environment), "OMP_NUM_THREADS": "1"},
                cwd=environments.ROOT,
                text=True,
                start_new_session=True,
            )

    def ask(self) -> None:
        """Have it start a measurement."""
        assert self._process.stdin is not None
        machine.signal_session(self._process.pid, signal.SIGCONT)
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return what it says: its versions first, then one measurement for each time it is asked.

        Raises:
            RuntimeError: with the last line of its log, if it ended or says nothing for long.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        line = self._process.stdout.readline() if ready else ""
        if line:
            # remaining loader processes would keep filling their queues during other measurements
            machine.signal_session(self._process.pid, signal.SIGSTOP)
            return json.loads(line)
        said = self._log.read_text().strip().splitlines() or ["it ended without a word"]
        raise RuntimeError(said[-1] if ready else f"no answer in {PATIENCE:.0f} s: {said[-1]}")

    def stop(self) -> None:
        """End the process and its children; it may first release what its peer shares."""
        machine.signal_session(self._process.pid, signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=PARTING)
        machine.signal_session(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def start(run: Run, work: Path, arguments: Arguments, stack: ExitStack) -> list[Contender]:
    """Start a run's processes, which the stack will stop."""
    contenders = []
    for number in range(run.processes):
        log = work / f"{run.contender}-{run.environment}-{run.workers}-{number}.log"
        contender = Contender(run, work, arguments, log)
        stack.callback(contender.stop)
        contenders.append(contender)
    return contenders


def measure(arguments: Arguments, work: Path) -> dict[str, Outcome]:
    """Measure each run over all rounds; one that cannot run does not stop the others."""
    table = runs(arguments.cpus)
    outcomes = {name: Outcome() for name in table}
    started: dict[str, list[Contender]] = {}
    with ExitStack() as stack:
        for name, run in table.items():
            outcome = outcomes[name]
            outcome.absent = run.environment and environments.absence(run.environment)
            if outcome.absent is None:
                contenders = start(run, work, arguments, stack)
                try:
                    for contender in contenders:
                        outcome.versions = contender.answer()
                    started[name] = contenders
                except RuntimeError as error:
                    outcome.absent = str(error)
            print(f"{name}: {outcome.absent or 'ready'}", flush=True)
        for number in range(arguments.rounds):
            for name, contenders in list(started.items()):
                for contender in contenders:
                    contender.ask()
                try:
                    answers = [contender.answer() for contender in contenders]
                except RuntimeError as error:
                    outcomes[name] = Outcome(absent=str(error))
                    del started[name]
                    continue
                total = {key: sum(answer[key] for answer in answers) for key in answers[0]}
                outcomes[name].images_per_second.append(total["images_per_second"])
                outcomes[name].cpus.append(total["cpus"])
                print(f"round {number + 1}, {name}: {total['images_per_second']:,.0f} images/s")
    return outcomes


def figures(outcomes: dict[str, Outcome], cpus: int) -> dict[str, ratios.Ratio | None]:
    """Compute the ratios of this benchmark; None if one side could not run."""

    def best(*names: str) -> list[float]:
        found = max((outcomes[name] for name in names), key=lambda one: one.median() or 0.0)
        return found.images_per_second

    pixels = best("rft pixels, no worker", f"rft pixels, {cpus} workers")
    reader = best("webdataset npy + cls, no worker", f"webdataset npy + cls, {cpus} workers")
    rft = outcomes["rft"].images_per_second
    bare = [cpus * rate for rate in outcomes["bare"].images_per_second]
    return {
        "pixels_over_memcpy": ratios.of_rounds(pixels, outcomes["memcpy"].images_per_second),
        "pixels_over_npy_cls": ratios.of_rounds(pixels, reader),
        "jpeg_over_bare": ratios.of_rounds(rft, bare),
        "simd_over_pillow": ratios.of_rounds(outcomes["rft, Pillow-SIMD"].images_per_second, rft),
    }


def row(run: Run, outcome: Outcome) -> dict[str, Any]:
    """Build a run's line of the result."""
    if outcome.absent is not None:
        return {"images_per_second": None, "reason": outcome.absent}
    rates = outcome.images_per_second
    return {
        "images_per_second": round(statistics.median(rates), 1),
        "lowest": round(min(rates), 1),
        "highest": round(max(rates), 1),
        "cpus_busy": round(statistics.median(outcome.cpus), 2),
        "processes": run.processes * (1 + run.workers),
        "versions": outcome.versions,
    }


def main() -> None:
    """Measure, print the table and the result."""
    arguments = cli.parse(Arguments, prog="benchmarks.loader")
    if arguments.quick:
        arguments = replace(arguments, images=200, rounds=1, seconds=1.0)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cpus])
    work = prepare(arguments)
    outcomes = measure(arguments, work)
    rows = {name: row(run, outcomes[name]) for name, run in runs(arguments.cpus).items()}
    print()
    for name, line in rows.items():
        if line["images_per_second"] is None:
            print(f"{name:30s} {'-':>9s}  {line['reason']}")
        else:
            print(
                f"{name:30s} {line['images_per_second']:9,.0f} images/s, {line['processes']} "
                f"processes, {line['cpus_busy']} CPUs busy"
            )
    result = {
        "benchmark": "loader",
        **machine.describe(machine.DATA_PLANE),
        "cpus": arguments.cpus,
        "images": arguments.images,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        **figures(outcomes, arguments.cpus),
        "rows": rows,
    }
    if arguments.save:
        files.write_json(str(RESULTS / "loader_cpu.json"), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
