"""Accuracy in and out of distribution against each other (Fig. 6), and the course of training.

Figures are made through matplotlib's object interface and returned as PNG bytes; no global state.
Recipes differ by marker and fill as well as by colour (Okabe and Ito's, safe for the colour-blind).
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from operator import itemgetter

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from rft.report.runs import Run
from rft.report.tables import ID_COLUMN, OOD_COLUMN, Row, Spread, by_recipe, order, wise_alpha

DPI = 200  # pages show the pictures at half their pixels, so they stay sharp on dense screens
INK, MUTED, GRID_LINE = "#222222", "#6b6b6b", "#e4e4e4"

SOLID = (0.0, ())  # matplotlib's (offset, dashes)
Box = tuple[float, float, float, float]  # left, bottom, right, top
Point = tuple[float, float]
Segment = tuple[Point, Point]


@dataclass(frozen=True)
class Style:
    """How a recipe is drawn."""

    color: str
    marker: str
    size: float = 7.5
    hollow: bool = False
    line: tuple[float, tuple[float, ...]] = SOLID


MASK_COLORS = {"random": "#009e73", "context": "#0072b2", "object": "#d55e00"}
FILL_STYLES = {
    "no": Style(INK, "o", hollow=True, line=(0.0, (1, 1.2))),
    "single": Style(INK, "o"),
    "multi": Style(INK, "D", size=6.0, line=(0.0, (5, 1.5))),
}


def style(recipe: str) -> Style:
    """Return the style of a recipe; unknown ones are grey pentagons."""
    fixed = {
        "zero-shot": Style("#222222", "*", size=11, line=(0.0, (4, 2))),
        "linear-probe": Style("#56b4e9", "<"),
        "vanilla": Style("#222222", "X", size=8),
        "lp-ft": Style("#56b4e9", ">"),
        "no-mask": Style("#aa4a8c", "s", size=6.5),
    }
    if recipe in fixed:
        return fixed[recipe]
    if recipe.startswith("wise-ft"):
        return Style("#b8860b", "^")
    if "soup" in recipe:
        return Style("#8c6d46", "P")
    for mask, fill in product(MASK_COLORS, FILL_STYLES):
        if recipe == f"{mask}-mask-{fill}-fill":
            return replace(FILL_STYLES[fill], color=MASK_COLORS[mask])
    return Style("#777777", "p")


def scatter(rows: Sequence[Row]) -> bytes | None:
    """Return the ID-against-OOD picture, or None if no recipe has both numbers.

    Error bars are one sample standard deviation over seeds.
    """
    points = {
        row.recipe: (x, y)
        for row in rows
        if (x := row.cells[ID_COLUMN]) is not None and (y := row.cells[OOD_COLUMN]) is not None
    }
    if not points:
        return None
    figure, axes = _axes(8.2, 5.6, 1)
    axes[0].set_xlabel("ImageNet top-1 (%)", fontsize=10, color=INK)
    axes[0].set_ylabel("OOD average top-1 (%)", fontsize=10, color=INK)
    axes[0].margins(0.12)
    for recipe, (x, y) in points.items():
        look = style(recipe)
        axes[0].errorbar(
            x.mean,
            y.mean,
            xerr=x.sd,
            yerr=y.sd,
            color=look.color,
            marker=look.marker,
            markersize=look.size,
            markerfacecolor="white" if look.hollow else look.color,
            markeredgewidth=1.4 if look.hollow else 0.6,
            markeredgecolor=look.color if look.hollow else "white",
            elinewidth=1,
            capsize=2,
            zorder=3,
        )
    path = _wise_path(points)
    if len(path) > 1:
        axes[0].plot(*zip(*path, strict=True), color=style("wise-ft").color, linewidth=1, zorder=2)
    figure.tight_layout()
    _label_points(figure, axes[0], points)
    return png(figure)


def _wise_path(points: dict[str, tuple[Spread, Spread]]) -> list[Point]:
    """Return the points of the WiSE-FT models in the order of their mixing coefficient."""
    path = sorted(
        (alpha, x.mean, y.mean)
        for recipe, (x, y) in points.items()
        if (alpha := wise_alpha(recipe)) is not None
    )
    return [(x, y) for _, x, y in path]


def _short_labels(recipes: Sequence[str]) -> list[str]:
    """Name the points; between the ends of a longer WiSE-FT path, by alpha alone."""
    alphas = sorted(alpha for name in recipes if (alpha := wise_alpha(name)) is not None)
    return [
        f"{alpha:g}"
        if (alpha := wise_alpha(name)) is not None and alpha in alphas[1:-1] and len(alphas) > 3
        else name
        for name in recipes
    ]


def _label_points(figure: Figure, axes: Axes, points: dict[str, tuple[Spread, Spread]]) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # text has no size before
    anchors = [
        tuple(axes.transData.transform((x.mean, y.mean)).tolist()) for x, y in points.values()
    ]
    texts = [
        axes.text(0, 0, label, fontsize=8.5, color=style(name).color, parse_math=False, zorder=5)
        for name, label in zip(points, _short_labels(list(points)), strict=True)
    ]
    extents = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    obstacles = [box for x, y in points.values() for box in _occupied(axes, x, y)]
    path = [tuple(axes.transData.transform(point).tolist()) for point in _wise_path(points)]
    frame = axes.bbox
    placed = place_labels(
        anchors,
        [(box.width, box.height) for box in extents],
        obstacles,
        list(pairwise(path)),
        (frame.x0, frame.y0, frame.x1, frame.y1),
    )
    for text, anchor, box in zip(texts, anchors, placed, strict=True):
        _put_label(figure, axes, text, anchor, box)


def _put_label(figure: Figure, axes: Axes, text: Text, anchor: Point, box: Box) -> None:
    text.set_transform(None)  # pixels of the figure
    text.set_position(box[:2])
    text.set_verticalalignment("bottom")
    end = nearest(box, anchor)
    if math.dist(anchor, end) > DPI / 11:  # too far from its marker to be read without a line
        to_data = axes.transData.inverted()
        (x0, y0), (x1, y1) = to_data.transform((anchor, end))
        color = text.get_color()
        axes.add_line(Line2D([x0, x1], [y0, y1], color=color, linewidth=0.6, alpha=0.7, zorder=2))


def _occupied(axes: Axes, x: Spread, y: Spread) -> list[Box]:
    """Return the pixels that a marker and its error bars cover."""
    cx, cy = axes.transData.transform((x.mean, y.mean))
    left, low = axes.transData.transform((x.mean - (x.sd or 0), y.mean - (y.sd or 0)))
    right, high = 2 * cx - left, 2 * cy - low
    pad = DPI / 15
    marker = (cx - pad, cy - pad, cx + pad, cy + pad)
    return [marker, (left, cy - pad / 3, right, cy + pad / 3), (cx - pad / 3, low, cx, high)]


def place_labels(
    anchors: Sequence[Point],
    sizes: Sequence[Point],
    obstacles: Sequence[Box],
    lines: Sequence[Segment],
    bounds: Box,
) -> list[Box]:
    """Return a box for each label: near its anchor, inside bounds, clear of everything else.

    Candidates lie on rings around the anchor; each label takes its cheapest one given the others,
    round after round until none moves. That depends on who begins, so a few orders are tried.
    Where there is no room at all, labels overlap least.
    """
    candidates = []
    for anchor, size in zip(anchors, sizes, strict=True):
        boxes = candidate_boxes(anchor, size)
        # whole pixels: equal distances stay in the order of candidate_boxes
        costs = [round(_own_cost(anchor, box, obstacles, lines, bounds)) for box in boxes]
        candidates.append(sorted(zip(costs, boxes, strict=True), key=itemgetter(0)))
    rightwards = sorted(range(len(anchors)), key=lambda index: anchors[index])
    upwards = sorted(range(len(anchors)), key=lambda index: anchors[index][::-1])
    turns = (rightwards, rightwards[::-1], upwards, upwards[::-1])
    _, boxes = min((_settle(anchors, candidates, turn) for turn in turns), key=itemgetter(0))
    return boxes


def _settle(
    anchors: Sequence[Point], candidates: Sequence[Sequence[tuple[int, Box]]], turn: Sequence[int]
) -> tuple[float, list[Box]]:
    """Return what the labels cost in all and where they are, when they choose in this order."""
    placed: dict[int, Box] = {}
    costs: dict[int, float] = {}
    for _ in range(8):
        before = dict(placed)
        for index in turn:
            others = [(anchors[j], box) for j, box in placed.items() if j != index]
            costs[index], placed[index] = _cheapest(anchors[index], candidates[index], others)
        if placed == before:
            break
    return sum(costs.values()), [placed[index] for index in range(len(anchors))]


def _cheapest(
    anchor: Point, candidates: Sequence[tuple[int, Box]], others: Sequence[tuple[Point, Box]]
) -> tuple[float, Box]:
    """Return the candidate that costs least given the other labels; they come by own cost."""
    least, chosen = math.inf, candidates[0][1]
    for own, box in candidates:
        if own >= least:
            break  # so do all that follow
        cost = own + sum(_pair_cost(anchor, box, *other) for other in others)
        if cost < least:
            least, chosen = cost, box
    return least, chosen


def candidate_boxes(anchor: Point, size: Point) -> list[Box]:
    """Return boxes of a size on rings around an anchor, nearest first, from its right side on."""
    boxes = []
    for ring in (0.1, 0.15, 0.22, 0.34, 0.5, 0.7, 0.95, 1.25, 1.6):
        for turn in range(24):
            angle = math.tau * turn / 24
            gap = ring * DPI
            # the box's own corner or side faces the anchor
            x = anchor[0] + gap * math.cos(angle) + size[0] * (math.cos(angle) - 1) / 2
            y = anchor[1] + gap * math.sin(angle) + size[1] * (math.sin(angle) - 1) / 2
            boxes.append((x, y, x + size[0], y + size[1]))
    return boxes


def _own_cost(
    anchor: Point, box: Box, obstacles: Sequence[Box], lines: Sequence[Segment], bounds: Box
) -> float:
    leader = (anchor, nearest(box, anchor))
    outside = (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, bounds)
    covered = sum(overlap(box, obstacle) for obstacle in obstacles)
    passed = sum(crosses(leader, other) for other in obstacles if not inside(anchor, other))
    struck = sum(crosses(line, box) for line in lines)
    return math.dist(*leader) + 150 * passed + 400 * struck + 20 * (outside + covered)


def _pair_cost(anchor: Point, box: Box, other_anchor: Point, other_box: Box) -> float:
    leader = (anchor, nearest(box, anchor))
    other_leader = (other_anchor, nearest(other_box, other_anchor))
    tangled = crosses(leader, other_box) + crosses(other_leader, box)
    tangled += intersect(leader, other_leader)
    return 20 * overlap(grow(box, DPI / 100), other_box) + 400 * tangled


def overlap(a: Box, b: Box) -> float:
    """Return the area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def grow(box: Box, by: float) -> Box:
    """Return a box that is larger on every side."""
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def nearest(box: Box, point: Point) -> Point:
    """Return the point of a box that is nearest to a point."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def inside(point: Point, box: Box) -> bool:
    """Whether a point lies in a box."""
    return nearest(box, point) == point


def crosses(segment: Segment, box: Box) -> bool:
    """Whether a segment enters a box."""
    left, low, right, high = box
    corners = [(left, low), (right, low), (right, high), (left, high), (left, low)]
    if inside(segment[0], box) or inside(segment[1], box):
        return True
    return any(intersect(segment, edge) for edge in pairwise(corners))


def intersect(first: Segment, second: Segment) -> bool:
    """Whether two segments cross."""
    (a, b), (c, d) = first, second
    return _side(a, b, c) * _side(a, b, d) < 0 and _side(c, d, a) * _side(c, d, b) < 0


def _side(a: Point, b: Point, c: Point) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


@dataclass(frozen=True)
class Panel:
    """One quantity of metrics.jsonl."""

    title: str
    unit: str

    def value(self, line: dict[str, float]) -> float | None:
        """Return the quantity in a line, or None if the line does not have it."""
        if self.unit == "%":
            if "held_out_correct" not in line:
                return None
            return 100 * line["held_out_correct"] / line["held_out_total"]
        return line.get(self.unit)


PANELS = (
    Panel("cross-entropy (training)", "ce"),
    Panel("feature MSE to the frozen model (training)", "mse"),
    Panel("held-out accuracy (%)", "%"),
)


def curve(run: Run, panel: Panel) -> dict[int, float]:
    """Return step -> value of one run; a quantity that is always zero was not in its loss."""
    values = {
        int(line["step"]): value
        for line in run.metrics
        if (value := panel.value(line)) is not None and math.isfinite(value)
    }
    return values if any(values.values()) else {}


def mean_curve(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    """Return the mean over curves at the steps that all of them have."""
    steps = set.intersection(*(set(values) for values in curves))
    return {step: float(np.mean([values[step] for values in curves])) for step in sorted(steps)}


def curves(runs: Sequence[Run]) -> bytes | None:
    """Return loss terms and held-out accuracy by step, or None if no run has metrics.

    A thin line is a run, the thick one its recipe's mean. A recipe with a single point, such as
    zero-shot, is a level across the panel.
    """
    found = {
        panel: {
            recipe: lines
            for recipe, members in by_recipe(runs).items()
            if (lines := [line for run in members if (line := curve(run, panel))])
        }
        for panel in PANELS
    }
    panels = [panel for panel in PANELS if found[panel]]
    if not panels:
        return None
    figure, axes = _axes(4 * len(panels), 3.7, len(panels))
    handles: dict[str, Line2D] = {}
    for panel, ax in zip(panels, axes, strict=True):
        ax.set_title(panel.title, fontsize=10, color=INK, loc="left")
        ax.set_xlabel("step", fontsize=9, color=INK)
        for recipe, lines in found[panel].items():
            _draw_curves(ax, recipe, lines)
            look = style(recipe)
            handles.setdefault(recipe, Line2D([], [], color=look.color, linestyle=look.line, lw=2))
    handles = {recipe: handles[recipe] for recipe in sorted(handles, key=order)}
    columns = min(len(handles), 5)
    figure.tight_layout(rect=(0, 0.045 + 0.055 * math.ceil(len(handles) / columns), 1, 1))
    legend = figure.legend(
        handles.values(), handles, loc="lower center", ncols=columns, fontsize=9, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return png(figure)


def _draw_curves(ax: Axes, recipe: str, lines: Sequence[dict[int, float]]) -> None:
    look = style(recipe)
    mean = mean_curve(lines)
    if len(mean) == 1:
        ax.axhline(next(iter(mean.values())), color=look.color, linestyle=look.line, linewidth=1.2)
        return
    if len(lines) > 1:
        for line in lines:
            ax.plot(list(line), list(line.values()), color=look.color, linewidth=0.6, alpha=0.35)
    steps, values = list(mean), list(mean.values())
    ax.plot(steps, values, color=look.color, linestyle=look.line, linewidth=1.6)


def _axes(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure of some inches with a row of clean axes."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(MUTED)
        ax.tick_params(colors=MUTED, labelsize=8.5)
        ax.grid(color=GRID_LINE, linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def png(figure: Figure) -> bytes:
    """Return a figure as PNG, pixel for pixel at its own resolution."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
