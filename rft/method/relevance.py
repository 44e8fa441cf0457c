"""The class activation map: Chefer's relevance of each patch for the label's logit.

R_0 = I, R_l = R_{l-1} + A_l R_{l-1} with A_l = mean_heads relu(G_l * P_l), G_l = ds/dP_l (Chefer et
al. 2021, eq. 5 and 6; section 3.2 of the paper). Only the class token's row of R is needed, and it
follows r <- r + r A_l from the last layer to the first, which is the order of a backward pass. Each
A_l is therefore computed from its layer's queries, keys and values when the gradient arrives there,
and then freed; neither all maps nor the L x L product are ever in memory.

Shapes: B batch, N heads, L = 1 + P tokens, P patches, Q queries (L, or 1 if only the class token
attends), S head width, K classes.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

# query, key and value, each (B, N, L, S)
Heads = tuple[Tensor, Tensor, Tensor]
# One layer: a function that returns its heads, and their outputs in the logits' graph, (B, N, L,
# S); or a function that returns None, and the layer's attention map in that graph, (B, N, Q, L).
Tap = tuple[Callable[[], Heads | None], Tensor]

# From a row r of R (B, L), a layer's heads and the gradient of their outputs to r A, fp32 (B, L)
Through = Callable[[Tensor, Heads, Tensor], Tensor]

# largest bytes of one fp32 attention map; more images are processed in parts
MAP_BYTES = 2**28


def through_maps(row_BL: Tensor, heads: Heads, gradient: Tensor) -> Tensor:
    """Compute r A with explicit attention maps and gradients, some images at a time."""
    return in_parts(_through_map, row_BL, heads, gradient)


def in_parts(through: Through, row_BL: Tensor, heads: Heads, gradient: Tensor) -> Tensor:
    """Compute r A of a layer in parts, so that a map takes at most MAP_BYTES."""
    num_heads, tokens = gradient.shape[1], row_BL.shape[1]
    images = max(1, MAP_BYTES // (4 * num_heads * tokens**2))
    columns = (tensor.split(images) for tensor in (row_BL, *heads, gradient))
    parts = zip(*columns, strict=True)
    return torch.cat([through(row, (q, k, v), dO) for row, q, k, v, dO in parts])


@cache
def compiled_maps() -> Through:
    """Compile the operations of `through_maps` between its matrix products into few kernels.

    The maps are still written, but read or written four times instead of eleven.
    """
    between = torch.compile(_between, dynamic=False)

    def through(row_BL: Tensor, heads: Heads, gradient: Tensor) -> Tensor:
        return between(row_BL, *scores_and_gradient(heads, gradient))

    return partial(in_parts, through)


def _through_map(row_BL: Tensor, heads: Heads, gradient: Tensor) -> Tensor:
    attention_BLL = layer_relevance(*map_and_gradient(heads, gradient))
    return (row_BL[:, None] @ attention_BLL)[:, 0]


def _between(row_BL: Tensor, scores_BNLL: Tensor, gradient_BNLL: Tensor) -> Tensor:
    attention_BLL = (gradient_BNLL * scores_BNLL.softmax(dim=-1)).relu().mean(dim=1)
    # not a matrix product, which a compiler would leave to a library as a separate pass
    return (row_BL[:, :, None] * attention_BLL).sum(dim=1)


def layer_relevance(probabilities_BNQL: Tensor, gradient_BNQL: Tensor) -> Tensor:
    """Compute A = mean_heads relu(G * P) of one layer, fp32 (B, Q, L)."""
    return (gradient_BNQL * probabilities_BNQL).relu_().mean(dim=1)


def map_and_gradient(heads: Heads, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Compute P and G = ds/dP of one layer, fp32, both (B, N, L, L)."""
    scores_BNLL, gradient_BNLL = scores_and_gradient(heads, gradient)
    return scores_BNLL.softmax(dim=-1), gradient_BNLL


