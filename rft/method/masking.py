"""Masks of patches: the object, the context, or random ones (section 3.2.1).

Each function returns a bool mask, (B, P), True where a patch is masked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def object_mask(relevance_BP: Tensor, threshold: float) -> Tensor:
    """Mask the patches whose normalised relevance is above the threshold (strictly)."""
    return relevance_BP > threshold


def context_mask(relevance_BP: Tensor, threshold: float) -> Tensor:
    """Mask all other patches; an image without any relevance is masked completely."""
    return ~object_mask(relevance_BP, threshold)


def bernoulli_mask(shape_BP: Sequence[int], rate: float, generator: torch.Generator) -> Tensor:
    """Mask each patch independently with probability `rate`, as the released code's fills."""
    return torch.rand(shape_BP, generator=generator) < rate


def fixed_count_mask(shape_BP: Sequence[int], rate: float, generator: torch.Generator) -> Tensor:
    """Mask the same number of random patches in each image: all but `kept_patches`.

    The released code does this if masked patches are dropped, as in MAE.
    """
    # argsort of the argsort is each patch's rank in its image's random order
    rank_BP = torch.rand(shape_BP, generator=generator).argsort(dim=1).argsort(dim=1)
    return rank_BP >= kept_patches(shape_BP[1], rate)


def kept_patches(patches: int, rate: float) -> int:
    """Count how many of `patches` a mask of fixed count keeps."""
    # rounded down, as in MAE's int(L * (1 - mask_ratio))
    return int(patches * (1 - rate))
