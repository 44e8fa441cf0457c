"""Table 2's metrics as the appendix words them: masks are sets of pixels, looked at one by one."""

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
