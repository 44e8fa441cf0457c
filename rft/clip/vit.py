"""The forward of CLIP's vision transformer, using open_clip's modules.

open_clip's blocks hide their attention. This forward gives the same features (tests/clip) and
exposes what the method needs: the pixels of patches before embedding, dropped or masked tokens, and
a tap on each layer's attention for the class activation map. The last layer is computed only for
the class token, because its other outputs are unused.

Shapes: B batch, C channel, H W pixels, P patches, V = C times the pixels of a patch, L = 1 + P
tokens, Q queries (L, or 1 in the last layer), N heads, D width, E embedding, S = D / N.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Heads = tuple[Tensor, Tensor, Tensor]  # query, key and value, each (B, N, L, S)
# Maps normed tokens and a mask to the heads, their outputs (B, N, L, S) and the values (B, L, D);
# for the class token alone, to None, its attention map (B, N, 1, L) and the values (B, 1, D).
Attend = Callable[
    [nn.MultiheadAttention, Tensor, Tensor | None], tuple[Heads | None, Tensor, Tensor]
]


class AttentionTap(NamedTuple):
    """One layer's attention in a forward pass."""

    heads: Callable[[], Heads | None]
    """Returns query, key and value, recomputed if the forward did not keep them; None if the
    attention map itself is in the graph."""
    watched: Tensor
    """The tensor to differentiate by: the heads' outputs (B, N, L, S), or the attention map (B, N,
    1, L)."""


class Pieces(NamedTuple):
    """Operations between a layer's matrix products: the plain functions below, or compiled ones.

    A piece reads and writes every element of every token, so on a GPU its time is memory traffic,
    and a compiler fuses it into one kernel. The matrix products stay outside, with their own nodes
    in autograd's graph. The backward of a compiled region computes all gradients, but the CAM needs
    only those of the tokens: with the products inside, it would also compute the gradients of all
    weights, a full pass of operations, and discard them.
    """

    standardise: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    norm: Callable[[nn.Module, Tensor], Tensor]
    add_norm: Callable[[nn.Module, nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    activate: Callable[[nn.Module, Tensor], Tensor]


def standardise(patches_BPV: Tensor, mean_C1: Tensor, std_C1: Tensor, dtype: torch.dtype) -> Tensor:
    """Standardise uint8 patches by each channel's mean and deviation."""
    # V is C, row, column (see `cut_patches`); R are the pixels of one channel
    pixels_BPCR = patches_BPV.float().unflatten(-1, (len(mean_C1), -1))
    return ((pixels_BPCR - mean_C1) / std_C1).flatten(-2).to(dtype)


def norm(normalise: nn.Module, x_BLD: Tensor) -> Tensor:
    """Normalise tokens, in their own type."""
    return normalise(x_BLD)


def add_norm(
    scale: nn.Module, normalise: nn.Module, x_BLD: Tensor, branch_BLD: Tensor
) -> tuple[Tensor, Tensor]:
    """Add a branch's output to the tokens; return the sum, and the sum normalised."""
    x_BLD = x_BLD + scale(branch_BLD)
    return x_BLD, normalise(x_BLD)


def activate(activation: nn.Module, hidden_BLH: Tensor) -> Tensor:
    """Apply the MLP's activation."""
    return activation(hidden_BLH)


EAGER = Pieces(standardise, norm, add_norm, activate)


@cache
def compiled() -> Pieces:
    """Wrap the pieces in torch.compile, which compiles on their first call.

    All layers share one graph per piece, token count, and whether weights are trained.
    """
    # sizes do not change within a run, and dynamic kernels are slower
    fixed = partial(torch.compile, dynamic=False)
    return Pieces(fixed(standardise), fixed(norm), fixed(add_norm), fixed(activate))


def check_supported(visual: nn.Module, what: str = "the image tower") -> VisionTransformer:
    """Return `visual` if this forward computes exactly the same as open_clip's.

    Raises:
        ValueError: naming the unsupported parts.
    """
    if not isinstance(visual, VisionTransformer):
        kind = type(visual).__name__
        raise ValueError(
            f"{what} is a {kind}; rft needs an open_clip VisionTransformer (docs/paper.md#models)"
        )
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
            f"{what} uses {', '.join(reasons)}; rft needs a class token and plain attention "
            "layers, as in ViT-B-32, ViT-B-16 or ViT-L-14 (docs/paper.md#models)"
        )
    return visual


def blocks(visual: VisionTransformer) -> list[ResidualAttentionBlock]:
    """List the transformer's layers, first to last."""
    return list(visual.transformer.resblocks)  # pyrefly: ignore[bad-return]


@torch.no_grad()
def lower(visual: VisionTransformer, dtype: torch.dtype) -> None:
    """Convert the matrices of a frozen tower to the type of its products.

    Otherwise autocast would convert them in every forward. Vectors are not converted, because norms
    compute in fp32.
    """
    for parameter in visual.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)


