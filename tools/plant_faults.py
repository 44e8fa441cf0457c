"""Plant one fault at a time and see whether the tests notice: see --help.

The faults are data, in `planted_faults.toml` beside this file. Each one is a text that occurs once
in a file of the tree, a replacement that makes the program compute something wrong, and the tests
that should fail then.
"""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rft import cli, files

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("planted_faults.toml")
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 600  # a fault may make a test hang; it is noticed then, too
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")


@dataclass(frozen=True, kw_only=True)
class PlantFaults:
    """Plant the faults of tools/planted_faults.toml, each in a copy of the tree, and run its tests.

    Exit code 0 if every fault was noticed or has a reason why it cannot be, 1 if not. All areas
    together are written to benchmarks/results/planted_faults.{json,md}.
    """

    only: str = ""
    """Plant the faults of this area alone, and write no result."""
    jobs: int = 1
    """Faults that are tried at the same time."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: in `file`, the only `old` becomes `new`, and one of `tests` should fail."""

    name: str
    area: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Test files, or single tests as FILE::NAME."""
    survives: str = ""
    """Why no test can notice it; empty for a fault that a test must notice."""


@dataclass(frozen=True)
class Outcome:
    """What came of one fault; `noticed_by` is the first test that failed, empty if none did."""

    fault: Fault
    noticed_by: str

    @property
    def is_bad(self) -> bool:
        """Whether the fault survived without a reason, or was noticed in spite of one."""
        return bool(self.noticed_by) == bool(self.fault.survives)


def main() -> None:
    """Try the faults that the command line asks for."""
    command = cli.parse(PlantFaults)
    if command.jobs < 1:
        raise ValueError(f"--jobs is {command.jobs}; it must be at least 1")
    faults = load(TABLE)
    areas = sorted({fault.area for fault in faults})
    if command.only:
        if command.only not in areas:
            raise cli.unknown("area", command.only, areas)
        faults = [fault for fault in faults if fault.area == command.only]
    check(faults, ROOT)
    outcomes = try_all(faults, ROOT, command.jobs, say)
    bad = [outcome for outcome in outcomes if outcome.is_bad]
    noticed = sum(bool(outcome.noticed_by) for outcome in outcomes)
    print(f"{noticed} of {len(outcomes)} faults were noticed, {len(bad)} need a test")
    if not command.only:
        document = to_document(outcomes)
        files.write_json(str(RESULTS / "planted_faults.json"), document)
        files.write_bytes(str(RESULTS / "planted_faults.md"), to_markdown(document).encode())
    sys.exit(1 if bad else 0)


def load(path: Path) -> list[Fault]:
    """Read a table of faults.

    Raises:
        ValueError: if it is no TOML, or an entry has other fields than a fault.
    """
    try:
        entries = tomllib.loads(path.read_text())["fault"]
        return [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of faults: {error}") from error


def check(faults: Sequence[Fault], root: Path) -> None:
    """Check that every fault can be planted in a tree, and that its tests are there.

    Raises:
        ValueError: naming the fault.
    """
    for fault in faults:
        plant(fault, (root / fault.file).read_text())
        if not fault.tests:
            raise ValueError(f"fault {fault.name!r} names no test")
        for test in fault.tests:
            path, _, name = test.partition("::")
            if not (root / path).is_file():
                raise ValueError(f"fault {fault.name!r}: there is no {path}")
            if name and f"def {name}(" not in (root / path).read_text():
                raise ValueError(f"fault {fault.name!r}: {path} has no test {name}")


def plant(fault: Fault, text: str) -> str:
    """Return the text of a file with the fault in it.

    Raises:
        ValueError: if the text to replace does not occur exactly once, or stays as it is.
    """
    count = text.count(fault.old)
    if count != 1 or fault.old == fault.new:
        raise ValueError(
            f"fault {fault.name!r}: its text occurs {count} times in {fault.file}, not once; write "
            "it anew for the code as it is now"
        )
    return text.replace(fault.old, fault.new)


def try_all(
    faults: Sequence[Fault], root: Path, jobs: int, tell: Callable[[Outcome], None]
) -> list[Outcome]:
    """Return what came of each fault, in their order; `tell` is called as each is done.

    Raises:
        ValueError: if a test fails without any fault, or one breaks the import of a module.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            copy_tree(root, Path(folder) / str(number))
            trees.put(Path(folder) / str(number))

        def attempt(fault: Fault) -> Outcome:
            tree = trees.get()
            try:
                outcome = try_one(fault, tree)
                tell(outcome)
                return outcome
            finally:
                trees.put(tree)

        tests = dict.fromkeys(test for fault in faults for test in fault.tests)
        if failed := first_failure(tests, Path(folder) / "0"):
            raise ValueError(f"{failed} fails without any fault; mend it first")
        return list(pool.map(attempt, faults))


