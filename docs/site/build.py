"""Build the pages as a static site: `python -m docs.site.build --out build/site`.

The site is DIR/html. It needs no network and no server: pages, search and pictures work from disk.
Warnings of Sphinx are errors, and so is a dead link.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from docs.site import helps, links, pages, reference
from rft import cli

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Arguments:
    """Build the pages of this repository as a site."""

    out: Path = Path("build/site")
    """Folder for the site, which is its html/, and for what it is built from."""


def build(out: Path) -> Path:
    """Build the site; its folder is returned.

    Raises:
        ValueError: for a page outside the navigation, a dead link, or a warning of Sphinx, which
            is printed.
    """
    tree = pages.Tree(pages.ROOT, out)
    tree.fill()
    for name, text in reference.pages(pages.ROOT):
        tree.write(name, text)
    tree.write("commands.md", helps.page())
    site = out / "html"
    shutil.rmtree(site, ignore_errors=True)
    words = ["-b", "html", "-q", "-E", "--fail-on-warning", "-c", HERE, "-d", out / "doctrees"]
    words += ["-D", f"html_extra_path={tree.copied.resolve()}", tree.source, site]
    if subprocess.run([sys.executable, "-m", "sphinx", *map(str, words)]).returncode:
        raise ValueError("Sphinx reports the problems above")
    if dead := list(links.dead(site)):
        raise ValueError(f"{len(dead)} links of the site are dead: {'; '.join(dead[:20])}")
    return site


def main() -> None:
    """Parse and build."""
    cli.say(str(build(cli.parse(Arguments, prog="site").out) / "index.html"))


if __name__ == "__main__":
    cli.run(main)
