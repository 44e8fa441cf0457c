"""Pre-training end to end, with few steps: its output can be loaded and is reproducible."""

import json

import numpy as np
import pytest
import torch

from rft.clip.load import load_clip
from rft.config import ModelConfig
from rft.demo import pretrain
from rft.demo.objects import CLASSES


@pytest.mark.slow
def test_it_writes_a_clip_that_loads_and_the_same_one_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "DEV_IMAGES", 32)
    for name in ("first", "again"):
        pretrain.pretrain(tmp_path / name, steps=3, images=128)
    first, again = (
        load_clip(ModelConfig(clip=f"local-dir:{tmp_path / name}", pretrained="")).model
        for name in ("first", "again")
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    card = json.loads((tmp_path / "first" / "card.json").read_text())
    assert card["steps"] == 3
    assert card["measured"]["dev-usual-total"] == 32


def test_initialisation_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, again = pretrain.build_model(0), pretrain.build_model(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.visual.proj, again.visual.proj)


def test_an_epoch_is_a_permutation_in_whole_batches():
    images = 3 * pretrain.BATCH_SIZE + 5
    batches = pretrain.draw_batches(images, seed=0)
    for _ in range(2):
        epoch = np.concatenate([next(batches).numpy() for _ in range(3)])
        assert len(set(epoch)) == 3 * pretrain.BATCH_SIZE
        assert set(epoch) <= set(range(images))


@pytest.mark.slow
def test_classes_are_balanced_and_contexts_are_independent_of_them():
    data = pretrain.draw_captioned("pretrain", pretrain.DIVERSE, 320, seed=0)
    counts = torch.bincount(data.labels_B, minlength=len(CLASSES))
    assert (counts == 320 // len(CLASSES)).all()
    assert data.images_BCHW.dtype == torch.uint8
    assert pretrain.DIVERSE.contexts == "any"
