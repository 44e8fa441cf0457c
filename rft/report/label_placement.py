"""Places labels in a plot: near their points, clear of everything else. Geometry, in pixels.

The functions take arrays that broadcast: boxes (..., 4) are left, bottom, right, top, and points
(..., 2) are x, y. A plot of 100 points compares millions of pairs of candidates.

Shapes: L labels, C candidates of one label, O other labels or obstacles, S segments of lines.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

DPI = 200  # pages show the pictures at half their pixels, so they stay sharp on dense screens

Box = tuple[float, float, float, float]  # left, bottom, right, top
Point = tuple[float, float]
Segment = tuple[Point, Point]

PAIRS = 20_000  # budget of comparisons, where each round compares all labels with all others
ROUNDS = 8  # most rounds with labels choosing in one order
CROWD = 25  # with so many labels or more, candidates all over the plot are tried too
LEAST_APART = DPI / 50  # least distance of these candidates


def place_labels(
    anchors: Sequence[Point],
    sizes: Sequence[Point],
    obstacles: Sequence[Box],
    lines: Sequence[Segment],
    bounds: Box,
) -> list[Box]:
    """Find a box for each label: near its anchor, inside bounds, clear of everything else.

    Each label takes its cheapest candidate given the others, in rounds until none moves. The result
    depends on the order of the labels, so a few orders are tried. Many labels get fewer tries, so
    that this takes seconds at most. If there is no space, labels overlap as little as possible.
    """
    if not anchors:
        return []
    points_L2 = np.array(anchors, dtype=float)
    candidates = []
    for point, size in zip(points_L2, sizes, strict=True):
        boxes_C4 = candidate_boxes(point, size)
        if len(anchors) >= CROWD:
            boxes_C4 = np.concatenate([boxes_C4, grid_boxes(size, bounds)])
        # rounded to pixels, so that equal distances keep the order of the candidates
        cost_C = _own_cost(point, boxes_C4, obstacles, lines, bounds).round()
        candidates.append((cost_C, boxes_C4))
    rightwards = sorted(range(len(anchors)), key=lambda index: anchors[index])
    upwards = sorted(range(len(anchors)), key=lambda index: anchors[index][::-1])
    # for example 8 rounds in each of 4 orders for 25 labels, 4 rounds in one order for 64
    passes = max(2, PAIRS // len(anchors) ** 2)
    turns = [rightwards, rightwards[::-1], upwards, upwards[::-1]][: max(1, passes // ROUNDS)]
    tried = [_settle(points_L2, candidates, turn, min(passes, ROUNDS)) for turn in turns]
    _, boxes_L4 = min(tried, key=lambda found: found[0])
    return [(left, low, right, high) for left, low, right, high in boxes_L4.tolist()]


def _settle(
    points_L2: np.ndarray,
    candidates: Sequence[tuple[np.ndarray, np.ndarray]],
    turn: Sequence[int],
    rounds: int,
) -> tuple[float, np.ndarray]:
    """Let the labels choose in this order; return their total cost and their boxes."""
    # NaN until a label has a box: NaN is unequal to itself, so the first round never ends the loop
    boxes_L4 = np.full((len(points_L2), 4), np.nan)
    cost_L = np.zeros(len(points_L2))
    for _ in range(rounds):
        before = boxes_L4.copy()
        for index in turn:
            others = ~np.isnan(boxes_L4[:, 0])
            others[index] = False
            costs, boxes = candidates[index]
            cost_L[index], boxes_L4[index] = _cheapest(
                points_L2[index], costs, boxes, points_L2[others], boxes_L4[others]
            )
        if np.array_equal(boxes_L4, before):
            break
    return float(cost_L.sum()), boxes_L4


def _cheapest(
    point: np.ndarray,
    cost_C: np.ndarray,
    boxes_C4: np.ndarray,
    points_O2: np.ndarray,
    others_O4: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Find the cheapest candidate given the other labels; return its cost and its box."""
    # 20 per pixel covered, as for obstacles (_own_cost)
    cost_C = cost_C + 20 * overlap(grow(boxes_C4[:, None]), others_O4).sum(axis=1)
    tangled_CO = _tangled(point, boxes_C4[:, None], points_O2, others_O4)
    cost_C = cost_C + 400 * tangled_CO.sum(axis=1)
    best = cost_C.argmin()
    return float(cost_C[best]), boxes_C4[best]


def candidate_boxes(anchor: np.ndarray, size: Point) -> np.ndarray:
    """Make boxes of a size on rings around an anchor, (C, 4): nearest first, from its right."""
    # in inches; outer rings are further apart
    gap_R11 = DPI * np.array([0.1, 0.15, 0.22, 0.34, 0.5, 0.7, 0.95, 1.25, 1.6])[:, None, None]
    angle_A = np.arange(24) * np.pi / 12
    towards_A2 = np.stack([np.cos(angle_A), np.sin(angle_A)], axis=-1)
    # the box's own corner or side faces the anchor
    corner_RA2 = anchor + gap_R11 * towards_A2 + np.asarray(size) * (towards_A2 - 1) / 2
    return np.concatenate([corner_RA2, corner_RA2 + size], axis=-1).reshape(-1, 4)


