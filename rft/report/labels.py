"""Where labels go in a plot: near their points, clear of everything else. Geometry, in pixels."""

import math
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter

DPI = 200  # pages show the pictures at half their pixels, so they stay sharp on dense screens

Box = tuple[float, float, float, float]  # left, bottom, right, top
Point = tuple[float, float]
Segment = tuple[Point, Point]


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
