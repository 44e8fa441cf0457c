"""Copy reports into docs/results and every table into the pages that show it.

`make results` runs the demo on five seeds and then this; `make bench`, `make gpu` and `make peers`
end with this too, without a demo. After `make reproduce`, --reproduction takes its report
in, and after `make post-2023` --later does. A page takes a table between the lines
`<!-- table: FILE -->` and `<!-- end of table -->`, where FILE may be a pattern that no file matches
yet; tests/test_docs.py holds the two equal.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from docs import questions
from rft import cli
from rft.storage import files

ROOT = Path(__file__).parents[1]
PAGES = (
    "docs/decisions.md",
    "docs/results.md",
    "docs/peers.md",
    "docs/storage.md",
    "docs/cluster.md",
    "docs/evaluation.md",
    "docs/methods.md",
    "docs/security.md",
    "docs/speed.md",
)
RESULTS = "docs/results"
LATER = "post-2023"
COPIED = (
    "table.md", "table.csv", "table.tex", "statistics.csv", "paper.md", "paper.csv",
    "scatter.png", "wise.png", "curves.png", "calibration.png", "gallery.png",
)  # fmt: skip
NOT_MEASURED = "Not measured."
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True)
class Arguments:
    """Take measured tables into the documentation."""

    demo: Path | None = None
    """Folder that `make demo` wrote; None leaves its results as they are."""
    reproduction: Path | None = None
    """Folder that `make reproduce` wrote; None leaves its results as they are."""
    later: Path | None = None
    """Folder that `make post-2023` wrote; None leaves its results as they are."""


def with_tables(page: str) -> str:
    """Return a page's text with every marked table as its file has it now."""

    def table(match: re.Match[str]) -> str:
        paths = sorted(ROOT.glob(match[2])) if "*" in match[2] else [ROOT / match[2]]
        text = "\n\n".join(path.read_text().strip() for path in paths) or NOT_MEASURED
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return BLOCK.sub(table, page)


def copy_report(folder: Path, report: str, name: str) -> None:
    """Copy a report below `folder` and what made its runs to docs/results/`name`."""
    results = ROOT / RESULTS / name
    for file in COPIED:
        if (folder / report / file).exists():  # paper.* are of the paper's own rows alone
            files.write_bytes(str(results / file), (folder / report / file).read_bytes())
    runs = folder / "runs" / (report if report == LATER else "")
    provenance = files.read_json(str(runs / "zero-shot-seed0/provenance.json"))
    # a path of the machine that measured means nothing to a reader
    provenance["command"] = [word.replace(str(folder), "DIR") for word in provenance["command"]]
    files.write_json(str(results / "provenance.json"), provenance)
    print(f"copied {folder / report} to {RESULTS}/{name}")


def main() -> None:
    """Copy the reports' files, then write the pages and the README's pictures."""
    arguments = cli.parse(Arguments, prog="update_results")
    if arguments.demo is not None:
        copy_report(arguments.demo, "report", "miniature")
    if arguments.reproduction is not None:
        copy_report(arguments.reproduction, "reproduction", "reproduction")
        questions.write(arguments.reproduction / "reproduction", ROOT / RESULTS / "reproduction")
    if arguments.later is not None:
        copy_report(arguments.later, LATER, LATER)
    # all of them before the first is written: a table may be missing
    pages = {name: with_tables((ROOT / name).read_text()) for name in PAGES}
    for name, text in pages.items():
        files.write_bytes(str(ROOT / name), text.encode())
        print(f"updated {name}")
    # here, because it imports torch, which the pages do not need
    from docs import pictures

    pictures.main(steps=arguments.demo is not None)


if __name__ == "__main__":
    cli.run(main)
