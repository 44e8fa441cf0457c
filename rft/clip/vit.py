"""The CLIP vision transformer's forward, over open_clip's own modules.

open_clip's blocks hide their attention. This forward gives the same features (tests/clip) and
opens three places: patch vectors before the class token joins, a key mask that drops tokens, and a
tap on every layer's attention for the class activation map.

Shapes: B batch, C channel, H W pixels, P patches, L = 1 + P tokens, N heads, D width, E embedding,
S = D / N.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn


class AttentionTap(NamedTuple):
    """What one layer's attention read and wrote in a forward pass."""

    query_BNLS: Tensor
    key_BNLS: Tensor
    value_BNLS: Tensor
    output_BNLS: Tensor


def check_supported(visual: nn.Module) -> VisionTransformer:
    """Return `visual` if this forward computes exactly what open_clip's does.

    Raises:
        ValueError: naming what the method cannot work with.
    """
    if not isinstance(visual, VisionTransformer):
        kind = type(visual).__name__
        raise ValueError(f"the image tower is a {kind}; rft needs an open_clip VisionTransformer")
    reasons = []
    if visual.attn_pool is not None:
        reasons.append("attention pooling")
    elif visual.pool_type != "tok":
        reasons.append(f"{visual.pool_type!r} pooling")
    kinds = {type(block) for block in blocks(visual)} - {ResidualAttentionBlock}
    reasons += [f"{kind.__name__} layers" for kind in kinds]
    if not isinstance(visual.patch_dropout, nn.Identity):
        reasons.append("patch dropout")
    if reasons:
        raise ValueError(
            f"the image tower uses {', '.join(reasons)}; rft needs a class token and plain "
            "attention layers, as in ViT-B-32, ViT-B-16 or ViT-L-14"
        )
    return visual


def blocks(visual: VisionTransformer) -> list[ResidualAttentionBlock]:
    """Return the transformer's layers, first to last."""
    return list(visual.transformer.resblocks)  # pyrefly: ignore[bad-return]


def embed_patches(visual: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Return the patch vectors of normalised images, (B, P, D), row-major over the patch grid."""
    return visual.conv1(images_BCHW).flatten(2).transpose(1, 2)


def encode(
    visual: VisionTransformer,
    patches_BPD: Tensor,
    keep_BP: Tensor | None = None,
    taps: list[AttentionTap] | None = None,
) -> Tensor:
    """Return the projected class-token features, un-normalised, (B, E).

    Args:
        visual: the transformer.
        patches_BPD: patch vectors from `embed_patches`.
        keep_BP: bool; patches that are False take no part in any attention, which gives the class
            token what dropping them would (fidelity: equal to 1e-14 in fp64).
        taps: if given, one tap is appended for each layer, first to last.
    """
    class_B1D = visual.class_embedding.to(patches_BPD.dtype).expand(len(patches_BPD), 1, -1)
    x_BLD = torch.cat([class_B1D, patches_BPD], dim=1)
    x_BLD = visual.ln_pre(x_BLD + visual.positional_embedding.to(x_BLD.dtype))
    mask_B11L = None
    if keep_BP is not None:
        mask_B11L = F.pad(keep_BP, (1, 0), value=True)[:, None, None, :]
    for block in blocks(visual):
        x_BLD = x_BLD + block.ls_1(_attention(block, block.ln_1(x_BLD), mask_B11L, taps))
        x_BLD = x_BLD + block.ls_2(block.mlp(block.ln_2(x_BLD)))
    # the layer norm works token by token, so norm-then-pool and pool-then-norm are the same
    return visual.ln_post(x_BLD[:, 0]) @ visual.proj


def _attention(
    block: ResidualAttentionBlock,
    x_BLD: Tensor,
    mask_B11L: Tensor | None,
    taps: list[AttentionTap] | None,
) -> Tensor:
    attention = block.attn
    qkv = F.linear(x_BLD, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part in qkv.chunk(3, dim=-1)
    )
    output_BNLS = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B11L)
    if taps is not None:
        taps.append(AttentionTap(query, key, value, output_BNLS))
    return attention.out_proj(output_BNLS.transpose(1, 2).flatten(2))
