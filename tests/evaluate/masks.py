"""Object masks for comparisons: random ones, and their files."""

from pathlib import Path

import numpy as np
from PIL import Image


def blob(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A rectangle somewhere in the image, bool (H, W)."""
    left, right = sorted(rng.choice(width + 1, 2, replace=False))
    top, bottom = sorted(rng.choice(height + 1, 2, replace=False))
    mask_HW = np.zeros((height, width), dtype=bool)
    mask_HW[top:bottom, left:right] = True
    return mask_HW


def save_mask(path: Path, mask_HW: np.ndarray, on: int = 255) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask_HW.astype(np.uint8) * on).save(path)
    return path
