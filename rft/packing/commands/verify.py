"""Check sets against their manifests: `python tools/verify_shards.py`."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from rft import cli
from rft.config import MAX_PIXELS
from rft.packing.foreign.samples import NO_SHARD
from rft.packing.verify import Report, verify
from rft.shards.folder import MANIFEST
from rft.shards.root import packed_sets
from rft.storage import files
from rft.storage.documents import Megapixels, Positive, document
from rft.text import counted

LINES = 50  # printed problems; the report file has all
ABSENT = 3  # of them absent shards


@document(name="--")
class VerifyShards:
    """Check a packed set against its manifest; exit code 0 if it matches, 1 if not.

    The quick check reads manifest.json, index.npz and samples.npz and queries the size of each
    shard. --deep reads every byte: it verifies the sha256 and tar headers of each shard and, for
    each sample, its key, position, crc32, label and hash, and decodes the image.

    Example:
    python tools/verify_shards.py s3://bucket/rft/imagenet-val --deep --report val.json
    """

    url: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SET")]
    """Packed set: the folder or URL that holds manifest.json, below a data root."""
    deep: bool = False
    """Read every byte of every shard."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that an image may have (--deep); raise it for panoramas."""
    report: str | None = None
    """JSON file for the result, with all problems."""
    workers: Positive | None = None
    """Processes that read shards (--deep); None is one for each core this process may use."""


def main() -> None:
    """Check the set that the command line names."""
    command = cli.parse(VerifyShards, config=(tyro.conf.FlagCreatePairsOff,))
    require_one_set(command.url)
    if command.report is not None:
        files.require_writable(command.report)  # before an hour of reading
    report = verify(
        command.url, deep=command.deep, workers=command.workers, max_pixels=command.max_pixels
    )
    if command.report is not None:
        files.write_json(command.report, report.to_json())
    say(report)
    sys.exit(1 if report.problems else 0)


def require_one_set(url: str) -> None:
    """Check that a URL is not a data root, a folder of sets.

    Raises:
        ValueError: naming its sets.
    """
    found: list[str] = []
    # a folder that cannot be listed, such as a web server's, is assumed to be a set
    with contextlib.suppress(OSError, ValueError):
        if not files.exists(files.join(url, MANIFEST)):
            found = packed_sets(url)
    if found:
        one = files.join(url, found[-1])
        raise ValueError(
            f"{url} is a data root, with {', '.join(found)}; name one set, as in {one}"
        )


def say(report: Report) -> None:
    """Print a summary and the problems, one line each."""
    # one line per problem; untrusted names must not be read as markup or emoji
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if report.dataset:
        filled = [count for count in report.per_class if count]
        spread = f" of {_range(filled)}" if filled else ""
        console.print(
            f"{report.dataset}: {counted(report.samples, 'sample')} in "
            f"{counted(report.shards, 'shard')}, {max(report.bytes / 2**20, 0.1):,.1f} MiB, "
            f"{len(filled):,} classes{spread}",
        )
    absent = [problem for problem in report.problems if problem.what.startswith(NO_SHARD)]
    # of a moved folder, all shards are absent
    hidden = {id(problem) for problem in absent[ABSENT:]}
    problems = [problem for problem in report.problems if id(problem) not in hidden]
    for problem in problems[:LINES]:
        console.print(str(problem), style="red")
    if more := len(report.problems) - len(problems[:LINES]):
        console.print(f"... and {more:,} more; --report FILE has them all")
    if absent:
        console.print(
            f"absent: {len(absent):,} of {counted(report.shards, 'shard')}; if they were moved, "
            f"pack or index the set again"
        )
    depth = "every byte was read" if report.deep else "quick check; --deep reads every byte"
    if not report.dataset:  # without a manifest nothing else was checked
        return
    if report.problems:
        what = "problems" if report.problems[1:] else "problem"
        console.print(f"{len(report.problems):,} {what} ({depth})", style="bold red")
    else:
        console.print(f"the set matches its manifest ({depth})", style="green")


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return counted(low, "sample") if low == high else f"{low:,} to {high:,} samples"
