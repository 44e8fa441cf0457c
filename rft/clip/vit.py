"""The CLIP vision transformer's forward, over open_clip's own modules.

open_clip's blocks hide their attention. This forward gives the same features (tests/clip) and
opens what the method needs: pixels of a patch before they are embedded, tokens that are dropped or
masked, and a tap on every layer's attention for the class activation map. The last layer is
computed for the class token alone, because nothing else of it is read.

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
# From normed tokens and a mask to the heads, their outputs (B, N, L, S) and the values (B, L, D);
# for the class token alone to None, its attention map (B, N, 1, L) and the values (B, 1, D).
Attend = Callable[
    [nn.MultiheadAttention, Tensor, Tensor | None], tuple[Heads | None, Tensor, Tensor]
]


class AttentionTap(NamedTuple):
    """One layer's attention in a forward pass."""

    heads: Callable[[], Heads | None]
    """Returns query, key and value, computed again where the forward did not keep them; None where
    the attention map itself is in the graph."""
    watched: Tensor
    """What the gradient is taken with respect to: the heads' outputs (B, N, L, S), or that map
    (B, N, 1, L)."""


class Pieces(NamedTuple):
    """What lies between a layer's products, each the plain function below or that one compiled.

    A piece touches every number of every token without being a product: on a GPU its time is that
    of reading and writing memory, and a compiler makes one kernel of it. The products stay outside,
    with their own nodes in autograd's graph: the backward of a compiled region computes every
    gradient that there is, and the CAM's wants those of the tokens alone. With the products inside,
    it would compute those of all weights as well, a whole pass of operations, and drop them.
    """

    standardise: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    norm: Callable[[nn.Module, Tensor], Tensor]
    add_norm: Callable[[nn.Module, nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    activate: Callable[[nn.Module, Tensor], Tensor]


def standardise(patches_BPV: Tensor, mean_C1: Tensor, std_C1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return uint8 patches with each channel's mean taken off and divided by its deviation."""
    # V is C, row, column (see `cut_patches`): R are the pixels of one channel
    pixels_BPCR = patches_BPV.float().unflatten(-1, (len(mean_C1), -1))
    return ((pixels_BPCR - mean_C1) / std_C1).flatten(-2).to(dtype)


def norm(normalise: nn.Module, x_BLD: Tensor) -> Tensor:
    """Return the normalised tokens, in their own type."""
    return normalise(x_BLD)


def add_norm(
    scale: nn.Module, normalise: nn.Module, x_BLD: Tensor, branch_BLD: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tokens with a branch's output added, and the same normalised."""
    x_BLD = x_BLD + scale(branch_BLD)
    return x_BLD, normalise(x_BLD)


def activate(activation: nn.Module, hidden_BLH: Tensor) -> Tensor:
    """Return the activation of the MLP's hidden numbers."""
    return activation(hidden_BLH)


EAGER = Pieces(standardise, norm, add_norm, activate)


@cache
def compiled() -> Pieces:
    """Return the pieces under torch.compile, which compiles at their first call.

    Every layer shares one graph of each, for each token count and for weights that learn or do not.
    """
    # sizes do not change within a run, and a kernel for any size is slower
    fixed = partial(torch.compile, dynamic=False)
    return Pieces(fixed(standardise), fixed(norm), fixed(add_norm), fixed(activate))


def check_supported(visual: nn.Module, what: str = "the image tower") -> VisionTransformer:
    """Return `visual` if this forward computes exactly what open_clip's does.

    Raises:
        ValueError: naming what the method cannot work with.
    """
    if not isinstance(visual, VisionTransformer):
        kind = type(visual).__name__
        raise ValueError(f"{what} is a {kind}; rft needs an open_clip VisionTransformer")
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
            f"{what} uses {', '.join(reasons)}; rft needs a class token and plain "
            "attention layers, as in ViT-B-32, ViT-B-16 or ViT-L-14"
        )
    return visual


def blocks(visual: VisionTransformer) -> list[ResidualAttentionBlock]:
    """Return the transformer's layers, first to last."""
    return list(visual.transformer.resblocks)  # pyrefly: ignore[bad-return]


@torch.no_grad()
def lower(visual: VisionTransformer, dtype: torch.dtype) -> None:
    """Keep the matrices of a frozen tower in the type of its products.

    Autocast would make the same copy of them in every forward. Vectors stay as they are: those of a
    norm are computed with in fp32.
    """
    for parameter in visual.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)


def cut_patches(images_BCHW: Tensor, side: int) -> Tensor:
    """Return the pixels of every patch, (B, P, V), row-major over the patch grid.

    The pixels of a patch lie in the order of the patch convolution's weight: C, row, column.
    """
    batch, channels, height, width = images_BCHW.shape
    # (B, C, rows of patches, rows in one, columns of patches, columns in one)
    grid = images_BCHW.view(batch, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)


def embed_tokens(visual: VisionTransformer, patches_BPV: Tensor) -> Tensor:
    """Return the tokens that the first layer reads, (B, L, D), class token first.

    The patch convolution's stride is its kernel, so it is one matrix product of the patch's pixels.
    """
    patches_BPD = F.linear(patches_BPV, visual.conv1.weight.flatten(1))
    # as open_clip does: in the product's type (bf16 under autocast), which the layers then keep
    class_B1D = visual.class_embedding.to(patches_BPD.dtype).expand(patches_BPD.shape[0], 1, -1)
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
        a dropped one fills the row.
    """
    # stable: equal patches keep the grid's order, so that sums round the same way each time
    kept_BM, order_BM = keep_BP.sort(dim=1, descending=True, stable=True)
    order_BM = order_BM[:, :most]
    # + 1: the class token comes first; gather wants an index for each number of a token
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
    """Return the projected class-token features, un-normalised, (B, E).

    Args:
        visual: the transformer.
        tokens_BLD: tokens from `embed_tokens`.
        keep_BP: bool; patches that are False take no part in any attention, which gives the class
            token what dropping them would.
        taps: if given, one tap is appended for each layer, first to last.
        recompute: keep only each layer's input for the backward pass and compute the layer again
            there (activation checkpointing): less memory for one more forward.
        pieces: what lies between the products of a layer.
    """
    mask_B11L = None
    if keep_BP is not None:
        # the class token always takes part: a row that is masked as a whole has a softmax of NaN
        mask_B11L = F.pad(keep_BP, (1, 0), value=True)[:, None, None, :]
    if taps is not None and torch.is_grad_enabled() and not tokens_BLD.requires_grad:
        # where the first layers are frozen, the CAM wants the gradient in them all the same
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
    """Return the layer's output for the tokens that `attend` returns, (B, Q, D)."""
    # without gradients nothing is kept for a backward pass
    if not (recompute and torch.is_grad_enabled()):
        x_BQD, heads, watched = _layer(block, attend, x_BLD, mask_B11L, pieces)
        if taps is not None:
            taps.append(AttentionTap(lambda: heads, watched))
        return x_BQD

    def layer(x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        # the heads are not returned, or they would be kept
        x_BQD, _, watched = _layer(block, attend, x_BLD, mask_B11L, pieces)
        return x_BQD, watched

    # the CAM calls torch.autograd.grad, which the reentrant kind refuses; no layer draws numbers
    x_BQD, watched = checkpoint(layer, x_BLD, use_reentrant=False, preserve_rng_state=False)
    if taps is not None:
        device = x_BLD.device.type
        # the CAM's hooks run in the backward pass, where the forward's autocast is not in force
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
    # the last layer computes the class token alone, the first of the tokens
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
        # nn.MultiheadAttention keeps the weights of query, key and value in one, in this order
        for part in projected.chunk(3, dim=-1)
    )
    return query, key, value


def _class_attention(
    attention: nn.MultiheadAttention, y_BLD: Tensor, mask_B11L: Tensor | None
) -> tuple[None, Tensor, Tensor]:
    """Attend from the class token alone, without projecting every token to a key and a value.

    q (W_k y) = (q W_k) y and sum p (W_v y) = W_v (sum p y), so it is enough to carry each head's
    query back to the tokens' own space, and what it found there forth.
    """
    heads = attention.num_heads
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query_NSD, key_NSD, value_NSD = (weight.unflatten(0, (heads, -1)) for weight in weights)
    query_BNS = F.linear(y_BLD[:, 0], weights[0], biases[0]).unflatten(-1, (heads, -1))
    # the key's bias adds one number to all scores of a head: the softmax does not see it
    carried_BND = torch.einsum("bns,nsd->bnd", query_BNS, key_NSD)
    scores_BNL = carried_BND @ y_BLD.transpose(1, 2) * query_NSD.shape[1] ** -0.5
    if mask_B11L is not None:
        scores_BNL = scores_BNL.masked_fill(~mask_B11L[:, 0], -torch.inf)
    map_BN1L = scores_BNL.softmax(dim=-1)[:, :, None]
    found_BND = map_BN1L[:, :, 0] @ y_BLD
    values_BNS = torch.einsum("bnd,nsd->bns", found_BND, value_NSD)
    # a map sums to one, but the value's bias is part of the gradient that the CAM takes of it
    bias_NS = biases[2].unflatten(0, (heads, -1))
    values_BNS = values_BNS + map_BN1L.sum(dim=-1) * bias_NS
    return None, map_BN1L, values_BNS.flatten(1)[:, None]
