"""The bounds on foreign CLIP configurations are defined once and admit open_clip's own models."""

import dataclasses

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from pydantic import TypeAdapter

from rft.clip import load
from rft.clip.bounds import HubConfig, ModelFields, TextFields, VisionFields
from rft.runs import header
from tests import formats

CONFIGS = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}

# the largest value of each bounded field in open_clip's models, and the model that has it
LARGEST = {
    ("", "embed_dim"): (1536, "ViT-gopt-16-SigLIP2-256"),
    ("vision_cfg", "layers"): (56, "ViT-e-14"),
    ("vision_cfg", "width"): (1792, "ViT-e-14"),
    ("vision_cfg", "head_width"): (112, "ViT-e-14"),
    ("vision_cfg", "mlp_ratio"): (8.5715, "ViT-e-14"),
    ("vision_cfg", "patch_size"): (32, "ViT-B-32"),
    ("vision_cfg", "image_size"): (512, "ViT-B-16-SigLIP2-512"),
    ("vision_cfg", "attn_pooler_queries"): (256, "coca_ViT-L-14"),
    ("vision_cfg", "attn_pooler_heads"): (8, "coca_ViT-L-14"),
    ("text_cfg", "layers"): (36, "ViT-e-14"),
    ("text_cfg", "width"): (1280, "ViT-bigG-14"),
    ("text_cfg", "heads"): (20, "ViT-bigG-14"),
    ("text_cfg", "mlp_ratio"): (4, "ViT-B-32"),
    ("text_cfg", "context_length"): (77, "ViT-B-32"),
    ("text_cfg", "vocab_size"): (901_629, "ViT-H-14-worldwide"),
}
FIELDS = {"": ModelFields, "vision_cfg": VisionFields, "text_cfg": TextFields}


def limits(part: str) -> dict[str, float]:
    """The largest accepted value of each bounded field; shares and scales separately."""
    schema = TypeAdapter(FIELDS[part]).json_schema()["properties"]
    found = {name: field.get("maximum") for name, field in schema.items()}
    return {name: limit for name, limit in found.items() if limit and not name.startswith("init_")}


def values(part: str, name: str) -> dict[str, float]:
    """A field of all models in which it is one number."""
    found = {
        model: (config[part] if part else config).get(name) for model, config in CONFIGS.items()
    }
    return {model: value for model, value in found.items() if isinstance(value, int | float)}


@pytest.mark.parametrize(("part", "name"), LARGEST, ids=str)
def test_each_limit_leaves_room_above_open_clips_largest_model(part, name):
    largest, model = LARGEST[part, name]
    config = CONFIGS[model]
    default = getattr(CLIPVisionCfg() if part == "vision_cfg" else CLIPTextCfg(), name, None)
    assert (config[part] if part else config).get(name, default) == largest
    assert max(values(part, name).values(), default=0) <= largest
    assert 1.7 * largest < limits(part)[name] <= 15 * largest


def test_every_field_with_a_limit_is_compared():
    assert {(part, name) for part in FIELDS for name in limits(part)} == LARGEST.keys()


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
    for name, limit in limits(where).items():
        for value in (0, -1, limit + 1):
            config = {**formats.CONFIG, where: {**formats.CONFIG[where], name: value}}
            with pytest.raises(ValueError, match=rf"{where}\.{name} is {value}; it must be"):
                HubConfig(model_cfg=config)
    with pytest.raises(
        ValueError, match="embed_dim is 4097; it must be less than or equal to 4096"
    ):
        HubConfig(model_cfg={**formats.CONFIG, "embed_dim": 4097})
