"""A batch's counterfactual images (section 3.2), from random draws and the CAM.

In the order of a step:
  draw: random masks and the sources of the fills, before any model runs;
  cam: the relevance of each patch for its image's label;
  donors: both combined into one index map, which `refill.apply_donors` applies to the patches.

Random numbers are addressed by step (rft/rng.py), so a resumed run draws the same numbers as an
uninterrupted one, and the gallery and the dry run draw like a step.

Shapes: B images, P patches, K classes, Z images in the donor pool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from rft import rng
from rft.config import Cam, Mask, MethodConfig
from rft.method import masking, refill, relevance
from rft.method.relevance import Tap, Through


@dataclass(frozen=True)
class StepAddress:
    """Address of the random draws of one micro-batch (see rft/rng.py)."""

    seed: int
    step: int
    rank: int
    micro: int

    def generator(self, purpose: str) -> torch.Generator:
        """Make this micro-batch's generator for one purpose."""
        return rng.torch_generator(self.seed, purpose, self.step, self.rank, self.micro)


class Draws(NamedTuple):
    """The part of a micro-batch's counterfactuals that is fixed before any model runs."""

    mask_BP: Tensor | None
    """Random masks; None if the CAM decides."""
    source_BP: Tensor
    """Source of each masked patch (rft/method/refill.py); its sizes may be 1. With unlike donors,
    the donor's rank among the other images of the pool, least like the label first."""
    own_B1: Tensor
    """Each image's own number in the donor pool."""
    kept: int | None
    """Patches that every image keeps, if the number is the same and the others are dropped."""

    def copied(self, copy: Callable[[Tensor], Tensor]) -> "Draws":
        """Copy every tensor, for example to a GPU."""
        mask_BP = None if self.mask_BP is None else copy(self.mask_BP)
        return Draws(mask_BP, copy(self.source_BP), copy(self.own_B1), self.kept)


def draw(method: MethodConfig, own: range, patches: int, pool: int, address: StepAddress) -> Draws:
    """Make the random draws for images `own` of a donor pool, on the CPU.

    The numbers are drawn for the full pool and each rank takes the part of its images, so that
    ranks with the same address draw consistent numbers.
    """
    rows = slice(own.start, own.stop)
    mask_BP, kept = None, None
    match method.mask:
        case "random":
            # a separate address, so that masks do not depend on the numbers drawn for a fill
            make = masking.fixed_count_mask if method.fixed_count else masking.bernoulli_mask
            mask_BP = make((pool, patches), method.rate, address.generator("mask"))[rows]
            # known in advance, so that the length of token lists is not read from the device
            if method.drops and method.fixed_count:
                kept = masking.kept_patches(patches, method.rate)
        case "object" | "context":
            pass  # the CAM decides, once there is one
        case "none":
            raise AssertionError("nothing is decided where nothing is masked")
        case _:
            assert_never(method.mask)
    if method.fill == "none":
        # one value for all images and patches, which `torch.where` broadcasts
        source_BP = torch.tensor([[refill.DROP]])
    else:
        source_BP = _sources(method, patches, pool, address.generator("fill"))[rows]
    own_B1 = torch.arange(own.start, own.stop)[:, None]
    return Draws(mask_BP, source_BP, own_B1, kept)


def _sources(method: MethodConfig, patches: int, pool: int, generator: torch.Generator) -> Tensor:
    """Draw `Draws.source_BP` for the full pool; its second size is 1 for a single fill."""
    columns = patches if method.fill == "multi" else 1
    if method.donor_choice == "unlike":
        return torch.randint(refill.unlike_others(pool), (pool, columns), generator=generator)
    if method.fill == "multi" or method.single_fill == "replacement":
        return refill.multi_sources(pool, columns, generator)
    derange = method.single_fill == "derangement"
    return refill.single_sources(pool, generator, derange=derange)


def cam(
    kind: Cam,
    logits_BK: Tensor,
    labels_B: Tensor,
    taps: Sequence[Tap],
    through: Through = relevance.through_maps,
) -> Tensor:
    """Compute a class activation map, (B, P), scaled so that each image's maximum is 1.

    `through` propagates relevance through a layer.
    """
    match kind:
        case "relevance":
            map_BP = relevance.label_relevance(logits_BK, labels_B, taps, through)
        case "grad-cam":
            map_BP = relevance.grad_cam(logits_BK, labels_B, taps)
        case _:
            assert_never(kind)
    return relevance.normalise(map_BP)


def cam_mask(kind: Mask, relevance_BP: Tensor, threshold: float) -> Tensor:
    """Threshold a normalised map into the object or the context mask, bool (B, P)."""
    match kind:
        case "object":
            return masking.object_mask(relevance_BP, threshold)
        case "context":
            return masking.context_mask(relevance_BP, threshold)
        case "random" | "none":
            raise ValueError(f"mask {kind} is not decided by a CAM")
        case _:
            assert_never(kind)


def donors(
    method: MethodConfig,
    draws: Draws,
    relevance_BP: Tensor | None,
    likeness_BZ: Tensor | None = None,
) -> Tensor:
    """Combine masks and fills into the index map (rft/method/refill.py), int64 (B, P).

    Args:
        method: the masks and fills.
        draws: the random draws.
        relevance_BP: the images' normalised CAM; None for random masks.
        likeness_BZ: likeness of each image of the pool to each image's label, by the teacher; None
            unless donors are chosen by it.
    """
    mask_BP = draws.mask_BP
    if method.needs_cam:
        assert relevance_BP is not None, "a CAM decides the masks, and none was computed"
        mask_BP = cam_mask(method.mask, relevance_BP, method.threshold)
    assert mask_BP is not None, "neither chance nor a CAM decides the masks"
    source_BP = draws.source_BP
    if method.donor_choice == "unlike":
        assert likeness_BZ is not None, "donors are chosen by their likeness, and none was computed"
        source_BP = refill.unlike_sources(source_BP, likeness_BZ, draws.own_B1)
    return refill.donors(mask_BP, source_BP, draws.own_B1)