def cut_patches(images_BCHW: Tensor, side: int) -> Tensor:
    """Cut images into the pixels of patches, (B, P, V), row-major over the patch grid.

    The pixels of a patch are in the order of the patch convolution's weight: C, row, column.
    """
    batch, channels, height, width = images_BCHW.shape
    # (B, C, rows of patches, rows in one, columns of patches, columns in one)
    grid = images_BCHW.view(batch, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)


def embed_tokens(visual: VisionTransformer, patches_BPV: Tensor) -> Tensor:
    """Embed patches as tokens for the first layer, (B, L, D), class token first.

    The patch convolution's stride equals its kernel, so it is one matrix product per patch.
    """
    patches_BPD = F.linear(patches_BPV, visual.conv1.weight.flatten(1))
    # as in open_clip, in the product's type (bf16 under autocast), which the layers then keep
    class_B1D = visual.class_embedding.to(patches_BPD.dtype).expand(patches_BPD.shape[0], 1, -1)
    tokens_BLD = torch.cat([class_B1D, patches_BPD], dim=1)
    return visual.ln_pre(tokens_BLD + visual.positional_embedding.to(tokens_BLD.dtype))


def drop_tokens(tokens_BLD: Tensor, keep_BP: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Select the class token and `most` patches of each image, kept ones first.

    Args:
        tokens_BLD: all tokens.
        keep_BP: bool; the patches to keep, at most `most` in each image.
        most: number of patches in the result.

    Returns:
        Tokens (B, 1 + most, D), and bool (B, most), which is False for dropped patches that pad an
        image with fewer kept ones.
    """
    # stable, so that patches keep the grid's order and sums always round alike
    kept_BM, order_BM = keep_BP.sort(dim=1, descending=True, stable=True)
    order_BM = order_BM[:, :most]
    # + 1 for the class token; gather needs an index for each element of a token
    index_BMD = (order_BM + 1)[..., None].expand(-1, -1, tokens_BLD.shape[-1])
    return torch.cat([tokens_BLD[:, :1], tokens_BLD.gather(1, index_BMD)], 1), kept_BM[:, :most]


def encode(
    visual: VisionTransformer,
    tokens_BLD: Tensor,
    *,
    keep_BP: Tensor | None = None,
    taps: list[AttentionTap] | None = None,
    recompute: bool = False,
    pieces: Pieces = EAGER,
) -> Tensor:
    """Compute the projected, un-normalised class-token features, (B, E).

    Args:
        visual: the transformer.
        tokens_BLD: tokens from `embed_tokens`.
        keep_BP: bool; False patches are masked in all attention, with the same result for the class
            token as dropping them.
        taps: if given, one tap is appended for each layer, first to last.
        recompute: keep only each layer's input, and recompute the layer in the backward pass
            (activation checkpointing): less memory for one more forward.
        pieces: operations between the matrix products of a layer.
    """
    mask_B11L = None
    if keep_BP is not None:
        # the class token is never masked, because a fully masked row has a softmax of NaN
        mask_B11L = F.pad(keep_BP, (1, 0), value=True)[:, None, None, :]
    if taps is not None and torch.is_grad_enabled() and not tokens_BLD.requires_grad:
        # if the first layers are frozen, the CAM still needs gradients in them
        tokens_BLD = tokens_BLD.detach().requires_grad_()
    *layers, last = blocks(visual)
    x_BLD = tokens_BLD
    for block in layers:
        x_BLD = _tapped_layer(block, _attention, x_BLD, mask_B11L, taps, recompute, pieces)
    class_B1D = _tapped_layer(last, _class_attention, x_BLD, mask_B11L, taps, recompute, pieces)
    return visual.ln_post(class_B1D[:, 0]) @ visual.proj


def _tapped_layer(
    block: ResidualAttentionBlock,
    attend: Attend,
    x_BLD: Tensor,
    mask_B11L: Tensor | None,
    taps: list[AttentionTap] | None,
    recompute: bool,
    pieces: Pieces,
) -> Tensor:
    """Run a layer for the tokens that `attend` returns, (B, Q, D), and append its tap."""
    # without gradients nothing is kept for a backward pass, so there is nothing to save
    if not (recompute and torch.is_grad_enabled()):
        x_BQD, heads, watched = _layer(block, attend, x_BLD, mask_B11L, pieces)
        if taps is not None:
            taps.append(AttentionTap(lambda: heads, watched))
        return x_BQD

    def layer(x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        # the heads are not returned, because they would then be kept
        x_BQD, _, watched = _layer(block, attend, x_BLD, mask_B11L, pieces)
        return x_BQD, watched

    # not reentrant, which refuses the CAM's torch.autograd.grad; no layer draws random numbers
    x_BQD, watched = checkpoint(layer, x_BLD, use_reentrant=False, preserve_rng_state=False)
    if taps is not None:
        device = x_BLD.device.type
        # the CAM's hooks run in the backward pass, outside the forward's autocast
        precision = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )

        def heads_again() -> Heads | None:
            if attend is _class_attention:
                return None
            with torch.no_grad(), precision:
                return _heads(block.attn, block.ln_1(x_BLD))

        taps.append(AttentionTap(heads_again, watched))
    return x_BQD


def _layer(
    block: ResidualAttentionBlock,
    attend: Attend,
    x_BLD: Tensor,
    mask_B11L: Tensor | None,
    pieces: Pieces,
) -> tuple[Tensor, Heads | None, Tensor]:
    mlp: Any = block.mlp
    heads, watched, values_BQD = attend(block.attn, pieces.norm(block.ln_1, x_BLD), mask_B11L)
    # the last layer computes only the class token, which is the first token
    x_BQD, y_BQD = pieces.add_norm(
        block.ls_1, block.ln_2, x_BLD[:, : values_BQD.shape[1]], block.attn.out_proj(values_BQD)
    )
    hidden_BQH = pieces.activate(mlp.gelu, mlp.c_fc(y_BQD))
    return x_BQD + block.ls_2(mlp.c_proj(hidden_BQH)), heads, watched


def _attention(
    attention: nn.MultiheadAttention, y_BLD: Tensor, mask_B11L: Tensor | None
) -> tuple[Heads, Tensor, Tensor]:
    heads = _heads(attention, y_BLD)
    output_BNLS = F.scaled_dot_product_attention(*heads, attn_mask=mask_B11L)
    return heads, output_BNLS, output_BNLS.transpose(1, 2).flatten(2)


def _heads(attention: nn.MultiheadAttention, y_BLD: Tensor) -> Heads:
    projected = F.linear(y_BLD, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        # nn.MultiheadAttention stores query, key and value weights in one matrix, in this order
        for part in projected.chunk(3, dim=-1)
    )
    return query, key, value


def _class_attention(
    attention: nn.MultiheadAttention, y_BLD: Tensor, mask_B11L: Tensor | None
) -> tuple[None, Tensor, Tensor]:
    """Attend from the class token only, without projecting all tokens to keys and values.

    Because q (W_k y) = (q W_k) y and sum p (W_v y) = W_v (sum p y), it suffices to project each
    head's query into the space of the tokens, and the weighted sum of tokens to values.
    """
    heads = attention.num_heads
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query_NSD, key_NSD, value_NSD = (weight.unflatten(0, (heads, -1)) for weight in weights)
    query_BNS = F.linear(y_BLD[:, 0], weights[0], biases[0]).unflatten(-1, (heads, -1))
    # the key's bias adds a constant to all scores of a head, which the softmax cancels
    carried_BND = torch.einsum("bns,nsd->bnd", query_BNS, key_NSD)
    scores_BNL = carried_BND @ y_BLD.transpose(1, 2) * query_NSD.shape[1] ** -0.5
    if mask_B11L is not None:
        scores_BNL = scores_BNL.masked_fill(~mask_B11L[:, 0], -torch.inf)
    map_BN1L = scores_BNL.softmax(dim=-1)[:, :, None]
    found_BND = map_BN1L[:, :, 0] @ y_BLD
    values_BNS = torch.einsum("bnd,nsd->bns", found_BND, value_NSD)
    # a map sums to one, but the explicit sum keeps the value's bias in the CAM's gradient
    bias_NS = biases[2].unflatten(0, (heads, -1))
    values_BNS = values_BNS + map_BN1L.sum(dim=-1) * bias_NS
    return None, map_BN1L, values_BNS.flatten(1)[:, None]
