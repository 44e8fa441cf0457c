"""Predicts the classes of new images: `python -m rft.predict RUN IMAGE...`.

Exit code 0 if all images were read, 1 if some were not, 2 if none was.
"""

import logging
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from rft import cli
from rft.config import MAX_PIXELS, Device
from rft.evaluate.forward import TOGETHER
from rft.log import ASIDE
from rft.packing.names import Patterns, named, patterns_of, taken_for_name
from rft.predict.images import Found, find_images, no_images, read_squares
from rft.predict.model import Model, Prediction, load, require_model
from rft.predict.page import SHOWN, START, Shown, render, shown
from rft.progress import progress
from rft.report.tables import csv_lines
from rft.storage import files
from rft.storage.documents import Megapixels, Positive, document
from rft.text import plain

LINES = 20  # printed counts of classes if a file has the images, and printed unreadable images
CSV_START = "image,class,probability"

log = logging.getLogger(__name__)


@document(name="--")
class Arguments:
    """Print the most probable classes of images, with probabilities.

    Images are treated like your own photos: turned upright, on white. Logits are those of
    rft.evaluate. Probabilities use the temperature that rft.evaluate --temperature fitted, if any.
    Images that cannot be read are reported and skipped, with exit code 1.

    Example:
    python -m rft.predict runs/first holiday --out predictions.csv --html predictions.html
    """

    model: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run folder, weights file with a classification head, or export for open_clip."""
    images: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="IMAGE...")]
    ] = ()
    """Image files, and folders that contain images at any depth."""
    out: Path | None = None
    """CSV file for the predictions: image, most probable classes, probabilities, temperature."""
    html: Path | None = None
    """HTML page for the predictions: pictures, names, probabilities as bars; a single file that
    needs no network."""
    top: Positive = 5
    """Number of classes per image."""
    cam: bool = False
    """Show on the page which patches are relevant for the first class (the method's CAM)."""
    ignore: Annotated[Patterns, tyro.conf.arg(metavar="NAME...")] = ()
    """Names of files and folders to skip in folders, such as '*.mov', in upper or lower case.
    Hidden files, and files that NAS devices, macOS and Windows leave behind, are always skipped."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that an image may have."""
    device: Device = "auto"


class Unread(NamedTuple):
    """Files that were not read."""

    count: int
    lines: list[str]
    """Their errors; files without an image's suffix share lines."""


def main() -> None:
    """Parse, check, predict; write the files last."""
    arguments = cli.parse(Arguments, prog="rft.predict", config=(tyro.conf.FlagCreatePairsOff,))
    require_model(arguments.model)
    found = find_images(arguments.images, patterns_of(arguments.ignore))
    # outputs of an earlier call may be in the folder of the images
    own = {path.resolve() for path in (arguments.out, arguments.html) if path is not None}
    others = {
        pattern: left
        for pattern, paths in found.others.items()
        if (left := [path for path in paths if path.resolve() not in own])
    }
    found = found._replace(others=others)
    check(arguments, found)
    model = load(arguments.model, device=arguments.device, max_pixels=arguments.max_pixels)
    predicted, drawn, unread = predict(model, found, arguments)
    if not predicted:
        first = unread.lines[0]
        raise ValueError(
            f"none of {unread.count:,} files could be read; first: {first}"
            if unread.count > 1
            else first
        )
    written = write(model, predicted, drawn, unread, arguments)
    say(model, predicted, found, unread, written)
    sys.exit(1 if unread.count else 0)


def check(arguments: Arguments, found: Found) -> None:
    """Check inputs and outputs before anything is read.

    Raises:
        ValueError: naming the option or folder.
    """
    if not arguments.images:
        hint = taken_for_name(arguments.ignore)
        raise ValueError(f"name at least one image, or a folder of images{hint}")
    if not (found.paths or found.refused or found.others):
        raise ValueError(f"{arguments.images[0]} holds no images")
    if arguments.cam and arguments.html is None:
        raise ValueError("--cam draws on the page; name one with --html")
    files_of = {"--out": arguments.out, "--html": arguments.html}
    targets = {option: path.resolve() for option, path in files_of.items() if path is not None}
    if len(set(targets.values())) < len(targets):
        raise ValueError(f"--out and --html are both {arguments.out}; name two different files")
    for option, start in (("--out", CSV_START.encode()), ("--html", START)):
        if (path := files_of[option]) is None:
            continue
        files.require_writable(str(path))
        # never overwrite a photo that was mistakenly named as an output
        if path.exists() and path.stat().st_size and not _begins(path, start):
            raise ValueError(
                f"{option} {path} exists and was not written by rft predict; choose another name"
            )


def _begins(path: Path, start: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(start)) == start


def predict(
    model: Model, found: Found, arguments: Arguments
) -> tuple[list[tuple[str, Prediction]], list[Shown], Unread]:
    """Predict all images: (path, prediction) pairs, the page's images, and the unread files."""
    paths = [str(path) for path in found.paths]
    refused = dict(found.refused)
    predicted: list[tuple[str, Prediction]] = []
    drawn: list[Shown] = []
    with (
        # results follow immediately, so without a terminal only slow runs print progress
        progress("predict", "images", len(paths), ASIDE, ends=False) as advance,
        closing(
            read_squares(
                paths,
                model.image_size,
                TOGETHER,
                max_pixels=arguments.max_pixels,
                refuse=lambda number, error: refused.update({found.paths[number]: str(error)}),
            )
        ) as stream,
    ):
        done = 0
        for squares in stream:
            logits_BK = model.forward(squares.images_BCHW)[1]
            names = [paths[number] for number in squares.numbers]
            found_here = model.predictions(logits_BK, arguments.top)
            predicted += zip(names, found_here, strict=True)
            if arguments.html is not None and (left := SHOWN - len(drawn)) > 0:
                images_BCHW = squares.images_BCHW[:left]
                maps_BGG = None
                if arguments.cam:
                    maps_BGG = model.maps(images_BCHW, logits_BK[:left].argmax(dim=1))
                part = (names[:left], found_here[:left], images_BCHW.numpy(), maps_BGG)
                drawn += shown(*part)
            advance(squares.numbers[-1] + 1 - done)
            done = squares.numbers[-1] + 1
        if done < len(paths):  # the last images could not be read
            advance(len(paths) - done)
    count = len(refused) + sum(map(len, found.others.values()))
    lines = refused | {
        min(paths): no_images(pattern, paths) for pattern, paths in found.others.items()
    }
    return predicted, drawn, Unread(count, [lines[path] for path in sorted(lines)])


def write(
    model: Model,
    predicted: Sequence[tuple[str, Prediction]],
    drawn: Sequence[Shown],
    unread: Unread,
    arguments: Arguments,
) -> list[Path]:
    """Write the files that the command line names, each completely or not at all; return them."""
    written = []
    if (out := arguments.out) is not None:
        top = len(predicted[0][1].names)
        files.write_bytes(str(out), csv_text(predicted, top).encode())
        written.append(out)
    if (html := arguments.html) is not None:
        page = render(model, drawn, len(predicted), _bounded(unread.lines))
        files.write_bytes(str(html), page)
        written.append(html)
    return written


def csv_text(predicted: Sequence[tuple[str, Prediction]], top: int) -> str:
    """Format the CSV: one row per image, its `top` classes side by side, the temperature last."""
    more = [f"{name} {place}" for place in range(2, top + 1) for name in ("class", "probability")]
    lines = [[*CSV_START.split(","), *more, "temperature"]]
    for path, one in predicted:
        shares = one.shares
        cells = [text for name, share in shares for text in (plain(name), f"{share:.6f}")]
        value = "" if one.temperature is None else f"{one.temperature:.6g}"
        lines.append([plain(path), *cells, value])
    return csv_lines(lines)


def say(
    model: Model,
    predicted: Sequence[tuple[str, Prediction]],
    found: Found,
    unread: Unread,
    written: Sequence[Path],
) -> None:
    """Print the predictions, unless they were written to a file, and a summary; warn of errors."""
    lines = [] if written else [line(path, one) for path, one in predicted]
    images = f"{len(predicted):,} image{'s' if predicted[1:] else ''}"
    lines.append(f"{images}, probabilities {_scale(model)}")
    if written:
        counts = Counter(one.name for _, one in predicted).most_common()
        shown = [f"{plain(name)} {count:,}" for name, count in counts[:LINES]]
        more = [f"and {len(counts) - LINES:,} more classes"] if counts[LINES:] else []
        lines.append(f"predicted: {', '.join([*shown, *more])}")
    if found.passed:
        counts = (f"{count:,} {named(name)}" for name, count in sorted(found.passed.items()))
        lines.append(f"skipped by name: {', '.join(counts)}")
    lines += [f"written: {plain(str(path))}" for path in written]
    cli.say("\n".join(lines))
    if unread.count:
        count = f"{unread.count:,} file{'s' if unread.count > 1 else ''} not read:"
        below = [f"  {plain(line)}" for line in _bounded(unread.lines)]
        log.warning(count, extra={"lines": below})


def line(path: str, one: Prediction) -> str:
    """Format an image's prediction: one line, or wrapped below the path on a narrower terminal."""
    text, width = f"{plain(path)}: {in_words(one)}", shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or len(text) <= width:
        return text
    return f"{plain(path)}:\n{textwrap.indent(textwrap.fill(in_words(one), width - 2), '  ')}"


def in_words(one: Prediction) -> str:
    """Format a prediction on one line."""
    return ", ".join(f"{plain(name)} {100 * share:.1f}%" for name, share in one.shares)


def _scale(model: Model) -> str:
    if model.temperature is None:
        return "uncalibrated (no temperature was fitted)"
    return f"at temperature {model.temperature:.3g}, fitted on held-out images"


def _bounded(lines: Sequence[str]) -> list[str]:
    more = [f"... and {len(lines) - LINES:,} more"] if len(lines) > LINES else []
    return [*lines[:LINES], *more]
