"""The text tower by itself, for methods that need texts while they train.

open_clip's own forward reads every text up to the tower's context length. Here a batch of texts may
be as short as its longest one: the tower is causal, so what comes after a text's end changes
nothing (tests/clip/test_text.py), and prompts of 15 tokens cost a fifth of 77.

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
    """A CLIP's text tower and logit scale: copies of the model's, over open_clip's modules."""

    attn_mask: Tensor
    positional_embedding: nn.Parameter

    def __init__(self, clip: PretrainedClip, needed_for: str) -> None:
        """Copy the tower of `clip`.

        Raises:
            ValueError: if it does not read texts as OpenAI's does, naming the option it is
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
        """The factor of the logits, about 100, without a dimension."""
        return self.logit_scale.float().exp().reshape(())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the normalised features (B, E), fp32, of texts of at most the context length."""
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
    """Return the tokens of each class in each template, int64 (K, M, T), T as the longest needs.

    Raises:
        TextTooLongError: for a prompt that the tower does not read to its end.
    """
    rows = [
        clip.tokenize([template.replace("{c}", name) for template in templates]) for name in classes
    ]
    tokens_KMT = torch.stack(rows)
    longest = int(tokens_KMT.argmax(dim=-1).max()) + 1
    return tokens_KMT[..., :longest].contiguous()


@torch.no_grad()
def prompt_features(tower: TextTower, prompts_KMT: Tensor) -> Iterator[Tensor]:
    """Yield the features (M, E) of each class's prompts, fp32 whatever the run's precision.

    A class is a forward of its own, so that its numbers do not depend on which others there are.
    """
    device = tower.logit_scale.device
    for prompts_MT in prompts_KMT:
        with torch.autocast(device.type, enabled=False):
            yield tower(prompts_MT.to(device))


def context_features(tower: TextTower, prompts_KMT: Tensor) -> Tensor:
    """Return one normalised vector (M, E) for each template: the mean over its classes (CAR-FT)."""
    total_ME: Tensor | float = 0.0
    for features_ME in prompt_features(tower, prompts_KMT):
        total_ME = total_ME + features_ME
    assert isinstance(total_ME, Tensor), "no class has a prompt"
    return F.normalize(total_ME / len(prompts_KMT), dim=-1)


def head_weight(tower: TextTower, prompts_KMT: Tensor) -> Tensor:
    """Return the weight (K, E) of these classes' zero-shot head, the logit scale folded in.

    What `rft.clip.head.zero_shot_head` makes of the pre-trained tower, for one that has learnt.
    """
    rows = [
        F.normalize(features_ME.mean(dim=0), dim=-1)
        for features_ME in prompt_features(tower, prompts_KMT)
    ]
    return torch.stack(rows) * tower.scale.detach()
