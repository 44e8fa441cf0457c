"""Figures in a page: reproducible bytes, texts as texts, unique ids, and linked rows."""

import re
from xml.etree import ElementTree

from matplotlib.figure import Figure

from rft.report import svg
from rft.report.colors import DARK, LIGHT, legible
from rft.report.svg import SVG

HOSTILE = '<script>alert(1)</script> id="x" url(#y) fill: #123456 & $x_$ \ufffe'


def drawing(name: str = "one") -> Figure:
    figure = Figure(figsize=(2, 2))
    axes = figure.subplots()
    (line,) = axes.plot([0, 1], [0, 1], marker="o")
    svg.tie(line, "abc")
    svg.tie(axes.text(0, 0, HOSTILE, parse_math=False), "abc")
    return figure


def elements(text: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(text).iter())


def test_the_same_figure_is_the_same_bytes():
    assert svg.svg(drawing(), "one") == svg.svg(drawing(), "one")


def test_a_page_gives_its_own_colours_and_font():
    text = svg.themed(svg.svg(drawing(), "one"), {LIGHT: "--ground"})
    assert "font-family" not in text
    styles = [e.get("style", "") for e in elements(text)]
    assert any("fill: var(--ground)" in style for style in styles)
    assert LIGHT not in text
    # matplotlib's first colour, and its form for a dark ground
    dark = legible("#1f77b4", DARK)
    assert dark != "#1f77b4"
    assert f"stroke: #1f77b4; stroke: light-dark(#1f77b4, {dark})" in text
    # a name is not a style
    assert text.count("fill: #123456") == 1


def test_coordinates_have_two_decimals():
    values = [
        value
        for e in elements(svg.svg(drawing(), "one"))
        for key, value in e.attrib.items()
        if key in ("d", "x", "y", "transform")
    ]
    assert any(re.search(r"\d\.\d\d\b", value) for value in values)
    assert not any(re.search(r"\.\d{3}|  |-0\.00", value) for value in values)


def test_a_point_is_marked():
    figure = Figure()
    (line,) = figure.subplots().plot([0], [0], marker="o")
    svg.tie(line, "abc", "point")
    (point,) = [e for e in elements(svg.svg(figure, "one")) if e.get("class") == "point"]
    assert point.get("data-row") == "abc"


def test_names_are_text():
    text = svg.svg(drawing(), "one")
    assert "<script" not in text
    (found,) = [e.text for e in elements(text) if e.tag == f"{{{SVG}}}text" and "alert" in e.text]
    assert found == HOSTILE.replace("\ufffe", "?")


def test_ids_and_what_refers_to_them_begin_with_the_figures_name():
    text = svg.svg(drawing(), "one")
    ids = {e.get("id") for e in elements(text) if "id" in e.attrib}
    assert ids
    assert all(own.startswith("one-") for own in ids)
    values = [value for e in elements(text) for value in e.attrib.values()]
    referred = {v[1:] for v in values if v.startswith("#one-")}
    referred |= {v.split("url(#")[1].split(")")[0] for v in values if "url(#" in v}
    assert referred
    assert referred <= ids


def test_artists_of_a_row_carry_its_id():
    tied = [e.tag for e in elements(svg.svg(drawing(), "one")) if e.get("data-row") == "abc"]
    # a line with its markers, and a text
    assert tied == [f"{{{SVG}}}g"] * 2


def test_nothing_of_the_figure_reaches_the_page():
    text = svg.svg(drawing(), "one")
    tags = {e.tag.rpartition("}")[2] for e in elements(text)}
    assert not tags & {"style", "script", "metadata", "image", "a"}
    assert text.startswith("<svg ")


def test_a_file_is_a_document_of_its_own():
    data = svg.document(svg.svg(drawing(), "one"))
    assert ElementTree.fromstring(data).tag == f"{{{SVG}}}svg"
