"""The counterfactuals of a few images, side by side (Fig. 5), and the masks during training.

The latter are frames: the same images at some steps of the training.

A counterfactual is a donor map. For image n and patch p it has the number of the image whose patch
p is shown there: n itself if the patch is kept, -1 if it is dropped. Here the map is applied to
pixels. Relevance is one number per patch, and is upsampled for the heat map only.

Shapes: B images, H W pixels, C channels, P = G * G patches in row-major order.
"""

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from rft.report.label_placement import DPI
from rft.report.plots import INK, MASK_COLORS, MUTED, drawn, encoded
from rft.report.tables import GRID
from rft.runs.gallery_file import DROP, Gallery
from rft.text import plain

MAX_ROWS = 6
TILE = 200  # approximate pixels to which small images are enlarged; large ones keep their size
GAP, GROUP_GAP, MARGIN, HEAD, FOOT, NAMES = 10, 34, 24, 116, 84, 210  # pixels
RULE = 54  # below the heading of a group
KEPT, MASKED = (232, 232, 232), (38, 70, 110)  # RGB
HATCH_LIGHT, HATCH_DARK = 205, 150  # grey levels
FRAME_BYTES = 60_000  # limit of a frame's picture
FRAME_IMAGES, FRAME_SIDE = 8, 256  # most images, and pixels of one; a page has less space for eight
QUALITIES = (75, 40, 20)  # of WebP; the first that fits is used


@dataclass(frozen=True)
class Column:
    """One column of the picture."""

    group: str
    title: str
    tiles: Callable[[], np.ndarray]
    """Makes its images, (B, H, W, C), when they are drawn: only one column is in memory."""


def enlarge(gallery: Gallery) -> Gallery:
    """Enlarge small images by an integer factor, so that they can be seen."""
    factor = max(1, round(TILE / gallery.images_BHWC.shape[1]))
    images_BHWC = gallery.images_BHWC.repeat(factor, axis=1).repeat(factor, axis=2)
    # relevance and donors have one entry per patch and need no change
    return replace(gallery, images_BHWC=images_BHWC, patch=gallery.patch * factor)


def to_pixels(values_BP: np.ndarray, patch: int) -> np.ndarray:
    """Expand values of patches to pixels, (B, H, W, 1)."""
    batch, count = values_BP.shape
    grid = round(count**0.5)
    values_BGG1 = values_BP.reshape(batch, grid, grid, 1)
    return values_BGG1.repeat(patch, axis=1).repeat(patch, axis=2)


def apply_donors(images_BHWC: np.ndarray, donor_BP: np.ndarray, patch: int) -> np.ndarray:
    """Make the counterfactual images, (B, H, W, C); dropped patches are hatched grey."""
    own_B1 = np.arange(len(images_BHWC))[:, None]
    dropped_BP = donor_BP == DROP
    source_BP = np.where(dropped_BP, own_B1, donor_BP)
    # the index broadcasts over channels, because all channels of a patch have one donor
    chosen_BHWC = np.take_along_axis(images_BHWC, to_pixels(source_BP, patch), axis=0)
    # one hatched square for the whole image, so that lines continue across neighbouring patches
    return np.where(to_pixels(dropped_BP, patch), hatch(images_BHWC.shape[1]), chosen_BHWC)


def hatch(size: int) -> np.ndarray:
    """Make a grey square with diagonal lines, unlike any image, (size, size, 3)."""
    diagonal = np.add.outer(np.arange(size), np.arange(size)) % 16
    grey = np.where(diagonal < 5, HATCH_DARK, HATCH_LIGHT).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def heat_map(images_BHWC: np.ndarray, relevance_BP: np.ndarray) -> np.ndarray:
    """Blend relevance in colour over the images in grey, stronger where relevance is higher."""
    size = images_BHWC.shape[1]
    grid = round(relevance_BP.shape[1] ** 0.5)
    # Pillow resizes float32 as mode F, without rounding to grey levels
    coarse = relevance_BP.reshape(-1, grid, grid)
    smooth = [Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC) for one in coarse]
    relevance_BHW = np.clip(np.stack([np.asarray(one) for one in smooth]), 0, 1)
    color_BHWC = 255 * matplotlib.colormaps["inferno"](relevance_BHW)[..., :3]
    grey_BHW1 = images_BHWC.mean(axis=3, keepdims=True)
    # at the highest relevance, a fifth of the image remains visible
    weight_BHW1 = 0.25 + 0.55 * relevance_BHW[..., None]
    return np.rint(grey_BHW1 * (1 - weight_BHW1) + color_BHWC * weight_BHW1).astype(np.uint8)


