"""The class activation map: Chefer's relevance of each patch for the label's logit.

R_0 = I, R_l = R_{l-1} + A_l R_{l-1} with A_l = mean_heads relu(G_l * P_l), G_l = ds/dP_l (Chefer et
al. 2021, eq. 5 and 6; section 3.2 of the paper). Only the class token's row of R is needed, and it
obeys r <- r + r A_l from the last layer to the first, so the L x L product is never formed and the
attention of one layer at a time is recomputed from its queries and keys.

Shapes: B batch, N heads, L = 1 + P tokens, P patches, S head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# one layer's query, key, value and attention output, each (B, N, L, S); the output must lie in the
# graph of the logits
Tap = tuple[Tensor, Tensor, Tensor, Tensor]


def label_relevance(logits_BK: Tensor, labels_B: Tensor, taps: Sequence[Tap]) -> Tensor:
    """Return the un-normalised relevance of every patch for its image's label, fp32 (B, P).

    The graph of `logits_BK` is kept, so the same forward can serve the loss. The logits must carry
    CLIP's scale: the rule is a product of (I + A), which is not invariant to it.
    """
    score = logits_BK.gather(1, labels_B[:, None]).sum()
    outputs = [output_BNLS for _, _, _, output_BNLS in taps]
    gradients = torch.autograd.grad(score, outputs, retain_graph=True)
    with torch.no_grad(), torch.autocast(score.device.type, enabled=False):
        row_BL = _class_token_row(outputs[0])
        for tap, gradient_BNLS in zip(reversed(taps), reversed(gradients), strict=True):
            attention_BLL = layer_relevance(tap, gradient_BNLS)
            row_BL = row_BL + torch.einsum("bl,blm->bm", row_BL, attention_BLL)
    return row_BL[:, 1:]


def layer_relevance(tap: Tap, output_gradient_BNLS: Tensor) -> Tensor:
    """Return A = mean_heads relu(G * P) of one layer, fp32 (B, L, L).

    With O = P V, the gradient of the attention probabilities is G = dO V^T, so fused attention
    that never exposes P serves as well.
    """
    query, key, value = (part.detach().float() for part in tap[:3])
    scale = query.shape[-1] ** -0.5
    probabilities_BNLL = (query @ key.transpose(-2, -1) * scale).softmax(dim=-1)
    gradient_BNLL = output_gradient_BNLS.float() @ value.transpose(-2, -1)
    return (gradient_BNLL * probabilities_BNLL).relu().mean(dim=1)


def normalise(relevance_BP: Tensor) -> Tensor:
    """Return relevance divided by each image's maximum (no minimum is subtracted), (B, P).

    An image without any relevance stays zero.
    """
    return relevance_BP / (relevance_BP.amax(dim=1, keepdim=True) + 1e-8)


def _class_token_row(output_BNLS: Tensor) -> Tensor:
    batch, _, tokens, _ = output_BNLS.shape
    row_BL = torch.zeros(batch, tokens, device=output_BNLS.device)
    row_BL[:, 0] = 1
    return row_BL
