"""Figures as SVG: the same bytes for the same figure, and small enough to stand in a page.

Texts stay texts, in the page's font. Artists that were tied to a row have its id in `data-row`, for
scripts; matplotlib's own ids get the figure's name in front, so that figures of one page have none
in common.
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

TIED = ("row", "point")  # what the gid of a tied artist begins with
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
# letters that XML has not, of those that a name may have
NO_XML = re.compile("[\ufffe\uffff]")
UNDATED = {"Date": None, "Creator": None, "Format": None, "Type": None}
OPTIONS = {"svg.fonttype": "none", "svg.hashsalt": "rft"}
DECIMALS = 2  # of coordinates, in points
LEGIBLE_WIDTH = 0.7  # share of its own width below which a figure is scrolled, not shrunk


def tie(artist: Artist, row_id: str, kind: str = "row") -> None:
    """Tie an artist to a row; of kind "point" is the marker that stands for the row."""
    artist.set_gid(f"{kind}:{row_id}")


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element whose ids begin with a name."""
    for text in figure.findobj(Text):
        text.set_text(NO_XML.sub("?", text.get_text()))
    stream = io.StringIO()
    # options of this writer are global in matplotlib; the context puts them back
    with matplotlib.rc_context(OPTIONS):
        figure.savefig(stream, format="svg", metadata=UNDATED, facecolor=LIGHT)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(stream.getvalue())
    for element in root.iter():
        _rename(element, name)
        for key in {"d", "x", "y", "transform"} & element.attrib.keys():
            element.set(key, _rounded(element.attrib[key]))
    # its only style is one of lines, for any element of the page
    for parent in list(root.iter(f"{{{SVG}}}defs")):
        for style in parent.findall(f"{{{SVG}}}style"):
            parent.remove(style)
    root.set("stroke-linejoin", "round")
    root.set("class", "figure")
    return ElementTree.tostring(root, encoding="unicode")


def document(element: str) -> bytes:
    """Return an <svg> element as a file of its own."""
    return f'<?xml version="1.0" encoding="utf-8"?>\n{element}\n'.encode()


def themed(element: str, neutral: Mapping[str, str]) -> str:
    """Return an <svg> element for a page of light and dark grounds, in the page's font.

    Args:
        element: what `svg` made.
        neutral: colour -> the page's property that takes its place. Other colours get a form for
            dark grounds beside their own; browsers that do not know light-dark() keep their own.
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
    """Return coordinates with few decimals and single spaces: curves are most of a page."""
    short = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):z.{DECIMALS}f}", numbers)
    return " ".join(short.split())


def _rename(element: ElementTree.Element, name: str) -> None:
    """Tie an element to its row, or put a name before its id, and before those it refers to."""
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
