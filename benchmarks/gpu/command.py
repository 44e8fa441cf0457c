"""The command `python -m benchmarks.gpu`: settings, a process for each part, JSON and table."""

import json
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import filelock
import open_clip
import tyro

from benchmarks import machine
from benchmarks.gpu import page, parts, runner
from benchmarks.gpu.inputs import REHEARSAL, Settings
from benchmarks.gpu.runner import Outcome
from rft import cli
from rft.storage import files

RESULTS = Path(__file__).parents[1] / "results"
SCHEMA = 1
VERSIONS = ("torch", "torchvision", "triton", "open_clip_torch", "timm", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure rft on this machine's first GPU, the most valuable parts first.

    A later call measures what is lacking, if sources, packages and machine are the same.
    """

    minutes: float = 6.0
    """Time for everything, from the start of the command."""
    parts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PART...")] = ()
    """Only these parts; by default all that are not completely measured yet."""
    again: bool = False
    """Measure everything again."""
    batch_size: int = 512
    """Images per step, halved if they do not fit."""
    models: tuple[str, ...] = ("ViT-B-32", "ViT-B-16")
    """open_clip models whose steps, training and evaluation are timed."""
    large: str = "ViT-L-14"
    """A larger model; only its step is timed."""
    rehearse: bool = False
    """Run everything on the CPU with a tiny model: every part for real, without useful figures."""
    out: Path = RESULTS
    """Folder for gpu_CHIP.json and gpu_CHIP.md; a rehearsal's are called rehearsal_CPU."""
    work: Path = Path("build/gpu")
    """Folder for shards, weights, runs and logs: some 12 GB, less for a rehearsal."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < 24 * 60:
            raise ValueError(f"--minutes is {self.minutes:g}; it must be above 0")
        if self.batch_size < 2:
            raise ValueError(f"--batch-size is {self.batch_size}; a fill needs 2 images or more")

    def settings(self) -> Settings:
        """Choose all sizes.

        Raises:
            ValueError: for a model that open_clip does not have.
        """
        work = self.work.resolve()
        cores = len(os.sched_getaffinity(0))
        whole = Settings(
            device="cuda",
            models=self.models,
            large=self.large,
            batch_size=self.batch_size,
            classes=1000,
            rounds=8,
            steps=60,
            workers=max(1, min(12, cores - 2)),
            work=work,
        )
        known = open_clip.list_models()
        if unknown := [name for name in (*self.models, self.large) if name not in known]:
            raise cli.unknown("model", unknown[0], known)
        if not self.rehearse:
            return whole
        tiny = {"device": "cpu", "models": (REHEARSAL,), "large": REHEARSAL, "batch_size": 8}
        return replace(
            whole, **tiny, classes=10, rounds=2, steps=9, workers=1, work=work / "rehearsal"
        )


def start(started: float) -> None:
    """Run the command; `started` is `time.monotonic()` before the imports, which count too."""
    cli.run(lambda: main(started))


def main(started: float) -> None:
    """Measure, and write the results after each part."""
    arguments = cli.parse(Arguments, prog="benchmarks.gpu")
    settings = arguments.settings()
    wanted = {part.name: part for part in parts.all_parts(settings)}
    if unknown := [name for name in arguments.parts if name not in wanted]:
        raise cli.unknown("part", unknown[0], list(wanted))
    settings.work.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(settings.work / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(
            f"another call works in {arguments.work}; choose another --work"
        ) from error
    chip = "cpu" if arguments.rehearse else parts.gpu_name(settings)
    # the running part is ended too; its measurements so far are kept
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as set by nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    result = Result(arguments, settings, list(wanted), chip)
    chosen = list(arguments.parts) or result.lacking(again=arguments.again)
    deadline = started + 60 * arguments.minutes
    runner.run([wanted[name] for name in chosen], settings.work / "parts", deadline, result.add)
    print(f"{time.monotonic() - started:.0f} s in all; wrote {result.path}", flush=True)
    result.require_measured(chosen)


class Result:
    """The result file, rewritten after each part.

    An earlier file's parts are kept if they were measured with the same sources, packages and
    settings on the same machine.
    """

    def __init__(
        self, arguments: Arguments, settings: Settings, names: list[str], chip: str
    ) -> None:
        kind = "rehearsal" if arguments.rehearse else "gpu"
        slug = re.sub(r"[^A-Za-z0-9]+", "-", chip.removeprefix("NVIDIA ")).strip("-")
        self.path = arguments.out / f"{kind}_{slug}.json"
        self._names = names
        self._now: dict[str, str] = {}
        document = {
            "benchmark": kind,
            "schema": SCHEMA,
            **machine.describe(),
            "source_sha256": machine.source_sha256(),
            "driver": None if arguments.rehearse else parts.driver(),
            "versions": machine.versions(VERSIONS),
            "settings": {
                "models": settings.models,
                "large": settings.large,
                "batch_size": settings.batch_size,
                "classes": settings.classes,
                "rounds": settings.rounds,
                "trainer_steps": settings.steps,
                "trainer_workers": settings.workers,
            },
            "parts": {},
        }
        # as in the file: lists instead of tuples
        self._document: dict[str, Any] = json.loads(json.dumps(document))
        if document["commit"] is None:
            warn(
                "not a git checkout: the result names no commit, only a hash of the sources. Write "
                "one to the file REVISION: git describe --always --dirty --abbrev=12 > REVISION"
            )
        self._keep_earlier()
        self._write()  # a folder that cannot be written is an error before anything is measured

    def _keep_earlier(self) -> None:
        if not self.path.exists():
            return
        same = ("schema", "source_sha256", "versions", "processor", "driver", "settings")
        try:
            earlier = files.read_json(str(self.path))
            if any(earlier[name] != self._document[name] for name in same):
                return
            page.text(earlier)
            self._document["parts"] = earlier["parts"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            aside = self.path.with_suffix(".damaged")
            self.path.rename(aside)
            warn(f"{self.path} is not a result file ({type(error).__name__}); moved to {aside}")

    def lacking(self, *, again: bool) -> list[str]:
        """List the parts that are not completely measured yet, or all of them, in order."""
        found = {} if again else self._document["parts"]
        whole = [name for name in self._names if found.get(name, {}).get("status") == "done"]
        for name in whole:
            print(f"{name}: measured at {found[name]['date']} (--again measures it again)")
        return [name for name in self._names if name not in whole]

    def add(self, name: str, outcome: Outcome) -> None:
        """Add a part and write JSON and table; a worse retry never discards a figure."""
        found = self._document["parts"]
        self._now[name] = outcome.status
        before = found.get(name)
        if before is not None and outcome.status == "not reached":
            return
        if before is not None and outcome.status != "done":
            if before["status"] == "done":
                before["repeated"] = f"{outcome.status}: {outcome.reason}"
                self._write()
                return
            outcome = replace(outcome, values=merged(before["values"], outcome.values))
        found[name] = {
            "status": outcome.status,
            "seconds": round(outcome.seconds, 1),
            "reason": outcome.reason,
            "date": machine.date(),
            "commit": self._document["commit"],
            "values": outcome.values,
        }
        self._write()

    def _write(self) -> None:
        files.write_json(str(self.path), self._document)
        try:
            text = page.text(self._document)
        except Exception as error:  # the figures are more important than their table
            traceback.print_exc()
            warn(f"no table of {self.path}: {error!r}")
            return
        files.write_bytes(str(self.path.with_suffix(".md")), text.encode())

    def require_measured(self, names: list[str]) -> None:
        """Check how this call's parts ended.

        Raises:
            ValueError: naming those that failed, or if not one was measured.
        """
        if failed := [name for name in names if self._now.get(name) == "failed"]:
            raise ValueError(f"failed: {', '.join(failed)}; reasons in {self.path}")
        if names and not any(self._now.get(name) in ("done", "cut off") for name in names):
            raise ValueError("no part was measured: --minutes is too short for any of them")


def merged(old: Any, new: Any) -> Any:
    """Combine the measurements of two tries of a part; the newer figure counts."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{name: merged(old.get(name), value) for name, value in new.items()}}


def warn(message: str) -> None:
    """Print problems that do not stop the command."""
    print(f"WARNING: {message}", file=sys.stderr, flush=True)
