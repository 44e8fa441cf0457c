"""Contents of a reproduction's report: `python -m tests.reproduction DIR` fails if a row lacks.

Reads the files for people, independently of the code that wrote them.
"""

import csv
import sys
from pathlib import Path

from rft.demo.command import REPORTS
from rft.paper import FIGURE_7, VIT_B_16, VIT_B_32
from rft.recipes import ALPHAS, ENSEMBLES, SUITE, SUITE_MERGED
from rft.report.read import TRANSDUCTIVE

NUMBERS = 7  # ImageNet, five OOD sets, their average
PNG = b"\x89PNG\r\n\x1a\n"


def missing(report: Path) -> list[str]:
    """List the rows of the paper's Tables 1 and 3 and Fig. 7 that a report lacks."""
    rows = [cells(line) for line in (report / "paper.md").read_text().splitlines()]
    here = {row[0]: row[2:] for row in rows if row[1:2] == ["here"]}
    theirs = [row[2:] for row in rows if row[1:2] == ["paper"]]
    names = {row.recipe for row in (*VIT_B_32, *VIT_B_16)}
    found = [f"{name} in paper.md" for name in names if not is_measured(here.get(name, []))]
    found += [f"the paper's row {n}" for n in range(len(theirs), len(names))]
    with (report / "table.csv").open() as stream:
        evaluated = {row["recipe"] for row in csv.DictReader(stream) if row["OOD avg"]}
    found += [f"{name} in table.csv" for name in figure_7() - evaluated]
    if (report / "wise.png").read_bytes()[:8] != PNG:
        found.append("a picture in wise.png")
    return sorted(found)


def missing_later(report: Path) -> list[str]:
    """List the systems of the later suite that a report lacks."""
    # WiSE at its authors' own alpha
    merged = [f"{name}-0.5" if "wise" in name else name for name in SUITE_MERGED]
    with (report / "table.csv").open() as stream:
        evaluated = {row["recipe"] for row in csv.DictReader(stream) if row["OOD avg"]}
    together = [
        f"{name}{TRANSDUCTIVE}" if one.transductive else name for name, one in ENSEMBLES.items()
    ]
    wanted = (*SUITE, *merged, *together)
    return [f"{name} in table.csv" for name in wanted if name not in evaluated]


def figure_7() -> set[str]:
    """Return the models of Fig. 7; a WiSE family is all of its alphas."""
    families = {name for name in FIGURE_7 if is_family(name)}
    models = {f"{name}-{alpha:g}" for name in families for alpha in ALPHAS}
    return models | (FIGURE_7.keys() - families)


def is_family(name: str) -> bool:
    return name.startswith("wise-") and not name.startswith("wise-kd-")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def is_measured(row: list[str]) -> bool:
    """Whether every cell is a percentage, with or without a spread."""
    numbers = [float(text.split()[0]) for text in row if text != "-"]
    return len(numbers) == NUMBERS and all(0 <= number <= 100 for number in numbers)


def main() -> None:
    if not (Path(sys.argv[1]) / "index.html").is_file():
        sys.exit(f"{sys.argv[1]} is no report")
    later = Path(sys.argv[1]).name == REPORTS["post-2023"]
    if lacking := (missing_later if later else missing)(Path(sys.argv[1])):
        sys.exit(f"{sys.argv[1]} lacks: {', '.join(lacking)}")
    whole = "every system of the later suite"
    if not later:
        whole = "every row of Tables 1 and 3 and every model of Fig. 7"
    print(f"{sys.argv[1]} has {whole}")


if __name__ == "__main__":
    main()
