"""The text tower on its own, for methods that need texts in training.

open_clip's own forward pads every text to the tower's context length. Here a batch of texts may be
as short as its longest one: the tower is causal, so tokens after a text's end have no effect
(tests/clip/test_text.py), and prompts of 15 tokens cost a fifth of 77.

Shapes: B texts, T tokens, K classes, M templates, E embedding.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from rft.clip.load import PretrainedClip


class TextTower(nn.Module):
    """Copies of a CLIP's text tower and logit scale, using open_clip's modules."""

    attn_mask: Tensor
    positional_embedding: nn.Parameter

    def __init__(self, clip: PretrainedClip, needed_for: str) -> None:
        """Copy the tower of `clip`.

        Raises:
            ValueError: if it does not read texts like OpenAI's; the message names the option
                `needed_for`.
        """
        super().__init__()
        _require_causal(clip, needed_for)
        model = clip.model
        tower: Any = copy.deepcopy(model if isinstance(model, CLIP) else model.text)
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection
        self.logit_scale = copy.deepcopy(model.logit_scale)
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)
        self.requires_grad_(True)

    @property
    def scale(self) -> Tensor:
        """The logit scale, about 100, as a zero-dimensional tensor."""
        return self.logit_scale.float().exp().reshape(())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Compute normalised features (B, E), fp32, of texts of at most the context length."""
        length = tokens_BT.shape[1]
        x_BTD = self.token_embedding(tokens_BT) + self.positional_embedding[:length]
        x_BTD = self.transformer(x_BTD, attn_mask=self.attn_mask[:length, :length])
        # the end token has the largest id
        ends_B = tokens_BT.argmax(dim=1)
        rows_B = torch.arange(len(tokens_BT), device=tokens_BT.device)
        features_BE = self.ln_final(x_BTD[rows_B, ends_B])
        if isinstance(self.text_projection, nn.Linear):
            features_BE = self.text_projection(features_BE)
        elif self.text_projection is not None:
            features_BE = features_BE @ self.text_projection
        return F.normalize(features_BE.float(), dim=-1)


def _require_causal(clip: PretrainedClip, needed_for: str) -> None:
    model: Any = clip.model
    reasons = []
    if not isinstance(model, CLIP | CustomTextCLIP):
        reasons.append(f"that of a {type(model).__name__}")
    elif isinstance(model, CustomTextCLIP) and not isinstance(model.text, TextTransformer):
        reasons.append(f"a {type(model.text).__name__}")
    else:
        tower: Any = model if isinstance(model, CLIP) else model.text
        pool = model.text_pool_type if isinstance(model, CLIP) else tower.pool_type
        if pool != "argmax":
            reasons.append(f"{pool!r} pooling")
        if tower.attn_mask is None:
            reasons.append("attention to later tokens")
        if getattr(tower, "cls_emb", None) is not None:
            reasons.append("a class token")
        if getattr(model, "logit_bias", None) is not None:
            reasons.append("a logit bias")
    if reasons:
        raise ValueError(
            f"{needed_for} needs a text tower like OpenAI's, which is causal and read at its end "
            f"token; {clip.architecture.clip} has {', '.join(reasons)}"
        )


def tokenize_prompts(
    clip: PretrainedClip, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Tokenize each class in each template, int64 (K, M, T), with T of the longest prompt.

    Raises:
        TextTooLongError: for a prompt that is too long for the tower.
    """
    rows = [
        clip.tokenize([template.replace("{c}", name) for template in templates]) for name in classes
    ]
    tokens_KMT = torch.stack(rows)
    # the end token has the largest id, so argmax finds where a prompt ends
    longest = int(tokens_KMT.argmax(dim=-1).max()) + 1
    return tokens_KMT[..., :longest].contiguous()


@torch.no_grad()
def prompt_features(tower: TextTower, prompts_KMT: Tensor) -> Iterator[Tensor]:
    """Yield the features (M, E) of each class's prompts, always in fp32.

    Each class is a separate forward, so that its features do not depend on the other classes.
    """
    device = tower.logit_scale.device
    for prompts_MT in prompts_KMT:
        with torch.autocast(device.type, enabled=False):
            yield tower(prompts_MT.to(device))


def context_features(tower: TextTower, prompts_KMT: Tensor) -> Tensor:
    """Compute one normalised vector per template, (M, E): the mean over the classes (CAR-FT)."""
    total_ME: Tensor | float = 0.0
    for features_ME in prompt_features(tower, prompts_KMT):
        total_ME = total_ME + features_ME
    assert isinstance(total_ME, Tensor), "no class has a prompt"
    return F.normalize(total_ME / len(prompts_KMT), dim=-1)


def head_weight(tower: TextTower, prompts_KMT: Tensor) -> Tensor:
    """Compute the weight (K, E) of these classes' zero-shot head, including the logit scale.

    It corresponds to `rft.clip.head.zero_shot_head`, but for a trained text tower.
    """
    rows = [
        F.normalize(features_ME.mean(dim=0), dim=-1)
        for features_ME in prompt_features(tower, prompts_KMT)
    ]
    return torch.stack(rows) * tower.scale.detach()
