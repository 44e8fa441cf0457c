"""Our forward is open_clip's forward."""

import open_clip
import pytest
import torch

from rft.clip import vit
from rft.clip.classifier import build_classifier, load_state, save_classifier
from tests.conftest import build_model


def test_features_equal_open_clip(images_BCHW):
    model = build_model()
    ours = model.features(model.patches(images_BCHW))
    normalised = (images_BCHW.float() - model._mean_C11) / model._std_C11
    torch.testing.assert_close(ours, model.visual(normalised), rtol=1e-5, atol=1e-6)


def test_vit_b_32_equals_open_clip():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        visual = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).visual.eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = vit.encode(visual, vit.embed_patches(visual, images))
        torch.testing.assert_close(ours, visual(images), rtol=1e-5, atol=1e-5)


def test_masked_keys_equal_dropped_tokens(images_BCHW):
    model = build_model()
    patches = model.patches(images_BCHW)
    keep = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.6
    masked = model.features(patches, keep)
    for n in range(len(patches)):
        kept = keep[n].nonzero().flatten()
        tokens = torch.cat([model.visual.class_embedding[None], patches[n, kept]])
        positions = torch.cat([torch.zeros(1, dtype=torch.int64), kept + 1])
        x = model.visual.ln_pre(tokens + model.visual.positional_embedding[positions])[None]
        x = model.visual.transformer(x)
        dropped = model.visual.ln_post(x[:, 0]) @ model.visual.proj
        torch.testing.assert_close(masked[n : n + 1], dropped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("RN50", "ModifiedResNet"), ("ViT-B-16-SigLIP", "TimmModel"), ("coca_ViT-B-32", "pooling")],
)
def test_other_towers_are_refused_by_reason(name, reason):
    config = open_clip.get_model_config(name)["vision_cfg"]
    with torch.device("meta"):
        visual = open_clip.model._build_vision_tower(8, config)
    with pytest.raises(ValueError, match=reason):
        vit.check_supported(visual)


def test_a_saved_classifier_comes_back_whole(tmp_path, images_BCHW):
    model = build_model().eval()
    save_classifier(str(tmp_path / "m.safetensors"), model, {"recipe": "test", "step": "3"})
    state, architecture, metadata = load_state(tmp_path / "m.safetensors")
    again = build_classifier(state, architecture)
    assert metadata == {"recipe": "test", "step": "3"}
    assert torch.equal(again(images_BCHW), model(images_BCHW))


def test_a_damaged_or_foreign_file_is_one_clear_error(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_state(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_state(path)
