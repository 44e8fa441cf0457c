"""FLYP's loss (Goyal et al. 2023): fine-tune as CLIP was pre-trained, by images and their prompts.

Shapes: B images of this rank, G of all ranks (the global batch), E embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 0x7FFF_FFFF_FFFF_FFFF  # the bits of a number that is not negative


def info_nce(
    images_BE: Tensor,
    texts_BE: Tensor,
    all_images_GE: Tensor,
    all_texts_GE: Tensor,
    scale: Tensor,
    first: int,
) -> Tensor:
    """Return this rank's part of the symmetric InfoNCE of a global batch, the mean over its rows.

    Each image is to find its own prompt among those of all images, and each prompt its own image.
    As in the released code, the other images of a class count as negatives, and their prompts too,
    even where the very same prompt was drawn for two of them.

    The mean over ranks of this and of its gradient is the loss and the gradient of one rank that
    has the whole batch, if the gradient of `all_...` goes back to the ranks that they came from.

    Args:
        images_BE: this rank's normalised features.
        texts_BE: those of its prompts, one for each image.
        all_images_GE: all ranks' features, in rank order.
        all_texts_GE: those of all prompts.
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

    A function of the sample's number and the key alone: every rank that reads a sample in a step
    draws the same template for it. The bits of both are mixed by SplitMix64's finaliser, in tensors
    of int64, because a generator for each sample would cost more than the step's other draws
    together.

    Args:
        samples_B: sample numbers, int64.
        templates: how many there are.
        key: seed of the step (`rft.rng.derive`), 63 bits.
    """
    mixed_B = samples_B * _signed(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_B = (mixed_B ^ _shifted(mixed_B, shift)) * _signed(factor)
    mixed_B = mixed_B ^ _shifted(mixed_B, 31)
    return (mixed_B & WORD) % templates


def _signed(number: int) -> int:
    """Return the int64 that has the bits of an unsigned one."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(numbers_B: Tensor, bits: int) -> Tensor:
    """Shift to the right with zeros from the left; torch's own shift repeats the sign."""
    return (numbers_B >> bits) & ((1 << (64 - bits)) - 1)
