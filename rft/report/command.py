"""Compare evaluated runs: `python -m rft.report RUN... --out DIR`."""

import logging
from pathlib import Path

import tyro
from rich.console import Console

from rft import cli, next_steps
from rft.config import MAX_PIXELS
from rft.report.page import show, write_report
from rft.storage.documents import Megapixels, document

log = logging.getLogger(__name__)


@document(name="--")
class Arguments:
    """Put evaluated runs side by side: tables, pictures, one self-contained page.

    Runs of one recipe that differ in nothing but the seed become one row, mean and spread. Every
    run must have been evaluated (python -m rft.evaluate), all of them on the same packed sets.

    Example:
    python -m rft.report runs --out report
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders that hold them at any depth; each run needs a results.json."""
    out: Path
    """Folder for index.html with everything, and each table and picture on its own."""
    testbed: Path | None = None
    """CSV file of other models, for effective robustness: columns model, id and ood, in %."""
    data: str = ""
    """Data root as for rft.evaluate, to show the images that were gained and lost."""
    chosen: Path | None = None
    """The run folder that was chosen without test images (`rft choose`): it is named first."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that such an image may have; raise it if a set was packed so."""


def main() -> None:
    """Parse, read, write, print the tables and the page's path last."""
    arguments = cli.parse(Arguments, prog="rft.report")
    report = write_report(
        arguments.runs,
        arguments.out,
        arguments.testbed,
        arguments.data,
        arguments.max_pixels,
        arguments.chosen,
    )
    console = Console()
    if console.is_terminal:
        show(report, console)
    else:
        # rich would fold the tables of a pipe at 80 columns
        print(report.text())
    for alarm in report.summary.alarms:
        log.warning(alarm)
    # which of several to use is not for test images to say (rft choose)
    trained = [run for run in report.runs if run.recipe != "zero-shot"]
    if len(trained) == 1:
        cli.say_next(next_steps.use(str(trained[0].path)))
    # the last line of the output: a script can take the path from there
    cli.say(f"{arguments.out / 'index.html'}")
