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
    """Compare evaluated runs in tables, pictures and one self-contained page.

    Runs of one recipe that differ only in the seed become one row with mean and spread. Every run
    must have been evaluated (python -m rft.evaluate), all on the same packed sets.

    Example:
    python -m rft.report runs --out report
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders that contain them at any depth; each run needs a results.json."""
    out: Path
    """Folder for index.html, which has everything, and for single tables and pictures."""
    testbed: Path | None = None
    """CSV file of other models, for effective robustness: columns model, id and ood, in %."""
    data: str = ""
    """Data root as for rft.evaluate, to show the images that were gained and lost."""
    chosen: Path | None = None
    """The exported model: a run folder, or the choice.json of `rft choose --save`. Only for the
    latter the page states that no test image chose it. It is first in "Classes and mistakes". An
    alarm names the models that are significantly better."""
    max_pixels: Megapixels = MAX_PIXELS
    """Limit of such an image, in millions of pixels; raise it if a set was packed with a higher
    one."""


def main() -> None:
    """Write the report, and print its tables and, last, the path of the page."""
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
        # rich would wrap tables at 80 columns in a pipe
        print(report.text())
    for alarm in report.summary.alarms:
        log.warning(alarm)
    # with several models no use is suggested: test images must not choose one (rft choose)
    trained = [run for run in report.runs if run.recipe != "zero-shot"]
    if len(trained) == 1:
        cli.say_next(next_steps.use(str(trained[0].path)))
    # the path is the last line of the output, so that scripts can read it there
    cli.say(f"{arguments.out / 'index.html'}")
