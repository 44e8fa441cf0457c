"""Random crops and flips of training images, drawn by address.

The augmentation of an image in an epoch depends only on seed, epoch and image id. It is therefore
the same for any number of ranks and loader processes, in any batch, and after resuming. The crop is
the one of open_clip's training: torchvision's `RandomResizedCrop` with 0.9 to 1 of the area,
bicubic; the flip is torchvision's `RandomHorizontalFlip`. Only the random numbers are our own.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from rft.rng import numpy_generator
from rft.shards.images import channels_first, cut_border

ALGORITHM = 1  # part of the fingerprint: raise it if the same address would give other pixels
AREA = (0.9, 1.0)  # share of the image
RATIO = (3 / 4, 4 / 3)  # width / height
ATTEMPTS = 10  # as in torchvision


class Draw(NamedTuple):
    """Augmentation of one image: the crop in pixels, and whether it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


class Augmentation(NamedTuple):
    """The augmentation of one epoch."""

    seed: int
    epoch: int

    def draw(self, key: str, width: int, height: int) -> Draw:
        """Draw the crop of an image of that size in pixels, and whether it is mirrored.

        Area and ratio are drawn until a crop fits into the image, at most ATTEMPTS times. The
        fallback is the largest central crop within RATIO, which is the full image unless its own
        ratio is outside.
        """
        random = numpy_generator(self.seed, "augment", self.epoch, key)
        flip = bool(random.random() < 0.5)
        for _ in range(ATTEMPTS):
            area = width * height * random.uniform(*AREA)
            ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                left, top = random.integers((width - wide + 1, height - high + 1)).tolist()
                return Draw(left, top, wide, high, flip)
        # at least one pixel, because an image of 1 x 100 has no crop within RATIO
        wide = min(width, max(1, round(height * RATIO[1])))
        high = min(height, max(1, round(width / RATIO[0])))
        return Draw((width - wide) // 2, (height - high) // 2, wide, high, flip)

    def pixels(self, image: Image.Image, key: str, size: int, border: int = 0) -> np.ndarray:
        """Augment an image to the model's input before normalisation, uint8 (3, S, S).

        Args:
            image: decoded, RGB.
            key: its id.
            size: S, the model's.
            border: pixels cut from each side first.

        Raises:
            ValueError: if nothing is left inside the border.
        """
        image = cut_border(image, border)
        left, top, width, height, flip = self.draw(key, *image.size)
        # crop before resizing, as in torchvision, so that the filter uses no pixel outside the crop
        image = image.crop((left, top, left + width, top + height))
        pixels_CHW = channels_first(image.resize((size, size), Image.Resampling.BICUBIC))
        return pixels_CHW[:, :, ::-1] if flip else pixels_CHW
