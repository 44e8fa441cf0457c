"""From a scene to pixels: context, object, light, style and noise, in this order.

Objects are always bright and contexts dark; with free polarity a CLIP this small learns contexts
only. Colours are float32 in [0, 1], images (H, W, C), fields over the image (H, W).
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from rft.demo.objects import SIDE
from rft.demo.scenes import PLAIN, Scene

IMAGE_SIZE = 48  # pixels of an image's side
CONTEXT_DARKNESS = 0.7

# palette -> (dark, light); each colour is jittered from image to image. Order counts, here and in
# _PATTERNS: a context's number decides its pattern and palette (pattern_and_palette)
_COLOURS = {
    "red": ((0.40, 0.08, 0.08), (0.95, 0.45, 0.30)),
    "green": ((0.05, 0.30, 0.10), (0.45, 0.85, 0.35)),
    "blue": ((0.05, 0.12, 0.42), (0.30, 0.65, 0.95)),
    "purple": ((0.28, 0.05, 0.38), (0.80, 0.45, 0.90)),
}


def render(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the image, uint8 (48, 48, 3), and the exact mask of its object, bool (48, 48)."""
    # all draws come from one generator: another order would be another world (VERSION)
    opacity = place(scene)
    image = draw_context(scene.context, rng)
    # bright: no channel is below 0.55
    colour = 1 - 0.45 * rng.uniform(size=3) * np.sqrt(rng.uniform())
    image = image + opacity[..., None] * (colour - image)
    shading = 1 + 0.12 * _smooth_noise(3, rng)  # uneven light
    image = image * (scene.brightness * shading)[..., None]
    image = _STYLES[scene.style](image, opacity, rng)
    return to_bytes(image, scene.noise, rng), opacity > 0.5


def draw_context(context: int, rng: np.random.Generator) -> np.ndarray:
    """Return a picture of the context alone."""
    if context == PLAIN:
        return np.full(
            (IMAGE_SIZE, IMAGE_SIZE, 3), CONTEXT_DARKNESS * rng.uniform(0.2, 0.7, size=3)
        )
    pattern, palette = pattern_and_palette(context)
    y, x = (
        np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + rng.uniform(0, IMAGE_SIZE, size=(2, 1, 1))
    ) / IMAGE_SIZE
    scale = rng.uniform(0.8, 1.25)
    value = np.clip(_PATTERNS[pattern](scale * x, scale * y, rng), 0, 1)[..., None]
    dark, light = np.clip(_COLOURS[palette] + rng.uniform(-0.1, 0.1, size=(2, 3)), 0, 1)
    return CONTEXT_DARKNESS * (dark + value * (light - dark))


def place(scene: Scene) -> np.ndarray:
    """Return the opacity of the scene's object, (48, 48)."""
    # PIL wants the map from output to input coordinates: undo shift, rotation and scale.
    turn, zoom = np.deg2rad(scene.angle), SIDE / scene.size
    cos, sin = zoom * np.cos(turn), zoom * np.sin(turn)
    centre_x, centre_y = IMAGE_SIZE / 2 + scene.shift[0], IMAGE_SIZE / 2 + scene.shift[1]
    matrix = (
        *(cos, sin, SIDE / 2 - cos * centre_x - sin * centre_y),
        *(-sin, cos, SIDE / 2 + sin * centre_x - cos * centre_y),
    )
    # outside the silhouette PIL fills with zeros
    placed = Image.fromarray(scene.silhouette).transform(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(placed)


def to_bytes(image: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Add pixel noise and return the image as uint8."""
    noisy = image + noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.rint(255 * np.clip(noisy, 0, 1)).astype(np.uint8)


def _smooth_noise(cells: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise in [-1, 1] whose grain is the image's side divided by `cells`."""
    coarse = rng.uniform(-1, 1, size=(cells, cells)).astype(np.float32)
    smooth = Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth), -1, 1)


# Patterns: a field in [0, 1] from coordinates in units of the image's side, with a random origin.


def _wave(t: np.ndarray) -> np.ndarray:
    """Return a soft square wave of period 1."""
    # beyond [0, 1], where draw_context clips it: flat tops and steep sides
    return 0.5 + 0.9 * np.sin(2 * np.pi * t)


