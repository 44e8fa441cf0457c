"""Our forward equals open_clip's for every supported tower; the others are refused."""

import copy
import functools

import open_clip
import pytest
import torch
from torch import nn

from rft.clip import vit
from rft.clip.classifier import build_classifier, load_state, save_classifier
from tests.conftest import build_model

SERVED = [
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "ViT-B-16",
    "ViT-B-16-quickgelu",
    "ViT-L-14",
    "ViT-L-14-quickgelu",
    "ViT-L-14-336",
    "ViT-L-14-336-quickgelu",
    "ViT-S-16-alt",  # layer scale
]


def empty_tower(name: str) -> nn.Module:
    """The image tower of an open_clip model, without memory for its weights; at most six layers.

    All layers of a tower are alike, and the 24 of ViT-L take seconds.
    """
    config = open_clip.get_model_config(name)
    quick = config.get("quick_gelu", False)
    vision = {**config["vision_cfg"], "layers": min(config["vision_cfg"]["layers"], 6)}
    with torch.device("meta"):
        return open_clip.model._build_vision_tower(config["embed_dim"], vision, quick_gelu=quick)


@functools.lru_cache(maxsize=1)
def draw_weights(name: str) -> dict[str, torch.Tensor]:
    """Random weights of roughly their usual sizes; kept for the twin with the other activation."""
    visual = empty_tower(name).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in visual.named_parameters():
            is_norm = path.split(".")[-2:-1] and path.split(".")[-2].startswith("ln_")
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.uniform_(-spread, spread, generator=generator)
            if is_norm and path.endswith("weight"):
                parameter.add_(1)
    return visual.state_dict()


def build_tower(name: str) -> nn.Module:
    """The image tower of an open_clip model with random weights, the same for quickgelu twins."""
    visual = empty_tower(name)
    visual.load_state_dict(draw_weights(name.removesuffix("-quickgelu")), assign=True)
    return visual.eval()


def test_features_equal_open_clip(images_BCHW):
    model = build_model()
    ours = model.features(model.patches(images_BCHW))
    normalised = (images_BCHW.float() - model._mean_C11) / model._std_C11
    torch.testing.assert_close(ours, model.visual(normalised), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_named_models_equal_open_clip(name):
    visual = build_tower(name)
    vit.check_supported(visual)
    size = visual.image_size[0]
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = vit.embed_tokens(visual, vit.cut_patches(images, visual.patch_size[0]))
        ours, theirs = vit.encode(visual, tokens), visual(images)
    assert theirs.std() > 0.1, "the comparison must have something to compare"
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


@pytest.mark.slow
def test_quickgelu_twins_differ():
    tokens, features = None, []
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        visual = build_tower(name)
        images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            tokens = vit.embed_tokens(visual, vit.cut_patches(images, 32))
            features.append(vit.encode(visual, tokens))
    assert (features[0] - features[1]).abs().max() > 1e-3


@pytest.mark.slow
def test_every_open_clip_model_is_served_or_refused_by_reason():
    served, refused = [], {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        if "timm_model_name" in vision:
            continue  # one class of towers, of which the next test builds one
        with torch.device("meta"):
            visual = open_clip.model._build_vision_tower(config["embed_dim"], vision)
        try:
            vit.check_supported(visual)
            served.append(name)
        except ValueError as error:
            refused[name] = str(error)
    assert {*SERVED, "ViT-H-14", "ViT-bigG-14", "ViT-B-16-plus-240"} <= set(served)
    assert "ModifiedResNet" in refused["RN50"]
    assert "attention pooling" in refused["coca_ViT-B-32"]
    assert all(
        "rft needs a class token" in reason or "needs an open" in reason
        for reason in refused.values()
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "ModifiedResNet"),
        ("ViT-B-16-SigLIP", "TimmModel"),
        ("coca_ViT-B-32", "attention pooling"),
        ("ViT-B-32", "'avg' pooling"),
        ("ViT-B-16", "patch dropout"),
    ],
)
def test_other_towers_are_refused_by_reason(name, reason):
    config = open_clip.get_model_config(name)["vision_cfg"]
    changes = {"'avg' pooling": {"pool_type": "avg"}, "patch dropout": {"patch_dropout": 0.5}}
    with torch.device("meta"):
        visual = open_clip.model._build_vision_tower(8, {**config, **changes.get(reason, {})})
    with pytest.raises(ValueError, match=reason):
        vit.check_supported(visual)


def test_masked_keys_and_dropped_tokens_equal_the_tower_without_them(images_BCHW):
    model = build_model()
    patches = model.patches(images_BCHW)
    keep = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.6
    masked = model.features(patches, keep_BP=keep)
    dropped = model.features(patches, keep_BP=keep, most=int(keep.sum(dim=1).amax()))
    tokens = vit.embed_tokens(model.visual, patches)
    for n in range(len(patches)):
        kept = torch.cat([torch.zeros(1, dtype=torch.int64), keep[n].nonzero().flatten() + 1])
        x = model.visual.transformer(tokens[n, kept][None])
        alone = model.visual.ln_post(x[:, 0]) @ model.visual.proj
        torch.testing.assert_close(masked[n : n + 1], alone, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dropped[n : n + 1], alone, rtol=1e-6, atol=1e-6)


def test_dropped_tokens_are_not_computed(images_BCHW, monkeypatch):
    model = build_model()
    lengths = []
    real = vit._layer
    monkeypatch.setattr(
        vit,
        "_layer",
        lambda block, attend, x, *rest: (
            lengths.append(x.shape[1]),
            real(block, attend, x, *rest),
        )[1],
    )
    patches = model.patches(images_BCHW)
    keep = torch.arange(16).expand(6, 16) < 5
    model.features(patches, keep_BP=keep, most=5)
    assert lengths == [6, 6, 6]


def test_lowered_weights_give_what_autocast_gives(images_BCHW):
    model = build_model()
    keep_BP = torch.arange(16).expand(6, 16) < 5
    for options in ({}, {"keep_BP": keep_BP}, {"keep_BP": keep_BP, "most": 5}):
        whole = copy.deepcopy(model)
        lowered = copy.deepcopy(model)
        vit.lower(lowered.visual, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            patches = model.patches(images_BCHW)
            assert patches.dtype == torch.bfloat16
            features = [one.features(patches, **options) for one in (whole, lowered)]
        assert torch.equal(*features)
    assert lowered.visual.conv1.weight.dtype == torch.bfloat16
    assert lowered.visual.ln_pre.weight.dtype == torch.float32


def test_a_saved_classifier_comes_back_whole(tmp_path, images_BCHW):
    model = build_model().eval()
    save_classifier(str(tmp_path / "m.safetensors"), model, {"recipe": "test", "step": "3"}, None)
    state, architecture, metadata, _ = load_state(tmp_path / "m.safetensors")
    again = build_classifier(state, architecture)
    assert metadata == {"recipe": "test", "step": "3"}
    assert torch.equal(again(images_BCHW), model(images_BCHW))


def test_a_damaged_or_foreign_file_is_one_clear_error(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_state(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="no safetensors header ends within its 22 bytes"):
        load_state(path)