def copy_tree(root: Path, target: Path) -> None:
    """Copy what git does not ignore, so that no compiled file of the original comes along."""
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def try_one(fault: Fault, tree: Path) -> Outcome:
    """Plant a fault in a tree, run its tests, and take it out again."""
    path = tree / fault.file
    text = path.read_text()
    path.write_text(plant(fault, text))
    try:
        return Outcome(fault, first_failure(fault.tests, tree))
    finally:
        path.write_text(text)


def first_failure(tests: Iterable[str], tree: Path) -> str:
    """Return the first test that fails in a tree, empty if all pass.

    Raises:
        ValueError: if the tests cannot be run.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        # a compiled file could outlive the fault: Python tells sources apart by size and second
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, *PYTEST, *tests]
    try:
        result = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"{next(iter(tests))} (it hangs)"
    if result.returncode == 0:
        return ""
    failed = [line.split(" - ")[0] for line in result.stdout.splitlines() if line[:7] == "FAILED "]
    errors = [line.split(" - ")[0] for line in result.stdout.splitlines() if line[:6] == "ERROR "]
    if result.returncode != 1 or not failed + errors or "ERROR collecting" in result.stdout:
        raise ValueError(f"{' '.join(tests)} cannot be run: {result.stdout[-600:]}{result.stderr}")
    return (failed + errors)[0].split(maxsplit=1)[1]


def say(outcome: Outcome) -> None:
    """Print what came of one fault."""
    fault = outcome.fault
    verdict = "noticed " if outcome.noticed_by else "SURVIVED" if outcome.is_bad else "survived"
    print(f"{verdict} {fault.area}: {fault.name}", flush=True)


def to_document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the result as a JSON document."""
    kept = ("name", "area", "file", "survives")
    return {
        "schema": 1,
        "provenance": files.provenance(),
        "faults": [
            {
                **{name: asdict(outcome.fault)[name] for name in kept},
                "noticed_by": outcome.noticed_by,
            }
            for outcome in outcomes
        ],
    }


def to_markdown(document: dict[str, Any]) -> str:
    """Return the result as a page: counts for each area, then every fault."""
    faults = document["faults"]
    lines = ["| area | planted | noticed | survived |", "|---|--:|--:|--:|"]
    for area in [*dict.fromkeys(fault["area"] for fault in faults), "all"]:
        some = [fault for fault in faults if area in (fault["area"], "all")]
        noticed = sum(bool(fault["noticed_by"]) for fault in some)
        lines.append(f"| {area} | {len(some)} | {noticed} | {len(some) - noticed} |")
    lines += ["", "| fault | in | noticed by, or why not |", "|---|---|---|"]
    for fault in faults:
        verdict = f"survived: {fault['survives']}"
        if fault["noticed_by"]:
            verdict = f"`{fault['noticed_by'].partition('::')[2].partition('[')[0]}`"
        lines.append(f"| {fault['area']}: {fault['name']} | {fault['file']} | {verdict} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
