"""The things in the miniature world: ten handwritten digits and six drawn shapes.

An instance is one silhouette. The instances of each class are split into four banks, for
pre-training, fine-tuning, development and testing, so that no image set shares an object with
another bank's. The split does not depend on any seed: a world drawn anew is still unseen by the
CLIP that comes with rft.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

from rft.rng import numpy_generator

Bank = Literal["pretrain", "finetune", "dev", "test"]

SHARES: dict[Bank, float] = {"pretrain": 0.40, "finetune": 0.28, "dev": 0.10, "test": 0.22}
SHAPES = ("star", "ring", "cross", "triangle", "heart", "crescent")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSES = (*(f"digit {digit}" for digit in DIGITS), *SHAPES)  # in label order
SHAPE_INSTANCES = 180  # about as many as there are scans of each digit (174 to 183)
SIDE = 32  # pixels of a silhouette

# class id -> opacity (instances, SIDE, SIDE), float32 in [0, 1]
Silhouettes = tuple[np.ndarray, ...]


def load_silhouettes(bank: Bank) -> Silhouettes:
    """Return the silhouettes of one bank for every class."""
    # here, because importing sklearn takes a second and the names above are wanted without it
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # scikit-learn's scans are 8 x 8 counts from 0 to 16
    scans = pixels.reshape(-1, 8, 8).astype(np.float32) / 16
    digits = [np.stack([_enlarge(scan) for scan in scans[labels == n]]) for n in range(10)]
    shapes = [_draw_instances(name) for name in SHAPES]
    return tuple(
        instances[bank_members(class_id, len(instances))[bank]]
        for class_id, instances in enumerate([*digits, *shapes])
    )


def bank_members(class_id: int, instances: int) -> dict[Bank, np.ndarray]:
    """Return the instance numbers of each bank: a random partition of all of them."""
    order = numpy_generator("banks", class_id).permutation(instances)
    # of sums, not of shares: rounding loses no instance
    ends = np.rint(np.cumsum(list(SHARES.values())) * instances).astype(int)
    return dict(zip(SHARES, np.split(order, ends[:-1]), strict=True))


def _enlarge(scan: np.ndarray) -> np.ndarray:
    large = np.asarray(Image.fromarray(scan).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    # bolder by a pixel on each side, so that a digit fills about as much of its square as a shape
    padded = np.pad(large, 1)
    shifted = [padded[y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(3)]
    # steeper: enlarging fourfold blurs an edge over four pixels
    return np.clip((np.max(shifted, axis=0) - 0.2) * 2.5, 0, 1)


def _draw_instances(name: str) -> np.ndarray:
    rng = numpy_generator("shape", name)
    return np.stack([_draw(_DISTANCES[name], rng) for _ in range(SHAPE_INSTANCES)])


def _draw(distance: Callable[..., np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draw one instance of a shape: random aspect, shear, size and proportion."""
    # centres of pixels, from -1 to 1; y grows downwards
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / (SIDE / 2) - 1
    width, height = rng.uniform(0.72, 0.95, size=2)
    shear = rng.uniform(-0.15, 0.15)
    proportion = rng.uniform()
    # the inverse map: coordinates of the pixels in the shape's own square
    inside = -distance((x + shear * y) / width, y / height, proportion)
    edge = 2 / SIDE  # one pixel
    return np.clip(inside / edge + 0.5, 0, 1).astype(np.float32)


# Signed distances (up to a scale), negative inside, in coordinates where the shape fills [-1, 1].
# `u` in [0, 1] sets the proportion: stroke width, notch depth and the like.


def _star(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    # all edges are folded onto one: angles from a tip, mirrored at it; -y puts a tip on top
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    radius, notch = np.hypot(x, y), 0.36 + 0.14 * u
    # the edge from the tip (radius 1, angle 0) to the notch (radius `notch`, half a sector)
    tip_x, notch_x, notch_y = 1, notch * np.cos(sector / 2), notch * np.sin(sector / 2)
    along = np.array([notch_x - tip_x, notch_y])
    normal = np.array([along[1], -along[0]]) / np.hypot(*along)
    return normal[0] * (radius * np.cos(angle) - tip_x) + normal[1] * radius * np.sin(angle)


def _ring(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    stroke = 0.14 + 0.10 * u
    return np.abs(np.hypot(x, y) - (0.98 - stroke)) - stroke


def _cross(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    arm = 0.17 + 0.15 * u
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - 0.98, short - arm)


def _triangle(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    half_base = 0.75 + 0.2 * u
    slope = np.hypot(half_base, 1.8)
    sides = (1.8 * np.abs(x) - half_base * (y + 0.9)) / slope
    return np.maximum(sides, y - 0.9)


def _heart(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    # the curve (x^2 + y^2 - 1)^3 = x^2 y^3 has its tip at negative y, which is up here: hence -y
    x, y = 1.2 * np.abs(x), 1.2 * -y + 0.1
    level = (x**2 + y**2 - 1) ** 3 - (0.8 + 0.4 * u) * x**2 * y**3
    # no distance: a cube root is steepest at zero, so this shape alone has hard edges
    return np.cbrt(level) * 0.3


def _crescent(x: np.ndarray, y: np.ndarray, u: float) -> np.ndarray:
    disc = np.hypot(x, y) - 0.95
    bite = np.hypot(x - 0.45 - 0.2 * u, y) - 0.8
    return np.maximum(disc, -bite)


_DISTANCES = {
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "triangle": _triangle,
    "heart": _heart,
    "crescent": _crescent,
}
