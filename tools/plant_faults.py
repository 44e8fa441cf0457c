"""Mutation testing: plant one fault at a time and check that the tests fail. See --help.

The faults are in `planted_faults.toml` beside this file. Each entry has a text that occurs once in
a source file, a replacement that makes the program compute wrong results, and the tests that should
fail.
"""

import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro

from rft import cli
from rft.storage import files

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("planted_faults.toml")
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 600  # a fault that makes a test hang counts as noticed
# no cache, so a trial leaves nothing in its tree; a fixed seed, so all faults see the same examples
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")
# imported once before the trials are forked, because their import takes seconds
HEAVY = ("torch", "torchvision", "open_clip", "sklearn.model_selection", "scipy.stats")
HEAVY += ("matplotlib.figure", "webdataset", "timm", "hypothesis", "rich.progress", "tyro")
OURS = ("rft", "tests", "tools", "benchmarks", "conftest")


@dataclass(frozen=True, kw_only=True)
class PlantFaults:
    """Plant each fault of tools/planted_faults.toml in a copy of the tree and run its tests.

    Exit code 0 if every fault was noticed or is marked with a reason to survive, else 1. Results
    are written to benchmarks/results/planted_faults.{json,md}.
    """

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="AREA...")] = ()
    """Plant only the faults of these areas; keep earlier results of the others."""
    jobs: int = 1
    """Number of faults to try in parallel."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Replaces the single occurrence of `old` in `file` by `new`; one of `tests` should fail."""

    name: str
    area: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Test files, or single tests as FILE::NAME."""
    survives: str = ""
    """The reason why no test can notice it; empty if a test must."""


@dataclass(frozen=True)
class Outcome:
    """The result of one fault; `noticed_by` is the first test that failed, empty if none did."""

    fault: Fault
    noticed_by: str

    @property
    def is_bad(self) -> bool:
        """Whether the fault survived without a reason, or was noticed despite one."""
        return bool(self.noticed_by) == bool(self.fault.survives)


def main() -> None:
    """Try the faults selected on the command line."""
    command = cli.parse(PlantFaults)
    if command.jobs < 1:
        raise ValueError(f"--jobs is {command.jobs}; it must be at least 1")
    faults = load(TABLE)
    areas = sorted({fault.area for fault in faults})
    for area in command.only:
        if area not in areas:
            raise cli.unknown("area", area, areas)
    faults = [fault for fault in faults if not command.only or fault.area in command.only]
    check(faults, ROOT)
    outcomes = try_all(faults, ROOT, command.jobs, say)
    bad = [outcome for outcome in outcomes if outcome.is_bad]
    noticed = sum(bool(outcome.noticed_by) for outcome in outcomes)
    print(f"{noticed} of {len(outcomes)} faults were noticed, {len(bad)} need a test")
    save(outcomes, areas)
    sys.exit(1 if bad else 0)


def load(path: Path) -> list[Fault]:
    """Read a table of faults.

    Raises:
        ValueError: if it is not TOML, or an entry does not have the fields of a fault.
    """
    try:
        entries = tomllib.loads(path.read_text())["fault"]
        return [Fault(tests=tuple(entry.pop("tests")), **entry) for entry in entries]
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of faults: {error}") from error


def check(faults: Sequence[Fault], root: Path) -> None:
    """Check that every fault can be planted in a tree, and that its tests exist.

    Raises:
        ValueError: naming all faults that fail the check.
    """
    if wrong := [problem for fault in faults for problem in _problems(fault, root)]:
        raise ValueError("; ".join(wrong))


def _problems(fault: Fault, root: Path) -> Iterator[str]:
    try:
        plant(fault, (root / fault.file).read_text())
    except (ValueError, OSError) as error:
        yield str(error)
    if not fault.tests:
        yield f"fault {fault.name!r} names no test"
    for test in fault.tests:
        path, _, name = test.partition("::")
        if not (root / path).is_file():
            yield f"fault {fault.name!r}: {path} does not exist"
        elif name and f"def {name}(" not in (root / path).read_text():
            yield f"fault {fault.name!r}: {path} has no test {name}"


def plant(fault: Fault, text: str) -> str:
    """Apply the fault to the text of its file.

    Raises:
        ValueError: if the text to replace does not occur exactly once, or would not change.
    """
    count = text.count(fault.old)
    if count != 1 or fault.old == fault.new:
        raise ValueError(
            f"fault {fault.name!r}: its text occurs {count} times in {fault.file}, not once; "
            "update it for the current code"
        )
    return text.replace(fault.old, fault.new)


def try_all(
    faults: Sequence[Fault], root: Path, jobs: int, tell: Callable[[Outcome], None]
) -> list[Outcome]:
    """Try each fault and return the outcomes in order; `tell` is called after each.

    Raises:
        ValueError: if a test fails without any fault, or a fault breaks the import of a module.
    """
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / str(number) for number in range(jobs)]
        copy_tree(root, trees[0])
        tests = tuple(dict.fromkeys(test for fault in faults for test in fault.tests))
        # its compiled files are reused by all trials, except for the file with the fault
        whole = Trial(tests, trees[0], compiles=True)
        whole.process.join()
        if failed := whole.first_failure():
            raise ValueError(f"{failed} fails without any fault; fix it first")
        for tree in trees[1:]:
            shutil.copytree(trees[0], tree)
        found = {}
        for fault, failed in _try_each(faults, trees):
            found[id(fault)] = Outcome(fault, failed)
            tell(found[id(fault)])
        return [found[id(fault)] for fault in faults]


def _try_each(faults: Sequence[Fault], trees: list[Path]) -> Iterator[tuple[Fault, str]]:
    """Yield each fault and its first failed test, in order of completion."""
    waiting, running = list(faults), {}
    try:
        while waiting or running:
            while waiting and trees:
                fault, tree = waiting.pop(0), trees.pop()
                path = tree / fault.file
                text = path.read_text()
                path.write_text(plant(fault, text))
                # differs from the time of the compiled file, which would otherwise be used
                os.utime(path, (0, 0))
                running[Trial(fault.tests, tree)] = fault, path, text
            # wakes up every second, because only the deadline ends a hanging trial
            connection.wait([trial.process.sentinel for trial in running], timeout=1)
            for trial in [trial for trial in running if trial.is_over()]:
                fault, path, text = running.pop(trial)
                path.write_text(text)
                trees.append(trial.tree)
                yield fault, trial.first_failure()
    finally:
        for trial in running:
            trial.end()


def copy_tree(root: Path, target: Path) -> None:
    """Copy the files that git does not ignore, and so no compiled files."""
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


class Trial:
    """A run of some tests in a tree, in a separate process."""

    def __init__(self, tests: tuple[str, ...], tree: Path, *, compiles: bool = False) -> None:
        self.tests = tests
        self.tree = tree
        self._output = tree / "output.txt"
        self._deadline = time.monotonic() + SECONDS
        self._hangs = False
        # only the first trial imports them
        for name in HEAVY:
            importlib.import_module(name)
        # this process runs no threads, so it is safe to fork
        context = multiprocessing.get_context("fork")
        arguments = (tests, tree, self._output, compiles)
        self.process = context.Process(target=_run_tests, args=arguments)
        self.process.start()

    def is_over(self) -> bool:
        """Whether the tests have ended. Ends them first if they take too long."""
        if self.process.is_alive() and time.monotonic() > self._deadline:
            self._hangs = True
            self.end()
        return not self.process.is_alive()

    def end(self) -> None:
        """Kill the tests and their child processes."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # already ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def first_failure(self) -> str:
        """Name the first failed test; empty if all passed.

        Raises:
            ValueError: if the tests could not be run.
        """
        if self._hangs:
            return f"{self.tests[0]} (it hangs)"
        code = self.process.exitcode
        if code == pytest.ExitCode.OK:
            return ""
        text = self._output.read_text(errors="replace")
        # lines of pytest's short summary: FAILED tests/test_a.py::test_b - AssertionError: ...
        kinds = ("FAILED ", "ERROR ")
        lines = [line for line in text.splitlines() if line.startswith(kinds)]
        failed = [line.split(" - ")[0].split(maxsplit=1)[1] for line in lines]
        # any test notices a broken import, so it proves nothing about the test
        if code != pytest.ExitCode.TESTS_FAILED or not failed or "ERROR collecting" in text:
            raise ValueError(f"{' '.join(self.tests)} cannot be run: {text[-600:]}")
        return failed[0]


