"""Fuzz for some minutes: `python -m tests.hostile.fuzz [--minutes 10] [--save]` (make fuzz)."""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks import machine
from rft import cli
from rft.storage import files
from tests.hostile import world
from tests.hostile.fuzz import engine
from tests.hostile.fuzz.targets import TARGETS
from tests.hostile.sandbox import ROOT, Sandbox

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("hypothesis", "numpy", "pillow", "torch", "safetensors", "open_clip_torch", "fsspec")
GRACE = 120  # seconds beyond a target's time after which it counts as hanging


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Mutate valid input of every kind for some minutes, and count the harm.

    Exit code 0 if nothing did, 1 if something crashed; each crash is printed with its smallest
    example and the seed that finds it again.
    """

    minutes: float = 10
    """Minutes for all targets together."""
    jobs: int = 2
    """Targets to fuzz in parallel."""
    seed: int = 0
    """The first seed; each round of 300 tries uses the next one."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TARGET...")] = ()
    """Only these targets."""
    save: bool = False
    """Also write the result to benchmarks/results/fuzz.{json,md}."""


def main() -> None:
    """Fuzz and print."""
    arguments = cli.parse(Arguments, prog="tests.hostile.fuzz")
    names = arguments.only or tuple(TARGETS)
    for name in names:
        if name not in TARGETS:
            raise cli.unknown("target", name, list(TARGETS))
    if arguments.minutes <= 0 or arguments.jobs < 1:
        raise ValueError("--minutes must be above 0 and --jobs at least 1")
    # compute threads do not survive a fork, and waiting for them never ends
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "world"
        sandbox = Sandbox()
        for make in (world.pack, world.train, world.finish):
            make(root, sandbox)
        seconds = 60 * arguments.minutes * arguments.jobs / len(names)
        found = fuzz_all(names, root / "work", Path(folder), seconds, arguments)
    result = {
        "benchmark": "fuzz",
        **machine.describe(),
        "versions": machine.versions(PACKAGES),
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "targets": {name: counts.to_json() for name, counts in found.items()},
    }
    text = to_markdown(result)
    print(text)
    if arguments.save:
        files.write_json(str(RESULTS / "fuzz.json"), result)
        files.write_bytes(str(RESULTS / "fuzz.md"), text.encode())
    for name, counts in found.items():
        for where, detail in counts.details.items():
            print(f"{name}: {where}: {detail}", file=sys.stderr)
    sys.exit(any(counts.crashes for counts in found.values()))


def fuzz_all(
    names: Sequence[str], source: Path, folder: Path, seconds: float, arguments: Arguments
) -> dict[str, engine.Counts]:
    """Fuzz targets, several in parallel, each in its own process."""
    context = multiprocessing.get_context("fork")
    waiting, running, found = list(names), {}, {}
    while waiting or running:
        while waiting and len(running) < arguments.jobs:
            name = waiting.pop(0)
            own = folder / name.replace(" ", "-")
            own.mkdir()
            reader, writer = context.Pipe(duplex=False)
            job = (name, source, own, seconds, arguments.seed, writer)
            process = context.Process(target=fuzz_one, args=job)
            process.start()
            writer.close()
            running[name] = (process, reader, time.monotonic() + seconds + GRACE)
        for name, (process, reader, deadline) in list(running.items()):
            counts = outcome_of(process, reader, late=time.monotonic() > deadline)
            if counts is not None:
                del running[name]
                found[name] = counts
                print(
                    f"{name}: {counts.tries:,} tries, {counts.crashes.total()} crashes", flush=True
                )
        time.sleep(0.1)
    return {name: found[name] for name in names}


def outcome_of(process: Any, reader: Any, *, late: bool) -> engine.Counts | None:
    """Return the result of a target's process after it has ended; kill it if it hangs."""
    if reader.poll():
        try:
            counts = reader.recv()
        except EOFError:
            process.join()
            counts = engine.Counts()
            counts.crashes[f"the process ended with {process.exitcode}"] += 1
        process.join()
        return counts
    if late:
        process.kill()
        process.join()
        counts = engine.Counts()
        counts.crashes["it hangs"] += 1
        return counts
    return None


def fuzz_one(name: str, source: Path, folder: Path, seconds: float, seed: int, writer: Any) -> None:
    """Fuzz one target in this process."""
    with Path(os.devnull).open("w") as silence:
        os.dup2(silence.fileno(), 1)  # suppress warnings about accepted input
        os.dup2(silence.fileno(), 2)
    target = TARGETS[name](source, folder)
    writer.send(engine.explore_for(seconds, target, folder, seed))
    writer.close()


def to_markdown(result: dict[str, Any]) -> str:
    """Return the counts as a table, and every crash."""
    lines = ["| target | tries | refused | accepted | crashes |", "|---|--:|--:|--:|--:|"]
    total = [0, 0, 0, 0]
    for name, counts in result["targets"].items():
        crashes = sum(counts["crashes"].values())
        cells = [counts["tries"], counts["refused"], counts["accepted"], crashes]
        total = [a + b for a, b in zip(total, cells, strict=True)]
        lines.append(row(name, cells))
    lines.append(row("all", total))
    for name, counts in result["targets"].items():
        lines += [f"- {name}: {where} ({number})" for where, number in counts["crashes"].items()]
    commit = result["commit"] or "an unknown commit"
    lines += [
        "",
        f"{result['minutes']:g} minutes at {commit} on {result['processor']}, {result['cores']} "
        f"cores, Python {result['python']}, {result['date'][:10]}.",
    ]
    return "\n".join(lines) + "\n"


def row(name: str, cells: Sequence[int]) -> str:
    """Format a line of the table."""
    return f"| {name} | {' | '.join(f'{cell:,}' for cell in cells)} |"


if __name__ == "__main__":
    cli.run(main)
