"""What the method makes of a few images, side by side (Fig. 5).

A counterfactual is a donor map: for image n and patch p the number of the image whose patch p is
shown there, n itself where the image is kept, -1 where the patch is dropped. Here it is applied to
pixels. The heat map is the only place where relevance, one number a patch, is upsampled.

Shapes: B images, H W pixels, C channels, P = G * G patches in row-major order.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from rft import files
from rft.arrays import read_npz
from rft.report.labels import DPI
from rft.report.plots import INK, MASK_COLORS, MUTED, png
from rft.report.tables import FILLS, MASKS

DROP = -1
MAX_ROWS = 6
# what a gallery may cost: `rft.train` writes 8 images and 15 columns, of some megabytes
GALLERY_BYTES = 2**26
MAX_IMAGES, MAX_SIDE, MAX_COLUMNS = 16, 1024, 32
TILE = 200  # pixels that a small image is enlarged to, about; a large one keeps its size
GAP, GROUP_GAP, MARGIN, HEAD, FOOT, NAMES = 10, 34, 24, 116, 84, 210  # pixels
RULE = 54  # below the heading of a group
KEPT, MASKED = (232, 232, 232), (38, 70, 110)
HATCH_LIGHT, HATCH_DARK = 205, 150


@dataclass(frozen=True)
class Gallery:
    """A checked gallery.npz."""

    images_BHWC: np.ndarray
    names: tuple[str, ...]
    relevance_BP: np.ndarray
    patch: int
    donors: dict[str, np.ndarray]
    """Recipe -> donor map, int64 (B, P)."""


@dataclass(frozen=True)
class Column:
    """One column of the picture."""

    group: str
    title: str
    tiles_BHWC: np.ndarray


def load_gallery(path: Path) -> Gallery:
    """Read a gallery.npz.

    Raises:
        ValueError: if it is not one or its arrays do not fit together.
    """
    try:
        return _parse(read_npz(files.read_bytes(str(path), GALLERY_BYTES), GALLERY_BYTES))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a gallery of rft.train: {error}") from error


def _parse(columns: dict[str, np.ndarray]) -> Gallery:
    images_BCHW = columns["images_BCHW"]
    if images_BCHW.ndim != 4 or columns["class_names"].dtype.kind != "U":
        raise ValueError("images_BCHW must be images, and class_names texts")
    images_BHWC = images_BCHW.transpose(0, 2, 3, 1)
    batch, height, width, channels = images_BHWC.shape
    if batch > MAX_IMAGES or height > MAX_SIDE or len(columns) > MAX_COLUMNS:
        raise ValueError(
            f"it may have {MAX_IMAGES} images of {MAX_SIDE} pixels a side and {MAX_COLUMNS} columns"
        )
    patch = int(columns["patch"])
    if channels != 3 or images_BHWC.dtype != np.uint8 or not batch:
        raise ValueError("images_BCHW must be RGB of type uint8")
    if height != width or patch < 1 or height % patch:
        raise ValueError(f"{height} x {width} pixels cannot be cut into patches of {patch}")
    shape = (batch, (height // patch) ** 2)
    donors = {
        name.removeprefix("donor/"): array
        for name, array in columns.items()
        if name.startswith("donor/")
    }
    for name, array in {"relevance_BP": columns["relevance_BP"], **donors}.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shape}")
    for name, donor_BP in donors.items():
        whole = np.issubdtype(donor_BP.dtype, np.integer)
        if not whole or donor_BP.min() < DROP or donor_BP.max() >= batch:
            raise ValueError(f"donor/{name} names images outside the batch of {batch}")
    labels = columns["labels_B"]
    if labels.shape != (batch,) or labels.min() < 0 or labels.max() >= len(columns["class_names"]):
        raise ValueError("labels_B does not name classes of class_names")
    names = tuple(str(columns["class_names"][label]) for label in labels)
    return Gallery(images_BHWC, names, columns["relevance_BP"], patch, donors)


def enlarge(gallery: Gallery) -> Gallery:
    """Return the gallery with each pixel repeated to a square, so that small images can be seen."""
    factor = max(1, round(TILE / gallery.images_BHWC.shape[1]))
    images_BHWC = gallery.images_BHWC.repeat(factor, axis=1).repeat(factor, axis=2)
    patch = gallery.patch * factor
    return Gallery(images_BHWC, gallery.names, gallery.relevance_BP, patch, gallery.donors)


def apply_donors(images_BHWC: np.ndarray, donor_BP: np.ndarray, patch: int) -> np.ndarray:
    """Return the counterfactual images, (B, H, W, C); dropped patches are hatched grey."""
    batch, size = images_BHWC.shape[:2]
    patches_BPHWC = cut(images_BHWC, patch)
    own_B1 = np.arange(batch)[:, None]
    dropped_BP = donor_BP == DROP
    source_BP = np.where(dropped_BP, own_B1, donor_BP)
    chosen_BPHWC = patches_BPHWC[source_BP, np.arange(donor_BP.shape[1])]
    hatch_1PHWC = cut(hatch(size)[None], patch)
    return join(np.where(dropped_BP[..., None, None, None], hatch_1PHWC, chosen_BPHWC))


def cut(images_BHWC: np.ndarray, patch: int) -> np.ndarray:
    """Return the patches of images, row by row, (B, P, patch, patch, C)."""
    batch, size, _, channels = images_BHWC.shape
    grid = size // patch
    tiles = images_BHWC.reshape(batch, grid, patch, grid, patch, channels)
    return tiles.swapaxes(2, 3).reshape(batch, grid * grid, patch, patch, channels)


def join(patches_BPHWC: np.ndarray) -> np.ndarray:
    """Return the images made of patches; the inverse of `cut`."""
    batch, count, patch, _, channels = patches_BPHWC.shape
    grid = round(count**0.5)
    tiles = patches_BPHWC.reshape(batch, grid, grid, patch, patch, channels)
    return tiles.swapaxes(2, 3).reshape(batch, grid * patch, grid * patch, channels)


def hatch(size: int) -> np.ndarray:
    """Return a grey square with diagonal lines, which no image looks like, (size, size, 3)."""
    diagonal = np.add.outer(np.arange(size), np.arange(size)) % 16
    grey = np.where(diagonal < 5, HATCH_DARK, HATCH_LIGHT).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def heat_map(images_BHWC: np.ndarray, relevance_BP: np.ndarray) -> np.ndarray:
    """Return the images in grey under their relevance in colour, stronger where it is higher."""
    size = images_BHWC.shape[1]
    grid = round(relevance_BP.shape[1] ** 0.5)
    coarse = relevance_BP.astype(np.float32).reshape(-1, grid, grid)
    smooth = [Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC) for one in coarse]
    relevance_BHW = np.clip(np.stack([np.asarray(one) for one in smooth]), 0, 1)
    color_BHWC = 255 * matplotlib.colormaps["inferno"](relevance_BHW)[..., :3]
    grey_BHW1 = images_BHWC.mean(axis=3, keepdims=True)
    weight_BHW1 = 0.25 + 0.55 * relevance_BHW[..., None]
    return np.rint(grey_BHW1 * (1 - weight_BHW1) + color_BHWC * weight_BHW1).astype(np.uint8)


def mask_picture(masked_BP: np.ndarray, patch: int) -> np.ndarray:
    """Return masks as dark patches on a light ground, (B, H, W, 3)."""
    color_BPC = np.where(masked_BP[..., None], MASKED, KEPT).astype(np.uint8)
    shape = (*masked_BP.shape, patch, patch, 3)
    return join(np.broadcast_to(color_BPC[:, :, None, None], shape))


def shown_mask(donors: dict[str, np.ndarray]) -> str | None:
    """Return the recipe whose mask is shown: the object's, where masked patches are dropped.

    Only a drop shows its mask exactly; a fill hides it where an image is its own donor.
    """
    wanted = [f"{mask}-mask-{fill}-fill" for mask in reversed(MASKS) for fill in FILLS]
    return next((name for name in wanted if name in donors), None)


def columns(gallery: Gallery) -> list[Column]:
    """Return the picture's columns: image, relevance, mask, and each counterfactual there is."""
    images_BHWC = gallery.images_BHWC
    found = [
        Column("", "image", images_BHWC),
        Column("", "relevance", heat_map(images_BHWC, gallery.relevance_BP)),
    ]
    if (name := shown_mask(gallery.donors)) is not None:
        own_B1 = np.arange(len(images_BHWC))[:, None]
        masked_BP = gallery.donors[name] != own_B1
        title = f"{name.split('-')[0]} mask"
        found.append(Column("", title, mask_picture(masked_BP, gallery.patch)))
    known = {f"{mask}-mask-{fill}-fill": (mask, fill) for mask in MASKS for fill in FILLS}
    for name, (mask, fill) in known.items():
        if name in gallery.donors:
            tiles = apply_donors(images_BHWC, gallery.donors[name], gallery.patch)
            found.append(Column(f"{mask}-mask", f"{fill}-fill", tiles))
    for name in sorted(gallery.donors.keys() - known.keys()):
        tiles = apply_donors(images_BHWC, gallery.donors[name], gallery.patch)
        found.append(Column(name, "", tiles))
    return found


