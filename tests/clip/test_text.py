"""The text tower gives open_clip's features, for short texts and for prompts."""

import dataclasses
import types
from typing import Any

import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import nn

from rft.clip.head import zero_shot_head
from rft.clip.text import TextTower, context_features, head_weight, tokenize_prompts
from tests.conftest import ARCHITECTURE, NAMES, TEMPLATES, VOCABULARY, build_clip
from tests.reference import later


def test_short_texts_have_the_features_of_padded_ones():
    clip = build_clip()
    tower, prompts = TextTower(clip, "a test"), tokenize_prompts(clip, NAMES, TEMPLATES)
    # start, a, a, blue, grey, end
    assert prompts.shape == (5, 3, 6)
    for name, tokens_MT in zip(NAMES, prompts, strict=True):
        padded = clip.tokenize([template.replace("{c}", name) for template in TEMPLATES])
        assert padded.shape[1] == 12
        for found, text in zip(tower(tokens_MT), padded, strict=True):
            expected = later.text_feature(clip.model, text)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_head_is_the_zero_shot_head():
    clip = build_clip()
    tower = TextTower(clip, "a test")
    with torch.no_grad():
        for parameter in (*clip.model.parameters(), *tower.parameters()):
            parameter.mul_(1.1)  # a trained tower with a logit scale
    found = head_weight(tower, tokenize_prompts(clip, NAMES, TEMPLATES))
    expected = zero_shot_head(clip, NAMES, TEMPLATES).weight
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad


def test_a_context_is_a_templates_mean_over_classes():
    clip = build_clip()
    prompts = tokenize_prompts(clip, NAMES, TEMPLATES)
    found = context_features(TextTower(clip, "a test"), prompts)
    for m in range(len(TEMPLATES)):
        texts = [clip.tokenize([TEMPLATES[m].replace("{c}", name)])[0] for name in NAMES]
        mean = torch.stack([later.text_feature(clip.model, text) for text in texts]).mean(dim=0)
        torch.testing.assert_close(found[m], later.unit(mean), rtol=1e-5, atol=1e-6)


def test_a_tower_is_a_copy_with_gradients():
    clip = build_clip()
    tower = TextTower(clip, "a test")
    tower(clip.tokenize(["red"])).sum().backward()
    # the feature loss does not depend on the scale
    names = [n for n, p in tower.named_parameters() if p.grad is None]
    assert names == ["logit_scale"]
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_features_are_fp32_under_autocast():
    clip = build_clip()
    tower = TextTower(clip, "a test")
    with torch.autocast("cpu", torch.bfloat16):
        assert tower(clip.tokenize(["red"])).dtype == torch.float32


def custom(**text: Any) -> Any:
    config = {"context_length": 12, "vocab_size": len(VOCABULARY), "width": 16, "heads": 2}
    return CustomTextCLIP(12, ARCHITECTURE.vision_cfg, {**config, "layers": 1, **text})


def test_a_custom_tower_of_the_same_kind_is_read_too():
    clip = dataclasses.replace(build_clip(), model=custom(proj_type="linear").eval())
    tokens = clip.tokenize(["a blue grey", "red"])
    found = TextTower(clip, "a test")(tokens[:, :6])
    expected = torch.stack([later.text_feature(clip.model, row) for row in tokens])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


OTHERS = {
    "bidirectional": (lambda: custom(no_causal_mask=True), "attention to later tokens"),
    "read at its last token": (lambda: custom(pool_type="last"), "'last' pooling"),
    "with a class token": (lambda: custom(embed_cls=True), "a class token"),
    "not open_clip's": (lambda: types.SimpleNamespace(), "that of a SimpleNamespace"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_towers_are_refused(kind):
    build, says = OTHERS[kind]
    clip = dataclasses.replace(build_clip(), model=build())
    with pytest.raises(ValueError, match=says) as error:
        TextTower(clip, "--method.loss contrastive")
    assert str(error.value).startswith("--method.loss contrastive needs a text tower like OpenAI's")


def test_a_tower_with_a_logit_bias_is_refused():
    clip = build_clip()
    clip.model.logit_bias = nn.Parameter(torch.zeros([]))
    with pytest.raises(ValueError, match="a logit bias"):
        TextTower(clip, "--method.lipsum-weight")
