"""Plots: accuracy out of distribution over accuracy in distribution (Fig. 6, 7), and others.

The others are training curves and calibration. Figures use matplotlib's object interface, without
global state. The artists of a row are tied to its id, for the page's script. Recipes differ by
marker and fill as well as by colour (Okabe and Ito's, safe for colour-blind readers).
"""

import contextlib
import io
import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D

from rft.log import ASIDE
from rft.recipes import MASKED
from rft.report.colors import LIGHT, legible
from rft.report.label_placement import DPI, Box, Point, nearest, place_labels
from rft.report.read import Run
from rft.report.svg import tie
from rft.report.tables import (
    ID_COLUMN,
    OOD_COLUMN,
    Row,
    Spread,
    by_row,
    ensemble_kind,
    order,
    shown_recipes,
    wise_model,
)
from rft.runs.records import Metrics
from rft.statistics.calibration import Bins

MODELS = 64  # limit of a picture; the time to place labels grows with the square of their number
POINTS = 500  # limit of a curve; a panel is 600 pixels wide
HEIGHT = 3.7  # inches of the curves, with up to 8 lines of legend below them
LED = DPI / 11  # from this distance in pixels on, a line leads from a marker to its label

INK, MUTED, GRID_LINE = "#222222", "#6b6b6b", "#e4e4e4"
NEUTRAL = {INK: "--ink", MUTED: "--muted", GRID_LINE: "--rule", LIGHT: "--ground"}
"""Colour -> CSS property that replaces it on the page."""

Dashes = tuple[float, tuple[float, ...]]  # matplotlib's (offset, on and off)
SOLID: Dashes = (0.0, ())
DOTTED: Dashes = (0.0, (1, 2))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Style:
    """Colour, marker and line of a recipe."""

    color: str
    marker: str
    size: float = 7.5
    hollow: bool = False
    line: Dashes = SOLID


MASK_COLORS = {"random": "#009e73", "context": "#0072b2", "object": "#d55e00"}
FILL_STYLES = {
    "none": Style(INK, "o", hollow=True, line=(0.0, (1, 1.2))),
    "single": Style(INK, "o"),
    "multi": Style(INK, "D", size=6.0, line=(0.0, (5, 1.5))),
}


def style(recipe: str) -> Style:
    """Look up the style of a recipe; unknown ones are grey pentagons."""
    fixed = {
        "zero-shot": Style("#222222", "*", size=11, line=(0.0, (4, 2))),
        "linear-probe": Style("#56b4e9", "<", line=(0.0, (1, 1.2))),
        "vanilla": Style("#222222", "X", size=8),
        "lp-ft": Style("#56b4e9", ">"),
        "uniform-soup": Style("#8c6d46", "P", size=8),
        "greedy-soup": Style("#8c6d46", "P", size=8, hollow=True),
        "model-stock": Style("#8c6d46", "p", size=8),
        "no-mask": Style("#aa4a8c", "s", size=6.5),
        # regularised in weight space (green), and by texts (violet)
        "l2-sp": Style("#1b7a5a", "D", size=6.5),
        "spd": Style("#1b7a5a", "D", size=6.5, hollow=True),
        "ftp": Style("#1b7a5a", "8", size=7),
        "car-ft": Style("#5e4fa2", "h", size=7.5),
        "lipsum-ft": Style("#5e4fa2", "h", size=7.5, hollow=True),
        "flyp": Style("#5e4fa2", "p", size=7.5),
    }
    if recipe in fixed:
        return fixed[recipe]
    ensembles = {
        "ose": Style("#3b6ea5", "d", size=7.5),
        "vrf": Style("#3b6ea5", "d", size=7.5, hollow=True),
        "dawin": Style("#3b6ea5", "H", size=7.5),
    }
    if (kind := ensemble_kind(recipe)) is not None:
        return ensembles[kind]
    if (wise := wise_model(recipe)) is not None:
        if wise.end == "vanilla":
            return Style("#b8860b", "^", hollow=wise.tower)
        return replace(style(wise.end), marker="v", size=7.5)
    if recipe.startswith("wise-kd-"):
        student = style(recipe.removeprefix("wise-kd-"))
        return replace(student, marker="h", size=8.5, line=(0.0, (6, 1.5, 1, 1.5)))
    if recipe in MASKED:
        method = MASKED[recipe]
        return replace(FILL_STYLES[method.fill], color=MASK_COLORS[method.mask])
    return Style("#777777", "p")