def picture(gallery: Gallery) -> bytes:
    """Return the gallery as PNG: a row for each of a few images, a column for each view of it."""
    large = enlarge(gallery)
    views = columns(large)
    batch, size = large.images_BHWC.shape[:2]
    rows = np.linspace(0, batch - 1, min(batch, MAX_ROWS)).astype(int)
    lefts = _lefts(views, size)
    tops = [HEAD + place * (size + GAP) for place in range(len(rows))]
    canvas = np.full((tops[-1] + size + FOOT, lefts[-1] + size + MARGIN, 3), 255, dtype=np.uint8)
    for left, view in zip(lefts, views, strict=True):
        for top, row in zip(tops, rows, strict=True):
            canvas[top : top + size, left : left + size] = view.tiles_BHWC[row]
    ramp = matplotlib.colormaps["inferno"](np.linspace(0, 1, size))[None, :, :3] * 255
    bar_top = tops[-1] + size + 2 * GAP
    canvas[bar_top : bar_top + 14, lefts[1] : lefts[1] + size] = ramp.astype(np.uint8)
    for left, right, _, color in _group_heads(views, lefts, size):
        canvas[RULE : RULE + 3, left:right] = np.rint(255 * np.array(to_rgb(color)))

    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(canvas)
    page = _Page(figure, width, height)
    for top, row in zip(tops, rows, strict=True):
        name = "\n".join(textwrap.wrap(large.names[row], 15, max_lines=4, placeholder=" ..."))
        page.write(NAMES - 2 * GAP, top + size / 2, name, 9.5, ha="right", va="center")
    for left, view in zip(lefts, views, strict=True):
        page.write(left + size / 2, HEAD - 14, view.title, 9.5, ha="center", va="bottom")
    for left, right, group, color in _group_heads(views, lefts, size):
        page.write(
            (left + right) / 2, RULE - 10, group, 10.5, ha="center", va="bottom", color=color
        )
    page.write(lefts[1], bar_top + 22, "0", 8.5, ha="left", va="top", color=MUTED)
    page.write(lefts[1] + size, bar_top + 22, "1", 8.5, ha="right", va="top", color=MUTED)
    if any((donor_BP == DROP).any() for donor_BP in large.donors.values()):
        text = "hatched grey: patch dropped"
        page.write(width - MARGIN, bar_top, text, 8.5, ha="right", va="top", color=MUTED)
    return png(figure)


def _lefts(views: Sequence[Column], size: int) -> list[int]:
    """Return each column's left edge, with more room between groups."""
    lefts = [NAMES]
    for before, view in pairwise(views):
        lefts.append(lefts[-1] + size + (GAP if view.group == before.group else GROUP_GAP))
    return lefts


def _group_heads(
    views: Sequence[Column], lefts: Sequence[int], size: int
) -> list[tuple[int, int, str, str]]:
    """Return (left, right, name, color) of each named group of columns."""
    heads = []
    for group in dict.fromkeys(view.group for view in views if view.group):
        members = [left for left, view in zip(lefts, views, strict=True) if view.group == group]
        color = MASK_COLORS.get(group.removesuffix("-mask"), INK)
        heads.append((members[0], members[-1] + size, group, color))
    return heads


class _Page:
    """Text on a figure, in pixels from the top left."""

    def __init__(self, figure: Figure, width: int, height: int) -> None:
        self._figure, self._width, self._height = figure, width, height

    def write(
        self, x: float, y: float, text: str, size: float, *, ha: str, va: str, color: str = INK
    ) -> None:
        x, y = x / self._width, 1 - y / self._height
        self._figure.text(x, y, text, fontsize=size, ha=ha, va=va, color=color, parse_math=False)
