"""The loss terms (eq. 2 and 3) and those of later methods, fp32 whatever comes in.

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
    """Return the loss of its terms, tensors or numbers (eq. 2 and 3), by their names.

    `kd` and `mse` are there always, zero where the method has none; the others where it has them.
    """
    fits = terms["contrastive" if method.loss == "contrastive" else "ce"]
    loss = fits + method.kd_weight * terms["kd"] + distillation(method, terms)
    if method.context_weight > 0:
        loss = loss + method.context_weight * terms["context"]
    if method.lipsum_weight > 0:
        loss = loss + method.lipsum_weight * terms["lipsum"]
    return loss


def distillation(method: MethodConfig, terms: Mapping[str, Term]) -> Term:
    """Add up the distillation on the same images: of the features, and of the probabilities."""
    features = method.distill_weight * terms["mse"]
    return features + method.head_weight * terms["head"] if method.head_weight > 0 else features


def classification(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return the mean cross-entropy, without label smoothing."""
    return F.cross_entropy(logits_BK.float(), labels_B)


def feature_mse(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """Return the mean over images and feature dimensions of the squared difference.

    Features are projected and not normalised; the paper's beta = 30 belongs to this mean.
    """
    return F.mse_loss(student_BE.float(), teacher_BE.float())


def knowledge_distillation(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of the logits softened by T, mean over the images.

    Hinton et al. 2015, as the released code has it; the paper's eq. 3 writes the arguments the
    other way round.
    """
    # T^2 undoes the 1 / T^2 of a softened gradient, so that the weight fits any T
    # batchmean, because "mean" divides by the number of classes too
    student_BK = (student_BK.float() / temperature).log_softmax(dim=1)
    teacher_BK = (teacher_BK.float() / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(student_BK, teacher_BK, reduction="batchmean", log_target=True)


def context_divergence(student_BE: Tensor, teacher_BE: Tensor, contexts_ME: Tensor) -> Tensor:
    """Return CAR-FT's term: KL(pre-trained || student) of the contexts of an image, their mean.

    Mao et al. 2024: p = softmax(s f^ C^T), where a context is a prompt template, whatever the
    class. The abstract names a KL divergence and no direction, and no code of the authors was
    found. Direction and weight 1 are those of the one re-implementation that we found, a baseline
    in domain-generalisation code; it leaves s out of the softmax, which the formula has.

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
    """Return Lipsum-FT's term: |s (f^ - f0^) Z^T|^2 / 2M, the mean over the images.

    Nam et al. 2024, as its released code has it: half the mean square over random texts by which an
    image's logits differ from the pre-trained model's.

    Args:
        student_BE: features on the clean images.
        teacher_BE: the pre-trained model's.
        texts_ME: normalised features of the texts, times the logit scale s.
    """
    moved_BE = F.normalize(student_BE.float(), dim=-1) - F.normalize(teacher_BE.float(), dim=-1)
    with torch.autocast(student_BE.device.type, enabled=False):
        return (moved_BE @ texts_ME.T).square().mean() / 2
