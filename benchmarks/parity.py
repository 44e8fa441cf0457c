"""Compare rft with the released code of each method: `python -m benchmarks.parity --save`.

Each module in benchmarks/parities compares one method. It is measured where the environment
variable that it names holds a checkout of the released code:

    git clone https://github.com/GT-RIPL/FTP /tmp/FTP
    RFT_PEER_FTP=/tmp/FTP python -m benchmarks.parity --save

For methods without a checkout, --save keeps the earlier result. The last line is one JSON object.
"""

import importlib
import json
import os
import pkgutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import machine, parities
from rft import cli
from rft.storage import files

TOLERANCE = 1e-5  # relative to the largest number of a tensor, both sides in fp32
RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "parity.json"
PAGE = RESULTS / "parity.md"


class Parity(Protocol):
    """A module of benchmarks/parities."""

    REPOSITORY: str
    """Of the released code, `owner/name`."""
    VARIABLE: str
    """Environment variable; its value is the folder of a checkout of that code."""

    def measure(self, checkout: Path) -> dict[str, float]:
        """Return the relative differences |ours - theirs| / max |theirs|, by compared quantity."""
        ...


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare with every released code whose environment variable is set."""

    save: bool = False
    """Also write benchmarks/results/parity.json and parity.md."""


def methods() -> dict[str, Parity]:
    """Import all modules of benchmarks/parities, by the name of their method."""
    names = sorted(module.name for module in pkgutil.iter_modules(parities.__path__))
    found: dict[str, Any] = {n: importlib.import_module(f"benchmarks.parities.{n}") for n in names}
    return {name.replace("_", "-"): module for name, module in found.items()}


def checkout(method: Parity) -> Path | None:
    """Return the checkout of a method's released code; None if its variable is not set.

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
    """Print why a method without a checkout is not compared."""
    return f"{method.VARIABLE} is not set to a checkout of github.com/{method.REPOSITORY}"


def peer_commit(folder: Path) -> str:
    """Return the commit of a checkout; `not recorded` for a folder that is not a git repository."""
    # --git-dir: otherwise an enclosing repository would answer
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
    """Add earlier results of methods that were not measured now."""
    return {**document, "parities": {**earlier["parities"], **document["parities"]}}


def beyond(document: dict[str, Any]) -> list[str]:
    """List every comparison whose difference exceeds the tolerance."""
    return [
        f"{method}, {name}: {difference:.1e}"
        for method, found in sorted(document["parities"].items())
        for name, difference in sorted(found["differences"].items())
        # a NaN fails this comparison
        if not difference <= document["tolerance"]
    ]


def page(document: dict[str, Any]) -> str:
    """Write the result as Markdown."""
    header = ["method", "released code", "compared", "largest difference", "rft", "torch", "day"]
    lines = [f"| {' | '.join(header)} |", "|---|---|---|--:|---|---|---|"]
    for method, found in sorted(document["parities"].items()):
        code = f"{found['repository']} at {found['peer_commit'][:12]}"
        made = f"{found['commit'] or 'not recorded'} | {found['torch']} | {found['date'][:10]}"
        lines += [
            f"| `{method}` | {code} | {name} | {difference:.1e} | {made} |"
            for name, difference in sorted(found["differences"].items())
        ]
    lines += [
        "",
        "Both sides compute in fp32 on the CPU. A difference is divided by the largest number of "
        f"the released code's tensor; {document['tolerance']:.0e} is the tolerance "
        f"(`python -m benchmarks.parity`, last called on {document['processor']}).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare, print, save."""
    arguments = cli.parse(Arguments, prog="benchmarks.parity")
    about = {"benchmark": "parity", **machine.describe(machine.STEP), "tolerance": TOLERANCE}
    known = methods()
    # all variables before the first comparison, so that a wrong one fails early
    folders = {name: checkout(method) for name, method in known.items()}
    measured = {}
    for name, folder in folders.items():
        if folder is None:
            print(f"{name}: not measured, {absence(known[name])}")
            continue
        # each has its own provenance: earlier results stay beside new ones
        made = {"date": about["date"], "commit": about["commit"], "torch": torch.__version__}
        measured[name] = {**compare(known[name], folder), **made}
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
