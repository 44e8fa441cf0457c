"""The repository's Markdown as the sources of the site, in the same folders, so links stay short.

The pages are written for readers of the repository. A link from them may lead to any file: pages
of the navigation and other Markdown become pages, pictures and data files are copied, and every
other file becomes a page that shows its text.
"""

import os
import re
import shutil
from functools import partial
from pathlib import Path

from pygments.lexers import find_lexer_class_for_filename

ROOT = Path(__file__).parents[2]
HOME = "README.md"
# Headings of the sidebar, and under each its pages with their titles. A page of docs/ that is not
# here is an error; a name without a file is skipped.
NAVIGATION = {
    "Use": {
        "docs/photos.md": "Your own photos",
        "docs/predict.md": "Predict",
        "docs/export.md": "Export",
    },
    "Train": {
        "docs/training.md": "Training",
        "docs/data.md": "Data",
        "docs/storage.md": "Storage",
        "docs/cluster.md": "Clusters",
        "docs/gpu.md": "GPUs",
        "docs/speed.md": "Speed",
    },
    "Measure": {
        "docs/evaluation.md": "Evaluation",
        "docs/methods.md": "Methods",
        "docs/results.md": "Results",
        "docs/paper.md": "Paper and code",
        "docs/peers.md": "Other loaders",
    },
    "Project": {
        "docs/architecture.md": "Architecture",
        "docs/decisions.md": "Decisions",
        "docs/trials.md": "Trials",
        "docs/security.md": "Security",
        "CHANGELOG.md": "Changelog",
    },
}
REFERENCE = {"commands.md": "Commands", "api/index.md": "Python API"}
COPIED = (".png", ".jpg", ".svg", ".csv", ".json", ".tex", ".html")
SHOWN = "files"  # folder of the pages that show the text of a file

# fenced blocks, and `code` within a paragraph
CODE = (
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)"
    r"|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)*?(?<!`)(?P=ticks)(?!`))"
)
# a label may hold an image
LABEL = r"(?P<label>(?:[^\[\]]|!?\[[^\]]*\](?:\([^)]*\))?)*)"
LINK = re.compile(
    CODE + rf"|(?P<image>!?)\[{LABEL}\]\((?P<target>[^)\s]+)\)",
    re.DOTALL | re.MULTILINE,
)
ATTRIBUTE = re.compile(
    CODE + r'|\b(?P<name>href|src|srcset)="(?P<target>[^"]+)"', re.DOTALL | re.MULTILINE
)
PICTURE = re.compile(r"<picture>\s*(.*?)</picture>", re.DOTALL)
DARK = re.compile(r'<source[^>]*prefers-color-scheme:\s*dark[^>]*srcset="([^"]+)"[^>]*>')
ELSEWHERE = re.compile(r"[a-z][a-z+.-]*:|#|//")


