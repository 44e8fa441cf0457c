"""Figures as SVG: the same bytes for the same figure, and small enough to embed in a page.

Texts remain text, in the page's font. Artists that were tied to a row have its id in `data-row`,
for scripts. matplotlib's own ids are prefixed with the figure's name, so that they are unique on a
page.
"""

import io
import re
from collections.abc import Mapping
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.text import Text

from rft.report.colors import DARK, LIGHT, legible

TIED = ("row", "point")  # prefixes of the gid of a tied artist
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
# characters that a name may contain but XML does not allow
NO_XML = re.compile("[\ufffe\uffff]")
UNDATED = {"Date": None, "Creator": None, "Format": None, "Type": None}
OPTIONS = {"svg.fonttype": "none", "svg.hashsalt": "rft"}
DECIMALS = 2  # of coordinates, in points
LEGIBLE_WIDTH = 0.7  # share of its own width below which a figure is scrolled, not shrunk


def tie(artist: Artist, row_id: str, kind: str = "row") -> None:
    """Tie an artist to a row; kind "point" is the marker that represents the row."""
    artist.set_gid(f"{kind}:{row_id}")


def svg(figure: Figure, name: str) -> str:
    """Draw a figure as an <svg> element whose ids begin with a name."""
    for text in figure.findobj(Text):
        text.set_text(NO_XML.sub("?", text.get_text()))
    stream = io.StringIO()
    # these options are global in matplotlib; the context restores them
    with matplotlib.rc_context(OPTIONS):
        figure.savefig(stream, format="svg", metadata=UNDATED, facecolor=LIGHT)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(stream.getvalue())
    for element in root.iter():
        _rename(element, name)
        for key in {"d", "x", "y", "transform"} & element.attrib.keys():
            element.set(key, _rounded(element.attrib[key]))
    # matplotlib's only style is for lines and would apply to all elements of the page
    for parent in list(root.iter(f"{{{SVG}}}defs")):
        for style in parent.findall(f"{{{SVG}}}style"):
            parent.remove(style)
    root.set("stroke-linejoin", "round")
    root.set("class", "figure")
    return ElementTree.tostring(root, encoding="unicode")


def document(element: str) -> bytes:
    """Make a file of an <svg> element."""
    return f'<?xml version="1.0" encoding="utf-8"?>\n{element}\n'.encode()


def themed(element: str, neutral: Mapping[str, str]) -> str:
    """Adapt an <svg> element to a page with light and dark backgrounds, and to the page's font.

    Args:
        element: the result of `svg`.
        neutral: colour -> CSS property of the page that replaces it. Other colours get a second
            value for dark backgrounds; browsers without light-dark() keep the first.
    """

    def replaced(match: re.Match[str]) -> str:
        what, color = match.groups()
        if color in neutral:
            return f"{what}: var({neutral[color]})"
        return f"{what}: {color}; {what}: light-dark({color}, {legible(color, DARK)})"

    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(element)
    for part in root.iter():
        if (style := part.get("style")) is not None:
            style = re.sub(r"font-family: [^;]*(; )?", "", style)
            part.set("style", re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})", replaced, style))
    width = float(root.get("width", "0pt").removesuffix("pt"))
    root.set("style", f"min-width: {LEGIBLE_WIDTH * width:.0f}pt")
    return ElementTree.tostring(root, encoding="unicode")


def _rounded(numbers: str) -> str:
    """Shorten coordinates to few decimals and single spaces, because curves are most of a page."""
    short = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):z.{DECIMALS}f}", numbers)
    return " ".join(short.split())


def _rename(element: ElementTree.Element, name: str) -> None:
    """Tie an element to its row, or prefix its id and its references with a name."""
    own = element.get("id", "")
    kind, _, row_id = own.partition(":")
    if row_id and kind in TIED:
        del element.attrib["id"]
        element.set("data-row", row_id)
        if kind == "point":
            element.set("class", kind)
    elif own:
        element.set("id", f"{name}-{own}")
    for key, value in element.attrib.items():
        if value.startswith("#") and key.endswith("href"):
            element.set(key, f"#{name}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))
