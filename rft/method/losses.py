"""The loss terms (eq. 2 and 3), fp32 whatever the precision of what comes in."""

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from rft.config import MethodConfig

Term = TypeVar("Term", Tensor, float)


def total(method: MethodConfig, cross_entropy: Term, kd: Term, mse: Term, head: Term) -> Term:
    """Return the loss of its terms, tensors or numbers (eq. 2 and 3); an absent term is zero."""
    return cross_entropy + method.kd_weight * kd + distillation(method, mse, head)


def distillation(method: MethodConfig, mse: Term, head: Term) -> Term:
    """Add up the distillation on the same images: of the features, and of the probabilities."""
    features = method.distill_weight * mse
    # not added where it has no weight: `head` is then a zero that costs a kernel
    return features + method.head_weight * head if method.head_weight > 0 else features


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
