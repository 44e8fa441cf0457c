"""A batch's counterfactual images (section 3.2): what chance decides, and what the CAM decides.

In the order of a step:
  draw: random masks and the sources of the fills, before any model has seen the images;
  cam: the relevance of each patch for its image's label;
  donors: both together as one index map, which `refill.apply_donors` applies to the patches.

Random numbers are addressed by step (rft/rng.py), so a resumed run draws what an uninterrupted one
would have, and the gallery and the dry run draw as a step does.

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
    """Names the random draws of one micro-batch (see rft/rng.py)."""

    seed: int
    step: int
    rank: int
    micro: int

    def generator(self, purpose: str) -> torch.Generator:
        """Return the generator of this micro-batch for one purpose."""
        return rng.torch_generator(self.seed, purpose, self.step, self.rank, self.micro)


class Draws(NamedTuple):
    """What is known of a micro-batch's counterfactuals before any model has seen it."""

    mask_BP: Tensor | None
    """Random masks; None if the CAM decides."""
    source_BP: Tensor
    """Where a masked patch comes from (rft/method/refill.py); its sizes may be 1. With unlike
    donors, the donor's rank among the others of the pool, the least like the label first."""
    own_B1: Tensor
    """Each image's own number in the donor pool."""
    kept: int | None
    """Patches that every image keeps, where that is the same number and the others are dropped."""

    def copied(self, copy: Callable[[Tensor], Tensor]) -> "Draws":
        """Copy every tensor, for example to a GPU."""
        mask_BP = None if self.mask_BP is None else copy(self.mask_BP)
        return Draws(mask_BP, copy(self.source_BP), copy(self.own_B1), self.kept)


def draw(method: MethodConfig, own: range, patches: int, pool: int, address: StepAddress) -> Draws:
    """Draw what chance decides for images `own` of a donor pool, on the CPU.

    The numbers are drawn for the whole pool and each rank takes its images' part, so that they do
    not depend on who draws them if the address does not.
    """
    rows = slice(own.start, own.stop)
    mask_BP, kept = None, None
    match method.mask:
        case "random":
            # an address of its own, so that masks do not depend on the numbers that a fill draws
            make = masking.fixed_count_mask if method.fixed_count else masking.bernoulli_mask
            mask_BP = make((pool, patches), method.rate, address.generator("mask"))[rows]
            # known without the masks: the length of token lists is not read from the device
            if method.drops and method.fixed_count:
                kept = masking.kept_patches(patches, method.rate)
        case "object" | "context":
            pass  # the CAM decides, once there is one
        case "none":
            raise AssertionError("nothing is decided where nothing is masked")
        case _:
            assert_never(method.mask)
    if method.fill == "none":
        # one number for all images and patches; `torch.where` expands it
        source_BP = torch.tensor([[refill.DROP]])
    else:
        source_BP = _sources(method, patches, pool, address.generator("fill"))[rows]
    own_B1 = torch.arange(own.start, own.stop)[:, None]
    return Draws(mask_BP, source_BP, own_B1, kept)


def _sources(method: MethodConfig, patches: int, pool: int, generator: torch.Generator) -> Tensor:
    """Draw `Draws.source_BP` for the whole pool; its second size is 1 for a single fill."""
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
    """Return the class activation map of that kind, each image's maximum 1, (B, P).

    `through` is how relevance goes through a layer.
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
    """Return the object or the context mask of a normalised map, bool (B, P)."""
    match kind:
        case "object":
            return masking.object_mask(relevance_BP, threshold)
        case "context":
            return masking.context_mask(relevance_BP, threshold)
        case "random" | "none":
            raise ValueError(f"no CAM decides what mask {kind} is")
        case _:
            assert_never(kind)


def donors(
    method: MethodConfig,
    draws: Draws,
    relevance_BP: Tensor | None,
    likeness_BZ: Tensor | None = None,
) -> Tensor:
    """Return the counterfactuals' index map (rft/method/refill.py), int64 (B, P).

    Args:
        method: the masks and fills.
        draws: what chance has decided.
        relevance_BP: the images' normalised CAM; None where masks are random.
        likeness_BZ: how much each image of the pool looks like each one's label to the teacher;
            None unless donors are chosen by it.
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