def _run_tests(tests: Sequence[str], tree: Path, output: Path, compiles: bool) -> None:
    """Run tests in a tree, in this process, which reimports our modules."""
    # a new process group, so that `end` also kills child processes of the tests
    os.setsid()
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    # the fork has inherited the modules of the original tree
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    os.environ["PYTHONPATH"] = str(tree)
    if not compiles:
        # a compiled file could outlive its fault: Python compares only size and mtime in seconds
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    code = pytest.main([*PYTEST, *tests])
    sys.stdout.flush()
    # skip the exit handlers of the parent
    os._exit(code)


def say(outcome: Outcome) -> None:
    """Print the outcome of one fault."""
    fault = outcome.fault
    verdict = "noticed " if outcome.noticed_by else "SURVIVED" if outcome.is_bad else "survived"
    print(f"{verdict} {fault.area}: {fault.name}", flush=True)


def save(outcomes: Sequence[Outcome], areas: Sequence[str]) -> None:
    """Write the outcomes of some of the table's areas; keep saved outcomes of the others."""
    path = RESULTS / "planted_faults.json"
    saved = files.read_json(str(path))["areas"] if path.is_file() else {}
    saved |= to_document(outcomes)["areas"]
    document = {"schema": 1, "areas": {area: saved[area] for area in areas if area in saved}}
    files.write_json(str(path), document)
    files.write_bytes(str(path.with_suffix(".md")), to_markdown(document).encode())


def to_document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Convert outcomes to a JSON document by area, each with its provenance."""
    provenance = files.provenance()
    areas: dict[str, Any] = {}
    for outcome in outcomes:
        fault = outcome.fault
        area = areas.setdefault(fault.area, {"provenance": provenance, "faults": []})
        entry = {name: getattr(fault, name) for name in ("name", "file", "survives")}
        area["faults"].append({**entry, "noticed_by": outcome.noticed_by})
    return {"schema": 1, "areas": areas}


def to_markdown(document: dict[str, Any]) -> str:
    """Format the result as a page: counts per area, then every fault."""
    areas = {name: area["faults"] for name, area in document["areas"].items()}
    everything = [fault for faults in areas.values() for fault in faults]
    lines = ["| area | planted | noticed | survived |", "|---|--:|--:|--:|"]
    for area, faults in {**areas, "all": everything}.items():
        noticed = sum(bool(fault["noticed_by"]) for fault in faults)
        lines.append(f"| {area} | {len(faults)} | {noticed} | {len(faults) - noticed} |")
    lines += ["", "| fault | in | noticed by, or why not |", "|---|---|---|"]
    for area, faults in areas.items():
        for fault in faults:
            test = fault["noticed_by"].rpartition("::")[2].partition("[")[0]
            verdict = f"`{test}`" if test else f"survived: {fault['survives']}"
            lines.append(f"| {area}: {fault['name']} | {fault['file']} | {verdict} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
