"""The streaming CAM equals the textbook's full relevance matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.clip import load
from rft.clip.classifier import Classifier
from rft.method import relevance
from tests.clip.test_vit import build_tower
from tests.conftest import build_model, sharpen
from tests.reference import textbook


def fast_relevance(model, images, labels, kind=relevance.label_relevance, recompute=False):
    taps = []
    features = model.features(model.patches(images), taps=taps, recompute=recompute)
    logits = model.logits(features)
    return kind(logits, labels, taps), logits


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["label_relevance", "grad_cam"])
def test_equals_the_textbook(images_BCHW, labels_B, kind, recompute):
    model = build_model()
    fast, _ = fast_relevance(model, images_BCHW, labels_B, getattr(relevance, kind), recompute)
    normalised = textbook.normalise_images(model, images_BCHW)
    slow_kind = {"label_relevance": textbook.relevance, "grad_cam": textbook.grad_cam}[kind]
    slow = torch.stack(
        [slow_kind(model, normalised[n], label) for n, label in enumerate(labels_B.tolist())]
    )
    # the largest patch of an image is 1, so this is one part in a million of it; a larger tower
    # rounds more often
    difference = (relevance.normalise(fast) - relevance.normalise(slow)).abs().max()
    assert difference < 1e-6
    assert (slow.amax(dim=1) > 0).sum() > 3, "most maps must show something"


@pytest.mark.slow
@pytest.mark.parametrize(("sharpness", "tolerance"), [(1, 1e-5), (4, 1e-4)])
def test_a_large_towers_masks_equal_the_textbooks(sharpness, tolerance):
    """ViT-B/32's width, heads and tokens; sharper attention loses more digits to rounding."""
    name = "ViT-B-32-quickgelu"
    visual, architecture = build_tower(name), load.architecture_of(name)
    head = torch.nn.Linear(architecture.embed_dim, 10, bias=False)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.normal_(std=100 / architecture.embed_dim**0.5, generator=draws)
        for block in visual.transformer.resblocks:
            queries_and_keys = block.attn.in_proj_weight[: 2 * block.attn.embed_dim]
            queries_and_keys *= sharpness
    model = Classifier(visual, head, architecture)
    images = torch.randint(256, (2, 3, 224, 224), generator=draws, dtype=torch.uint8)
    fast = relevance.normalise(fast_relevance(model, images, torch.tensor([0, 1]))[0])
    normalised = textbook.normalise_images(model, images)
    slow = torch.stack([textbook.relevance(model, normalised[n], n) for n in range(2)])
    slow = relevance.normalise(slow)
    assert (fast - slow).abs().max() < tolerance
    for threshold in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        assert torch.equal(fast > threshold, slow > threshold)


@pytest.mark.parametrize("kind", ["label_relevance", "grad_cam"])
def test_equals_the_textbook_where_patches_differ(images_BCHW, labels_B, kind):
    model = sharpen(build_model())
    fast, _ = fast_relevance(model, images_BCHW, labels_B, getattr(relevance, kind))
    normalised = textbook.normalise_images(model, images_BCHW)
    slow_kind = {"label_relevance": textbook.relevance, "grad_cam": textbook.grad_cam}[kind]
    for n, label in enumerate(labels_B.tolist()):
        slow_P = slow_kind(model, normalised[n], label)
        torch.testing.assert_close(fast[n] / slow_P.max(), slow_P / slow_P.max(), rtol=0, atol=1e-4)
    assert (fast >= 0).all()
    if kind == "grad_cam":
        assert (fast == 0).any(), "a patch below zero, which counts as zero"
    # the least relevant patch has little of the relevance of the most relevant one
    assert (relevance.normalise(fast).amin(dim=1) < 0.6).all()


def test_a_batch_worked_off_in_parts_is_the_same(images_BCHW, labels_B, monkeypatch):
    model = build_model()
    together, _ = fast_relevance(model, images_BCHW, labels_B)
    tokens, heads = 17, model.visual.transformer.resblocks[0].attn.num_heads
    monkeypatch.setattr(relevance, "MAP_BYTES", 2 * 4 * heads * tokens**2)
    parts, _ = fast_relevance(model, images_BCHW[:5], labels_B[:5])
    torch.testing.assert_close(parts, together[:5], rtol=1e-5, atol=1e-7)


def test_the_loss_goes_backward_without_the_maps_hooks(images_BCHW, labels_B, monkeypatch):
    model = build_model()
    calls = []
    real = relevance.propagate
    monkeypatch.setattr(relevance, "propagate", lambda *a: (calls.append(1), real(*a)))
    _, logits = fast_relevance(model, images_BCHW, labels_B)
    assert len(calls) == 3, "one call for each layer"
    logits.sum().backward()
    assert len(calls) == 3


def test_leaves_parameter_gradients_alone_and_keeps_the_graph(images_BCHW, labels_B):
    model = build_model()
    _, logits = fast_relevance(model, images_BCHW, labels_B)
    assert all(parameter.grad is None for parameter in model.parameters())
    logits.sum().backward()
    assert model.visual.proj.grad is not None


def test_an_image_does_not_depend_on_its_batch(images_BCHW, labels_B):
    model = build_model()
    together, _ = fast_relevance(model, images_BCHW, labels_B)
    alone, _ = fast_relevance(model, images_BCHW[2:3], labels_B[2:3])
    torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-7)


def test_logit_scale_changes_the_map(images_BCHW, labels_B):
    # the rule multiplies (I + A): an unscaled head would give other masks
    model = build_model()
    scaled, _ = fast_relevance(model, images_BCHW, labels_B)
    with torch.no_grad():
        model.head.weight /= 100
    unscaled, _ = fast_relevance(model, images_BCHW, labels_B)
    assert not torch.allclose(relevance.normalise(scaled), relevance.normalise(unscaled), atol=1e-3)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 4), patches=st.integers(1, 20))
def test_normalised_relevance_has_maximum_one(seed, batch, patches):
    values = torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed)) + 1e-3
    normalised = relevance.normalise(values)
    torch.testing.assert_close(normalised.amax(dim=1), torch.ones(batch), atol=1e-4, rtol=0)
    assert (normalised >= 0).all()


def test_an_image_without_relevance_stays_zero():
    assert (relevance.normalise(torch.zeros(2, 9)) == 0).all()
