"""Merges and ensembles, one tensor, image and component at a time, in plain Python.

Slow and obvious on purpose; `rft.method.averaging` and `rft.method.ensembling` must equal it.
"""

import math
from collections.abc import Sequence

Vector = Sequence[float]


def cosine(one: Vector, other: Vector) -> float:
    """The cosine of two vectors; 0 if one of them is zero."""
    norms = math.hypot(*one) * math.hypot(*other)
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / norms if norms else 0.0


def model_stock(start: Vector, models: Sequence[Vector]) -> tuple[list[float], float]:
    """The Model Stock of one tensor, and its ratio."""
    deltas = [[a - b for a, b in zip(model, start, strict=True)] for model in models]
    n = len(models)
    cosines = [cosine(deltas[i], deltas[j]) for i in range(n) for j in range(i + 1, n)]
    c = max(math.fsum(cosines) / len(cosines), 0.0)
    t = n * c / (1 + (n - 1) * c)
    means = [math.fsum(column) / n for column in zip(*models, strict=True)]
    return [t * mean + (1 - t) * base for mean, base in zip(means, start, strict=True)], t


def softmax(logits: Vector, temperature: float = 1.0) -> list[float]:
    top = max(logits) / temperature
    powers = [math.exp(logit / temperature - top) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


def mixed(zero_shot: Vector, fine_tuned: Vector, weight: float, *temperatures: float) -> Vector:
    """Probabilities of one image: those of both models, the fine-tuned one's with `weight`."""
    t_zs, t_ft = temperatures or (1.0, 1.0)
    pairs = zip(softmax(zero_shot, t_zs), softmax(fine_tuned, t_ft), strict=True)
    return [(1 - weight) * a + weight * b for a, b in pairs]


def kth_distance(query: Vector, bank: Sequence[Vector], k: int) -> float:
    """Squared distance between unit vectors to the k-th nearest of a bank."""
    length = math.hypot(*query)
    found = []
    for feature in bank:
        norm = math.hypot(*feature)
        pairs = zip(query, feature, strict=True)
        found.append(math.fsum((a / length - b / norm) ** 2 for a, b in pairs))
    return sorted(found)[k - 1]


def vrf_weight(distance: float, centre: float = 1.5, scale: float = 0.6) -> float:
    return 1 / (1 + math.exp((distance - centre) / scale))


def entropy(logits: Vector, temperature: float = 1.0) -> float:
    return -math.fsum(p * math.log(p) for p in softmax(logits, temperature) if p > 0)


def dawin_coefficients(zero_shot: Sequence[Vector], fine_tuned: Sequence[Vector]) -> list[float]:
    """The fine-tuned model's share for each image of a set, from the complete set's entropies."""
    h_zs, h_ft = [entropy(z) for z in zero_shot], [entropy(z) for z in fine_tuned]
    mean_zs, mean_ft = (math.fsum(h) / len(h) for h in (h_zs, h_ft))
    offset = (_sd(h_zs) / mean_zs + _sd(h_ft) / mean_ft) / 2
    share = mean_zs / (mean_zs + mean_ft)
    return [
        (math.exp(-b) + offset * share) / (math.exp(-a) + math.exp(-b) + offset)
        for a, b in zip(h_zs, h_ft, strict=True)
    ]


def _sd(values: Vector) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def beta_log_density(x: float, a: float, b: float) -> float:
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return (a - 1) * math.log(x) + (b - 1) * math.log(1 - x) - log_beta


def beta_moments(values: Vector, shares: Vector) -> tuple[float, float]:
    """a and b of the Beta distribution with the weighted mean and variance of some values."""
    eps = 10 * 2.0**-52
    count = math.fsum(shares) + eps
    mean = math.fsum(s * v for s, v in zip(shares, values, strict=True)) / count
    square = math.fsum(s * v * v for s, v in zip(shares, values, strict=True)) / count
    variance = min(square - mean**2, mean * (1 - mean) / 4) + eps
    factor = mean * (1 - mean) / (variance + 1e-10) - 1
    return factor * mean, factor * (1 - mean)