def mask_picture(masked_BP: np.ndarray, patch: int) -> np.ndarray:
    """Draw masks as dark patches on a light background, (B, H, W, 3)."""
    return np.where(to_pixels(masked_BP, patch), MASKED, KEPT).astype(np.uint8)


def columns(gallery: Gallery) -> list[Column]:
    """List the columns of the picture: image, relevance, mask, and each counterfactual."""
    images_BHWC, patch = gallery.images_BHWC, gallery.patch
    found = [
        Column("", "image", lambda: images_BHWC),
        Column("", "relevance", lambda: heat_map(images_BHWC, gallery.relevance_BP)),
    ]
    # prefer the object mask, and a recipe that drops patches: only a drop shows its mask exactly,
    # while a fill hides the mask where an image is its own donor
    wanted = (name for mask in reversed(MASK_COLORS) for name in GRID if name.startswith(mask))
    if (name := next((name for name in wanted if name in gallery.donors), None)) is not None:
        own_B1 = np.arange(len(images_BHWC))[:, None]
        # DROP differs from every image's number, so dropped patches count as masked
        masked_BP = gallery.donors[name] != own_B1
        title = f"{name.split('-')[0]} mask"
        found.append(Column("", title, partial(mask_picture, masked_BP, patch)))
    known = [name for mask in MASK_COLORS for name in GRID if name.startswith(mask)]
    # an untrusted file may name donor maps after any recipe; those outside the grid come last
    for name in [*known, *sorted(gallery.donors.keys() - set(known))]:
        if name in gallery.donors:
            mask, _, fill = name.partition("-mask-")
            group, title = (f"{mask}-mask", fill) if name in known else (name, "")
            tiles = partial(apply_donors, images_BHWC, gallery.donors[name], patch)
            found.append(Column(group, title, tiles))
    return found


def picture(gallery: Gallery) -> bytes:
    """Draw the gallery as PNG: one row per image, one column per view of it."""
    large = enlarge(gallery)
    views = columns(large)
    batch, size = large.images_BHWC.shape[:2]
    rows = np.linspace(0, batch - 1, min(batch, MAX_ROWS)).astype(int)
    lefts = _lefts(views, size)
    tops = [HEAD + place * (size + GAP) for place in range(len(rows))]
    bar_top = tops[-1] + size + 2 * GAP
    height, width = tops[-1] + size + FOOT, lefts[-1] + size + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)

    def write(x: float, y: float, text: str, size: float, **look: Any) -> None:
        """Write text at a position in pixels from the top left."""
        # parse_math=False below: dollar signs in a class's name do not mark a formula
        look = {"color": INK, **look}
        figure.text(x / width, 1 - y / height, text, fontsize=size, parse_math=False, **look)

    for top, row in zip(tops, rows, strict=True):
        name = plain(large.names[row], kept="\n")
        # about as many letters as fit into NAMES at this size
        name = "\n".join(textwrap.wrap(name, 15, max_lines=4, placeholder=" ..."))
        write(NAMES - 2 * GAP, top + size / 2, name, 9.5, ha="right", va="center")
    for left, view in zip(lefts, views, strict=True):
        write(left + size / 2, HEAD - 14, view.title, 9.5, ha="center", va="bottom")
    heads = _group_heads(views, lefts, size)
    for left, right, group, color in heads:
        write((left + right) / 2, RULE - 10, group, 10.5, ha="center", va="bottom", color=color)
    # the scale of the relevance is below its column, the second
    write(lefts[1], bar_top + 22, "0", 8.5, ha="left", va="top", color=MUTED)
    write(lefts[1] + size, bar_top + 22, "1", 8.5, ha="right", va="top", color=MUTED)
    if any((donor_BP == DROP).any() for donor_BP in large.donors.values()):
        text = "hatched grey: patch dropped"
        write(width - MARGIN, bar_top, text, 8.5, ha="right", va="top", color=MUTED)

    # images are copied into the rendered pixels: drawn by matplotlib they would take thirty times
    # the memory. The pixels are RGBA, and only RGB is written, so the alpha channel stays opaque
    pixels_HWC = drawn(figure)
    for left, view in zip(lefts, views, strict=True):
        tiles_BHWC = view.tiles()
        for top, row in zip(tops, rows, strict=True):
            pixels_HWC[top : top + size, left : left + size, :3] = tiles_BHWC[row]
    ramp = matplotlib.colormaps["inferno"](np.linspace(0, 1, size))[None, :, :3] * 255
    pixels_HWC[bar_top : bar_top + 14, lefts[1] : lefts[1] + size, :3] = ramp.astype(np.uint8)
    for left, right, _, color in heads:
        pixels_HWC[RULE : RULE + 3, left:right, :3] = np.rint(255 * np.array(to_rgb(color)))
    return encoded(pixels_HWC)


