"""Pictures of pages as readers see them: `python docs/screenshots.py PAGE... --out DIR`.

Chromium opens each page, of a report or of the site that `make docs` builds, from disk: at the
width of a desk and of a phone, in light and dark. Playwright drives the Chromium of the system;
both come with the development environment (the Debian package chromium, and `playwright` of
pyproject.toml).
"""

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from rft import cli
from rft.storage import files

CHROMIUM = "chromium"
# it runs as root where tests do, draws without a GPU, and looks for no updates
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
WIDTHS = {"desk": 1440, "phone": 390}  # pixels
GROUNDS: tuple[Literal["light", "dark"], ...] = ("light", "dark")


@dataclass(frozen=True)
class Arguments:
    """Take pictures of a page: DIR/page-desk-light.png, and of other widths and grounds.

    Those of several pages are named by page: DIR/index-desk-light.png.
    """

    pages: tyro.conf.Positional[tuple[Path, ...]]
    """HTML files."""
    out: Path
    """Folder for the pictures."""
    height: int = 2400
    """Pixels from the top of the page."""


def why_not() -> str:
    """Why there can be no browser here; empty if there can."""
    if importlib.util.find_spec("playwright") is None:
        return "the Python package playwright is not installed"
    if shutil.which(CHROMIUM) is None:
        return f"{CHROMIUM} is not installed (Debian package {CHROMIUM})"
    return ""


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium; Playwright's browser is yielded.

    Raises:
        ValueError: if there can be none.
    """
    if reason := why_not():
        raise ValueError(f"no browser: {reason}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=shutil.which(CHROMIUM), args=list(OPTIONS)
        )
        yield started
        started.close()


def take(path: Path, out: Path, height: int, called: str) -> Iterator[Path]:
    """Take the pictures of a page; yield each one's path."""
    with browser() as started:
        for name, width in WIDTHS.items():
            for ground in GROUNDS:
                size = {"width": width, "height": height}
                page = started.new_page(viewport=size, color_scheme=ground)
                page.goto(path.resolve().as_uri())
                picture = out / f"{called}-{name}-{ground}.png"
                files.write_bytes(str(picture), page.screenshot())
                page.close()
                yield picture


def main() -> None:
    """Parse and take them."""
    arguments = cli.parse(Arguments, prog="screenshots")
    pages = arguments.pages
    for page in pages:
        if not page.is_file():
            raise ValueError(f"{page} does not exist; name HTML files of a report or the site")
    for page in pages:
        called = "page" if len(pages) == 1 else page.stem
        for picture in take(page, arguments.out, arguments.height, called):
            cli.say(str(picture))


if __name__ == "__main__":
    cli.run(main)
