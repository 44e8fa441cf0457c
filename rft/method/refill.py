"""What replaces masked patches, as an index map (section 3.2.2).

A counterfactual image is a donor for each image n and patch p: n itself where the patch is kept,
another image m of the batch where it is refilled, DROP where it is dropped. A fill takes the patch
at the same position, so the map can be applied to pixels, to patch vectors or to a picture alike.
"""

import torch
from torch import Tensor

DROP = -1


def no_fill(mask_BP: Tensor) -> Tensor:
    """Drop the masked patches. Donors, int64 (B, P)."""
    return _donors(mask_BP, torch.full_like(mask_BP, DROP, dtype=torch.int64))


def single_fill(mask_BP: Tensor, generator: torch.Generator) -> Tensor:
    """Fill all masked patches of an image from one image of the batch. Donors, int64 (B, P).

    Donors are a random permutation of the batch, so an image may be its own donor (once in a batch
    on average), as in the released code.
    """
    source_B = torch.randperm(len(mask_BP), generator=generator).to(mask_BP.device)
    return _donors(mask_BP, source_B[:, None].expand_as(mask_BP))


def multi_fill(mask_BP: Tensor, generator: torch.Generator) -> Tensor:
    """Fill each masked patch from any other image of the batch. Donors, int64 (B, P).

    Each patch draws on its own, uniformly over the other images, never the image itself.
    """
    batch = len(mask_BP)
    assert batch > 1, "multi-fill needs another image in the batch"
    shift_BP = torch.randint(1, batch, mask_BP.shape, generator=generator).to(mask_BP.device)
    own_B1 = torch.arange(batch, device=mask_BP.device)[:, None]
    return _donors(mask_BP, (own_B1 + shift_BP) % batch)


def apply_donors(patches_BPD: Tensor, donor_BP: Tensor) -> Tensor:
    """Return the patch vectors of the counterfactual images, (B, P, D).

    Dropped patches keep their own vector: whoever attends must leave them out (`donor_BP != DROP`).
    """
    batch, patches = donor_BP.shape
    own_B1 = torch.arange(batch, device=donor_BP.device)[:, None]
    source_BP = torch.where(donor_BP == DROP, own_B1, donor_BP)
    return patches_BPD[source_BP, torch.arange(patches, device=donor_BP.device)]


def _donors(mask_BP: Tensor, source_BP: Tensor) -> Tensor:
    own_B1 = torch.arange(len(mask_BP), device=mask_BP.device)[:, None]
    return torch.where(mask_BP, source_BP, own_B1)
