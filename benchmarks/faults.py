"""Cost of faults: `python -m benchmarks.faults [--quick] [--save]`.

Each try starts a training under torchrun, injects a fault at a random point, and reruns the same
command. It measures the steps that were computed twice, and compares the weights, bit for bit, with
those of an undisturbed run. The processes, signals and files are real, and so is the full disk (a
file system in memory, which needs root). If a fault must end a run for good, the try counts if the
run prints one line about it and keeps its checkpoints.

The last line printed is a JSON object: `tries`, `lost_steps` (all tries together),
`weights_differ` (tries that did not end with the undisturbed run's weights).
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from benchmarks import machine, tiny_world
from benchmarks.servers.loopback import NotHereError
from benchmarks.servers.tmpfs import small_disk
from rft import cli
from rft.rng import numpy_generator
from rft.runs import filenames
from rft.runs.filenames import LAST, SELECTED
from rft.storage import files
from rft.train.checkpoint import Store, file_name, record_name

RESULTS = Path(__file__).parent / "results"
RANKS = 2
STEPS, EVERY = 80, 4  # steps of the complete run, and between two checkpoints
SECONDS = 600  # until a try stops waiting for an expected event, on any machine
HANG = 8  # seconds that ranks wait for a hanging one


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Inject faults into a small run and count the lost steps."""

    quick: bool = False
    """20 tries in total instead of 20 per kill and 3 per other fault."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FAULT...")] = ()
    """Only these faults."""
    tries: int | None = None
    """Tries per fault."""
    seed: int = 0
    """Seed of the points at which faults are injected."""
    save: bool = False
    """Write the table to benchmarks/results, and keep saved rows of faults that are not tried."""


@dataclass
class Run:
    """A training on the tiny world, started as by a user."""

    folder: Path
    data: Path
    clip: str
    ranks: int = RANKS
    options: tuple[str, ...] = ()
    process: subprocess.Popen[str] | None = None
    output: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """The module and its options."""
        return [
            *("rft.train", "object-mask-single-fill"),
            *("--data", str(self.data), "--run-dir", str(self.folder), "--scale", "miniature"),
            *("--model.clip", self.clip, "--method.threshold", "0.5", "--loader.workers", "1"),
            *("--loader.held-out", "16", "--loader.batch-size", "6", "--optim.epochs", "8"),
            *("--log.checkpoint-steps", str(EVERY), "--log.every-steps", "1", *self.options),
        ]

    def log(self) -> Path:
        """Return a new file for the output of a job."""
        self.output.append(str(self.folder.with_suffix(f".{len(self.output)}.log")))
        return Path(self.output[-1])

    def start(self) -> None:
        """Start it in its own session, with output to a file."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={self.ranks}", "-m", *self.words]
        with self.log().open("w") as stream:
            self.process = subprocess.Popen(
                command, env=tiny_world.environment(), stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True, text=True,
            )  # fmt: skip

    def said(self) -> str:
        """Return the output so far of the job that was started last."""
        return Path(self.output[-1]).read_text()

    def require_told(self, *either: str) -> None:
        """Check that the output of the job with the fault has one of these messages."""
        # ranks can outlive their torchrun for a moment
        deadline = time.monotonic() + SECONDS
        while not any(words in self.said() for words in either):
            if time.monotonic() > deadline:
                raise RuntimeError(f"it did not say {either[0]}: {self.said()[-3000:]}")
            time.sleep(0.1)

    def wait(self) -> int:
        """Wait for the end of the job; return its exit code."""
        assert self.process is not None
        return self.process.wait(SECONDS)

    def finish(self) -> None:
        """Run the same command to the end."""
        self.start()
        code = self.wait()
        if not self.finished:
            raise RuntimeError(f"the run did not finish (exit code {code}): {self.said()[-3000:]}")

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.folder / filenames.TRAINING).exists()

    def step(self) -> int:
        """Return the last step that was logged."""
        path = self.folder / filenames.METRICS
        lines = path.read_text().splitlines() if path.exists() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        return max(steps, default=0)

    def saved(self) -> int:
        """Return the step of the newest checkpoint that is safe."""
        path = self.folder / filenames.PROGRESS
        return json.loads(path.read_text())["step"] if path.exists() else 0

    def resumed_at(self) -> int:
        """Return the step from which the job that was started last resumed."""
        for line in map(unstamped, self.said().splitlines()):
            if line.startswith("resuming after step "):
                return int(line.split()[-1])
        return 0

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Wait until a condition holds while the job is running."""
        assert self.process is not None
        deadline = time.monotonic() + SECONDS
        while not reached():
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended before it was hurt: {self.said()[-3000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the run did not get there: {self.said()[-3000:]}")
            time.sleep(0.005)

    def rank_processes(self) -> list[int]:
        """Return the process ids of the ranks, in order."""
        assert self.process is not None
        found = {}
        for pid in tiny_world.children(self.process.pid):
            with suppress(OSError):  # ended between listing and reading
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"rft.train" in command and b"forkserver" not in command:
                    values = dict(word.split(b"=", 1) for word in words if b"=" in word)
                    found[int(values[b"RANK"])] = pid
        return [found[rank] for rank in sorted(found)]

    def loaders(self) -> list[int]:
        """Return the process ids of all ranks' loader processes."""
        found = []
        for rank in self.rank_processes():
            for server in tiny_world.children(rank):
                with suppress(OSError):
                    if b"forkserver" in Path(f"/proc/{server}/cmdline").read_bytes():
                        found += tiny_world.children(server)
        return found

    def weights(self) -> list[str]:
        """Return the hashes of the selected and the last weights."""
        return [files.sha256_file(self.folder / which) for which in (SELECTED, LAST)]

    def leave_nothing_running(self) -> None:
        """Kill processes that a failed try may have left."""
        if self.process is not None:
            for pid in [*tiny_world.children(self.process.pid), self.process.pid]:
                tiny_world.kill(pid)
            self.process.wait()