def frames(gallery: Gallery) -> dict[int, bytes]:
    """Draw each step as WebP: the images' relevance and, below, the images without masked patches.

    The result maps steps, in ascending order, to pictures. It is empty for fewer than two steps.
    """
    if gallery.frames is None or len(gallery.frames.steps_S) < 2:
        return {}
    large = enlarge(gallery)
    count, size = large.images_BHWC.shape[:2]
    chosen = np.linspace(0, count - 1, min(count, FRAME_IMAGES)).astype(int)
    images_BHWC, kept = large.images_BHWC[chosen], gallery.frames
    found = {}
    for place, step in enumerate(kept.steps_S.tolist()):
        rows = [heat_map(images_BHWC, kept.relevance_SBP[place, chosen])]
        if kept.masked_SBP is not None:
            masked_BHW1 = to_pixels(kept.masked_SBP[place, chosen], large.patch)
            rows.append(np.where(masked_BHW1, np.array(MASKED, np.uint8), images_BHWC))
        # images side by side
        pixels_HWC = np.concatenate([np.concatenate([*row], axis=1) for row in rows])
        found[step] = _webp(Image.fromarray(pixels_HWC).reduce(-(-size // FRAME_SIDE)))
    return found


def _webp(image: Image.Image) -> bytes:
    """Encode a picture within FRAME_BYTES, at the best quality that fits, or at half its size."""
    while True:
        for quality in QUALITIES:
            stream = io.BytesIO()
            image.save(stream, "WEBP", quality=quality)
            if len(stream.getvalue()) <= FRAME_BYTES:
                return stream.getvalue()
        image = image.reduce(2)


def _lefts(views: Sequence[Column], size: int) -> list[int]:
    """Compute each column's left edge, with a wider gap between groups."""
    lefts = [NAMES]
    for before, view in pairwise(views):
        lefts.append(lefts[-1] + size + (GAP if view.group == before.group else GROUP_GAP))
    return lefts


def _group_heads(
    views: Sequence[Column], lefts: Sequence[int], size: int
) -> list[tuple[int, int, str, str]]:
    """List (left, right, name, color) of each named group of columns."""
    heads = []
    for group in dict.fromkeys(view.group for view in views if view.group):
        members = [left for left, view in zip(lefts, views, strict=True) if view.group == group]
        # a group is a mask, or a recipe outside the grid
        color = MASK_COLORS.get(group.removesuffix("-mask"), INK)
        heads.append((members[0], members[-1] + size, group, color))
    return heads
