"""The loss terms equal their formulas."""

import torch

from rft.method import losses
from tests.reference import textbook


def test_knowledge_distillation_equals_its_sum():
    student, teacher = torch.randn(6, 5) * 20, torch.randn(6, 5) * 20
    fast = losses.knowledge_distillation(student, teacher, 10)
    torch.testing.assert_close(fast, textbook.kd(student.double(), teacher.double(), 10).float())
    assert fast > 0


def test_knowledge_distillation_of_a_model_from_itself_is_zero():
    logits = torch.randn(4, 7) * 50
    assert losses.knowledge_distillation(logits, logits, 10).abs() < 1e-6


def test_feature_mse_weighs_30_over_dimensions_for_each_squared_distance():
    student, teacher = torch.randn(3, 512), torch.randn(3, 512)
    distance_B = ((student - teacher) ** 2).sum(dim=1)
    torch.testing.assert_close(
        30 * losses.feature_mse(student, teacher), 30 / 512 * distance_B.mean()
    )


def test_losses_are_fp32_whatever_comes_in():
    student, teacher = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    assert losses.feature_mse(student, teacher).dtype == torch.float32
    assert losses.knowledge_distillation(student, teacher, 10).dtype == torch.float32
    assert losses.classification(student, torch.tensor([0, 1, 2])).dtype == torch.float32
