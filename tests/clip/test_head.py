"""The zero-shot head, computed by hand and by the textbook."""

import json
import math
import types

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import tiny_world
from rft.clip.classifier import Classifier
from rft.clip.head import zero_shot_head
from rft.clip.load import WordTokenizer, load_clip
from rft.config import ModelConfig
from tests.conftest import ARCHITECTURE, build_model
from tests.reference import zero_shot

# the output of a two-dimensional text tower for each prompt
EMBEDDINGS = {"cat": (3.0, 4.0), "a cat": (0.0, 2.0), "dog": (1.0, 0.0), "a dog": (0.0, -5.0)}
WORDS = list(EMBEDDINGS)


class Tower:
    """A text tower that looks its prompts up; the scale of its logits is 50."""

    logit_scale = torch.tensor(math.log(50))

    def encode_text(self, words_BL: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        found = torch.tensor([EMBEDDINGS[WORDS[int(n)]] for n in words_BL[:, 0]])
        return found / found.norm(dim=1, keepdim=True) if normalize else found


def tower() -> types.SimpleNamespace:
    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[WORDS.index(text)] for text in texts])

    architecture = types.SimpleNamespace(clip="by hand", embed_dim=2)
    return types.SimpleNamespace(model=Tower(), tokenize=tokenize, architecture=architecture)


def test_the_head_by_hand():
    head = zero_shot_head(tower(), ["cat", "dog"], ["{c}", "a {c}"])
    # cat: (0.6, 0.8) and (0, 1) have the mean (0.3, 0.9), which is sqrt(0.9) long
    # dog: (1, 0) and (0, -1) have the mean (0.5, -0.5), which is sqrt(0.5) long
    expected = [
        [50 * 0.3 / math.sqrt(0.9), 50 * 0.9 / math.sqrt(0.9)],
        [50 * math.sqrt(0.5), -50 * math.sqrt(0.5)],
    ]
    torch.testing.assert_close(head.weight.detach(), torch.tensor(expected))
    assert head.bias.tolist() == [0, 0]


def test_the_head_equals_the_textbook(tiny_clip):
    clip = load_clip(ModelConfig(clip=tiny_clip))
    classes, templates = ["red", "blue", "green"], ["a {c} square", "{c}", "a a {c}", "square {c}"]
    head = zero_shot_head(clip, classes, templates)
    expected = zero_shot.head_weight(clip, classes, templates)
    torch.testing.assert_close(head.weight.detach().double(), expected, rtol=1e-5, atol=1e-5)
    scale = math.exp(clip.model.logit_scale.item())
    assert head.weight.norm(dim=1).tolist() == pytest.approx([scale] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool_type": "none"}, r"gives a head of \(128, 3\) features and classes.* \(16, 3\)"),
        ({"embed_cls": True}, "cannot be computed: The size of tensor a"),
        ({"output_tokens": True, "custom_text": True}, "cannot be computed: 'tuple' object"),
        ({"scaled_cosine_attn": True, "block_type": "custom"}, "cannot be computed: batch1 must"),
    ],
)
def test_a_text_tower_that_open_clip_cannot_compute(tmp_path, fields, message):
    name = tiny_world.write_clip(tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_config.json"
    document = json.loads(path.read_text())
    config = document["model_cfg"]
    custom = fields.get("custom_text", False)
    config["text_cfg"] |= {key: value for key, value in fields.items() if key != "custom_text"}
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    path.write_text(json.dumps({**document, "model_cfg": {**config, "custom_text": custom}}))
    save_file(model.state_dict(), tmp_path / "clip" / "open_clip_model.safetensors")
    clip = load_clip(ModelConfig(clip=name))
    with pytest.raises(ValueError, match=f"the text tower of local-dir:.*clip {message}"):
        zero_shot_head(clip, ["red", "blue", "green"], ["a {c} square"])


def test_the_head_learns(tiny_clip):
    head = zero_shot_head(load_clip(ModelConfig(clip=tiny_clip)), ["red", "blue"], ["{c}"])
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_logits_are_of_the_features_direction_alone():
    model = build_model()
    feature_E = torch.arange(1.0, 13)
    direction = [value / math.sqrt(650) for value in range(1, 13)]  # 650 = 1 + 4 + ... + 144
    expected = [
        sum(w * v for w, v in zip(row, direction, strict=True))
        for row in model.head.weight.detach().tolist()
    ]
    for scale in (1, 7):
        found = model.logits(scale * feature_E[None])[0].tolist()
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_pixels_are_normalised_by_the_architectures_numbers():
    model = build_model()
    grey_PV = torch.full((1, 1, 3 * 4 * 4), 51, dtype=torch.uint8)
    found = model.normalise(grey_PV).unflatten(-1, (3, 16))
    for channel, (mean, std) in enumerate(zip(ARCHITECTURE.mean, ARCHITECTURE.std, strict=True)):
        value = torch.full((1, 1, 16), (51 / 255 - mean) / std)
        torch.testing.assert_close(found[:, :, channel], value)
    assert isinstance(model, Classifier)


def test_a_word_that_a_tiny_clip_does_not_read_comes_with_what_to_do():
    tokenize = WordTokenizer(["", "<start>", "a", "photo", "of", "star", "<end>"], 8)
    with pytest.raises(
        ValueError, match=r"knows only 4 words, and 'bad' of 'a bad photo' is not one; .*--"
    ):
        tokenize(["a photo of a star", "a bad photo"])
    with pytest.raises(ValueError, match=r"\(/.*/demo/clip/vocab\.txt lists them"):
        load_clip(ModelConfig(clip="rft-miniature")).tokenize(["a zebra"])
