"""The streaming CAM equals the textbook's full relevance matrix."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.method import relevance
from tests.conftest import build_model
from tests.reference import textbook


def fast_relevance(model, images, labels):
    taps = []
    features = model.features(model.patches(images), taps=taps)
    logits = model.logits(features)
    return relevance.label_relevance(logits, labels, taps), logits


def test_equals_textbook_in_fp32(images_BCHW, labels_B):
    model = build_model()
    fast, _ = fast_relevance(model, images_BCHW, labels_B)
    normalised = textbook.normalise_images(model, images_BCHW)
    for n, label in enumerate(labels_B.tolist()):
        slow = textbook.relevance(model, normalised[n], label)
        torch.testing.assert_close(fast[n], slow, rtol=1e-5, atol=1e-6)
        assert slow.max() > 0


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


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 4), patches=st.integers(1, 20))
def test_normalised_relevance_has_maximum_one(seed, batch, patches):
    values = torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed)) + 1e-3
    normalised = relevance.normalise(values)
    torch.testing.assert_close(normalised.amax(dim=1), torch.ones(batch), atol=1e-4, rtol=0)
    assert (normalised >= 0).all()


def test_an_image_without_relevance_stays_zero():
    assert (relevance.normalise(torch.zeros(2, 9)) == 0).all()