@dataclass(frozen=True)
class Outcome:
    """The result of one try."""

    fault: str
    at_step: int
    lost_steps: int
    weights_differ: bool
    date: str
    said: str = ""
    """The line in which the job reports the fault; empty if it was killed."""


Random = np.random.Generator


def to_random_step(run: Run, random: Random, last: int = STEPS // 2) -> None:
    """Start the run and wait for a random moment."""
    run.start()
    reach_random_step(run, random, last)


def reach_random_step(run: Run, random: Random, last: int = STEPS // 2) -> None:
    """Wait for a random moment of a run that was started."""
    at = int(random.integers(1, last))
    run.wait_for(lambda: run.step() >= at)
    time.sleep(random.uniform(0, 0.05))


def kill_rank(run: Run, random: Random) -> None:
    """SIGKILL to one rank."""
    to_random_step(run, random)
    tiny_world.kill(int(random.choice(run.rank_processes())))
    run.wait()


def kill_torchrun(run: Run, random: Random) -> None:
    """SIGKILL to torchrun, which orphans its ranks."""
    to_random_step(run, random)
    assert run.process is not None
    tiny_world.kill(run.process.pid)
    run.wait()


def kill_loader(run: Run, random: Random) -> None:
    """SIGKILL to one loader process."""
    run.start()
    run.wait_for(lambda: run.step() >= 1)
    # found in advance: the run must not notice a loader killed after its last batch, and on a busy
    # machine the search takes as long as the run
    loader = int(random.choice(run.loaders()))
    reach_random_step(run, random)
    tiny_world.kill(loader)
    run.wait()


def kill_all(run: Run, random: Random) -> None:
    """SIGKILL to every process at once, like a node failure."""
    to_random_step(run, random)
    run.leave_nothing_running()


def signal_all(number: signal.Signals, run: Run, random: Random) -> None:
    """Signal every process of the run at once, as a scheduler does."""
    to_random_step(run, random)
    assert run.process is not None
    for pid in [run.process.pid, *tiny_world.children(run.process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    run.wait()
    run.require_told(f"({number.name})", "the process that started this one is gone")


def stop_file(run: Run, random: Random) -> None:
    """Create the stop file, as launch/train.sbatch does."""
    to_random_step(run, random)
    stop = run.folder / "stop"
    stop.touch()
    run.wait()
    run.require_told(f"({stop})")
    stop.unlink()


def full_disk(run: Run, random: Random) -> None:
    """Fill the file system until a checkpoint fails, then free space."""
    to_random_step(run, random)
    ballast = run.folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(2**16))
    run.wait()
    run.require_told("No space left on device")
    ballast.unlink()


def damage(how: str, run: Run, random: Random) -> None:
    """Kill the run, then truncate the newest checkpoint or flip a bit of it."""
    run.start()
    run.wait_for(lambda: run.saved() >= 2 * EVERY)
    run.leave_nothing_running()
    path = max((run.folder / filenames.CHECKPOINTS).glob("step-*.pt"))
    data = bytearray(path.read_bytes())
    at = int(random.integers(len(data)))
    if how == "truncated":
        data = data[:at]
    else:
        data[at] ^= 1 << int(random.integers(8))
    path.write_bytes(data)


def hang(run: Run, random: Random) -> None:
    """SIGSTOP to one rank, which stops responding."""
    to_random_step(run, random)
    rank = int(random.integers(run.ranks))
    pid = run.rank_processes()[rank]
    os.kill(pid, signal.SIGSTOP)
    run.require_told(f"no answer from rank {rank} of {run.ranks}")
    tiny_world.kill(pid)  # as torchrun does, after giving it half a minute to end by itself
    run.wait()


def second_job(run: Run, random: Random) -> None:
    """Start the same command during the run: the second must exit, the first continue."""
    to_random_step(run, random, last=EVERY)
    assert run.process is not None
    # the first job must not end before the second has tried
    for pid in run.rank_processes():
        os.kill(pid, signal.SIGSTOP)
    second = dataclasses.replace(run, options=("--cluster.lock-wait", "0"), output=[])
    second.output = list(run.output)
    second.start()
    code = second.wait()
    for pid in run.rank_processes():
        os.kill(pid, signal.SIGCONT)
    if code == 0 or "another job is writing" not in second.said():
        raise RuntimeError(f"the second job was let in: {second.said()[-3000:]}")
    run.output.append(second.output[-1])
    run.wait()


def not_finite(run: Run, random: Random) -> None:
    """Kill the run and put huge weights into its newest checkpoint: the next step is NaN.

    The same command must meet it again and touch no checkpoint; then the checkpoint is put back.
    """
    run.start()
    run.wait_for(lambda: run.saved() >= 2 * EVERY)
    run.leave_nothing_running()
    store = Store(str(run.folder / filenames.CHECKPOINTS), keep=2)
    step = store.steps()[-1]
    paths = [Path(store.url) / name for name in (file_name(step), record_name(step))]
    before = [path.read_bytes() for path in paths]
    content = torch.load(paths[0], weights_only=True)
    next(iter(content["model"].values())).fill_(3e38)  # a weight that is infinite is refused
    store.write(content)
    poisoned = sorted((path, files.sha256_file(path)) for path in paths[0].parent.iterdir())
    for _ in range(2):
        run.start()
        if run.wait() == 0 or f"is not finite at step {step + 1} (" not in run.said():
            raise RuntimeError(f"NaN was not told: {run.said()[-3000:]}")
    after = sorted((path, files.sha256_file(path)) for path in paths[0].parent.iterdir())
    if after != poisoned:
        raise RuntimeError("a run that diverged changed its checkpoints")
    for path, data in zip(paths, before, strict=True):
        path.write_bytes(data)


Fault = Callable[[Run, Random], None]
KILLS: dict[str, Fault] = {
    "SIGKILL a rank": kill_rank,
    "SIGKILL torchrun": kill_torchrun,
    "SIGKILL a loader process": kill_loader,
}
OTHERS: dict[str, Fault] = {
    "SIGKILL everything": kill_all,
    "SIGTERM everything": partial(signal_all, signal.SIGTERM),
    "SIGUSR1 everything": partial(signal_all, signal.SIGUSR1),
    "stop file": stop_file,
    "disk full": full_disk,
    "newest checkpoint truncated": partial(damage, "truncated"),
    "newest checkpoint flipped": partial(damage, "flipped"),
    "rank hangs": hang,
    "second job": second_job,
    "loss is NaN": not_finite,
}
FAULTS = KILLS | OTHERS


class Bench:
    """The tiny world, the undisturbed run and a working folder, reused by later faults."""

    def __init__(self, folder: Path, ranks: int = RANKS, kind: type[Run] = Run) -> None:
        self._folder, self._ranks, self._kind = folder, ranks, kind
        self._folder.mkdir(parents=True, exist_ok=True)
        self.data = tiny_world.shards(folder / "world")
        self.clip = tiny_world.clip_name(folder / "clip")
        calm = self.run("calm")
        if not calm.finished:
            tiny_world.write_data(folder / "world")
            tiny_world.write_clip(folder / "clip")
            calm.finish()
        assert calm.step() == STEPS, f"the run has {calm.step()} steps, not {STEPS}"
        self._weights = calm.weights()

    def run(self, name: str) -> Run:
        """Create a run that has not started."""
        return self._kind(self._folder / name, self.data, self.clip, self._ranks)

    def attempt(self, fault: str, random: Random) -> Outcome:
        """Try one fault."""
        name = f"{fault.replace(' ', '-')}-{random.integers(2**32):08x}"
        run = self.run(name)
        with ExitStack() as stack:
            stack.callback(run.leave_nothing_running)
            if fault == "disk full":
                run.folder.mkdir()
                stack.enter_context(small_disk(run.folder, 2**23))
            if fault == "rank hangs":
                run.options = ("--cluster.timeout", str(HANG))
            if fault == "stop file":
                run.options = ("--cluster.stop-file", str(run.folder / "stop"))
            FAULTS[fault](run, random)
            reached, said, lost = run.step(), told(run.said()), 0
            if not run.finished:
                run.finish()
                # ranks whose torchrun is gone continue to their next step
                lost = max(reached - run.resumed_at(), 0)
                said = said or told(run.said())
            elif fault != "second job":
                raise RuntimeError(f"the run was not hurt: {run.said()[-3000:]}")
            return Outcome(fault, reached, lost, run.weights() != self._weights, today(), said)


def today() -> str:
    """Format the date as in results."""
    return time.strftime("%Y-%m-%d")


def told(text: str) -> str:
    """Return the line in which a job reports why it ended."""
    for line in map(unstamped, text.splitlines()):
        if line.startswith(("error", "stopped after", "WARNING")):
            return line
    return ""


def unstamped(line: str) -> str:
    """Strip time and rank from a log line; a level other than INFO stays."""
    return re.sub(r"^[0-9-]{10} [0-9:]{8} \[[0-9]+\] (INFO: )?", "", line)


def tries_of(arguments: Arguments) -> list[str]:
    """List the faults to try, in order."""
    chosen = [name for name in FAULTS if not arguments.only or name in arguments.only]
    if unknown := set(arguments.only) - set(FAULTS):
        raise cli.unknown("fault", unknown.pop(), sorted(FAULTS))
    if arguments.tries is None and arguments.quick:
        # every fault once, then the first ones again
        return (chosen * 20)[:20]
    kills, others = (20, 3) if arguments.tries is None else (arguments.tries, arguments.tries)
    return [name for name in chosen for _ in range(kills if name in KILLS else others)]


def table(outcomes: Sequence[Outcome]) -> str:
    """Format the faults, tries and lost steps as Markdown."""
    lines = [
        "| fault | tries | lost steps, mean | lost steps, most | other weights at the end |",
        "| --- | --: | --: | --: | --: |",
    ]
    for fault in FAULTS:
        mine = [outcome for outcome in outcomes if outcome.fault == fault]
        if mine:
            lost = [outcome.lost_steps for outcome in mine]
            differ = sum(outcome.weights_differ for outcome in mine)
            mean = f"{sum(lost) / len(lost):.1f}"
            lines.append(f"| {fault} | {len(mine)} | {mean} | {max(lost)} | {differ} |")
    return "\n".join(lines)


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Compute the numbers of the last line."""
    return {
        "tries": len(outcomes),
        "lost_steps": sum(outcome.lost_steps for outcome in outcomes),
        "weights_differ": sum(outcome.weights_differ for outcome in outcomes),
    }


def merged(before: Sequence[Outcome], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Merge the outcomes with earlier ones of other faults, in the table's order."""
    now = {outcome.fault for outcome in outcomes}
    kept = [outcome for outcome in before if outcome.fault not in now]
    return sorted([*kept, *outcomes], key=lambda outcome: list(FAULTS).index(outcome.fault))


def save(outcomes: Sequence[Outcome]) -> None:
    """Write the results, keeping saved ones of other faults on runs of the same kind."""
    path, kind = RESULTS / "faults.json", {"steps": STEPS, "every": EVERY, "ranks": RANKS}
    before = json.loads(path.read_text()) if path.exists() else {}
    if kind.items() <= before.items():
        outcomes = merged([Outcome(**one) for one in before["outcomes"]], outcomes)
    about = machine.describe()
    result = {**about, **summary(outcomes), **kind}
    result["outcomes"] = [
        {name: value for name, value in dataclasses.asdict(one).items() if name != "said"}
        for one in outcomes
    ]
    files.write_json(str(path), result)
    text = f"{table(outcomes)}\n\n{note(about, outcomes)}\n"
    files.write_bytes(str(RESULTS / "faults.md"), text.encode())


def note(about: dict[str, object], outcomes: Sequence[Outcome]) -> str:
    """Describe what the table was measured on."""
    dates = sorted({outcome.date for outcome in outcomes})
    return (
        f"A run of {STEPS} steps on {RANKS} ranks (gloo, CPU), a checkpoint every {EVERY} steps, "
        "hurt at a random point and started again with the same command. Lost steps were computed "
        f"twice. Faults of {' and '.join(dates)}; the last of {machine.made(about)}."
    )


def main() -> None:
    """Try, print, save."""
    arguments = cli.parse(Arguments, prog="benchmarks.faults")
    faults = tries_of(arguments)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "runs")
        for number, fault in enumerate(faults):
            random = numpy_generator("faults", arguments.seed, number)
            try:
                outcome = bench.attempt(fault, random)
            except NotHereError as reason:
                print(f"{number + 1}/{len(faults)} {fault}: not tried: {reason}", flush=True)
                continue
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                # a try with an unexpected outcome counts as different weights
                outcome = Outcome(fault, 0, 0, True, today(), f"FAILED: {error}")
            outcomes.append(outcome)
            print(
                f"{number + 1}/{len(faults)} {fault} at step {outcome.at_step}: "
                f"{outcome.lost_steps} steps lost, "
                f"{'OTHER' if outcome.weights_differ else 'same'} weights  "
                f"{outcome.said.replace(folder, '')}",
                flush=True,
            )
            # an interrupted benchmark keeps the faults that are done
            if arguments.save and faults[number + 1 : number + 2] != [fault]:
                save(outcomes)
    print(table(outcomes))
    print(json.dumps(summary(outcomes)))


if __name__ == "__main__":
    cli.run(main)
