"""How much of an image and of its object a patch mask covers (Table 2, appendix A.2). Pure.

All counts are pixels, as int64, and are divided only at the end. A patch mask covers whole patches,
so |M_cam & M_seg| is the sum of the object's pixels in the masked patches, and masks need not be
expanded to pixels.

Shapes: B images, P patches, H W pixels, T thresholds, N images of a whole evaluation.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rft.paper import Covered


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Pixels of N images: of the image, of the object and, per threshold, masked; all int64.

    The image masking rate is masked / image, the object masking rate both / object, and the IoU
    both / either.
    """

    image: int
    object_N: np.ndarray
    """|M_seg|."""
    masked_TN: np.ndarray
    """|M_cam|."""
    both_TN: np.ndarray
    """|M_cam & M_seg|."""

    @property
    def either(self) -> np.ndarray:
        """|M_cam | M_seg|, (T, N)."""
        return self.masked_TN + self.object_N - self.both_TN

    def with_object(self) -> "Pixels":
        """Select the images whose object mask is not empty; the others have no object rate."""
        seen_N = self.object_N > 0
        return Pixels(
            image=self.image,
            object_N=self.object_N[seen_N],
            masked_TN=self.masked_TN[:, seen_N],
            both_TN=self.both_TN[:, seen_N],
        )

    def pooled(self) -> "Pixels":
        """Sum the pixels of all images, as if they were one; its rates favour large objects."""
        return Pixels(
            image=len(self.object_N) * self.image,
            object_N=self.object_N.sum(keepdims=True),
            masked_TN=self.masked_TN.sum(axis=1, keepdims=True),
            both_TN=self.both_TN.sum(axis=1, keepdims=True),
        )

    def mean_rates(self) -> list[Covered]:
        """Average the rates of the images, for each threshold.

        Every object must have pixels. The sums are fp64 and in the order of the images.
        """
        image_T = (self.masked_TN / self.image).mean(axis=1)
        # rates are averaged per image, so that objects of any size count the same
        object_T = (self.both_TN / self.object_N).mean(axis=1)
        iou_T = (self.both_TN / self.either).mean(axis=1)
        return [Covered(*map(float, row)) for row in zip(image_T, object_T, iou_T, strict=True)]


def count_object(object_BHW: Tensor, patches: int) -> Tensor:
    """Count the pixels of an object (bool) in each patch of its image, int64 (B, P).

    Images are square, and patches are in row-major order.
    """
    grid = math.isqrt(patches)
    side = object_BHW.shape[-1] // grid
    assert object_BHW.shape[1:] == (grid * side, grid * side), "not a square of whole patches"
    # the last dimension first, because an unflatten shifts the dimensions after it
    grid_BGRGR = object_BHW.unflatten(2, (grid, side)).unflatten(1, (grid, side))
    return grid_BGRGR.sum(dim=(2, 4), dtype=torch.int64).flatten(1)


def count_masked(mask_TBP: Tensor, object_BP: Tensor, patch_pixels: int) -> tuple[Tensor, Tensor]:
    """Count |M_cam| and |M_cam & M_seg|, both int64 (T, B), for patch masks (bool).

    `object_BP` is the result of `count_object`; a patch has `patch_pixels` pixels.
    """
    masked_TB = mask_TBP.sum(dim=2, dtype=torch.int64) * patch_pixels
    # bool times int64 is int64, so the count is exact
    return masked_TB, (mask_TBP * object_BP).sum(dim=2)
