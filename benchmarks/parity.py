"""Compare rft with the released code of each method: `python -m benchmarks.parity --save`.

Each module in benchmarks/parities compares one method. It is measured where the environment
variable that it names holds a checkout of the released code:

    git clone https://github.com/GT-RIPL/FTP /tmp/FTP
    RFT_PEER_FTP=/tmp/FTP python -m benchmarks.parity --save

Of methods without a checkout, --save keeps the earlier result. The last line is one JSON object.
"""

import importlib
import json
import os
import pkgutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import machine, parities
from rft import cli
from rft.storage import files

TOLERANCE = 1e-5  # of the largest number of a tensor, both sides in fp32
RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "parity.json"
PAGE = RESULTS / "parity.md"


class Parity(Protocol):
    """A module of benchmarks/parities."""

    REPOSITORY: str
    """Of the released code, `owner/name`."""
    VARIABLE: str
    """Of the environment; its value is the folder of a checkout of that code."""

    def measure(self, checkout: Path) -> dict[str, float]:
        """Return the relative difference |ours - theirs| / max |theirs| of all that is compared."""
        ...


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare with every released code that an environment variable gives a checkout of."""

    save: bool = False
    """Write benchmarks/results/parity.json and parity.md as well."""


def methods() -> dict[str, Parity]:
    """Import all modules of benchmarks/parities, by the name of their method."""
    names = sorted(module.name for module in pkgutil.iter_modules(parities.__path__))
    found: dict[str, Any] = {n: importlib.import_module(f"benchmarks.parities.{n}") for n in names}
    return {name.replace("_", "-"): module for name, module in found.items()}


def checkout(method: Parity) -> Path | None:
    """Return the checkout of a method's released code, None where its variable is not set.

    Raises:
        ValueError: if the variable names no folder.
    """
    value = os.environ.get(method.VARIABLE)
    if not value:
        return None
    path = Path(value)
    if not path.is_dir():
        raise ValueError(
            f"{method.VARIABLE} is {value}, which is not a folder; clone "
            f"https://github.com/{method.REPOSITORY} and set it to that folder"
        )
    return path.absolute()


def absence(method: Parity) -> str:
    """Write why a method without a checkout is not compared."""
    return f"{method.VARIABLE} is not set to a checkout of github.com/{method.REPOSITORY}"


def peer_commit(folder: Path) -> str:
    """Return the commit of a checkout; `not recorded` for a folder that is not git's."""
    # --git-dir: a folder inside another repository would answer with the commit of that one
    command = ["git", "--git-dir", str(folder / ".git"), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else "not recorded"


def compare(method: Parity, folder: Path) -> dict[str, Any]:
    """Measure one method."""
    return {
        "repository": method.REPOSITORY,
        "peer_commit": peer_commit(folder),
        "differences": {name: float(f"{d:.2g}") for name, d in method.measure(folder).items()},
    }


def with_earlier(document: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Add the earlier results of what was not measured now."""
    return {**document, "parities": {**earlier["parities"], **document["parities"]}}


def beyond(document: dict[str, Any]) -> list[str]:
    """List every comparison whose difference is not within the tolerance."""
    return [
        f"{method}, {name}: {difference:.1e}"
        for method, found in sorted(document["parities"].items())
        for name, difference in sorted(found["differences"].items())
        # a NaN is not within it
        if not difference <= document["tolerance"]
    ]


def page(document: dict[str, Any]) -> str:
    """Write the result as Markdown."""
    lines = ["| method | released code | compared | largest difference |", "|---|---|---|--:|"]
    for method, found in sorted(document["parities"].items()):
        code = f"{found['repository']} at {found['peer_commit'][:12]}"
        lines += [
            f"| `{method}` | {code} | {name} | {difference:.1e} |"
            for name, difference in sorted(found["differences"].items())
        ]
    commits = {found["commit"] or "not recorded" for found in document["parities"].values()}
    lines += [
        "",
        "Differences are divided by the largest number of the released code's tensor; both sides "
        f"compute in fp32 on the CPU, and {document['tolerance']:.0e} is the tolerance. Measured "
        f"by `python -m benchmarks.parity`: {machine.made(document)}; rft at "
        f"{', '.join(sorted(commits))}; torch {document['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare, print, save."""
    arguments = cli.parse(Arguments, prog="benchmarks.parity")
    about = {"benchmark": "parity", **machine.describe(machine.STEP), "tolerance": TOLERANCE}
    known = methods()
    # all variables before the first comparison: a wrong one stops it at once
    folders = {name: checkout(method) for name, method in known.items()}
    measured = {}
    for name, folder in folders.items():
        if folder is None:
            print(f"{name}: not measured, {absence(known[name])}")
            continue
        measured[name] = {**compare(known[name], folder), "commit": about["commit"]}
    document = {**about, "parities": measured}
    if arguments.save and RESULT.exists():
        document = with_earlier(document, files.read_json(str(RESULT)))
    print(page(document))
    if arguments.save and measured:
        files.write_json(str(RESULT), document)
        files.write_bytes(str(PAGE), page(document).encode())
    print(json.dumps(document))
    if wrong := beyond({**document, "parities": measured}):
        raise ValueError(f"not equal to the released code within {TOLERANCE:g}: {'; '.join(wrong)}")


if __name__ == "__main__":
    cli.run(main)
