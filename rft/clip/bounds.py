"""Limits on the size of a CLIP described by a header or a folder.

Such documents are untrusted. Each number is bounded before a tower is built, because its
configuration decides how much memory it takes; its real weights are compared afterwards. A
configuration stays the dict that open_clip takes, with only the given fields.
tests/clip/test_bounds.py compares the limits with the largest models of the installed open_clip.
"""

import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal, Required, TypeVar, cast

import open_clip
from open_clip.model import CLIPVisionCfg
from pydantic import AfterValidator, BeforeValidator, Field, with_config
from typing_extensions import TypedDict

from rft.clip.unpickle import first_line
from rft.storage.documents import FOREIGN, STRICT, Name, Whole, document

T = TypeVar("T")


# each `limit` is at least about twice the largest value among open_clip's models
def _up_to(limit: int) -> Any:
    return Field(ge=1, le=limit)


def _no_timm(value: Any) -> Any:
    # timm would download a model of any name before any check
    if value:
        raise ValueError(
            "its image tower is built by timm; rft needs open_clip's own (docs/paper.md#models)"
        )
    return value


def _no_resnet(layers: Any) -> Any:
    if isinstance(layers, list | tuple):
        raise ValueError(
            "it describes a ResNet; rft needs open_clip's VisionTransformer (docs/paper.md#models)"
        )
    return layers


def _no_coca(_: object) -> object:
    raise ValueError("it describes a CoCa; rft needs a CLIP (docs/paper.md#models)")


def _harmless(options: dict[str, Any]) -> dict[str, Any]:
    # other options reach libraries that open any file, or run the folder's code (trust_remote_code)
    if options.keys() - {"clean", "strip_sep_token"}:
        raise ValueError(
            "of a tokenizer's options, rft accepts only clean and strip_sep_token, because others "
            "may run code; remove them"
        )
    return options


Dropped = Annotated[float, Field(ge=0, lt=1)]
"""Share dropped by dropout."""
Scale = Annotated[float, Field(ge=0, le=10)]
Model = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$", max_length=200)]
"""A name on the model hub, not a path."""
EmbedDim = Annotated[int, _up_to(4096)]
Ratio = Annotated[float, Field(gt=0, le=16)]
# mean and deviation of pixels in [0, 1]
Mean = Annotated[float, Field(ge=-10, le=10)]
Deviation = Annotated[float, Field(ge=1e-3, le=1e3)]


@with_config(STRICT)
class Norm(TypedDict, total=False):
    """Options of a layer norm."""

    eps: Annotated[float, Field(gt=0, lt=1)]


@with_config(STRICT)
class Activation(TypedDict, total=False):
    """Options of a GELU."""

    approximate: Literal["none", "tanh"]


class Attention(TypedDict, total=False):
    """Options of the layers, shared by both towers."""

    ls_init_value: Scale | None
    output_tokens: bool
    final_ln_after_pool: bool
    act_kwargs: Activation | None
    norm_kwargs: Norm | None
    block_type: Literal["default", "custom"] | None
    qk_norm: bool
    scaled_cosine_attn: bool
    scale_heads: bool
    scale_attn_inner: bool
    scale_attn: bool
    scale_fc: bool


@with_config(STRICT)
class VisionFields(Attention, total=False):
    """Fields of open_clip's CLIPVisionCfg."""

    timm_model_name: Annotated[str | None, AfterValidator(_no_timm)]
    layers: Annotated[int, _up_to(128), BeforeValidator(_no_resnet)]
    width: Annotated[int, _up_to(4096)]
    head_width: Annotated[int, _up_to(256)]
    mlp_ratio: Ratio
    patch_size: Annotated[int, _up_to(64)]
    # required, because `Architecture.image_size` reads the dict, which has no defaults
    image_size: Required[Annotated[int, _up_to(2048)]]
    patch_dropout: Dropped
    attentional_pool: bool
    attn_pooler_queries: Annotated[int, _up_to(1024)]
    attn_pooler_heads: Annotated[int, _up_to(64)]
    no_ln_pre: bool
    pos_embed_type: Literal["learnable", "sin_cos_2d"]
    pool_type: Literal["tok", "avg", "none"]
    timm_model_pretrained: Annotated[bool, AfterValidator(_no_timm)]
    timm_pool: Name | None
    timm_proj: Name | None
    timm_proj_bias: bool
    timm_drop: Dropped
    timm_drop_path: Dropped | None