def scores_and_gradient(heads: Heads, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the scores, of which P is the softmax, and G = ds/dP, fp32, both (B, N, L, L).

    With O = P V, G = dO V^T, so this also works for fused attention, which never exposes P.
    """
    query, key, value = (part.float() for part in heads)
    # in place: each copy of a map may take MAP_BYTES
    scores_BNLL = (query @ key.transpose(-2, -1)).mul_(query.shape[-1] ** -0.5)
    return scores_BNLL, gradient.float() @ value.transpose(-2, -1)


def label_relevance(
    logits_BK: Tensor, labels_B: Tensor, taps: Sequence[Tap], through: Through = through_maps
) -> Tensor:
    """Compute the un-normalised relevance of every patch for its image's label, fp32 (B, P).

    The graph of `logits_BK` is kept, so the same forward can serve the loss. The logits must have
    exactly CLIP's scale, because the rule is a product of (I + A), which is not invariant to it.

    Args:
        logits_BK: the student's logits.
        labels_B: the label of each image.
        taps: the layers, first to last.
        through: how a row goes through a layer that is tapped at its heads.
    """
    heads, last = taps[-1]
    # the last layer may be tapped at its map (B, N, 1, L), others at their outputs (B, N, L, S)
    tokens = last.shape[-1] if heads() is None else last.shape[-2]
    row_BL = torch.zeros(len(last), tokens, device=last.device)
    # the class token's row of the identity, R_0
    row_BL[:, 0] = 1

    def consume(heads: Callable[[], Heads | None], watched: Tensor, gradient: Tensor) -> None:
        propagate(row_BL, (heads, watched), gradient, through)

    hooks = [watched.register_hook(partial(consume, heads, watched)) for heads, watched in taps]
    try:
        # on its way to the first layer, the gradient passes every layer's hook from last to first
        _gradient(logits_BK, labels_B, taps[0][1])
    finally:
        # because the loss runs backward through the same layers
        for hook in hooks:
            hook.remove()
    return row_BL[:, 1:]


def propagate(row_BL: Tensor, tap: Tap, gradient: Tensor, through: Through) -> None:
    """Propagate the class token's row of R through one layer, in place: r <- r + r A.

    Args:
        row_BL: the row after the later layers.
        tap: the layer.
        gradient: of the score with respect to the tap's tensor.
        through: how a row goes through a layer that is tapped at its heads.
    """
    with torch.no_grad(), torch.autocast(row_BL.device.type, enabled=False):
        heads = tap[0]()
        if heads is None:
            # the last layer's map has only the class token's query: the row is still 0 for all
            # others
            row_BL += (row_BL[:, None, :1] @ layer_relevance(tap[1].float(), gradient.float()))[
                :, 0
            ]
        else:
            row_BL += through(row_BL, heads, gradient)


def grad_cam(logits_BK: Tensor, labels_B: Tensor, taps: Sequence[Tap]) -> Tensor:
    """Compute GradCAM over the last layer's attention of the class token, fp32 (B, P).

    Each head's map is weighted by its mean gradient over the patches; the map is the positive part
    of the mean over heads (after Selvaraju et al. 2017). Chefer et al. 2021 compare with a variant
    that averages the gradient over the full map, and the paper's released code has a variant on the
    last block's ln_1 (docs/paper.md). It is cheaper than `label_relevance`, but ignores all layers
    except the last.
    """
    heads, watched = taps[-1]
    gradient = _gradient(logits_BK, labels_B, watched)
    with torch.no_grad(), torch.autocast(logits_BK.device.type, enabled=False):
        found = heads()
        maps = (watched, gradient) if found is None else map_and_gradient(found, gradient)
        # query 0 is always the class token; key 0, its attention to itself, is not a patch
        probabilities_BNP, gradient_BNP = (each[:, :, 0, 1:].float() for each in maps)
        weight_BN1 = gradient_BNP.mean(dim=-1, keepdim=True)
        return (weight_BN1 * probabilities_BNP).mean(dim=1).relu()


def normalise(relevance_BP: Tensor) -> Tensor:
    """Divide relevance (B, P) by each image's maximum, without subtracting the minimum.

    An image without any relevance stays zero.
    """
    return relevance_BP / (relevance_BP.amax(dim=1, keepdim=True) + 1e-8)


def _gradient(logits_BK: Tensor, labels_B: Tensor, tensor: Tensor) -> Tensor:
    """Compute the gradient of the labels' logits, and keep their graph."""
    # images are independent, so one backward pass of the sum gives each its own gradient
    score = logits_BK.gather(1, labels_B[:, None]).sum()
    # a backward pass uses its forward's precision by itself; autocast would lower the head's
    with torch.autocast(logits_BK.device.type, enabled=False):
        return torch.autograd.grad(score, tensor, retain_graph=True)[0]
