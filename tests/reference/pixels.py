"""Pixel-by-pixel references: Table 2's metrics as the appendix words them, EXIF orientation."""

from collections.abc import Sequence

import numpy as np


def masked_pixels(mask_P: Sequence[bool], size: int) -> set[tuple[int, int]]:
    """The pixels of the masked patches of a square image; patches are counted row by row."""
    grid = round(len(mask_P) ** 0.5)
    side = size // grid
    pixels = set()
    for row in range(size):
        for column in range(size):
            if mask_P[(row // side) * grid + column // side]:
                pixels.add((row, column))
    return pixels


def object_pixels(object_HW: np.ndarray) -> set[tuple[int, int]]:
    return {(r, c) for r, line in enumerate(object_HW) for c, value in enumerate(line) if value}


def table_2(masks_NP, objects_NHW) -> dict[str, float | int]:
    """Counts over all images with an object, and the means of these images' own rates."""
    sums = dict.fromkeys(("images", "image", "object", "masked", "both", "either"), 0)
    rates = {"image_masking_rate": [], "object_masking_rate": [], "iou": []}
    for mask_P, object_HW in zip(masks_NP, objects_NHW, strict=True):
        seen = object_pixels(object_HW)
        if not seen:
            continue
        masked = masked_pixels(mask_P, len(object_HW))
        sums["images"] += 1
        sums["image"] += object_HW.size
        sums["object"] += len(seen)
        sums["masked"] += len(masked)
        sums["both"] += len(masked & seen)
        sums["either"] += len(masked | seen)
        rates["image_masking_rate"].append(len(masked) / object_HW.size)
        rates["object_masking_rate"].append(len(masked & seen) / len(seen))
        rates["iou"].append(len(masked & seen) / len(masked | seen))
    means = {name: sum(values) / len(values) for name, values in rates.items()}
    return {**sums, **means}


# Which side of the scene row 0 and column 0 of the stored pixels are (EXIF 2.32, 4.6.4 A).
STORED_SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_as(seen_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a camera stores for a scene, pixel by pixel from the tag's definition."""
    height, width, _ = seen_HWC.shape
    row_side, column_side = STORED_SIDES[orientation]
    rows, columns = (height, width) if row_side in ("top", "bottom") else (width, height)
    stored = np.empty((rows, columns, 3), dtype=seen_HWC.dtype)
    for row in range(rows):
        for column in range(columns):
            distance = {row_side: row, column_side: column}
            y = distance["top"] if "top" in distance else height - 1 - distance["bottom"]
            x = distance["left"] if "left" in distance else width - 1 - distance["right"]
            stored[row, column] = seen_HWC[y, x]
    return stored
