"""Ensembles of a zero-shot and a fine-tuned model: output-space ensembles, VRF and DaWin. Pure.

Shapes: B or N images, G classes or groups of classes, E embedding, M images of a bank,
J components of a mixture.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# VRF: distance at which both models have equal weight, and scale of the transition
CENTRE, SCALE = 1.5, 0.6
NEAREST_SHARE = 0.001  # VRF: k of the k-th nearest image, as a share of the bank

COMPONENTS = 3  # of DaWin's mixture
TOLERANCE = 1e-4  # change of the mean log-likelihood at which the fit has converged
MOST_STEPS = 1000
STARVED = 1e-9  # components with fewer (weighted) images are dropped
TINY = 10 * torch.finfo(torch.float64).eps
SIMILARITIES = 2**24  # computed at a time; 64 MB in fp32


def mixed_log_probabilities(
    zero_shot_BG: Tensor,
    fine_tuned_BG: Tensor,
    weight_B1: Tensor | float,
    temperatures: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Average the probabilities of two models; return their logarithms, fp64 (B, G).

    p = (1 - w) softmax(z_zs / T_zs) + w softmax(z_ft / T_ft): the output-space ensemble with a
    constant weight, VRF (Zhu et al. 2024, eq. 5) with one weight per image. Logits are those of the
    scored groups only. The sum is computed from logarithms, so that no probability underflows to 0.
    """
    pairs = zip((zero_shot_BG, fine_tuned_BG), temperatures, strict=True)
    zero_shot, fine_tuned = ((z_BG.double() / t).log_softmax(dim=1) for z_BG, t in pairs)
    weight_B1 = torch.as_tensor(weight_B1, dtype=torch.float64, device=zero_shot.device)
    return torch.logaddexp(torch.log1p(-weight_B1) + zero_shot, torch.log(weight_B1) + fine_tuned)