def looks(rows: Sequence[Row]) -> dict[str, Style]:
    """Map row names to styles; several settings of one recipe differ in colour."""
    found = {}
    for row in rows:
        same = [other.name for other in rows if other.recipe == row.recipe]
        look = style(row.recipe)
        if len(same) > 1:
            share = same.index(row.name) / (len(same) - 1)
            # the last colours of viridis are too light for a white background
            color = to_hex(matplotlib.colormaps["viridis"](0.85 * share))
            look = replace(look, color=color)
        found[row.name] = look
    return found


@dataclass(frozen=True)
class Mark:
    """One model in a picture of two accuracies."""

    id: str
    """Id of its row."""
    label: str
    look: Style
    x: Spread
    y: Spread
    minor: bool = False
    """Whether it is one of many on a path, and drawn small without bars."""


@dataclass(frozen=True)
class Line:
    """A line through marks."""

    color: str
    dashes: Dashes
    through: tuple[Point, ...]


def accuracy_points(rows: Sequence[Row]) -> dict[str, tuple[Spread, Spread]]:
    """Map row names to (ImageNet accuracy, OOD average), for rows that have both."""
    return {
        row.name: (row.cells[ID_COLUMN], row.cells[OOD_COLUMN])
        for row in rows
        if ID_COLUMN in row.cells and OOD_COLUMN in row.cells
    }


def scatter(rows: Sequence[Row]) -> Figure | None:
    """Draw OOD over ID accuracy (Fig. 6); None if no row has both numbers.

    Error bars are one sample standard deviation over seeds. Each WiSE family has one model.
    """
    points, styles = accuracy_points(rows), looks(rows)
    drawn = [row for row in rows if row.name in points]
    kept = shown_recipes(row.recipe for row in drawn)
    marks = [
        Mark(row.id, row.name, styles[row.name], *points[row.name])
        for row in drawn
        if row.recipe in kept
    ]
    return _picture(marks, []) if marks else None


def wise_paths(recipes: Collection[str]) -> dict[str, list[str]]:
    """Map each WiSE family to the recipes on its path, from alpha 0 to alpha 1.

    If the zero-shot and the fine-tuned model are among the recipes, they are the ends. They have
    the weights of the merged models of alpha 0 and 1, and replace these. A path of the image tower
    alone ends at the fine-tuned model, but does not begin at the zero-shot one.
    """
    paths: dict[str, dict[float, str]] = {}
    for recipe in sorted(recipes, key=order):
        if (wise := wise_model(recipe)) is not None:
            ends = {1.0: wise.end} if wise.tower else {0.0: "zero-shot", 1.0: wise.end}
            present = {alpha: end for alpha, end in ends.items() if end in recipes}
            # the ends are entered first, so a merged model of alpha 0 or 1 does not replace them
            paths.setdefault(wise.family, present).setdefault(wise.alpha, recipe)
    return {family: [path[alpha] for alpha in sorted(path)] for family, path in paths.items()}


def alpha_of(recipe: str) -> float:
    """Find the alpha of a recipe on a path of `wise_paths`; the names of the ends have none."""
    wise = wise_model(recipe)
    return wise.alpha if wise is not None else float(recipe != "zero-shot")


