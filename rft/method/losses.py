"""The loss terms (eq. 2 and 3) and those of later methods, always computed in fp32.

Shapes: B images, K classes, E embedding, M texts.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rft.config import MethodConfig

Term = TypeVar("Term", Tensor, float)


def total(method: MethodConfig, terms: Mapping[str, Term]) -> Term:
    """Combine named terms, tensors or numbers, into the loss (eq. 2 and 3).

    `kd` and `mse` are always present, zero if the method does not use them; other terms only if it
    does.
    """
    fits = terms["contrastive" if method.loss == "contrastive" else "ce"]
    loss = fits + method.kd_weight * terms["kd"] + distillation(method, terms)
    if method.context_weight > 0:
        loss = loss + method.context_weight * terms["context"]
    if method.lipsum_weight > 0:
        loss = loss + method.lipsum_weight * terms["lipsum"]
    return loss


def distillation(method: MethodConfig, terms: Mapping[str, Term]) -> Term:
    """Add the distillation terms on the same images: features, and probabilities."""
    features = method.distill_weight * terms["mse"]
    return features + method.head_weight * terms["head"] if method.head_weight > 0 else features


def classification(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross-entropy without label smoothing."""
    return F.cross_entropy(logits_BK.float(), labels_B)


def feature_mse(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """Mean squared difference over images and feature dimensions.

    Features are projected but not normalised; the paper's beta = 30 belongs to this mean.
    """
    return F.mse_loss(student_BE.float(), teacher_BE.float())


def knowledge_distillation(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits softened by T, mean over images.

    Hinton et al. 2015, as in the released code; the paper's eq. 3 has the arguments in the opposite
    order.
    """
    # T^2 cancels the 1 / T^2 of softened gradients, so that the weight fits any T. batchmean,
    # because "mean" would also divide by the number of classes.
    student_BK = (student_BK.float() / temperature).log_softmax(dim=1)
    teacher_BK = (teacher_BK.float() / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(student_BK, teacher_BK, reduction="batchmean", log_target=True)


def context_divergence(student_BE: Tensor, teacher_BE: Tensor, contexts_ME: Tensor) -> Tensor:
    """CAR-FT's term: KL(pre-trained || student) over the contexts of an image, mean over images.

    Mao et al. 2024: p = softmax(s f^ C^T), where a context is a prompt template, independent of the
    class. The abstract names a KL divergence without its direction, and no code of the authors was
    found. Direction and weight 1 are taken from the only re-implementation that we found, a
    baseline in domain-generalisation code; it omits s in the softmax, which the formula has.

    Args:
        student_BE: features on the clean images.
        teacher_BE: the pre-trained model's.
        contexts_ME: normalised text features of the contexts, times the logit scale s.
    """
    with torch.autocast(student_BE.device.type, enabled=False):
        student_BM, teacher_BM = (
            F.normalize(features_BE.float(), dim=-1) @ contexts_ME.T
            for features_BE in (student_BE, teacher_BE)
        )
    return knowledge_distillation(student_BM, teacher_BM, temperature=1)


def random_text_distance(student_BE: Tensor, teacher_BE: Tensor, texts_ME: Tensor) -> Tensor:
    """Lipsum-FT's term: |s (f^ - f0^) Z^T|^2 / 2M, mean over images.

    Nam et al. 2024, as in its released code: half the mean square, over random texts, of the
    difference between an image's logits and the pre-trained model's.

    Args:
        student_BE: features on the clean images.
        teacher_BE: the pre-trained model's.
        texts_ME: normalised features of the texts, times the logit scale s.
    """
    moved_BE = F.normalize(student_BE.float(), dim=-1) - F.normalize(teacher_BE.float(), dim=-1)
    with torch.autocast(student_BE.device.type, enabled=False):
        return (moved_BE @ texts_ME.T).square().mean() / 2
