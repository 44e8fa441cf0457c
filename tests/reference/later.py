"""Terms of methods after the paper, one image and one text at a time, following their formulas."""

import math

import torch
from torch import Tensor


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def context_divergence(student: Tensor, teacher: Tensor, contexts: Tensor) -> Tensor:
    """CAR-FT: sum_c p0_c log(p0_c / p_c) of each image; contexts carry the logit scale."""
    found = []
    for own, theirs in zip(student, teacher, strict=True):
        p = torch.stack([unit(own) @ context for context in contexts]).softmax(dim=0)
        p0 = torch.stack([unit(theirs) @ context for context in contexts]).softmax(dim=0)
        found.append((p0 * (p0.log() - p.log())).sum())
    return torch.stack(found).mean()


def random_text_distance(student: Tensor, teacher: Tensor, texts: Tensor) -> Tensor:
    """Lipsum-FT: sum_m (z_m - z0_m)^2 / 2M of each image."""
    found = []
    for own, theirs in zip(student, teacher, strict=True):
        squares = [(unit(own) @ text - unit(theirs) @ text) ** 2 for text in texts]
        found.append(torch.stack(squares).sum() / (2 * len(texts)))
    return torch.stack(found).mean()


def info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """FLYP's loss of a complete batch: two softmaxes per pair."""
    found = []
    for n in range(len(images)):
        across = torch.stack([scale * unit(images[n]) @ unit(text) for text in texts])
        down = torch.stack([scale * unit(image) @ unit(texts[n]) for image in images])
        found.append(-across.log_softmax(dim=0)[n] / 2 - down.log_softmax(dim=0)[n] / 2)
    return torch.stack(found).mean()


def splitmix64(sample: int, key: int) -> int:
    """The mixed bits of a sample and a key, by Python's integers of any size."""
    word = 2**64 - 1
    mixed = (sample * 0x9E3779B97F4A7C15 + key) & word
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & word
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & word
    return mixed ^ (mixed >> 31)


def weighted_mean(weights: list[Tensor]) -> Tensor:
    """The mean of all weights that a run of len(weights) - 1 steps had, by Beta(0.5, 0.5)."""
    steps = len(weights) - 1
    times = [(step + 0.5) / (steps + 1) for step in range(steps + 1)]
    density = [1 / (math.pi * math.sqrt(x * (1 - x))) for x in times]
    return sum(w * theta for w, theta in zip(density, weights, strict=True)) / sum(density)


def text_feature(clip, tokens: Tensor) -> Tensor:
    """The normalised feature of one text by open_clip's own forward."""
    return unit(clip.encode_text(tokens[None])[0])