def kth_distance(query_BE: Tensor, bank_ME: Tensor, k: int) -> Tensor:
    """Compute the squared distance (B,) of each unit query to its k-th nearest row of a unit bank.

    Between unit vectors it is 2 - 2 cos, in [0, 4]. It is squared because VRF's constants belong to
    the squared distances of its released code (an exact faiss index). The search is exact: all
    similarities are computed, one block of the bank at a time.
    """
    assert 1 <= k <= len(bank_ME), f"no {k}-th nearest of {len(bank_ME)}"
    best_BK = query_BE.new_empty((len(query_BE), 0))
    for block_ME in bank_ME.split(max(1, SIMILARITIES // max(1, len(query_BE)))):
        both_BK = torch.cat([best_BK, query_BE @ block_ME.T], dim=1)
        best_BK = both_BK.topk(min(k, both_BK.shape[1]), dim=1).values
    return (2 - 2 * best_BK[:, -1]).clamp(0, 4)


def unit(feature_BE: Tensor) -> Tensor:
    """Normalise features to length 1, in fp32 or fp64."""
    return F.normalize(feature_BE if feature_BE.dtype == torch.float64 else feature_BE.float())


def nearest_rank(bank: int, share: float = NEAREST_SHARE) -> int:
    """Compute VRF's k for a bank of `bank` images: floor(share x images), at least 1.

    This is the paper's rule. Its code uses round(1000 x the bank's share of the training images),
    which is 0.08% of the bank for ImageNet.
    """
    return max(1, int(share * bank))


def vrf_weight(distance_B: Tensor, centre: float = CENTRE, scale: float = SCALE) -> Tensor:
    """Compute the fine-tuned model's weight (B,): sigmoid(-(d - centre) / scale), fp64."""
    return torch.sigmoid((centre - distance_B.double()) / scale)


def entropy(logits_NG: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the entropy of each image's probabilities, in nats, fp64 (N,)."""
    log_NG = (logits_NG.double() / temperature).log_softmax(dim=1)
    return -(log_NG.exp() * log_NG).sum(dim=1)


def dawin_coefficients(zero_shot_N: Tensor, fine_tuned_N: Tensor) -> Tensor:
    """Compute the share of the fine-tuned weights for each image of a set, fp64 (N,).

    Oh et al. 2025: exp(-H) measures the confidence of a model, and the share is the fine-tuned
    model's part of both confidences. An offset for the set, the mean of both models' coefficients
    of variation, pulls all shares towards the zero-shot model's part of the mean entropies. An
    image's share therefore depends on the other images of the set.

    Args:
        zero_shot_N: entropies of the zero-shot model, in nats.
        fine_tuned_N: entropies of the fine-tuned model, in nats.

    Raises:
        ValueError: if there are fewer than two images.
    """
    if len(zero_shot_N) < 2:
        raise ValueError(
            "DaWin needs at least two images in a set, because its offset is computed from their "
            "spread"
        )
    zero_shot_N, fine_tuned_N = zero_shot_N.double(), fine_tuned_N.double()
    means = zero_shot_N.mean(), fine_tuned_N.mean()
    # a model that is certain of every image has no spread
    spreads = [
        one_N.std() / mean if mean > 0 else mean
        for one_N, mean in zip((zero_shot_N, fine_tuned_N), means, strict=True)
    ]
    offset = (spreads[0] + spreads[1]) / 2
    total = means[0] + means[1]
    share = means[0] / total if total > 0 else 0.5
    sure_zs_N, sure_ft_N = (-zero_shot_N).exp(), (-fine_tuned_N).exp()
    return (sure_ft_N + offset * share) / (sure_zs_N + sure_ft_N + offset)


@dataclass(frozen=True)
class BetaMixture:
    """A mixture of Beta distributions on (0, 1); all fields are fp64 (J,)."""

    weight_J: Tensor
    a_J: Tensor
    b_J: Tensor

    @property
    def means(self) -> Tensor:
        """Mean of each component, fp64 (J,)."""
        return self.a_J / (self.a_J + self.b_J)

    def log_parts(self, value_N: Tensor) -> Tensor:
        """Compute log(weight x density) of each component, (N, J)."""
        a_J, b_J = self.a_J, self.b_J
        log_beta_J = torch.lgamma(a_J) + torch.lgamma(b_J) - torch.lgamma(a_J + b_J)
        rising_NJ = (a_J - 1) * value_N.log()[:, None]
        falling_NJ = (b_J - 1) * (1 - value_N).log()[:, None]
        return rising_NJ + falling_NJ - log_beta_J + self.weight_J.log()

    def assign(self, value_N: Tensor) -> Tensor:
        """Find the most probable component of each value, the first of equal ones, int64 (N,)."""
        return self.log_parts(value_N).argmax(dim=1)

    @classmethod
    def of_moments(cls, value_N: Tensor, share_NJ: Tensor) -> "BetaMixture":
        """Fit components to the means and variances of weighted values.

        Variances are limited to a quarter of the largest variance that a Beta distribution with
        that mean can have. Components in which no image has a share are dropped.
        """
        count_J = share_NJ.sum(dim=0)
        share_NJ, count_J = share_NJ[:, count_J > STARVED], count_J[count_J > STARVED] + TINY
        mean_J = value_N @ share_NJ / count_J
        variance_J = value_N.square() @ share_NJ / count_J - mean_J.square()
        bound_J = mean_J * (1 - mean_J)
        variance_J = torch.minimum(variance_J, bound_J / 4) + TINY
        factor_J = bound_J / (variance_J + 1e-10) - 1
        return cls(count_J / count_J.sum(), factor_J * mean_J, factor_J * (1 - mean_J))


def fit_beta_mixture(value_N: Tensor, components: int = COMPONENTS) -> BetaMixture:
    """Fit a mixture of Beta distributions to values in (0, 1) by expectation maximisation.

    Moments of the weighted values replace the maximisation, as in DaWin's released code, which
    starts from k-means with three random seeds and keeps the most likely result. Here k-means
    starts at quantiles, so that the same values give the same mixture. If there are fewer distinct
    values than components, there are fewer components.

    Raises:
        ValueError: if a value is not in (0, 1).
    """
    value_N = value_N.double()
    if not bool(((value_N > 0) & (value_N < 1)).all()):
        raise ValueError("the values of a mixture of Beta distributions must be between 0 and 1")
    label_N = kmeans(value_N, min(components, len(value_N.unique())))
    share_NJ = F.one_hot(label_N).double() + TINY
    return improve(value_N, BetaMixture.of_moments(value_N, share_NJ))


def improve(value_N: Tensor, mixture: BetaMixture) -> BetaMixture:
    """Repeat expectation and moments until the mean log-likelihood converges."""
    before = -torch.inf
    for _ in range(MOST_STEPS):
        part_NJ = mixture.log_parts(value_N)
        total_N = part_NJ.logsumexp(dim=1)
        mixture = BetaMixture.of_moments(value_N, (part_NJ - total_N[:, None]).exp())
        now = float(total_N.mean())
        if abs(now - before) < TOLERANCE:
            break
        before = now
    return mixture


def kmeans(value_N: Tensor, clusters: int) -> Tensor:
    """Assign each value to a cluster by Lloyd's algorithm from quantiles, int64 (N,).

    There must be at least `clusters` distinct values.
    """
    different = value_N.unique()
    at_J = (torch.arange(clusters, device=value_N.device) + 0.5) / clusters * len(different)
    centre_J = different[at_J.long()]
    while True:
        edges = (centre_J[1:] + centre_J[:-1]) / 2
        label_N = torch.bucketize(value_N, edges)
        count_J = torch.bincount(label_N, minlength=clusters)
        # at first no cluster is empty, because each centre is one of the values
        sum_J = torch.zeros_like(centre_J).index_add_(0, label_N, value_N)
        moved_J = torch.where(count_J > 0, sum_J / count_J.clamp(min=1), centre_J)
        if torch.equal(moved_J, centre_J):
            return label_N
        centre_J = moved_J
