"""Augmentation of one training image with torchvision's own functions."""

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F


def crop_flip(
    image: Image.Image, box: tuple[int, int, int, int], size: int, flip: bool
) -> np.ndarray:
    """The box (left, top, width, height) at `size` x `size` pixels, mirrored or not, (3, S, S)."""
    left, top, width, height = box
    found = F.resized_crop(
        image, top, left, height, width, [size, size], InterpolationMode.BICUBIC, antialias=True
    )
    return F.pil_to_tensor(F.hflip(found) if flip else found).numpy()
