"""Description of an image tower without its weights, stored in the header of rft's files."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from open_clip.model import CLIP, CLIPTextCfg
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor

from rft.clip import vit
from rft.clip.bounds import Deviation, EmbedDim, HubConfig, Mean, Vision, build, open_clips
from rft.runs.header import Entries
from rft.storage import documents, files
from rft.storage.documents import Name, document


@document(name="architecture")
class Architecture:
    """Image tower and preprocessing of a CLIP."""

    clip: Name
    embed_dim: EmbedDim
    vision_cfg: Vision
    quick_gelu: bool
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]

    def __post_init__(self) -> None:
        if self.quick_gelu and self.vision_cfg.get("act_kwargs"):
            raise ValueError("vision_cfg.act_kwargs is given, but a QuickGELU has no options")

    @classmethod
    def of(cls, clip: str, hub: HubConfig) -> Self:
        """Extract the image tower of an open_clip configuration, which is named `clip`."""
        default = PreprocessCfg()
        return cls(
            clip=clip,
            embed_dim=hub.model_cfg["embed_dim"],
            vision_cfg=hub.model_cfg["vision_cfg"],
            quick_gelu=hub.model_cfg.get("quick_gelu", False),
            mean=three(hub.preprocess_cfg.get("mean", default.mean)),
            std=three(hub.preprocess_cfg.get("std", default.std)),
        )

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.vision_cfg["image_size"]

    def to_json(self) -> str:
        """Format as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def difference(self, other: "Architecture") -> list[str]:
        """List the fields in which two architectures differ, one line each.

        The name is ignored, because it may be a folder on another machine.
        """
        mine, theirs = (dataclasses.asdict(a) | {"clip": ""} for a in (self, other))
        return files.difference(mine, theirs)

    def build_visual(self) -> VisionTransformer:
        """Build the image tower, without loading weights.

        Raises:
            ValueError: if the tower is not one the method can work with.
        """
        vision = open_clips(self.vision_cfg)
        # open_clip's CLIP cannot be built without a text tower: use a tiny one, which is dropped
        text = CLIPTextCfg(context_length=1, vocab_size=1, width=8, heads=1, layers=1)
        what = f"the image tower of {self.clip}"
        model = build(what, CLIP, self.embed_dim, vision, text, quick_gelu=self.quick_gelu)
        return vit.check_supported(model.visual, what)

    def expected(self) -> dict[str, Tensor]:
        """List the weights of the tower as `visual.*`, on the meta device without memory.

        Raises:
            ValueError: if the tower is not one the method can work with.
        """
        return _expected(self.to_json())


def three(values: Sequence[float]) -> tuple[float, float, float]:
    """Convert the values of three channels."""
    red, green, blue = map(float, values)
    return red, green, blue


# cached by its JSON, because an architecture holds a dict and is not hashable
@functools.lru_cache(maxsize=4)  # a soup compares dozens of files with one tower
def _expected(document: str) -> dict[str, Tensor]:
    architecture = documents.decode(document.encode(), Architecture, "architecture")
    with torch.device("meta"):
        visual = architecture.build_visual()
    return {f"visual.{name}": value for name, value in visual.state_dict().items()}


def read_header(path: Path, entries: Entries) -> Architecture:
    """Read the architecture in the header of a file written by rft.

    Raises:
        ValueError: naming the file, if the architecture is missing or unsupported.
    """
    if entries.architecture is None:
        raise ValueError(f"{path} was not written by rft: its header has no architecture")
    where = f"architecture in the header of {path}"
    architecture = documents.decode(entries.architecture.encode(), Architecture, where)
    try:
        architecture.expected()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return architecture
