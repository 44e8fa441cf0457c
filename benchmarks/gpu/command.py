"""The command `python -m benchmarks.gpu`: settings, a process for each part, JSON and table."""

import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import open_clip
import tyro

from benchmarks import machine
from benchmarks.gpu import page, parts, runner
from benchmarks.gpu.inputs import REHEARSAL, Settings
from benchmarks.gpu.runner import Outcome
from rft import cli, files

RESULTS = Path(__file__).parents[1] / "results"
SCHEMA = 1
VERSIONS = ("torch", "torchvision", "triton", "open_clip_torch", "timm", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure what rft does on this machine's first GPU, the most valuable things first.

    Parts that an earlier call measured, for the same commit on the same machine, are kept.
    """

    minutes: float = 6.0
    """Time for everything, from the start of the command."""
    parts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PART...")] = ()
    """Only these parts; all of them if none is named."""
    batch_size: int = 512
    """Images per step, halved where they do not fit."""
    models: tuple[str, ...] = ("ViT-B-32", "ViT-B-16")
    """open_clip models whose steps, training and evaluation are timed."""
    large: str = "ViT-L-14"
    """A larger one, whose step alone is timed."""
    rehearse: bool = False
    """Run all of it on the CPU with a tiny model: every part for real, no figure worth keeping."""
    out: Path = RESULTS
    """Folder for gpu_CHIP.json and gpu_CHIP.md; a rehearsal's are called rehearsal_CPU."""
    work: Path = Path("build/gpu")
    """Folder for shards, weights, runs and logs: some 12 GB, a rehearsal's are small."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < 24 * 60:
            raise ValueError(f"--minutes is {self.minutes:g}; it must be above 0")
        if self.batch_size < 2:
            raise ValueError(f"--batch-size is {self.batch_size}; a fill needs 2 images or more")

    def settings(self) -> Settings:
        """Return how large everything is.

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
    wanted = parts.all_parts(settings)
    names = [part.name for part in wanted]
    if unknown := [name for name in arguments.parts if name not in names]:
        raise cli.unknown("part", unknown[0], names)
    chosen = [part for part in wanted if not arguments.parts or part.name in arguments.parts]
    # the running part is ended too; what the others measured is in the file already
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    settings.work.mkdir(parents=True, exist_ok=True)
    result = Result(arguments, settings, names)
    deadline = started + 60 * arguments.minutes
    runner.run(chosen, settings.work / "parts", deadline, result.add)
    print(f"{time.monotonic() - started:.0f} s in all; wrote {result.path}", flush=True)
    if result.failed:
        raise ValueError(f"failed: {', '.join(result.failed)}; why is in {result.path}")


class Result:
    """The result file, written again after each part."""

    def __init__(self, arguments: Arguments, settings: Settings, names: list[str]) -> None:
        self._out, self._kind = arguments.out, "rehearsal" if arguments.rehearse else "gpu"
        self._names = names
        document = {
            "benchmark": self._kind,
            "schema": SCHEMA,
            **machine.describe(),
            "commit": files.git_revision(),
            "source_sha256": machine.source_sha256(),
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
        # as the file has it: lists for tuples
        self._document: dict[str, Any] = json.loads(json.dumps(document))
        if document["commit"] is None:
            print(
                "warning: not a git checkout: the result names no commit, only a hash of the "
                "sources. Write one to the file REVISION first: git describe --always --dirty "
                "--abbrev=12 > REVISION",
                file=sys.stderr,
            )
        self._chip = "cpu" if arguments.rehearse else parts.gpu_name(settings)
        self._keep_earlier()

    @property
    def path(self) -> Path:
        """The JSON file."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", self._chip.removeprefix("NVIDIA ")).strip("-")
        return self._out / f"{self._kind}_{slug}.json"

    def _keep_earlier(self) -> None:
        """Take over the parts of an earlier call that measured the same sources in the same way."""
        if not self.path.exists():
            return
        earlier = files.read_json(str(self.path))
        same = ("schema", "source_sha256", "versions", "processor", "settings")
        if all(earlier.get(name) == self._document[name] for name in same):
            self._document["parts"] = earlier["parts"]

    def add(self, name: str, outcome: Outcome) -> None:
        """Add a part and write JSON and table; a part that was not reached keeps what it had."""
        found = self._document["parts"]
        if outcome.status == "not reached" and name in found:
            return
        found[name] = {
            "status": outcome.status,
            "seconds": round(outcome.seconds, 1),
            "reason": outcome.reason,
            "date": machine.date(),
            "values": outcome.values,
        }
        ordered = {part: found[part] for part in self._names if part in found}
        self._document["parts"] = ordered
        files.write_json(str(self.path), self._document)
        text = page.text(self._document)
        files.write_bytes(str(self.path.with_suffix(".md")), text.encode())

    @property
    def failed(self) -> list[str]:
        """Names of the parts that failed."""
        parts = self._document["parts"].items()
        return [name for name, part in parts if part["status"] == "failed"]
