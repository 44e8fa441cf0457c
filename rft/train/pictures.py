"""What a step distilled on, as one picture: images, their masks, their counterfactuals.

A live look at the training itself, from the tensors of the step that has just been done. The
report's gallery (rft/train/gallery.py) shows the selected model on fixed images.

Shapes: B images, P patches, V = C times the pixels of a patch, Z images in the donor pool.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.utils import make_grid

from rft.clip import vit
from rft.method import refill

COLUMNS = 8
TILE = 112  # pixels that a small image is enlarged to, about; a large one keeps its size
GREY, LIGHT, DARK = 128, 232, 56  # a dropped patch; in a mask what stays, and what is masked


class Counterfactuals(NamedTuple):
    """A micro-batch's counterfactuals as the step knew them; nothing is copied."""

    pool_ZCHW: Tensor  # uint8
    donor_BP: Tensor
    own_B1: Tensor


def grid(shown: Counterfactuals, side: int) -> Tensor:
    """Return a column for each of the first images, uint8 (3, height, width) on the CPU.

    From the top: the image, its mask (dark), and what the models saw instead, with dropped patches
    in grey. A masked patch that an image's fill takes from the image itself counts as kept.

    Args:
        shown: the micro-batch.
        side: of a patch, in pixels.
    """
    donor_BP, own_B1 = shown.donor_BP[:COLUMNS], shown.own_B1[:COLUMNS]
    images_BCHW = shown.pool_ZCHW[own_B1[:, 0]]
    images_BPV = vit.cut_patches(images_BCHW, side)
    pool_ZPV = vit.cut_patches(shown.pool_ZCHW, side)
    filled_BPV = refill.apply_donors(pool_ZPV, donor_BP, own_B1)
    filled_BPV = filled_BPV.masked_fill((donor_BP == refill.DROP)[..., None], GREY)
    mask_BP1 = (donor_BP != own_B1)[..., None]
    mask_BPV = torch.full_like(images_BPV, LIGHT).masked_fill(mask_BP1, DARK)
    rows = [join_patches(part, side) for part in (images_BPV, mask_BPV, filled_BPV)]
    picture_CHW = make_grid(torch.cat(rows), nrow=len(images_BCHW), padding=1, pad_value=255)
    times = max(1, round(TILE / images_BCHW.shape[-1]))
    return picture_CHW.repeat_interleave(times, 1).repeat_interleave(times, 2).cpu()


def join_patches(patches_BPV: Tensor, side: int) -> Tensor:
    """Return the images made of patches, (B, C, H, W); the inverse of `vit.cut_patches`."""
    batch, count, values = patches_BPV.shape
    across = round(count**0.5)
    tiles = patches_BPV.view(batch, across, across, values // side**2, side, side)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, across * side, across * side)
