"""Texts for the methods that train with them; `build` prepares them once.

CAR-FT's contexts are constants. Lipsum-FT's random texts are embedded anew in each step by the
frozen text tower. FLYP trains that tower (rft/train/contrastive.py).

Shapes: M texts, T tokens, E embedding, K classes.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rft import rng
from rft.clip.classifier import module_sha256
from rft.clip.load import PretrainedClip
from rft.clip.text import TextTower, context_features, tokenize_prompts
from rft.config import MethodConfig
from rft.train.contrastive import Contrast

TEXTS = 80  # of Lipsum-FT's paper, in each step
LENGTH = 8  # their tokens, between start and end


class RandomTexts(nn.Module):
    """Lipsum-FT's random texts and the frozen text tower that embeds them."""

    def __init__(self, clip: PretrainedClip, tower: TextTower) -> None:
        """Freeze `tower`, a copy of the text tower of `clip`."""
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        empty_T = clip.tokenize([""])[0]
        # start and end of an empty text, before the padding; the end token has the largest id
        self.start, self.end = int(empty_T[0]), int(empty_T[1])
        # a tiny tower may read fewer tokens
        self.length = min(LENGTH, len(empty_T) - 2)

    def draw(self, seed: int, step: int) -> Tensor:
        """Draw the tokens (M, T) of a step's texts, on the CPU; the same on every rank.

        Uniform over all tokens except start and end, as in the released code.
        """
        generator = rng.torch_generator(seed, "random texts", step)
        shape = (TEXTS, self.length)
        words_MT = torch.randint(self.end - 1, shape, generator=generator)
        words_MT = words_MT + (words_MT >= self.start)
        start_M1, end_M1 = torch.full((TEXTS, 1), self.start), torch.full((TEXTS, 1), self.end)
        return torch.cat([start_M1, words_MT, end_M1], dim=1)

    @torch.no_grad()
    def forward(self, tokens_MT: Tensor) -> Tensor:
        """Compute their features (M, E), times the logit scale."""
        return self.tower(tokens_MT) * self.tower.scale


class Texts(NamedTuple):
    """The texts of a method; None for those that it does not need."""

    contexts_ME: Tensor | None = None
    """Features of CAR-FT's contexts, times the logit scale."""
    random: RandomTexts | None = None
    contrast: Contrast | None = None
    tower_sha256: str = ""
    """Hash of the pre-trained text tower, if the method needs texts."""

    def fingerprint(self) -> dict[str, str]:
        """Hash of the text tower, for the run's fingerprint; empty without texts."""
        return {"text_sha256": self.tower_sha256} if self.tower_sha256 else {}


def build(
    clip: PretrainedClip, classes: Sequence[str], templates: Sequence[str], method: MethodConfig
) -> Texts:
    """Prepare the texts of a method; `clip` is on the compute device.

    Raises:
        ValueError: if the text tower is not of OpenAI's kind, or there are too few prompt templates
            for contexts.
    """
    options = {
        "--method.context-weight": method.context_weight > 0,
        "--method.lipsum-weight": method.lipsum_weight > 0,
        "--method.loss contrastive": method.loss == "contrastive",
    }
    needed_for = next((option for option, needs in options.items() if needs), None)
    if needed_for is None:
        return Texts()
    tower = TextTower(clip, needed_for)
    contexts_ME = random = contrast = None
    if method.context_weight > 0:
        contexts_ME = _contexts(clip, tower, classes, templates)
    if method.lipsum_weight > 0:
        random = RandomTexts(clip, copy.deepcopy(tower))
    if method.loss == "contrastive":
        contrast = Contrast(copy.deepcopy(tower), tokenize_prompts(clip, classes, templates))
    return Texts(contexts_ME, random, contrast, module_sha256(tower))


@torch.no_grad()
def _contexts(
    clip: PretrainedClip, tower: TextTower, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    if len(templates) < 2:
        raise ValueError(
            "--method.context-weight needs two or more prompt templates as contexts, but the "
            "set's manifest has one: pack or index the set again with more in --classes"
        )
    return context_features(tower, tokenize_prompts(clip, classes, templates)) * tower.scale
