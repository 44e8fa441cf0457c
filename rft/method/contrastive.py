"""FLYP's loss (Goyal et al. 2023): CLIP's pre-training loss on images and their prompts.

Shapes: B images of this rank, G of all ranks (the global batch), E embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 0x7FFF_FFFF_FFFF_FFFF  # mask of all bits but the sign


def info_nce(
    images_BE: Tensor,
    texts_BE: Tensor,
    all_images_GE: Tensor,
    all_texts_GE: Tensor,
    scale: Tensor,
    first: int,
) -> Tensor:
    """Compute this rank's part of a global batch's symmetric InfoNCE, as the mean over its rows.

    Each image is matched to its own prompt among all prompts, and each prompt to its own image. As
    in the released code, other images of the same class count as negatives, and so do their
    prompts, even if the identical prompt was drawn.

    The mean over ranks of this loss, and of its gradient, equals that of a single rank with the
    full batch, if the gradients of `all_...` flow back to the ranks that own the rows.

    Args:
        images_BE: this rank's normalised features.
        texts_BE: normalised features of its prompts, one per image.
        all_images_GE: image features of all ranks, in rank order.
        all_texts_GE: features of all prompts.
        scale: factor of the cosines.
        first: row of this rank's first image among all.
    """
    own_B = torch.arange(first, first + len(images_BE), device=images_BE.device)
    with torch.autocast(images_BE.device.type, enabled=False):
        by_image = F.cross_entropy(scale * images_BE @ all_texts_GE.T, own_B)
        by_text = F.cross_entropy(scale * texts_BE @ all_images_GE.T, own_B)
    return (by_image + by_text) / 2


def draw_templates(samples_B: Tensor, templates: int, key: int) -> Tensor:
    """Draw the template (B,) of each image's prompt, int64 from 0 to `templates` - 1.

    The draw depends only on the sample's number and the key, so that every rank draws the same
    template for a sample. Both are mixed by SplitMix64's finaliser, in int64 tensors, because one
    generator per sample would cost more than all other draws of the step.

    Args:
        samples_B: sample numbers, int64.
        templates: number of templates.
        key: seed of the step (`rft.rng.derive`), 63 bits.
    """
    mixed_B = samples_B * _signed(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_B = (mixed_B ^ _shifted(mixed_B, shift)) * _signed(factor)
    mixed_B = mixed_B ^ _shifted(mixed_B, 31)
    return (mixed_B & WORD) % templates


def _signed(number: int) -> int:
    """Reinterpret the bits of an unsigned 64-bit number as int64."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(numbers_B: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros, unlike torch's own shift, which repeats the sign."""
    return (numbers_B >> bits) & ((1 << (64 - bits)) - 1)
