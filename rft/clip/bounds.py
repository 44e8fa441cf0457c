"""How large a CLIP may be that a header or a folder describes: open_clip's largest, with room.

Such documents come from strangers. Each number is bounded before a tower is built, because a
tower's memory follows from its configuration; what its weights really take is compared afterwards.
A configuration stays the dict that open_clip takes: only fields that were given are in it.
"""

import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Required, TypeVar, cast

import open_clip
from open_clip.model import CLIPVisionCfg
from pydantic import AfterValidator, BeforeValidator, Field, with_config
from typing_extensions import TypedDict

from rft.clip.unpickle import first_line
from rft.storage.documents import FOREIGN, STRICT, Name, Whole, document

T = TypeVar("T")


class Bound(NamedTuple):
    """The largest value of a field in open_clip's models, and the largest that is read."""

    largest: float
    model: str
    limit: int


EMBED_DIM = Bound(1536, "ViT-gopt-16-SigLIP2-256", 4096)
VISION = {
    "layers": Bound(56, "ViT-e-14", 128),
    "width": Bound(1792, "ViT-e-14", 4096),
    "head_width": Bound(112, "ViT-e-14", 256),
    "mlp_ratio": Bound(8.5715, "ViT-e-14", 16),
    "patch_size": Bound(32, "ViT-B-32", 64),
    "image_size": Bound(512, "ViT-B-16-SigLIP2-512", 2048),
    "attn_pooler_queries": Bound(256, "coca_ViT-L-14", 1024),
    "attn_pooler_heads": Bound(8, "coca_ViT-L-14", 64),
}
TEXT = {
    "layers": Bound(36, "ViT-e-14", 128),
    "width": Bound(1280, "ViT-bigG-14", 4096),
    "heads": Bound(20, "ViT-bigG-14", 64),
    "mlp_ratio": Bound(4, "ViT-B-32", 16),
    "context_length": Bound(77, "ViT-B-32", 1024),
    "vocab_size": Bound(901_629, "ViT-H-14-worldwide", 2**21),
}


def _whole(bound: Bound) -> Any:
    return Field(ge=1, le=bound.limit)


def _ratio(bound: Bound) -> Any:
    return Field(gt=0, le=bound.limit)


def _no_timm(value: Any) -> Any:
    # timm would download a model of any name before anything could be checked
    if value:
        raise ValueError("timm builds its image tower; rft needs open_clip's own")
    return value


def _no_resnet(layers: Any) -> Any:
    if isinstance(layers, list | tuple):
        raise ValueError("it is of a ResNet; rft needs open_clip's VisionTransformer")
    return layers


def _no_coca(_: object) -> object:
    raise ValueError("it is of a CoCa; rft needs a CLIP")


def _harmless(options: dict[str, Any]) -> dict[str, Any]:
    # the rest goes to libraries that open any file, or run code of the folder (trust_remote_code)
    if options.keys() - {"clean", "strip_sep_token"}:
        raise ValueError(
            "of a tokenizer's options, rft passes on clean and strip_sep_token only, because "
            "others may run code; remove them"
        )
    return options


Dropped = Annotated[float, Field(ge=0, lt=1)]
"""Share that dropout leaves out."""
Scale = Annotated[float, Field(ge=0, le=10)]
Model = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$", max_length=200)]
"""A name on the model hub; no path."""
EmbedDim = Annotated[int, _whole(EMBED_DIM)]
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
    """What both towers say of their layers."""

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
    layers: Annotated[int, _whole(VISION["layers"]), BeforeValidator(_no_resnet)]
    width: Annotated[int, _whole(VISION["width"])]
    head_width: Annotated[int, _whole(VISION["head_width"])]
    mlp_ratio: Annotated[float, _ratio(VISION["mlp_ratio"])]
    patch_size: Annotated[int, _whole(VISION["patch_size"])]
    image_size: Required[Annotated[int, _whole(VISION["image_size"])]]
    patch_dropout: Dropped
    attentional_pool: bool
    attn_pooler_queries: Annotated[int, _whole(VISION["attn_pooler_queries"])]
    attn_pooler_heads: Annotated[int, _whole(VISION["attn_pooler_heads"])]
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
    """Return an object of open_clip's, which has demands of its own on bounded fields.

    Raises:
        ValueError: naming `what` it was to be, whatever open_clip or torch raise.
    """
    try:
        with warnings.catch_warnings():
            # an odd tower that can be built is compared with its weights
            warnings.simplefilter("ignore")
            return kind(*arguments, **fields)
    except Exception as error:
        raise ValueError(
            f"open_clip {open_clip.__version__} cannot build {what}: {first_line(error)}"
        ) from error


def open_clips(fields: VisionFields) -> CLIPVisionCfg:
    """Return open_clip's own class of these fields, which has a value for every one.

    Raises:
        ValueError: for a field that the installed open_clip does not have.
    """
    return build("it", CLIPVisionCfg, **cast(dict[str, Any], fields))


def _require_mlp(width: int, ratio: float) -> None:
    if int(width * ratio) < 1:
        raise ValueError(f"mlp_ratio is {ratio}; of a width of {width} it must leave 1 or more")


def _divides(fields: VisionFields) -> VisionFields:
    vision = open_clips(fields)
    for name, part in (("width", "head_width"), ("image_size", "patch_size")):
        value, side = getattr(vision, name), getattr(vision, part)
        if value % side:
            raise ValueError(f"{name} is {value}; it must be a multiple of {part}, {side}")
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

    context_length: Annotated[int, _whole(TEXT["context_length"])]
    vocab_size: Annotated[int, _whole(TEXT["vocab_size"])]
    hf_tokenizer_name: Model | None
    tokenizer_mode: Name | None
    tokenizer_kwargs: Annotated[dict[str, Any], AfterValidator(_harmless)] | None
    width: Annotated[int, _whole(TEXT["width"])]
    heads: Annotated[int, _whole(TEXT["heads"])]
    layers: Annotated[int, _whole(TEXT["layers"])]
    mlp_ratio: Annotated[float, _ratio(TEXT["mlp_ratio"])]
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
    """What rft reads of open_clip's PreprocessCfg."""

    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]
    interpolation: Name
    resize_mode: Name


@document(config=FOREIGN)
class HubConfig:
    """An open_clip_config.json."""

    model_cfg: ModelFields
    preprocess_cfg: Preprocess = Field(default_factory=Preprocess)
