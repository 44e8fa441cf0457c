"""The CLIP vision transformer's forward, over open_clip's own modules.

open_clip's blocks hide their attention. This forward gives the same features (tests/clip) and
opens what the method needs: pixels of a patch before they are embedded, tokens that are dropped or
masked, and a tap on every layer's attention for the class activation map. The last layer is
computed for the class token alone, because nothing else of it is read.

Shapes: B batch, C channel, H W pixels, P patches, V = C times the pixels of a patch, L = 1 + P
tokens, Q queries (L, or 1 in the last layer), N heads, D width, E embedding, S = D / N.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Heads = tuple[Tensor, Tensor, Tensor]  # query (B, N, Q, S), key and value (B, N, L, S)


class AttentionTap(NamedTuple):
    """One layer's attention in a forward pass."""

    heads: Callable[[], Heads]
    """Returns query, key and value; computed again where the forward did not keep them."""
    output_BNQS: Tensor


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


def cut_patches(images_BCHW: Tensor, side: int) -> Tensor:
    """Return the pixels of every patch, (B, P, V), row-major over the patch grid.

    The pixels of a patch lie in the order of the patch convolution's weight: C, row, column.
    """
    batch, channels, height, width = images_BCHW.shape
    grid = images_BCHW.view(batch, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)


def embed_tokens(visual: VisionTransformer, patches_BPV: Tensor) -> Tensor:
    """Return the tokens that the first layer reads, (B, L, D), class token first.

    The patch convolution's stride is its kernel, so it is one matrix product of the patch's pixels.
    """
    patches_BPD = F.linear(patches_BPV, visual.conv1.weight.flatten(1))
    class_B1D = visual.class_embedding.to(patches_BPD.dtype).expand(len(patches_BPD), 1, -1)
    tokens_BLD = torch.cat([class_B1D, patches_BPD], dim=1)
    return visual.ln_pre(tokens_BLD + visual.positional_embedding.to(tokens_BLD.dtype))


def drop_tokens(tokens_BLD: Tensor, keep_BP: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the class token and `most` patches of each image, the kept ones first, and which stay.

    Args:
        tokens_BLD: all tokens.
        keep_BP: bool; the patches to keep, `most` of them or fewer in each image.
        most: patches in the result.

    Returns:
        Tokens (B, 1 + most, D), and bool (B, most): False where an image keeps fewer patches and
        another one fills the row.
    """
    kept_BM, order_BM = keep_BP.sort(dim=1, descending=True, stable=True)
    order_BM = order_BM[:, :most]
    index_BMD = (order_BM + 1)[..., None].expand(-1, -1, tokens_BLD.shape[-1])
    return torch.cat([tokens_BLD[:, :1], tokens_BLD.gather(1, index_BMD)], 1), kept_BM[:, :most]


def encode(
    visual: VisionTransformer,
    tokens_BLD: Tensor,
    *,
    keep_BP: Tensor | None = None,
    taps: list[AttentionTap] | None = None,
    recompute: bool = False,
) -> Tensor:
    """Return the projected class-token features, un-normalised, (B, E).

    Args:
        visual: the transformer.
        tokens_BLD: tokens from `embed_tokens`.
        keep_BP: bool; patches that are False take no part in any attention, which gives the class
            token what dropping them would.
        taps: if given, one tap is appended for each layer, first to last.
        recompute: keep only each layer's input for the backward pass and compute the layer again
            there (activation checkpointing): less memory for one more forward.
    """
    mask_B11L = None
    if keep_BP is not None:
        mask_B11L = F.pad(keep_BP, (1, 0), value=True)[:, None, None, :]
    *layers, last = blocks(visual)
    x_BLD = tokens_BLD
    for block in layers:
        x_BLD = _tapped_layer(block, x_BLD, x_BLD.shape[1], mask_B11L, taps, recompute)
    class_B1D = _tapped_layer(last, x_BLD, 1, mask_B11L, taps, recompute)
    return visual.ln_post(class_B1D[:, 0]) @ visual.proj


def _tapped_layer(
    block: ResidualAttentionBlock,
    x_BLD: Tensor,
    queries: int,
    mask_B11L: Tensor | None,
    taps: list[AttentionTap] | None,
    recompute: bool,
) -> Tensor:
    """Return the layer's output for its first `queries` tokens, (B, Q, D)."""
    if not (recompute and torch.is_grad_enabled()):
        x_BQD, heads, output_BNQS = _layer(block, x_BLD, queries, mask_B11L)
        if taps is not None:
            taps.append(AttentionTap(lambda: heads, output_BNQS))
        return x_BQD

    def layer(x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        x_BQD, _, output_BNQS = _layer(block, x_BLD, queries, mask_B11L)
        return x_BQD, output_BNQS

    x_BQD, output_BNQS = checkpoint(layer, x_BLD, use_reentrant=False, preserve_rng_state=False)
    if taps is not None:
        device = x_BLD.device.type
        precision = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        again = partial(_heads_again, block, x_BLD, queries, precision)
        taps.append(AttentionTap(again, output_BNQS))
    return x_BQD


def _layer(
    block: ResidualAttentionBlock, x_BLD: Tensor, queries: int, mask_B11L: Tensor | None
) -> tuple[Tensor, Heads, Tensor]:
    heads = _heads(block, x_BLD, queries)
    output_BNQS = F.scaled_dot_product_attention(*heads, attn_mask=mask_B11L)
    mixed_BQD = block.attn.out_proj(output_BNQS.transpose(1, 2).flatten(2))
    x_BQD = x_BLD[:, :queries] + block.ls_1(mixed_BQD)
    return x_BQD + block.ls_2(block.mlp(block.ln_2(x_BQD))), heads, output_BNQS


def _heads(block: ResidualAttentionBlock, x_BLD: Tensor, queries: int) -> Heads:
    attention, y_BLD = block.attn, block.ln_1(x_BLD)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    width = x_BLD.shape[-1]
    if queries == x_BLD.shape[1]:
        parts = F.linear(y_BLD, weight, bias).split(width, dim=-1)
    else:
        query_BQD = F.linear(y_BLD[:, :queries], weight[:width], bias[:width])
        parts = (query_BQD, *F.linear(y_BLD, weight[width:], bias[width:]).split(width, dim=-1))
    query, key, value = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts
    )
    return query, key, value


def _heads_again(
    block: ResidualAttentionBlock, x_BLD: Tensor, queries: int, precision: torch.autocast
) -> Heads:
    with torch.no_grad(), precision:
        return _heads(block, x_BLD, queries)
