"""The zero-shot head as in the papers: one prompt at a time, with explicit sums."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def length(vector: list[float]) -> float:
    return math.sqrt(sum(value * value for value in vector))


def head_weight(clip, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Rows of the head (K, E), float64: each is a class's mean prompt, of unit length, scaled."""
    scale = math.exp(clip.model.logit_scale.item())
    rows = []
    for name in classes:
        prompts = []
        for template in templates:
            before, after = template.split("{c}")
            with torch.no_grad():
                text = clip.model.encode_text(clip.tokenize([before + name + after]))[0].tolist()
            prompts.append([value / length(text) for value in text])
        mean = [sum(values) / len(prompts) for values in zip(*prompts, strict=True)]
        rows.append([scale * value / length(mean) for value in mean])
    return torch.tensor(rows, dtype=torch.float64)