def wise_picture(rows: Sequence[Row]) -> Figure | None:
    """Draw the integration of WiSE-FT (Fig. 7); None without such a model.

    A line follows a WiSE family over alpha. A dotted line leads from a fine-tuned model to the same
    training with knowledge distillation from a WiSE-FT model. Only points with a name have bars.
    """
    points = accuracy_points(rows)
    paths = wise_paths(points)
    students = [name for name in points if name.startswith("wise-kd-")]
    if not paths and not students:
        return None

    def line(names: Sequence[str], look: Style, dashes: Dashes) -> Line:
        through = tuple((points[name][0].mean, points[name][1].mean) for name in names)
        return Line(look.color, dashes, through)

    # a family has one style, so 0.5 stands for any alpha
    lines = [line(path, style(f"{family}-0.5"), SOLID) for family, path in paths.items()]
    included = {"zero-shot", *students, *(name for path in paths.values() for name in path)}
    for student in students:
        teacherless = student.removeprefix("wise-kd-")
        included.add(teacherless)
        if teacherless in points:
            lines.append(line([teacherless, student], style(student), DOTTED))
    named = shown_recipes(points)
    ids = {row.name: row.id for row in rows}
    marks = []
    for name, (x, y) in points.items():
        if name in included:
            # one model per family is labelled with its full name, the others with alpha only
            wise = None if name in named else wise_model(name)
            label = name if wise is None else f"{wise.alpha:g}"
            marks.append(Mark(ids[name], label, style(name), x, y, minor=wise is not None))
    return _picture(marks, lines)


def _picture(marks: Sequence[Mark], lines: Sequence[Line]) -> Figure:
    """Draw the first `MODELS` marks, and lines, by ImageNet accuracy and OOD average."""
    figure, axes = _axes(8.2, 5.6, 1)
    if left_out := _left_out(len(marks)):
        axes[0].set_title(left_out, fontsize=8.5, color=MUTED, loc="left")
        marks = marks[:MODELS]
        # lines consist of points, so those of left-out marks are found by position
        there = {(mark.x.mean, mark.y.mean) for mark in marks}
        lines = [
            replace(line, through=through)
            for line in lines
            if (through := tuple(point for point in line.through if point in there))
        ]
    axes[0].set_xlabel("ImageNet top-1 (%)", fontsize=10, color=INK)
    axes[0].set_ylabel("OOD average top-1 (%)", fontsize=10, color=INK)
    axes[0].margins(0.12)
    for mark in marks:
        _draw_mark(axes[0], mark)
    for line in lines:
        xs, ys = zip(*line.through, strict=True)
        axes[0].plot(xs, ys, color=line.color, linestyle=line.dashes, linewidth=1, zorder=2)
    # labels are placed last, in pixels, so nothing may move after them
    figure.tight_layout()
    _label_marks(figure, axes[0], marks, lines)
    return figure


def _left_out(count: int) -> str:
    """Make the note of a picture that does not show all models; empty if it does."""
    return f"the first {MODELS} of {count:,} models" if count > MODELS else ""


def _draw_mark(axes: Axes, mark: Mark) -> None:
    look = mark.look
    point, caps, bars = axes.errorbar(
        mark.x.mean,
        mark.y.mean,
        xerr=None if mark.minor else mark.x.sd,
        yerr=None if mark.minor else mark.y.sd,
        color=look.color,
        marker=look.marker,
        markersize=look.size * (0.6 if mark.minor else 1),
        markerfacecolor=LIGHT if look.hollow else look.color,
        markeredgewidth=1.4 if look.hollow else 0.6,
        markeredgecolor=look.color if look.hollow else LIGHT,
        elinewidth=1,
        capsize=2,
        zorder=3,
    )
    tie(point, mark.id, "point")
    for part in (*caps, *bars):
        tie(part, mark.id)


