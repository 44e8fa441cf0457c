"""Loading of a pre-trained CLIP by name: weights, tokenizer and preprocessing, by open_clip.

`clip` is an open_clip model name with a weights tag or a file (any format of rft/clip/weights.py
with both towers), or a folder in open_clip's hub layout: `local-dir:PATH`, or
`hf-hub:ORGANISATION/NAME` on the model hub. A local folder may contain `vocab.txt` (one word per
line), which replaces open_clip's BPE tokenizer. `rft-miniature`, the tiny CLIP included in rft,
does.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.model import (
    CLIP,
    CLIPTextCfg,
    CLIPVisionCfg,
    CustomTextCLIP,
    convert_to_custom_text_state_dict,
)
from safetensors import SafetensorError
from torch import Tensor

from rft.clip import hub, unpickle, vit, weights
from rft.clip.architecture import Architecture, three
from rft.clip.bounds import HubConfig, ModelFields, build, open_clips
from rft.clip.classifier import require_finite
from rft.clip.weights import LOCAL, Geometry, Weights
from rft.config import ModelConfig
from rft.log import ASIDE
from rft.runs import filenames, header
from rft.runs.filenames import SELECTED
from rft.storage import files

HUB = "hf-hub:"
VOCABULARY = "vocab.txt"
MINIATURE = "rft-miniature"
RESIZE = {
    "resize_mode": "shortest",
    "interpolation": "bicubic",
}  # as `rft.shards.images` always resizes
WEIGHTS_HINT = "name its model with --model.clip and the file with --model.pretrained"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainedClip:
    """A CLIP with both towers, its tokenizer and its architecture.

    `tokenize` raises `TextTooLongError` for a text that is too long for the text tower.
    """

    model: Any  # open_clip's CLIP, CustomTextCLIP or CoCa, which share no base class
    tokenize: Callable[[list[str]], Tensor]
    architecture: Architecture


class TextTooLongError(ValueError):
    """A text with more tokens than the text tower reads; open_clip would silently truncate it."""

    def __init__(self, text: str, limit: int) -> None:
        super().__init__(f"{text!r} is longer than {limit} tokens")
        self.text, self.limit = text, limit


def load_clip(config: ModelConfig) -> PretrainedClip:
    """Load a pre-trained CLIP in fp32 on the CPU.

    Raises:
        ValueError: for an unknown name or tag, an activation or a shape that does not match the
            weights, a weights file without both towers, an unsupported image tower, or a weight
            that is not finite.
    """
    clip, tag = config.clip, config.pretrained
    described = hub_config(clip)  # first, because it refuses unsafe options of a folder
    if names_folder(clip):
        folder = _local_folder(clip)
        # hub_config has already cached the configuration in the same folder
        if folder is None:
            folder = hub.fetch(clip.removeprefix(HUB)).parent
        loaded, what = _from_weights(weights.read(folder), clip), clip
        warn_of_resize(clip, described.preprocess_cfg)
    else:
        loaded, what = _of_tag_or_file(clip, tag), f"{clip} {tag}"
    require_finite(what, loaded.model.state_dict())
    return loaded


def download(config: ModelConfig) -> None:
    """Download the weights of a pre-trained CLIP, unless they are on this machine.

    Raises:
        rft.clip.hub.UnreachableError: if they cannot be downloaded.
    """
    if config.clip.startswith(HUB):
        hub.fetch(config.clip.removeprefix(HUB))
    elif not names_folder(config.clip) and (
        tag := open_clip.get_pretrained_cfg(config.clip, config.pretrained)
    ):
        hub.fetch_tag(tag)


def load_file(path: Path, clip: str) -> PretrainedClip:
    """Load a weights file with both towers into the model named `clip`.

    Raises:
        ValueError: if it does not exist or does not fit, or a weight is not finite.
    """
    loaded = _from_weights(weights.read(path), clip)
    require_finite(path, loaded.model.state_dict())
    return loaded


def find_tag(clip: str, name: str) -> dict[str, Any]:
    """Look up a weights tag of open_clip; empty if `name` is a file.

    Raises:
        ValueError: if it is neither.
    """
    tag: dict[str, Any] = open_clip.get_pretrained_cfg(clip, name)
    if not tag and not (name and Path(name).exists()):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(clip)) or "none"
        raise ValueError(f"{name!r} is neither a weights tag of {clip} nor a file; tags: {tags}")
    return tag


def _of_tag_or_file(clip: str, name: str) -> PretrainedClip:
    tag = find_tag(clip, name)
    if not tag:
        return _from_weights(weights.read(Path(name)), clip)
    architecture, quick = architecture_of(clip), bool(tag.get("quick_gelu", False))
    _require_activation(f"weights {name!r}", quick, architecture)
    path = hub.fetch_tag(tag)
    try:
        model: Any = open_clip.create_model(clip, pretrained=str(path))
    except (*unpickle.DAMAGE, SafetensorError) as error:
        raise ValueError(f"cannot load {clip} {name}: {unpickle.first_line(error)}") from error
    vit.check_supported(model.visual)
    warn_of_resize(f"{clip} {name}", tag)
    # taken from the tag, because a named model's configuration has none
    mean, std = three(tag["mean"]), three(tag["std"])
    architecture = dataclasses.replace(architecture, mean=mean, std=std)
    return PretrainedClip(model.eval(), _tokenizer(clip, model.context_length), architecture)


def _from_weights(found: Weights, clip: str) -> PretrainedClip:
    """Build the CLIP named `clip` with the weights of a file that has both towers."""
    if not found.text:
        raise ValueError(
            f"{found.files[0]} ({found.format}) has no text tower for a zero-shot head; start from "
            "the pre-trained weights that it was fine-tuned from"
        )
    architecture = architecture_of(clip)
    require_fit(found, architecture)
    if remote := hub_config(clip).model_cfg["text_cfg"].get("hf_model_name"):
        log.info(
            f"the text tower of {clip} is described by {remote} on the model hub, which is queried",
            extra=ASIDE,
        )
    with torch.device(
        "meta"
    ):  # on the meta device: memory is allocated only after the weights were checked
        expected = _build(clip).state_dict()
    state = {**found.visual, **found.text}
    # CustomTextCLIP prefixes its text tower with `text.`, but most files have plain names
    if "text.token_embedding.weight" in expected and "positional_embedding" in state:
        state = convert_to_custom_text_state_dict(state)
    scale = state.get("logit_scale")
    if scale is not None and scale.numel() == 1:  # open_clip stores it with or without a dimension
        state["logit_scale"] = scale.reshape(expected["logit_scale"].shape)
    if changed := weights.difference(expected, state):
        raise ValueError(f"{found.files[0]} does not fit {clip}: it has {changed}")
    model = _build(clip)
    model.load_state_dict(state)
    return PretrainedClip(model.eval(), _tokenizer(clip, model.context_length), architecture)


def _build(clip: str) -> Any:
    """Build both towers of a model, without loading weights."""
    fields: dict[str, Any] = {**hub_config(clip).model_cfg}
    text = fields["text_cfg"]
    custom = fields.pop("custom_text", False) or "hf_model_name" in text
    if custom:  # otherwise its own weights would be downloaded and then overwritten
        fields["text_cfg"] = {**text, "hf_model_pretrained": False}
    return build(clip, CustomTextCLIP if custom else CLIP, **fields)


def names_folder(clip: str) -> bool:
    """Whether a name is a folder or a hub model that has both configuration and weights."""
    return clip == MINIATURE or clip.startswith((LOCAL, HUB))


def architecture_of(clip: str) -> Architecture:
    """Look up the architecture of a model without loading weights.

    Raises:
        ValueError: if there is no such model, or rft cannot work with it.
    """
    return Architecture.of(clip, hub_config(clip))


def require_fit(found: Weights, architecture: Architecture) -> None:
    """Check that an image tower read from a file matches the named model.

    Raises:
        ValueError: with both geometries and the models that the file would fit, or with another
            difference.
    """
    expected = architecture.expected()
    # first, because this error can name the models that would fit
    if found.geometry != (wanted := Geometry.of(expected, architecture.clip)):
        names = ", ".join(names_of(found)) or "none"
        raise ValueError(
            f"{found.files[0]} has a different image tower ({found.geometry}) than "
            f"{architecture.clip} ({wanted}); models of this shape: {names}"
        )
    if changed := weights.difference(expected, found.visual):
        raise ValueError(f"{found.files[0]} does not fit {architecture.clip}: it has {changed}")
    what = f"{found.files[0]} ({found.format})"
    if found.quick_gelu is not None:
        _require_activation(what, found.quick_gelu, architecture)
    if found.openai:
        require_openai_tower(architecture, what)


def require_openai_tower(architecture: Architecture, what: str) -> None:
    """Check that an image tower computes the same as OpenAI's code.

    Raises:
        ValueError: naming `what` requires such towers, and the difference.
    """
    ours = dataclasses.asdict(open_clips(architecture.vision_cfg))
    # open_clip's defaults are OpenAI's tower: heads 64 wide, an MLP of four times the width, no
    # extras
    free = ("layers", "width", "patch_size", "image_size")
    theirs = dataclasses.asdict(CLIPVisionCfg(**{name: ours[name] for name in free}))
    ours, theirs = {"quick_gelu": architecture.quick_gelu} | ours, {"quick_gelu": True} | theirs
    for name, value in ours.items():
        if value != theirs[name]:
            raise ValueError(
                f"{what} is for OpenAI's image towers, which have {name} {theirs[name]}; "
                f"{architecture.clip} has {value}"
            )


def _require_activation(what: str, quick: bool, architecture: Architecture) -> None:
    # open_clip only warns here, and would use an activation that the weights were not trained with
    if architecture.quick_gelu == quick:
        return
    clip = architecture.clip
    other = f"{clip}-quickgelu" if quick else clip.removesuffix("-quickgelu")
    kind = "QuickGELU" if quick else "GELU"
    hint = f"as {other}; use that model" if other in open_clip.list_models() else f"with {kind}"
    raise ValueError(f"{what} were trained {hint}")


def names_of(found: Weights) -> list[str]:
    """List the models whose image tower has the geometry of the weights."""
    names = []
    for name in (*open_clip.list_models(), MINIATURE):
        config: Any = open_clip.get_model_config(name)
        if name == MINIATURE:
            config = hub_config(name).model_cfg
        assert config is not None, f"open_clip lists {name} but has no configuration for it"
        vision: Any = CLIPVisionCfg(**config["vision_cfg"])
        # a ResNet has a list of layers
        plain = isinstance(vision.layers, int) and isinstance(vision.image_size, int)
        if vision.timm_model_name or not plain:
            continue
        grid = vision.image_size // vision.patch_size
        sizes = (vision.width, vision.patch_size, vision.layers, grid, config["embed_dim"])
        openais = config.get("quick_gelu", False) and "hf_model_name" not in config["text_cfg"]
        if Geometry(*sizes) == found.geometry and (openais or not found.openai):
            names.append(name)
    return names


def warn_of_resize(what: str, preprocess: Mapping[str, Any]) -> None:
    """Warn if weights were trained with a resizing that differs from rft's.

    Args:
        what: name of the weights.
        preprocess: open_clip's `preprocess_cfg` of these weights.
    """
    theirs = {name: preprocess.get(name, ours) for name, ours in RESIZE.items()}
    if theirs != RESIZE:
        mode, interpolation = theirs.values()
        log.warning(
            f"{what} was trained on images resized by open_clip's {mode!r}, {interpolation}; rft "
            "always resizes the shorter side, bicubic, and crops. Accuracies may be lower than "
            "its authors'"
        )


def _local_folder(clip: str) -> Path | None:
    if clip == MINIATURE:
        return Path(str(resources.files("rft") / "demo" / "clip"))
    return Path(clip.removeprefix(LOCAL)) if clip.startswith(LOCAL) else None


def _tokenizer(clip: str, context_length: int) -> Callable[[list[str]], Tensor]:
    text = hub_config(clip).model_cfg["text_cfg"]
    known = text.get("vocab_size", CLIPTextCfg().vocab_size)
    if vocabulary := vocabulary_of(clip):
        return WordTokenizer(_words(vocabulary, known), context_length, str(vocabulary))
    tokenizer = open_clip.get_tokenizer(clip)

    def tokenize(texts: list[str]) -> Tensor:
        tokens = tokenize_all(tokenizer, texts)
        # the configuration lacks the vocabulary size of towers from transformers
        if "hf_model_name" not in text and int(tokens.max()) >= known:
            raise ValueError(
                f"{clip}: its text tower has {known:,} tokens, but the tokenizer more; a folder "
                "with its own words needs them in vocab.txt"
            )
        return tokens

    return tokenize


def _words(vocabulary: Path, tokens: int) -> list[str]:
    """Read the words of a vocabulary, in the order of their token ids."""
    data = files.read_bytes(str(vocabulary), header.BYTES)
    try:
        # editors may write Windows line ends, and a line break after the last word
        words = data.decode().replace("\r\n", "\n").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{vocabulary} is not UTF-8 text: {error}") from error
    # at least padding, start and end
    if not 2 < len(words) <= tokens:
        raise ValueError(f"{vocabulary} has {len(words):,} words, but the text tower {tokens:,}")
    return words


def tokenize_all(tokenizer: Callable[..., Tensor], texts: Sequence[str]) -> Tensor:
    """Tokenize texts with open_clip's tokenizer, int64 (len(texts), context length).

    Raises:
        TextTooLongError: for a text that the tokenizer truncates.
    """
    tokens = tokenizer(list(texts))
    limit = tokens.shape[1]
    # an empty text is only start and end, so the middle of its row is padding on either side
    padding = tokenizer([""])[0, limit // 2]
    # padding is at the end, or at the start with some tokenizers
    full = (tokens[:, 0] != padding) & (tokens[:, -1] != padding)
    for row in full.nonzero()[:, 0].tolist():
        # a full row may be a text that just fits: then a longer context gives no more tokens
        longer = tokenizer([texts[row]], context_length=2 * limit)[0]
        if (longer != padding).sum() > (tokens[row] != padding).sum():
            raise TextTooLongError(texts[row], limit)
    return tokens


def vocabulary_of(clip: str) -> Path | None:
    """Find the word list of a local folder that has its own tokenizer."""
    folder = _local_folder(clip)
    # anything of this name that is not a file is refused when it is read
    return folder / VOCABULARY if folder and os.path.lexists(folder / VOCABULARY) else None


def hub_config(clip: str) -> HubConfig:
    """Read `model_cfg` of a model and, if it is stored with the weights, `preprocess_cfg`.

    Raises:
        ValueError: if there is no such model, or rft cannot work with it.
    """
    if folder := _local_folder(clip):
        path = folder / weights.HUB_CONFIG
        if not path.is_file():
            raise ValueError(f"no CLIP at {folder}: {_why_no_clip(path)}")
    elif clip.startswith(HUB):
        path = hub.fetch(clip.removeprefix(HUB), weights.HUB_CONFIG)
    else:
        model_cfg = open_clip.get_model_config(clip)
        if model_cfg is None:
            raise ValueError(f"open_clip has no model {clip!r}; {_instead_of(clip)}")
        try:
            return HubConfig(model_cfg=cast(ModelFields, model_cfg))
        except ValueError as error:
            raise ValueError(f"rft does not support {clip}: {error}") from error
    return files.read_document(str(path), HubConfig, header.BYTES)


def _why_no_clip(config: Path) -> str:
    """Explain why a folder is not a CLIP, by the path of its configuration."""
    folder = config.parent
    if not folder.exists():
        return "no such folder"
    if not folder.is_dir():
        return f"it is a file; {WEIGHTS_HINT}"
    if (folder / filenames.TRAINING).is_file() or (folder / SELECTED).is_file():
        return f"it is a run folder of rft; start from its model with --model.start {folder}"
    return f"{config.name} is missing"


def _instead_of(clip: str) -> str:
    """Suggest the probable meaning of a name that is not an open_clip model."""
    path = Path(clip).expanduser()
    if path.is_dir():
        if (path / weights.HUB_CONFIG).is_file():
            return f"for the folder use {LOCAL}{clip}"
        return f"it is a folder: {_why_no_clip(path / weights.HUB_CONFIG)} (else {LOCAL}{clip})"
    if path.is_file():
        return f"it is a file; {WEIGHTS_HINT}"
    known = {name.lower(): name for name in (MINIATURE, *open_clip.list_models())}
    # OpenAI's spelling is ViT-B/32
    if close := get_close_matches(clip.replace("/", "-").lower(), known, n=3):
        return f"did you mean {' or '.join(known[name] for name in close)}?"
    if "/" in clip:
        return f"for a folder use {LOCAL}PATH, for a model of the hub {HUB}ORGANISATION/NAME"
    return "python -c 'import open_clip; print(open_clip.list_models())' lists them"


class WordTokenizer:
    """One token per word, for a tiny text tower: pad 0, start 1, end = the last id.

    open_clip reads the text feature at the largest token id, so that must be the end token.
    """

    def __init__(self, words: Sequence[str], context_length: int, source: str = VOCABULARY) -> None:
        self._end = max((number for number, word in enumerate(words) if word), default=0)
        self._ids = {word: n for n, word in enumerate(words) if word and 1 < n < self._end}
        self._context_length = context_length
        self._source = source  # file of the words, for messages

    def __call__(self, texts: Sequence[str] | str) -> Tensor:
        """Tokenize texts, int64 (len(texts), context length).

        Raises:
            ValueError: for a word outside the vocabulary or a text that is too long.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self._context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            # drop punctuation
            words = text.lower().replace(".", " ").replace(",", " ").split()
            if unknown := [word for word in words if word not in self._ids]:
                raise ValueError(
                    f"this tiny CLIP knows only {len(self._ids)} words, and {unknown[0]!r} of "
                    f"{text!r} is not one; it is for rft's own examples: name a different "
                    "--model.clip, or pack or index the set with --classes of its words "
                    f"({self._source} lists them, such as {', '.join(sorted(self._ids)[-5:])})"
                )
            ids = [1, *(self._ids[word] for word in words), self._end]
            if len(ids) > self._context_length:
                raise TextTooLongError(text, self._context_length)
            row[: len(ids)] = torch.tensor(ids)
        return tokens
