"""The streaming CAM equals the textbook's full relevance matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.method import relevance
from tests.conftest import build_model
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
    # the largest patch of an image is 1, so this is one part in a million of it
    difference = (relevance.normalise(fast) - relevance.normalise(slow)).abs().max()
    assert difference < 1e-6
    assert (slow.amax(dim=1) > 0).sum() > 3, "most maps must show something"


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
