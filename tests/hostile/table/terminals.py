"""Third-party texts on a terminal, in a page and in a spreadsheet."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser

from tests.hostile.rows import Answer, Row
from tests.hostile.table.tars import END, sample
from tests.hostile.world import (
    EVALUATE,
    HUB,
    INDEX,
    LOCALISE,
    PACK,
    REPORT,
    SHOW,
    VERIFY,
    WISE,
    Place,
    Ran,
)

ESCAPE = "\x1b[2J\x1b]0;owned\x07"
NAMES = {
    "escape sequences": ESCAPE,
    "a C1 control": "\x9b31mred",
    "a carriage return": "all is well\rerror",
    "a line break": "one\nerror: two",
    "text turned around": "\u202egnp.exe",
    "a backspace": "abc\x08\x08\x08",
    "nothing to see": "\u200b\u2060",
    "rich's markup": "[/red]:wave:[bold]x[link=http://x]y",
}
# the others are shown, or hidden, at the same positions
FIRST = ("escape sequences", "a line break", "text turned around", "rich's markup")
NEW = tuple("packed" if word == "shards" else word for word in PACK)


def row(
    what: str,
    words: Sequence[str],
    damage: Callable[[Place], object],
    *says: str,
    answer: Answer = "either",
    holds: Callable[[Place, Ran], object] = lambda *_: None,
    slow: bool = False,
    writes: Sequence[str] = (),
) -> Row:
    return Row(
        kind="terminal",
        what=what,
        words=words,
        damage=damage,
        says=says,
        answer=answer,
        holds=holds,
        slow=slow,
        writes=writes,
    )


def class_called(name: str) -> Callable[[Place], None]:
    """Give the sets a class of that name; the run's weights keep the old one."""

    def damage(place: Place) -> None:
        for dataset in ("train", "test"):
            place.edit(f"shards/{dataset}/manifest.json", classes=[name, "green"])

    return damage


def tables_are_safe(place: Place, _: Ran) -> None:
    """No cell of a table is a formula."""
    for path in (place / "report").glob("*.csv"):
        for cells in csv.reader(path.open(newline="")):
            for cell in cells:
                number = cell.lstrip("+-").replace(".", "", 1).isdigit()
                assert number or not cell.startswith(tuple("=+-@\t\r")) or cell == "-", cell


def page_is_safe(place: Place, _: Ran) -> None:
    """No text of a run is markup in the page."""
    path = place / "report/index.html"
    if path.exists():
        page = Elements()
        page.feed(path.read_text())
        page.close()
        assert "h1" in page.names
        assert not [name for name in page.attributes if name.startswith("on")]
        assert "x" not in page.sources
        assert not [text for text in page.scripts if text.startswith("alert")]


