"""Replacement of masked patches, as an index map (section 3.2.2).

Counterfactual images are described by a donor for each image and patch: the image's own number in
the donor pool if the patch is kept, another image's if it is refilled, DROP if it is dropped. A
fill takes the patch at the same position, so the map can be applied to pixels, patch vectors or
pictures alike. The pool contains the images whose patches may be taken: a rank's own, or the global
batch.

Shapes: B images, P patches, Z images in the donor pool.
"""

import torch
from torch import Tensor

DROP = -1


def single_sources(pool: int, generator: torch.Generator, *, derange: bool = False) -> Tensor:
    """Draw one source for all masked patches of each image, int64 (Z, 1).

    The sources are a random permutation of the pool, in which an image may be its own source (one
    per pool on average), as in the released code. With `derange`, they are a uniformly drawn
    permutation in which none is.
    """
    assert pool > 1 or not derange, "a derangement needs another image in the pool"
    own_Z = torch.arange(pool)
    while True:
        source_Z = torch.randperm(pool, generator=generator)
        # one in e permutations passes, for any size of the pool
        if not derange or not (source_Z == own_Z).any():
            return source_Z[:, None]


def multi_sources(pool: int, patches: int, generator: torch.Generator) -> Tensor:
    """Draw a source for each masked patch of each image, int64 (Z, P).

    Each patch draws independently and uniformly from the other images, never the image itself.
    """
    assert pool > 1, "multi-fill needs another image in the pool"
    shift_ZP = torch.randint(1, pool, (pool, patches), generator=generator)
    return (torch.arange(pool)[:, None] + shift_ZP) % pool


def likeness(logits_ZK: Tensor, labels_B: Tensor) -> Tensor:
    """Likeness of each image of the pool to each image's label by a model, fp32 (B, Z).

    It is the probability of the label by the pool image's logits.
    """
    return logits_ZK.float().softmax(dim=1)[:, labels_B].T


def unlike_others(pool: int) -> int:
    """Count the images that a fill chooses from if it takes the less alike half of the others.

    At least one: the smallest pool of a fill has two images.
    """
    return max(1, (pool - 1) // 2)


def unlike_sources(rank_BP: Tensor, likeness_BZ: Tensor, own_B1: Tensor) -> Tensor:
    """Find the donors of given ranks; rank 0 is the pool's image that is least like the label.

    Args:
        rank_BP: int64, below `unlike_others(Z)`; its second size may be 1.
        likeness_BZ: of the pool's images to each image's label; ties keep the order of the pool.
        own_B1: each image's own number in the pool, which is never chosen.

    Returns:
        Numbers of pool images, int64, shaped as `rank_BP`.
    """
    others_BZ = likeness_BZ.scatter(1, own_B1, torch.inf)
    return others_BZ.argsort(dim=1, stable=True).gather(1, rank_BP)


def donors(mask_BP: Tensor, source_BP: Tensor, own_B1: Tensor) -> Tensor:
    """Build the index map, int64 (B, P).

    Args:
        mask_BP: bool; True where a patch is masked.
        source_BP: source of each masked patch, or DROP; its sizes may be 1.
        own_B1: each image's own number in the pool.
    """
    return torch.where(mask_BP, source_BP, own_B1)


def apply_donors(patches_ZPV: Tensor, donor_BP: Tensor, own_B1: Tensor) -> Tensor:
    """Assemble the patches of the counterfactual images, (B, P, V), from those of the pool.

    Dropped patches keep their own pixels: attention must leave them out (`donor_BP != DROP`).
    """
    # as an index, DROP would mean the last image of the pool
    source_BP = torch.where(donor_BP == DROP, own_B1, donor_BP)
    # patch p of the result is patch p of its source
    return patches_ZPV[source_BP, torch.arange(donor_BP.shape[1], device=donor_BP.device)]