def _cell(t: np.ndarray) -> np.ndarray:
    """Return the position in a cell of side 1, in [-0.5, 0.5)."""
    return t % 1 - 0.5


def _bricks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(6 * y)
    # six rows of three bricks, every other row shifted by half a brick
    mortar = np.maximum(np.abs(_cell(6 * y)) - 0.32, np.abs(_cell(3 * x + 0.5 * row)) - 0.41)
    return 0.8 - 10 * mortar


def _ripples(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    centre_x, centre_y = rng.uniform(0.2, 0.8, size=2)
    # from the image's corner, not the random origin: the centre must be in the image
    return _wave(5 * np.hypot(x - x[0, 0] - centre_x, y - y[0, 0] - centre_y))


def _speckle(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # grains of 2 x 2 pixels, 40% of them light
    light = rng.uniform(size=(IMAGE_SIZE // 2, IMAGE_SIZE // 2)) > 0.6
    return light.repeat(2, axis=0).repeat(2, axis=1)


def _haze(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    turn = rng.uniform(0, 2 * np.pi)
    # without the random origin: the middle of the image is the middle grey
    slope = np.cos(turn) * (x - x.mean()) + np.sin(turn) * (y - y.mean())
    return 0.5 + 0.8 * slope


_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "stripes": lambda x, y, rng: _wave(5 * y),
    "columns": lambda x, y, rng: _wave(5 * x),
    "diagonals": lambda x, y, rng: _wave(3.5 * (x + y)),
    "checks": lambda x, y, rng: 0.5 + 2 * np.sin(6 * np.pi * x) * np.sin(6 * np.pi * y),
    "dots": lambda x, y, rng: 10 * (0.3 - np.hypot(_cell(5 * x), _cell(5 * y))),
    "clouds": lambda x, y, rng: 0.5 + 0.7 * _smooth_noise(6, rng),
    "bricks": _bricks,
    "ripples": _ripples,
    "grid": lambda x, y, rng: 12 * (np.maximum(np.abs(_cell(5 * x)), np.abs(_cell(5 * y))) - 0.36),
    "waves": lambda x, y, rng: _wave(4 * y + 0.5 * np.sin(4 * np.pi * x)),
    "speckle": _speckle,
    "haze": _haze,
}
PATTERNS, PALETTES = tuple(_PATTERNS), tuple(_COLOURS)


def pattern_and_palette(context: int) -> tuple[str, str]:
    """Return the two words that describe a context; no two contexts share both."""
    # 12 is a multiple of 4: without the shift, contexts c and c + 12 would be one
    palette = context + context // len(PATTERNS)
    return PATTERNS[context % len(PATTERNS)], PALETTES[palette % len(PALETTES)]


# Styles: how a photograph of the scene is drawn again.


def _cartoon(image: np.ndarray, opacity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    flat = np.rint(image * 3) / 3
    return np.where(_edges(opacity)[..., None] > 0.6, 0.05, flat)


def _painting(image: np.ndarray, opacity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    strokes = _blur(rng.normal(0, 0.25, size=image.shape))
    return np.rint((_blur(image) + strokes) * 6) / 6


def _embroidery(image: np.ndarray, opacity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    # threads run one way on the object, the other way on the ground
    threads = np.where(opacity > 0.5, (x + y) % 4 < 2, (x - y) % 4 < 2)
    return image * np.where(threads, 1.1, 0.75)[..., None]


def _sketch(image: np.ndarray, opacity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    ink = np.clip(1.3 * _edges(_blur(image).mean(axis=-1)) - 0.1, 0, 0.9)
    return np.repeat(rng.uniform(0.9, 1) - ink[..., None], 3, axis=-1)


_STYLES: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "photo": lambda image, opacity, rng: image,
    "cartoon": _cartoon,
    "painting": _painting,
    "embroidery": _embroidery,
    "sketch": _sketch,
}


def _edges(field: np.ndarray) -> np.ndarray:
    """Return the gradient's magnitude over two pixels."""
    padded = np.pad(field, 1, mode="edge")
    across = padded[1:-1, 2:] - padded[1:-1, :-2]
    down = padded[2:, 1:-1] - padded[:-2, 1:-1]
    # not halved: a full step of a field in [0, 1] is 1
    return np.hypot(across, down)


def _blur(image: np.ndarray) -> np.ndarray:
    """Return the mean over 3 x 3 pixels."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