class Elements(HTMLParser):
    """The actual markup of a page, without texts that only look like markup."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.sources: set[str | None] = set()
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources |= {value for name, value in attrs if name == "src"}

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts.append(data.strip())


def recipe(name: str) -> Callable[[Place], object]:
    """Give the run, including its weights, a recipe of that name."""

    def damage(place: Place) -> None:
        place.edit("run/config.json", recipe=name)
        (place / "run/training.json").unlink(missing_ok=True)
        place.edit("run/progress.json", step=2, of=2)
        for path in (place / "run/checkpoints").glob("*.safetensors"):
            path.unlink()

    return damage


def named(what: str, name: str) -> Iterator[Row]:
    """Yield a row for each position at which a third-party name is shown."""
    yield row(
        f"{what} in the name of a set",
        (*EVALUATE[:5], name, *EVALUATE[6:]),
        lambda _: None,
        answer="refused",
    )
    yield row(f"{what} in the name of a class, shown", SHOW, class_called(name), slow=True)
    yield row(f"{what} in the name of a class, compared", EVALUATE, class_called(name))
    yield row(
        f"{what} in the dataset of a manifest",
        VERIFY,
        lambda place: place.edit("shards/test/manifest.json", dataset=name),
        answer="reported",
    )
    yield row(f"{what} in an option", ("rft.train", name), lambda _: None, answer="refused")
    yield row(
        f"{what} in the recipe of a run", REPORT, recipe(name), slow=True, writes=["report/*"]
    )
    yield row(
        f"{what} in a key of a document",
        REPORT,
        lambda place: place.edit("run/results.json", sets={name: 1}),
        answer="refused",
    )
    yield row(
        f"{what} in an unknown field",
        SHOW,
        lambda place: place.edit("run/config.json", **{name: 1}),
        answer="refused",
        slow=True,
    )
    yield row(
        f"{what} in a value",
        SHOW,
        lambda place: place.edit("run/config.json", precision=name),
        answer="refused",
        slow=True,
    )
    yield row(
        f"{what} in the encoding",
        EVALUATE,
        lambda place: place.edit("shards/test/manifest.json", encoding={"kind": name}),
        answer="refused",
    )
    if "\n" not in name and "/" not in name:
        yield row(
            f"{what} in the name of a photo",
            NEW,
            lambda place: (place / f"photos/red/{name}.png").write_text("no image"),
            answer="refused",
            writes=["packed", "packed/*"],
        )
        yield row(
            f"{what} in the name of a class folder",
            (*NEW[:5], *NEW[7:]),
            lambda place: (place / "photos/red").rename(place / f"photos/{name}"),
            writes=["packed", "packed/*"],
        )
        yield row(
            f"{what} in the name of a member",
            (*INDEX[:3], "new/test", *INDEX[4:]),
            lambda place: (place / "foreign/0.tar").write_bytes(sample(f"a{name}", b"9") + END),
            answer="refused",
        )


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    for what, name in NAMES.items():
        for one in named(what, name):
            yield replace(one, thorough=what not in FIRST)
    yield row(
        "escape sequences in a folder that is no run",
        ("rft.report", f"x{ESCAPE}", "--out", "report"),
        lambda place: None,
        answer="refused",
    )
    yield row(
        "escape sequences in --out",
        ("rft.merge", "wise", "zero", "run", "--out", f"m{ESCAPE}"),
        lambda _: None,
    )
    yield row(
        "escape sequences in --masks",
        (*LOCALISE[:7], f"m{ESCAPE}", *LOCALISE[8:]),
        lambda _: None,
        answer="refused",
        slow=True,
    )
    yield row(
        "escape sequences in a card",
        HUB,
        lambda place: place.edit("hub/card.json", files={ESCAPE: 1}),
        answer="refused",
    )
    yield row(
        "escape sequences in a class's name that weights tell",
        WISE,
        lambda place: place.edit("run/config.json", recipe=ESCAPE),
        answer="refused",
    )

    for formula in ("=HYPERLINK(1)", "+cmd|' /C calc'!A0", "@SUM(A1)", "-2+3", "\t=1", "\r=1"):
        yield row(
            f"{formula!r} as the recipe of a run",
            REPORT,
            recipe(formula),
            holds=tables_are_safe,
            slow=True,
            writes=["report/*"],
        )
        yield row(
            f"{formula!r} as the name of a set",
            REPORT,
            lambda place, formula=formula: place.edit(
                "run/results.json", sets={formula: place.read("run/results.json")["sets"]["test"]}
            ),
            holds=tables_are_safe,
            slow=True,
        )
    for html in (
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "{{7*7}}",
        "' onload=\"alert(1)",
    ):
        yield row(
            f"{html} as the recipe of a run",
            REPORT,
            recipe(html),
            holds=page_is_safe,
            slow=True,
            writes=["report/*"],
        )
        yield row(
            f"{html} as the name of a set",
            REPORT,
            lambda place, html=html: place.edit(
                "run/results.json", sets={html: place.read("run/results.json")["sets"]["test"]}
            ),
            holds=page_is_safe,
            slow=True,
        )
        yield row(
            f"{html} in the provenance",
            REPORT,
            lambda place, html=html: (place / "run/provenance.json").write_text(
                json.dumps({"rft": html, "git": html, "python": html, "command": [html]})
            ),
            holds=page_is_safe,
            slow=True,
        )
