"""Object masks from any segmenter: PNG files that are found by their names.

The name of a mask is the key of its sample. Keys are made from image paths (see
`rft.shards.keys.make_keys`), so masks may have the paths of their images
(`n01440764/n01440764_10026.png`), or be in one folder, or anywhere below the given folder.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rft.config import MAX_PIXELS
from rft.shards.image_files import BYTES_PER_PIXEL, open_image, pillow_errors
from rft.shards.images import clip_square
from rft.shards.keys import safe_in_key
from rft.storage import files

SUFFIX = ".png"


class ObjectMask(NamedTuple):
    """One object mask, cropped like the model's input, and the hash of its file."""

    pixels_HW: np.ndarray  # bool
    sha256: bytes


def find_masks(folder: Path, keys: Sequence[str]) -> dict[str, Path]:
    """Find the masks of the samples with these keys below a folder; some may have none.

    Raises:
        ValueError: if the folder does not exist, two samples have the same key, or two files match
            one sample.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder of masks at {folder}")
    # counts the keys, and serves as the set of them below
    wanted = Counter(keys)
    if twice := [key for key, count in wanted.items() if count > 1]:
        raise ValueError(f"several samples have the key {twice[0]!r}: its mask would be ambiguous")
    found: dict[str, Path] = {}
    for path in _png_files(folder):
        for key in _keys_of(path.relative_to(folder)) & wanted.keys():
            if key in found:
                raise ValueError(
                    f"{found[key]} and {path} may both be the mask of sample {key!r}; --masks must "
                    f"be a folder with the masks of this set only"
                )
            found[key] = path
    return found


def read_mask(
    path: Path, source: tuple[int, int], size: int, border: int = 0, max_pixels: float = MAX_PIXELS
) -> ObjectMask:
    """Read a mask and crop it like its image.

    Args:
        path: a PNG of one channel: 0 outside the object, and one other value (1 or 255) on it.
        source: width and height of the image that the sample was made from; own photos are turned
            upright first. A mask has this size, or is already the square that the model sees.
        size: side of the model's input in pixels.
        border: pixels that are first cut off each side of the image.
        max_pixels: limit of a mask, in millions of pixels.

    Raises:
        ValueError: naming the file, if it is not such a PNG or has a different size.
    """
    # the complete file, because the hash is of the file and not of the pixels
    data = files.read_bytes(str(path), int(BYTES_PER_PIXEL * max_pixels * 1e6))
    image = _binary(data, path, max_pixels)
    if image.size == source:
        # nearest, because any other resampling mixes object and background
        image = clip_square(image, size, border, Image.Resampling.NEAREST)
    elif image.size != (size, size):
        width, height = source
        turned = "; it is turned" if image.size == (height, width) else ""
        raise ValueError(
            f"{path} is {image.width} x {image.height} pixels, its image {width} x {height}"
            f"{turned}; segment the image as rft shows it (own photos upright by their EXIF "
            f"orientation, all others as stored), or its {size} x {size} centre crop"
        )
    return ObjectMask(np.asarray(image) > 0, hashlib.sha256(data).digest())


def _png_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        # sorted in place, because os.walk follows this list, and file systems have no order
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(SUFFIX):
                yield Path(parent, name)


def _keys_of(path: Path) -> set[str]:
    """Derive the possible keys of a mask's sample from its path, or from any end of the path.

    rft joins folder and name by "_" if names alone are not unique. Third-party shards may have "/"
    in their keys.
    """
    *folders, stem = path.with_suffix("").parts
    keys = set()
    for first in range(len(folders) + 1):
        ending = folders[first:]
        keys.add("/".join([*ending, stem]))
        safe = [safe_in_key(name) for name in ("/".join(ending), stem) if name]
        keys.add("_".join(safe))
    return keys


def _binary(data: bytes, path: Path, max_pixels: float) -> Image.Image:
    """Decode a mask to 0 and 255, mode L."""
    image = open_image(data, str(path), max_pixels, formats=("PNG",))
    with pillow_errors(str(path)):
        values = np.asarray(image)
    # a palette image gives its indices; modes LA, RGB and RGBA have a third dimension
    if values.ndim != 2:
        raise ValueError(f"{path} has several channels ({image.mode}); a mask has one")
    on_HW = values > 0
    if image.mode == "P":
        colours_HWC = np.asarray(image.convert("RGB"))
        # a palette of one colour has no meaning; Pillow writes it if none was given
        coloured = np.ptp(colours_HWC, axis=(0, 1)).any()
        if coloured and (colours_HWC.any(axis=2) != on_HW).any():
            raise ValueError(
                f"{path} has a palette whose black is not index 0 alone, so a viewer shows a "
                "different object; save it without a palette: Image.fromarray(np.asarray(image)) "
                "keeps the indices"
            )
    if not (values[on_HW] == values.max()).all():
        raise ValueError(f"{path} is not binary; a mask has 0 and one other value, on the object")
    return Image.fromarray(on_HW.astype(np.uint8) * 255)