class Tree:
    """Folders of Markdown that Sphinx reads and of files that it copies, filled from the pages."""

    def __init__(self, root: Path, out: Path) -> None:
        self.root, self.source, self.copied = root.resolve(), out / "source", out / "copied"
        self.waiting = [HOME, *pages_of_docs(root)]
        self.staged: set[str] = set()
        self.missing: list[str] = []
        for folder in (self.source, self.copied):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def fill(self) -> None:
        """Stage all pages, and all that they link to.

        Raises:
            ValueError: that lists the links to files that do not exist.
        """
        in_navigation = set(self.waiting)
        while self.waiting:
            name = self.waiting.pop()
            if name not in self.staged:
                self.staged.add(name)
                text = self._text(name)
                self.write(_page(name), text if name in in_navigation else _aside(name, text))
        if self.missing:
            raise ValueError("links to files that do not exist: " + ", ".join(sorted(self.missing)))
        home = self.source / _page(HOME)
        home.write_text(f"{home.read_text()}\n{contents(self.root)}")

    def write(self, name: str, text: str) -> None:
        """Write a source of the site."""
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def _text(self, name: str) -> str:
        path = self.root / name
        if path.is_dir():
            files = sorted(one.name for one in path.iterdir() if one.is_file())
            return self.rewritten("\n".join(f"- [{one}]({one})" for one in files), name)
        if path.suffix == ".md":
            return self.rewritten(path.read_text(), name)
        text = path.read_text()
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
        return f"{fence}{_language(name)}\n{text.rstrip()}\n{fence}\n"

    def rewritten(self, text: str, page: str) -> str:
        """Rewrite the links of a page's Markdown for the site."""
        text = PICTURE.sub(_by_theme, text)
        text = ATTRIBUTE.sub(partial(self._attribute, page), text)
        return LINK.sub(partial(self._link, page), text)

    def _link(self, page: str, match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        label = LINK.sub(partial(self._link, page), match["label"])
        if ELSEWHERE.match(match["target"]):
            return f"{match['image']}[{label}]({match['target']})"
        target, _, anchor = match["target"].partition("#")
        if not (name := self._found(page, target)):
            return match[0]
        if match["image"]:
            self._copy(name, self.source)
            return f"![{label}]({_relative(name, page)})"
        if name.endswith(COPIED):
            self._copy(name, self.copied)
            return f'<a href="{_relative(name, page)}">{label}</a>'
        self.waiting.append(name)
        # lines of a file's text have no anchors
        anchor = f"#{anchor}" if anchor and name.endswith(".md") else ""
        return f"[{label}]({_relative(_page(name), page)}{anchor})"

    def _attribute(self, page: str, match: re.Match[str]) -> str:
        if match["code"] or ELSEWHERE.match(match["target"]):
            return match[0]
        target, hash_, anchor = match["target"].partition("#")
        if not (name := self._found(page, target)):
            return match[0]
        if name.endswith(COPIED):
            self._copy(name, self.copied)
        else:
            self.waiting.append(name)
            name = _page(name).removesuffix(".md") + ".html"
        return f'{match["name"]}="{_relative(name, page)}{hash_}{anchor}"'

    def _found(self, page: str, target: str) -> str:
        """Find the file that a page links to: its path in the repository, empty if missing."""
        folder = self.root / page
        path = ((folder if folder.is_dir() else folder.parent) / target).resolve()
        if path.exists() and path.is_relative_to(self.root):
            return str(path.relative_to(self.root))
        self.missing.append(f"{page}: {target}")
        return ""

    def _copy(self, name: str, folder: Path) -> None:
        if (self.root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / name, folder / name)


def pages_of_docs(root: Path) -> list[str]:
    """List the pages of the navigation that exist, in its order.

    Raises:
        ValueError: if a page of docs/ is not in the navigation.
    """
    named = [name for pages in NAVIGATION.values() for name in pages]
    present = sorted(f"docs/{path.name}" for path in (root / "docs").glob("*.md"))
    if forgotten := [name for name in present if name not in named]:
        raise ValueError(f"not in NAVIGATION of docs/site/pages.py: {', '.join(forgotten)}")
    return [name for name in named if (root / name).is_file()]


def contents(root: Path) -> str:
    """Write the tables of contents of the sidebar, as directives of the home page."""
    present = set(pages_of_docs(root))
    groups = {**NAVIGATION, "Reference": REFERENCE}
    return "\n".join(
        toctree(
            title, {name: short for name, short in pages.items() if name in present | {*REFERENCE}}
        )
        for title, pages in groups.items()
    )


def toctree(caption: str, pages: dict[str, str]) -> str:
    """Write one table of contents, which the page itself does not show."""
    lines = [f"{title} <{name.removesuffix('.md')}>" for name, title in pages.items()]
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *lines, "```", ""])


def _relative(name: str, page: str) -> str:
    """Give the path to a file of the site from a page of the repository."""
    return os.path.relpath(name, Path(_page(page)).parent)


def _page(name: str) -> str:
    """Name the site's source for a file of the repository."""
    if name == HOME:
        return "index.md"
    return name if name.endswith(".md") else f"{SHOWN}/{name}.md"


def _aside(name: str, text: str) -> str:
    """Mark a page as outside the navigation, and a file's text as outside the search."""
    options = ["orphan: true", *([] if name.endswith(".md") else ["nosearch: true"])]
    title = [] if text.startswith("# ") else [f"# {name}", ""]
    return "\n".join(["---", *options, "---", "", *title, text])


def _language(name: str) -> str:
    lexer = find_lexer_class_for_filename(name)
    return lexer.aliases[0] if lexer and lexer.aliases else "text"


def _by_theme(match: re.Match[str]) -> str:
    """Make two images of a `<picture>` for light and dark, which follow the site's switch."""
    dark = DARK.search(match[1])
    image = re.search(r"<img[^>]*>", match[1])
    if not (dark and image):
        return match[0]
    light = image[0].replace("<img", '<img class="only-light"', 1)
    other = re.sub(r'\bsrc="[^"]*"', f'src="{dark[1]}"', image[0])
    return light + other.replace("<img", '<img class="only-dark"', 1)
