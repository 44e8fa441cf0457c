"""Figures as SVG: the same bytes for the same figure, and small enough to stand in a page.

Texts stay texts, in the page's font. Artists that were tied to a row have its id in `data-row`, for
scripts; matplotlib's own ids get the figure's name in front, so that figures of one page have none
in common.
"""

import io
import re
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.text import Text

TIED = "row:"
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
# letters that XML has not, of those that a name may have
NO_XML = re.compile("[\ufffe\uffff]")
UNDATED = {"Date": None, "Creator": None, "Format": None, "Type": None}
OPTIONS = {"svg.fonttype": "none", "svg.hashsalt": "rft"}


def tie(artist: Artist, row_id: str) -> None:
    """Tie an artist to a row."""
    artist.set_gid(f"{TIED}{row_id}")


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element whose ids begin with a name."""
    for text in figure.findobj(Text):
        text.set_text(NO_XML.sub("?", text.get_text()))
    stream = io.StringIO()
    # options of this writer are global in matplotlib; the context puts them back
    with matplotlib.rc_context(OPTIONS):
        figure.savefig(stream, format="svg", metadata=UNDATED, facecolor="white")
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(stream.getvalue())
    for element in root.iter():
        _rename(element, name)
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


def _rename(element: ElementTree.Element, name: str) -> None:
    """Tie an element to its row, or put a name before its id, and before those it refers to."""
    own = element.get("id", "")
    if own.startswith(TIED):
        del element.attrib["id"]
        element.set("data-row", own.removeprefix(TIED))
    elif own:
        element.set("id", f"{name}-{own}")
    for key, value in element.attrib.items():
        if value.startswith("#") and key.endswith("href"):
            element.set(key, f"#{name}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))
