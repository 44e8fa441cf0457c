"""Terms of methods after the paper equal their formulas, text by text and image by image."""

import torch

from rft.method import contrastive, losses
from rft.recipes import build
from tests.reference import later


def features(seed: int, rows: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 12, generator=generator) * 3


def close(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Values and gradients agree to 1e-5 of the largest."""
    assert (fast - slow).abs() <= 1e-5 * slow.abs()
    ours, theirs = (torch.autograd.grad(loss, inputs) for loss in (fast, slow))
    for one, two in zip(ours, theirs, strict=True):
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()


def test_the_divergence_of_contexts_is_its_sum():
    student, teacher = features(0).requires_grad_(), features(1)
    contexts = 20 * torch.nn.functional.normalize(features(2, rows=7), dim=1)
    fast = losses.context_divergence(student, teacher, contexts)
    assert fast > 0.1
    close(fast, later.context_divergence(student, teacher, contexts), [student])


def test_the_divergence_of_contexts_is_from_the_pretrained_model():
    # KL(p0 || p) is large where p lacks mass of p0, not where p0 lacks mass of p
    contexts = 20 * torch.eye(3)
    one, both = torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 1, 0]])
    misses = losses.context_divergence(one, both, contexts)
    assert misses > 3 * losses.context_divergence(both, one, contexts) > 0


def test_a_model_has_no_distance_from_itself():
    own, texts = features(0), features(2, rows=80)
    assert losses.context_divergence(own, own, texts).abs() < 1e-6
    assert losses.random_text_distance(own, own, texts) == 0
    # a similarity does not depend on the length of a feature
    assert losses.context_divergence(2 * own, own, texts).abs() < 1e-5
    assert losses.random_text_distance(2 * own, own, texts) < 1e-10


def test_the_distance_of_random_texts_is_its_sum():
    student, teacher = features(0).requires_grad_(), features(1)
    texts = 14 * torch.nn.functional.normalize(features(2, rows=80), dim=1)
    fast = losses.random_text_distance(student, teacher, texts)
    close(fast, later.random_text_distance(student, teacher, texts), [student])


def test_the_contrastive_loss_is_two_softmaxes_for_each_pair():
    images, texts = features(0).requires_grad_(), features(1).requires_grad_()
    scale = torch.tensor(9.0, requires_grad=True)
    unit = [torch.nn.functional.normalize(one, dim=1) for one in (images, texts)]
    fast = contrastive.info_nce(*unit, *unit, scale, 0)
    close(fast, later.info_nce(images, texts, scale), [images, texts, scale])


def test_ranks_parts_of_the_contrastive_loss_have_its_mean():
    images, texts = (torch.nn.functional.normalize(features(n), dim=1) for n in (0, 1))
    scale = torch.tensor(9.0)
    parts = [
        contrastive.info_nce(images[n : n + 2], texts[n : n + 2], images, texts, scale, n)
        for n in (0, 2, 4)
    ]
    whole = contrastive.info_nce(images, texts, images, texts, scale, 0)
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_terms_are_fp32_under_autocast():
    student, teacher, texts = features(0), features(1), features(2, rows=80)
    unit = [torch.nn.functional.normalize(one, dim=1) for one in (student, teacher)]

    def terms() -> list[torch.Tensor]:
        return [
            losses.context_divergence(student, teacher, texts),
            losses.random_text_distance(student, teacher, texts),
            contrastive.info_nce(*unit, *unit, torch.tensor(9.0), 0),
        ]

    plain = terms()
    with torch.autocast("cpu", torch.bfloat16):
        assert terms() == plain


def test_templates_are_splitmix64s():
    samples = torch.tensor([0, 1, 2, 77, 1_281_166, 2**31])
    for key in (0, 5, 2**63 - 1):
        expected = [(later.splitmix64(n, key) & (2**63 - 1)) % 80 for n in samples.tolist()]
        assert contrastive.draw_templates(samples, 80, key).tolist() == expected


def test_templates_are_drawn_evenly_and_anew():
    samples = torch.arange(80_000)
    first, second = (contrastive.draw_templates(samples, 80, key) for key in (11, 12))
    counts = torch.stack([first, second]).flatten().bincount(minlength=80)
    # 2,000 expected of each, with a standard deviation of 44
    assert counts.min() > 1780
    assert counts.max() < 2220
    # the same one again only by chance
    assert abs((first == second).float().mean() - 1 / 80) < 0.003
    # nor are neighbours equal
    assert abs((first[1:] == first[:-1]).float().mean() - 1 / 80) < 0.003


def test_the_loss_is_the_weighted_sum_of_its_terms():
    method = build("car-ft").method
    terms = {"ce": 2.0, "kd": 0.0, "mse": 0.0, "context": 0.5}
    assert losses.total(method, terms) == 2.5
    terms = {"contrastive": 3.0, "kd": 0.0, "mse": 0.0}
    assert losses.total(build("flyp").method, terms) == 3.0
    terms = {"ce": 2.0, "kd": 0.0, "mse": 0.0, "lipsum": 0.25}
    assert losses.total(build("lipsum-ft").method, terms) == 2.25
