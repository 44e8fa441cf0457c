"""What rebuilds an image tower without its weights: it travels in the header of our checkpoints.

It is read from files that anyone may have made, so every field is checked before it is used.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import VisionTransformer

from rft import files
from rft.classes import Classes
from rft.classes import of_entries as classes_of_entries
from rft.clip import vit


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Image tower and preprocessing of a CLIP."""

    clip: str
    embed_dim: int
    vision_cfg: dict[str, Any]
    quick_gelu: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        kinds = {"clip": str, "embed_dim": int, "vision_cfg": dict, "quick_gelu": bool}
        if wrong := [name for name, kind in kinds.items() if type(getattr(self, name)) is not kind]:
            raise ValueError(f"its {wrong[0]} is not a {kinds[wrong[0]].__name__}")
        try:
            vision = CLIPVisionCfg(**self.vision_cfg)
        except TypeError as error:
            raise ValueError(f"its vision_cfg is not open_clip's: {error}") from error
        # timm would download a model of any name before anything could be checked
        if vision.timm_model_name or vision.timm_model_pretrained:
            raise ValueError("timm builds its image tower; rft needs open_clip's own")
        if type(self.vision_cfg.get("image_size")) is not int:
            raise ValueError("its image_size is not one number")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if [type(value) for value in values] != [float] * 3:
                raise ValueError(f"its {name} is not three numbers")

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.vision_cfg["image_size"]

    def to_json(self) -> str:
        """Return the architecture as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def of(document: Any) -> "Architecture":
        """Rebuild an architecture from its fields.

        Raises:
            ValueError: if they are not those of one that rft can work with.
        """
        try:
            pixels = {name: tuple(map(float, document[name])) for name in ("mean", "std")}
            fields: dict[str, Any] = {**document, **pixels}
            return Architecture(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it lacks a field or has another ({error})") from error

    def difference(self, other: "Architecture") -> list[str]:
        """Return one line for each field in which two differ.

        The name does not count: it may be a folder of another machine.
        """
        mine, theirs = (dataclasses.asdict(a) | {"clip": ""} for a in (self, other))
        return files.difference(mine, theirs)

    def build_visual(self) -> VisionTransformer:
        """Return the image tower with weights still to be loaded.

        Raises:
            ValueError: if the tower is not one the method can work with.
        """
        vision = CLIPVisionCfg(**self.vision_cfg)
        text = CLIPTextCfg(context_length=1, vocab_size=1, width=8, heads=1, layers=1)
        model = CLIP(self.embed_dim, vision, text, quick_gelu=self.quick_gelu)
        return vit.check_supported(model.visual)


class Header(NamedTuple):
    """What the header of one of rft's weights files says."""

    architecture: Architecture
    metadata: dict[str, str]
    """Recipe and step."""
    classes: Classes | None
    """Classes of the head; None in a file that was written without them."""


def read_header(path: Path, header: Mapping[str, str]) -> Header:
    """Parse the header of one of rft's files.

    Raises:
        ValueError: if the header is not rft's.
    """
    try:
        entries = json.loads(header["rft"])
        classes = classes_of_entries(entries)
        entries.pop("classes", None)
        architecture = Architecture.of(json.loads(entries.pop("architecture")))
        return Header(architecture, entries, classes)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} was not written by rft: its header names no architecture ({error})"
        ) from error


def read_document(path: Path) -> dict[str, Any]:
    """Return the JSON object in a local file.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a JSON object")
    return document
