"""bf16 changes hardly any mask: the trained tiny CLIP on images of its own world."""

import pytest
import torch

from rft.clip.classifier import Classifier
from rft.clip.head import zero_shot_head
from rft.clip.load import MINIATURE, load_clip
from rft.config import ModelConfig
from rft.demo.captions import TEMPLATES
from rft.demo.objects import CLASSES
from rft.demo.pretrain import draw_captioned
from rft.demo.scenes import Setting
from rft.method import losses, masking, relevance

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Classifier:
    clip = load_clip(ModelConfig(clip=MINIATURE, pretrained=""))
    head = zero_shot_head(clip, CLASSES, TEMPLATES)
    return Classifier(clip.model.visual, head, clip.architecture)


@pytest.fixture(scope="module")
def scenes():
    setting = Setting(bank="dev", styles={"photo": 1.0}, contexts="usual")
    return draw_captioned("precision", setting, 192, 0)


def look(model, scenes, *, bf16: bool, recompute: bool = False):
    """Features, losses and the normalised CAM, as in a training step."""
    taps = []
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        features = model.features(model.patches(scenes.images_BCHW), taps=taps, recompute=recompute)
        logits = model.logits(features)
        loss = losses.classification(logits, scenes.labels_B)
        cam = relevance.label_relevance(logits, scenes.labels_B, taps)
    return features, logits, loss, relevance.normalise(cam)


@pytest.mark.parametrize("threshold", [0.3, 0.4, 0.5, 0.6])
def test_masks_agree_on_99_of_100_patches(model, scenes, threshold):
    *_, exact = look(model, scenes, bf16=False)
    features, *_, rounded = look(model, scenes, bf16=True)
    assert features.dtype == torch.bfloat16, "the tower did run in bf16"
    masks = [masking.object_mask(cam, threshold) for cam in (exact, rounded)]
    assert 0.01 < masks[0].float().mean() < 0.9
    assert (masks[0] == masks[1]).float().mean() >= 0.99


def test_what_is_not_the_tower_is_fp32(model, scenes):
    _, logits, loss, cam = look(model, scenes, bf16=True)
    assert (logits.dtype, loss.dtype, cam.dtype) == (torch.float32,) * 3


def test_layers_computed_again_run_in_the_same_precision(model, scenes):
    *_, kept = look(model, scenes, bf16=True)
    *_, again = look(model, scenes, bf16=True, recompute=True)
    assert torch.equal(kept, again)