def grid_boxes(size: Point, bounds: Box) -> np.ndarray:
    """Make boxes of a size in rows all over the bounds, (C, 4), a third of a width apart."""
    # some letters have no width, and arange does not accept a step of zero
    x_X = np.arange(bounds[0], bounds[2] - size[0], max(size[0] / 3, LEAST_APART))
    y_Y = np.arange(bounds[1], bounds[3] - size[1], size[1] + DPI / 50)
    corner_C2 = np.stack(np.meshgrid(x_X, y_Y), axis=-1).reshape(-1, 2)
    return np.concatenate([corner_C2, corner_C2 + size], axis=-1)


def _own_cost(
    point: np.ndarray,
    boxes_C4: np.ndarray,
    obstacles: Sequence[Box],
    lines: Sequence[Segment],
    bounds: Box,
) -> np.ndarray:
    # reshape: an empty list has no second axis
    obstacles_O4 = np.array(obstacles, dtype=float).reshape(-1, 4)
    lines_S22 = np.array(lines, dtype=float).reshape(-1, 2, 2)
    boxes_C14, end_C2 = boxes_C4[:, None], nearest(boxes_C4, point)
    area_C = (boxes_C4[:, 2] - boxes_C4[:, 0]) * (boxes_C4[:, 3] - boxes_C4[:, 1])
    outside_C = area_C - overlap(boxes_C4, bounds)
    covered_C = overlap(boxes_C14, obstacles_O4).sum(axis=1)
    # the line to a label starts inside its own marker and bars, which are no obstacle to it
    others_O4 = obstacles_O4[~inside(point, obstacles_O4)]
    passed_C = crosses(point, end_C2[:, None], others_O4).sum(axis=1)
    struck_C = crosses(lines_S22[:, 0], lines_S22[:, 1], boxes_C14).sum(axis=1)
    away_C = np.linalg.norm(end_C2 - point, axis=1)
    # every fault costs as much as the pixels of distance that a label accepts to avoid it; areas
    # cost per pixel
    return away_C + 150 * passed_C + 400 * struck_C + 20 * (outside_C + covered_C)


def _tangled(
    point: np.ndarray, boxes: np.ndarray, other_points: np.ndarray, other_boxes: np.ndarray
) -> np.ndarray:
    """Count how often labels, or the lines to their points, cross each other."""
    end, other_end = nearest(boxes, point), nearest(other_boxes, other_points)
    tangled = crosses(point, end, other_boxes).astype(int)
    tangled += crosses(other_points, other_end, boxes)
    return tangled + intersect(point, end, other_points, other_end)


def grow(boxes: np.ndarray) -> np.ndarray:
    """Add a margin on every side of boxes."""
    # a hundredth of an inch, because labels that almost touch read as one
    return boxes + DPI / 100 * np.array([-1, -1, 1, 1])


def overlap(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Compute the area that boxes share."""
    left, low, right, high = _coordinates(a)
    left_b, low_b, right_b, high_b = _coordinates(b)
    width = np.minimum(right, right_b) - np.maximum(left, left_b)
    height = np.minimum(high, high_b) - np.maximum(low, low_b)
    return np.maximum(width, 0) * np.maximum(height, 0)


def nearest(box: ArrayLike, point: ArrayLike) -> np.ndarray:
    """Find the points of boxes that are nearest to points."""
    left, low, right, high = _coordinates(box)
    x, y = _coordinates(point)
    x, y = np.broadcast_arrays(x.clip(left, right), y.clip(low, high))
    return np.stack([x, y], axis=-1)


def inside(point: ArrayLike, box: ArrayLike) -> np.ndarray:
    """Whether points are in boxes."""
    (left, low, right, high), (x, y) = _coordinates(box), _coordinates(point)
    return (left <= x) & (x <= right) & (low <= y) & (y <= high)


def crosses(start: ArrayLike, end: ArrayLike, box: ArrayLike) -> np.ndarray:
    """Whether segments enter boxes: some part is between left and right, bottom and top."""
    first, last = np.zeros(()), np.ones(())  # shares of the segment's length
    low_and_high = _coordinates(box)
    # a segment parallel to an axis meets two of the sides at infinity. If it runs along a side,
    # 0 / 0 is NaN, first < last is false, and it does not enter
    with np.errstate(divide="ignore", invalid="ignore"):
        for axis, (here, there) in enumerate(
            zip(_coordinates(start), _coordinates(end), strict=True)
        ):
            one = (low_and_high[axis] - here) / (there - here)
            other = (low_and_high[axis + 2] - here) / (there - here)
            first = np.maximum(first, np.minimum(one, other))
            last = np.minimum(last, np.maximum(one, other))
    return first < last


def intersect(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Whether segments from a to b and from c to d cross."""
    # zero is not a crossing: lines to two labels may start at one point
    apart = _side(a, b, c) * _side(a, b, d) < 0
    return apart & (_side(c, d, a) * _side(c, d, b) < 0)


def _side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # the sign is the side of the line from a through b on which c is
    along, across = b - a, c - a
    return along[..., 0] * across[..., 1] - along[..., 1] * across[..., 0]


def _coordinates(array: ArrayLike) -> np.ndarray:
    """Split points or boxes into one array per coordinate."""
    return np.moveaxis(np.asarray(array, dtype=float), -1, 0)
