"""The loss terms (eq. 2, section 3.2)."""

import torch.nn.functional as F
from torch import Tensor


def feature_mse(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """Return the mean over images and feature dimensions of the squared difference, fp32.

    Features are projected and not normalised; the paper's beta = 30 belongs to this mean.
    """
    return F.mse_loss(student_BE.float(), teacher_BE.float())


def classification(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return the mean cross-entropy, fp32, without label smoothing."""
    return F.cross_entropy(logits_BK.float(), labels_B)