def build(what: str, kind: Callable[..., T], *arguments: Any, **fields: Any) -> T:
    """Build an open_clip object, which may refuse even bounded fields.

    Raises:
        ValueError: naming `what` it is, for any error of open_clip or torch.
    """
    try:
        with warnings.catch_warnings():
            # a strange tower that can be built is compared with its weights later
            warnings.simplefilter("ignore")
            return kind(*arguments, **fields)
    except Exception as error:
        raise ValueError(
            f"open_clip {open_clip.__version__} cannot build {what}: {first_line(error)}"
        ) from error


def open_clips(fields: VisionFields) -> CLIPVisionCfg:
    """Convert the fields to open_clip's class, which has defaults for all others.

    Raises:
        ValueError: for a field that the installed open_clip lacks.
    """
    return build("it", CLIPVisionCfg, **cast(dict[str, Any], fields))


def _require_mlp(width: int, ratio: float) -> None:
    if int(width * ratio) < 1:
        raise ValueError(f"mlp_ratio is {ratio}; times the width {width} it must be at least 1")


def _divides(fields: VisionFields) -> VisionFields:
    # with open_clip's defaults for missing fields
    vision = open_clips(fields)
    for name, part in (("width", "head_width"), ("image_size", "patch_size")):
        value, side = getattr(vision, name), getattr(vision, part)
        if value % side:
            raise ValueError(f"{name} is {value}; it must be a multiple of {part}, {side}")
    # sine and cosine of row and column take a quarter of the width each
    if vision.pos_embed_type == "sin_cos_2d" and vision.width % 4:
        raise ValueError(
            f"width is {vision.width}; with pos_embed_type sin_cos_2d it must be a multiple of 4"
        )
    _require_mlp(vision.width, vision.mlp_ratio)
    return fields


Vision = Annotated[VisionFields, AfterValidator(_divides)]


@with_config(STRICT)
class TextFields(Attention, total=False):
    """Fields of open_clip's CLIPTextCfg."""

    context_length: Annotated[int, _up_to(1024)]
    vocab_size: Annotated[int, _up_to(2**21)]
    hf_tokenizer_name: Model | None
    tokenizer_mode: Name | None
    tokenizer_kwargs: Annotated[dict[str, Any], AfterValidator(_harmless)] | None
    width: Annotated[int, _up_to(4096)]
    heads: Annotated[int, _up_to(64)]
    layers: Annotated[int, _up_to(128)]
    mlp_ratio: Ratio
    embed_cls: bool
    pad_id: Whole
    eos_id: Whole
    no_causal_mask: bool
    pool_type: Literal["first", "last", "argmax", "eos", "none"]
    proj_bias: bool
    proj_type: Literal["linear", "none"]
    hf_model_name: Model | None
    hf_model_pretrained: bool
    hf_proj_type: Literal["linear", "mlp"] | None
    hf_pooler_type: Name | None


def _heads(fields: TextFields) -> TextFields:
    # the defaults of open_clip's CLIPTextCfg
    width, heads = fields.get("width", 512), fields.get("heads", 8)
    if width % heads:
        raise ValueError(f"width is {width}; it must be a multiple of heads, {heads}")
    _require_mlp(width, fields.get("mlp_ratio", 4.0))
    return fields


Text = Annotated[TextFields, AfterValidator(_heads)]


@with_config(STRICT)
class ModelFields(TypedDict, total=False):
    """Arguments of open_clip's CLIP and CustomTextCLIP."""

    multimodal_cfg: Annotated[Any, AfterValidator(_no_coca)]
    embed_dim: Required[EmbedDim]
    vision_cfg: Required[Vision]
    text_cfg: Required[Text]
    quick_gelu: bool
    custom_text: bool
    init_logit_scale: Annotated[float, Field(ge=-100, le=100)]
    init_logit_bias: Annotated[float, Field(ge=-1000, le=1000)] | None


@with_config(FOREIGN)
class Preprocess(TypedDict, total=False):
    """The fields of open_clip's PreprocessCfg that rft reads."""

    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]
    interpolation: Name
    resize_mode: Name


@document(config=FOREIGN)
class HubConfig:
    """An open_clip_config.json."""

    model_cfg: ModelFields
    preprocess_cfg: Preprocess = Field(default_factory=Preprocess)
