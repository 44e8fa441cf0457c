"""A pre-trained CLIP by name: its weights, tokenizer and preprocessing, through open_clip.

`clip` is an open_clip model name with a weights tag or file, or `local-dir:PATH`, a folder in
open_clip's hub layout. Such a folder may hold `vocab.txt` (one word a line) instead of using
open_clip's BPE tokenizer; `rft-miniature`, the tiny CLIP that comes with rft, does.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor

from rft.clip import vit
from rft.config import ModelConfig

LOCAL = "local-dir:"
MINIATURE = "rft-miniature"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What rebuilds the image tower without any weights file: it travels in our checkpoints."""

    clip: str
    embed_dim: int
    vision_cfg: dict[str, Any]
    quick_gelu: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return int(self.vision_cfg["image_size"])

    def to_json(self) -> str:
        """Return the architecture as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Architecture":
        """Rebuild an architecture from `to_json`'s line."""
        document = json.loads(text)
        document["mean"], document["std"] = tuple(document["mean"]), tuple(document["std"])
        return Architecture(**document)

    def build_visual(self) -> VisionTransformer:
        """Return the image tower with weights still to be loaded.

        Raises:
            ValueError: if the tower is not one the method can work with.
        """
        vision = CLIPVisionCfg(**self.vision_cfg)
        text = CLIPTextCfg(context_length=1, vocab_size=1, width=8, heads=1, layers=1)
        model = CLIP(self.embed_dim, vision, text, quick_gelu=self.quick_gelu)
        return vit.check_supported(model.visual)


@dataclass(frozen=True)
class PretrainedClip:
    """A whole CLIP, both towers, with what is needed to feed it."""

    model: Any  # open_clip's CLIP, CustomTextCLIP or CoCa, which share no base class
    tokenize: Callable[[list[str]], Tensor]
    architecture: Architecture


def load_clip(config: ModelConfig) -> PretrainedClip:
    """Load a pre-trained CLIP in fp32 on the CPU.

    Raises:
        ValueError: for an unknown name or tag, a QuickGELU mismatch, or an unsupported tower.
    """
    name = config.clip
    if name == MINIATURE:
        name = f"{LOCAL}{resources.files('rft') / 'demo' / 'clip'}"
    local = name.startswith(LOCAL)
    folder = Path(name.removeprefix(LOCAL))
    model_cfg = _local_config(folder) if local else _named_config(config)
    model: Any = open_clip.create_model(name, pretrained=None if local else config.pretrained)
    vit.check_supported(model.visual)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    architecture = Architecture(
        clip=config.clip,
        embed_dim=model_cfg["embed_dim"],
        vision_cfg=model_cfg["vision_cfg"],
        quick_gelu=model_cfg.get("quick_gelu", False),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
    )
    vocabulary = folder / "vocab.txt"
    if local and vocabulary.is_file():
        words = vocabulary.read_text().split("\n")
        tokenize = WordTokenizer(words, model.context_length)
    else:
        tokenize = open_clip.get_tokenizer(name)
    return PretrainedClip(model.eval(), tokenize, architecture)


class WordTokenizer:
    """One token a word, for a tiny text tower: pad 0, start 1, end = the last id.

    open_clip reads the text feature at the largest token id, so the end token must have it.
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        self._ids = {word: number for number, word in enumerate(words) if word}
        self._context_length = context_length

    def __call__(self, texts: Sequence[str] | str) -> Tensor:
        """Return token ids of the texts, int64 (len(texts), context length).

        Raises:
            ValueError: for a word outside the vocabulary or a text that is too long.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self._context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            words = text.lower().replace(".", " ").replace(",", " ").split()
            if unknown := [word for word in words if word not in self._ids]:
                raise ValueError(f"the tokenizer's vocabulary has no {unknown[0]!r} ({text!r})")
            ids = [1, *(self._ids[word] for word in words), max(self._ids.values())]
            if len(ids) > self._context_length:
                raise ValueError(f"{text!r} is longer than {self._context_length} tokens")
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def _local_config(folder: Path) -> dict[str, Any]:
    path = folder / "open_clip_config.json"
    if not path.is_file():
        raise ValueError(f"no CLIP at {folder}: {path.name} is missing")
    return json.loads(path.read_text())["model_cfg"]


def _named_config(config: ModelConfig) -> dict[str, Any]:
    model_cfg = open_clip.get_model_config(config.clip)
    if model_cfg is None:
        raise ValueError(
            f"open_clip has no model {config.clip!r}; python -c "
            "'import open_clip; print(open_clip.list_models())' lists them"
        )
    tag = open_clip.get_pretrained_cfg(config.clip, config.pretrained)
    if not tag and not Path(config.pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.clip)) or "none"
        raise ValueError(
            f"{config.pretrained!r} is no weights tag of {config.clip} and no file; tags: {tags}"
        )
    quick = bool(model_cfg.get("quick_gelu", False))
    if tag and bool(tag.get("quick_gelu", False)) != quick:
        # open_clip only warns here and computes something else than the weights were trained for
        other = config.clip.removesuffix("-quickgelu") if quick else f"{config.clip}-quickgelu"
        raise ValueError(f"weights {config.pretrained!r} were trained as {other}; use that model")
    return model_cfg
