"""What a CLIP of a stranger may be is written down once, and open_clip's own models are within."""

import dataclasses

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from rft.clip import bounds, load
from rft.clip.bounds import HubConfig, TextFields, VisionFields
from rft.runs import header
from tests import formats

CONFIGS = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}


def values(part: str, name: str) -> dict[str, float]:
    """A field of all models in which it is one number."""
    found = {
        model: (config[part] if part else config).get(name) for model, config in CONFIGS.items()
    }
    return {model: value for model, value in found.items() if isinstance(value, int | float)}


@pytest.mark.parametrize(
    ("part", "name", "bound"),
    [
        ("", "embed_dim", bounds.EMBED_DIM),
        *(("vision_cfg", name, bound) for name, bound in bounds.VISION.items()),
        *(("text_cfg", name, bound) for name, bound in bounds.TEXT.items()),
    ],
    ids=str,
)
def test_each_limit_leaves_room_above_open_clips_largest_model(part, name, bound):
    config = CONFIGS[bound.model]
    default = getattr(CLIPVisionCfg() if part == "vision_cfg" else CLIPTextCfg(), name, None)
    assert (config[part] if part else config).get(name, default) == bound.largest
    assert max(values(part, name).values(), default=0) <= bound.largest
    assert 1.7 * bound.largest < bound.limit <= 15 * bound.largest


def test_the_fields_are_open_clips():
    for own, theirs in ((VisionFields, CLIPVisionCfg), (TextFields, CLIPTextCfg)):
        assert own.__annotations__.keys() == {field.name for field in dataclasses.fields(theirs)}


def test_every_model_of_open_clip_is_read_or_refused_by_name():
    read = []
    for model, config in CONFIGS.items():
        vision = config["vision_cfg"]
        reason = "timm" if "timm_model_name" in vision else ""
        reason = reason or ("ResNet" if isinstance(vision.get("layers"), list) else "")
        reason = reason or ("CoCa" if "multimodal_cfg" in config else "")
        if reason:
            with pytest.raises(ValueError, match=f"{reason}.*rft needs"):
                load.architecture_of(model)
        else:
            load.architecture_of(model)
            read.append(model)
    assert {"ViT-B-32-quickgelu", "ViT-bigG-14", "ViT-e-14", "xlm-roberta-large-ViT-H-14"} <= {
        *read
    }


@pytest.mark.slow
def test_no_model_has_as_many_tensors_as_a_header_may():
    config = {
        name: value for name, value in CONFIGS["MobileCLIP-S2"].items() if name != "custom_text"
    }
    with torch.device("meta"):
        tensors = len(open_clip.CustomTextCLIP(**config).state_dict())
    assert tensors == 1722 < header.TENSORS / 5


GOOD = {"model_cfg": formats.CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [1, 1, 1]}}


def test_a_good_configuration_stays_the_dict_that_was_given():
    found = HubConfig(model_cfg=formats.CONFIG)
    assert found.model_cfg == formats.CONFIG
    assert found.preprocess_cfg == {}


@pytest.mark.parametrize("where", ["vision_cfg", "text_cfg"])
def test_each_limit_is_where_it_says(where: str):
    for name, bound in (bounds.VISION if where == "vision_cfg" else bounds.TEXT).items():
        for value in (0, -1, bound.limit + 1):
            config = {**formats.CONFIG, where: {**formats.CONFIG[where], name: value}}
            with pytest.raises(ValueError, match=rf"{where}\.{name} is {value}; it must be"):
                HubConfig(model_cfg=config)
    with pytest.raises(
        ValueError, match="embed_dim is 4097; it must be less than or equal to 4096"
    ):
        HubConfig(model_cfg={**formats.CONFIG, "embed_dim": bounds.EMBED_DIM.limit + 1})