def _label_marks(figure: Figure, axes: Axes, marks: Sequence[Mark], lines: Sequence[Line]) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # text has no size before the first drawing

    def pixels(point: Point) -> Point:
        x, y = axes.transData.transform(point)
        return float(x), float(y)

    anchors = [pixels((mark.x.mean, mark.y.mean)) for mark in marks]
    texts = [
        axes.text(
            0,
            0,
            mark.label,
            fontsize=7.5 if mark.minor else 8.5,
            color=legible(mark.look.color, LIGHT),
            parse_math=False,
            zorder=5,
        )
        for mark in marks
    ]
    for text, mark in zip(texts, marks, strict=True):
        tie(text, mark.id)
    # only the sizes matter here: all texts are still at the origin
    extents = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    frame = axes.bbox
    placed = place_labels(
        anchors,
        [(box.width, box.height) for box in extents],
        [box for mark in marks for box in _occupied(axes, mark)],
        list(chain.from_iterable(pairwise(map(pixels, line.through)) for line in lines)),
        (frame.x0, frame.y0, frame.x1, frame.y1),
    )
    for mark, text, anchor, box in zip(marks, texts, anchors, placed, strict=True):
        # in inches, because the pixels of an SVG differ
        text.set_transform(figure.dpi_scale_trans)
        text.set_position((box[0] / DPI, box[1] / DPI))
        text.set_verticalalignment("bottom")
        end = tuple(nearest(box, anchor))
        if math.dist(anchor, end) > LED:
            xs, ys = axes.transData.inverted().transform((anchor, end)).T
            look = {"color": text.get_color(), "linewidth": 0.6, "alpha": 0.7, "zorder": 2}
            leader = Line2D(xs, ys, **look)
            tie(leader, mark.id)
            # not axes.plot, which would rescale the axes after the labels were placed in pixels
            axes.add_line(leader)


def _occupied(axes: Axes, mark: Mark) -> list[Box]:
    """Compute the boxes, in pixels, that a marker and its error bars cover."""
    x, y = mark.x, mark.y
    cx, cy = axes.transData.transform((x.mean, y.mean))
    # about half a marker and a margin
    pad = DPI / (25 if mark.minor else 15)
    marker = (cx - pad, cy - pad, cx + pad, cy + pad)
    if mark.minor:
        return [marker]
    left, low = axes.transData.transform((x.mean - (x.sd or 0), y.mean - (y.sd or 0)))
    # the axes are linear, so bars are equally long on both sides
    right, high = 2 * cx - left, 2 * cy - low
    return [marker, (left, cy - pad / 3, right, cy + pad / 3), (cx - pad / 3, low, cx, high)]


class Panel(NamedTuple):
    """One quantity of metrics.jsonl: its title, and how to read it from a line."""

    title: str
    value: Callable[[Metrics], float | None]
    is_loss: bool = True
    """Whether it is a term of the loss, which is 0 at every step of a recipe without that term."""


def held_out_percent(line: Metrics) -> float | None:
    """Compute the accuracy on held-out images, in percent; None if the line has none."""
    correct, total = line.held_out_correct, line.held_out_total
    return None if correct is None or total is None else 100 * correct / total


PANELS = (
    Panel("cross-entropy (training)", lambda line: line.ce),
    Panel("feature MSE to the teacher (training)", lambda line: line.mse),
    Panel("KL to the WiSE-FT model (training)", lambda line: line.kd),
    Panel("contrastive loss (training)", lambda line: line.contrastive),
    Panel("KL of the contexts (training)", lambda line: line.context),
    Panel("distance of random texts (training)", lambda line: line.lipsum),
    Panel("distillation of the head (training)", lambda line: line.head),
    Panel("held-out accuracy (%)", held_out_percent, is_loss=False),
)


def curve(run: Run, panel: Panel) -> dict[int, float]:
    """Map steps to values of one run; empty for a term that its loss does not have."""
    values = {
        line.step: value
        for line in sorted(run.metrics, key=lambda line: line.step)
        if (value := panel.value(line)) is not None and math.isfinite(value)
    }
    return {} if panel.is_loss and not any(values.values()) else values


