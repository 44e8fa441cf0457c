"""The links of a built site, checked in its HTML: a tool that is lenient cannot hide a dead one.

A page loads nothing from another host, and every relative link leads to a file of the site and to
an anchor that this file has.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# what a browser fetches on its own: tag, attribute
LOADED = {
    ("script", "src"), ("link", "href"), ("img", "src"), ("img", "srcset"), ("source", "src"),
    ("source", "srcset"), ("iframe", "src"), ("video", "src"), ("audio", "src"), ("object", "data"),
}  # fmt: skip


@dataclass
class Page(HTMLParser):
    """The links and anchors of an HTML file."""

    loaded: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what a tag refers to and what refers to it."""
        for name, value in attrs:
            if name in ("id", "name"):
                self.anchors.add(value or "")
            elif (tag, name) in LOADED and value:
                self.loaded += (
                    [one.split()[0] for one in value.split(",")] if "set" in name else [value]
                )
            elif (tag, name) == ("a", "href") and value:
                self.linked.append(value)


def read(path: Path) -> Page:
    """Parse one HTML file."""
    page = Page()
    page.feed(path.read_text())
    return page


def dead(site: Path) -> Iterator[str]:
    """Check every page of a site; yield a line for each link that leads nowhere."""
    pages = {path.resolve(): read(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for target in page.loaded:
            if urlsplit(target).netloc:
                yield f"{name}: loads {target} from another host"
        for target in {*page.loaded, *page.linked}:
            if why := _problem(path, target, pages):
                yield f"{name}: {target} {why}"
    for sheet in sorted(site.rglob("*.css")):
        for host in ("http:", "https:", "//"):
            if f"url({host}" in sheet.read_text().replace('"', "").replace("'", ""):
                yield f"{sheet.relative_to(site)}: loads a file from another host"


def _problem(path: Path, target: str, pages: dict[Path, Page]) -> str:
    """Explain why a link is dead; empty if it is not, or leads out of the site."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return ""
    found = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not found.is_file():
        return "does not exist"
    anchor = unquote(parts.fragment)
    if anchor and found in pages and anchor not in pages[found].anchors:
        return "has no such anchor"
    return ""