def mean_curve(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    """Average curves at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(values) for values in curves)))
    values_LS = np.array([[values[step] for step in steps] for values in curves])
    return dict(zip(steps, values_LS.mean(axis=0).tolist(), strict=True))


def curves(runs: Sequence[Run], rows: Sequence[Row]) -> Figure | None:
    """Draw loss terms and held-out accuracy by step; None if no run has metrics.

    A thin line is a run, a thick line the mean of a row. A row with a single point, such as
    zero-shot, is a horizontal line across the panel.
    """
    logged = by_row([run for run in runs if run.metrics])
    shown = dict(islice(logged.items(), MODELS))
    found = {
        panel: {
            name: lines
            for name, members in shown.items()
            if (lines := [line for run in members if (line := curve(run, panel))])
        }
        for panel in PANELS
    }
    panels = [panel for panel in PANELS if found[panel]]
    if not panels:
        return None
    names = [name for name in shown if any(name in found[panel] for panel in panels)]
    # a column of the legend takes 0.65 inches for line and gap, and about 0.08 per letter
    room = 4 * len(panels) / (0.65 + 0.08 * max(map(len, names)))
    columns, left_out = max(1, min(len(names), 5, int(room))), _left_out(len(logged))
    lines_below = math.ceil(len(names) / columns) + bool(left_out)
    # from 8 lines of legend on, the figure grows with them and the panels keep half of its height
    height = HEIGHT * max(1, lines_below / 8)
    figure, axes = _axes(4 * len(panels), height, len(panels))
    styles, ids = looks(rows), {row.name: row.id for row in rows}
    for panel, ax in zip(panels, axes, strict=True):
        ax.set_title(panel.title, fontsize=10, color=INK, loc="left")
        ax.set_xlabel("step", fontsize=9, color=INK)
        for name, lines in found[panel].items():
            for line in _draw_curves(ax, styles[name], lines):
                tie(line, ids[name])
    # a line of the legend takes 0.2 inches, 0.055 of HEIGHT
    figure.tight_layout(rect=(0, (0.045 + 0.055 * lines_below) * HEIGHT / height, 1, 1))
    legend = figure.legend(
        [Line2D([], [], color=styles[n].color, linestyle=styles[n].line, lw=2) for n in names],
        names,
        loc="lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
        title=left_out or None,
        title_fontproperties={"size": 8.5},
    )
    for text, line, name in zip(legend.get_texts(), legend.get_lines(), names, strict=True):
        # dollar signs in a recipe's name do not mark a formula
        text.set_parse_math(False)
        tie(text, ids[name])
        tie(line, ids[name])
    return figure


def thinned(line: dict[int, float]) -> tuple[list[int], list[float]]:
    """Thin a line to at most `POINTS` points, including its last; return steps and values."""
    steps, values = list(line), list(line.values())
    every = math.ceil(len(steps) / POINTS)
    # counted from the end, so that the last point is kept
    return steps[::-1][::every][::-1], values[::-1][::every][::-1]


def _draw_curves(ax: Axes, look: Style, lines: Sequence[dict[int, float]]) -> list[Line2D]:
    """Draw the runs of a row and their mean; return the artists."""
    mean = mean_curve(lines)
    # a line through a single point would be invisible
    if len(mean) == 1:
        level = next(iter(mean.values()))
        return [ax.axhline(level, color=look.color, linestyle=look.line, linewidth=1.2)]
    drawn: list[Line2D] = []
    if len(lines) > 1:
        for line in lines:
            thin = {"color": look.color, "linewidth": 0.6, "alpha": 0.35}
            drawn += ax.plot(*thinned(line), **thin)
    steps, values = thinned(mean)
    drawn += ax.plot(steps, values, color=look.color, linestyle=look.line, linewidth=1.6)
    return drawn


CALIBRATED = 24  # most rows of the calibration picture
ACROSS = 6  # most of its panels side by side
KINDS = {ID_COLUMN: ("ImageNet", SOLID), OOD_COLUMN: ("OOD", (0.0, (4, 2)))}


def calibration_picture(rows: Sequence[Row], bins: Mapping[tuple[str, str], Bins]) -> Figure | None:
    """Draw a panel for each row: accuracy over confidence, in bins of equal width.

    `bins` maps (row, column) to bins; those of the OOD column are of all images of its sets. None
    if no row has bins.
    """
    drawn = [row for row in rows if any((row.name, column) in bins for column in KINDS)]
    if not drawn:
        return None
    left_out = f"the first {CALIBRATED} of {len(drawn):,} models" if drawn[CALIBRATED:] else ""
    drawn = drawn[:CALIBRATED]
    down = math.ceil(len(drawn) / ACROSS)
    # rows of panels are as even as possible: nine make five and four
    across = math.ceil(len(drawn) / down)
    width, height = 1.0 + 2.0 * across, 0.9 + 2.2 * down
    figure, axes = _axes(width, height, across, down)
    styles = looks(rows)
    for place, (ax, row) in enumerate(zip(axes, drawn, strict=False)):
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7, linestyle=DOTTED)
        for column, (_, dashes) in KINDS.items():
            if (one := bins.get((row.name, column))) is not None:
                ax.plot(
                    one.confidence_M,
                    one.accuracy_M,
                    color=styles[row.name].color,
                    linestyle=dashes,
                    linewidth=1.4,
                    marker=".",
                )
        # ties the complete panel
        tie(ax, row.id)
        title = "\n".join(textwrap.wrap(row.name, 26)[:2])
        ax.set_title(title, fontsize=8, color=INK, loc="left", parse_math=False)
        ax.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        # all panels have the same scales, so only the outer ones have numbers
        ax.tick_params(labelleft=place % across == 0, labelbottom=place + across >= len(drawn))
    for ax in axes[len(drawn) :]:
        ax.set_visible(False)
    # fixed margins, because measuring the texts of so many panels takes longer than drawing them
    figure.subplots_adjust(
        left=0.85 / width,
        right=1 - 0.15 / width,
        bottom=0.55 / height,
        top=1 - 0.75 / height,
        wspace=0.15,
        hspace=0.3,
    )
    figure.supxlabel("confidence", fontsize=9, color=INK)
    figure.supylabel("accuracy", fontsize=9, color=INK)
    figure.legend(
        [Line2D([], [], color=INK, linestyle=dashes) for _, dashes in KINDS.values()],
        [name for name, _ in KINDS.values()],
        loc="upper right",
        ncols=2,
        fontsize=8.5,
        frameon=False,
        title=left_out or None,
        title_fontproperties={"size": 8.5},
    )
    return figure


def _axes(width: float, height: float, across: int, down: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure of a size in inches, with a grid of plain axes."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=LIGHT)
    # squeeze=False gives an array even for a single axes
    axes = list(figure.subplots(down, across, squeeze=False).reshape(-1))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(MUTED)
        ax.tick_params(colors=MUTED, labelsize=8.5)
        ax.grid(color=GRID_LINE, linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Summarise the warnings of drawing in one line that any terminal can show.

    matplotlib warns of each character that its font lacks, and prints that character.
    """
    with warnings.catch_warnings(record=True) as found:
        # overrides -W: no warning becomes an error, and each text is recorded once
        warnings.simplefilter("default")
        yield
    if found:
        more = f" (and {len(found) - 1} more warnings)" if found[1:] else ""
        log.info(f"matplotlib warned while drawing: {found[0].message}{more}", extra=ASIDE)


def png(figure: Figure) -> bytes:
    """Draw a figure as PNG at its own resolution."""
    return encoded(drawn(figure))


def drawn(figure: Figure) -> np.ndarray:
    """Draw a figure to pixels, RGBA (H, W, 4)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def encoded(pixels_HWC: np.ndarray) -> bytes:
    """Encode pixels as PNG."""
    stream = io.BytesIO()
    # origin, because a user's matplotlibrc may turn images upside down
    imsave(stream, pixels_HWC, format="png", origin="upper", dpi=DPI)
    return stream.getvalue()
