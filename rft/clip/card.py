"""The card (JSON) that an export writes next to its weights; defined here for both directions."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rft.classes import Classes, PromptsSha256
from rft.clip.architecture import Architecture
from rft.runs import header
from rft.runs.records import RecordedSeed
from rft.runs.trained_on import TrainedOn
from rft.storage import documents, files
from rft.storage.documents import FOREIGN, Count, Name, Schema, Sha256, Text, document
from rft.text import short

Format = Literal["open-clip", "onnx", "released", "model-soups", "safetensors"]


@document(name="source", config=FOREIGN)
class Source:
    """The weights that were exported."""

    path: Text
    sha256: Sha256
    text: Text = ""
    """Source of the text tower, as given by --text."""


@document(name="preprocessing", config=FOREIGN)
class Preprocessing:
    """Input expected by the image tower."""

    size: Count
    resize: Name = "bicubic, shorter side to size"
    crop: Name = "center"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@document(name="head", config=FOREIGN)
class Head:
    """The classification head."""

    classes: Count
    features: Count
    logits: Name = "weight @ (features / |features|) + bias"
    logit_scale_in_weight: bool = True


@document(name="card", config=FOREIGN)
class Card:
    """Description of exported weights, sufficient to compute with them."""

    schema: Schema = 1
    format: Format
    source: Source
    files: dict[Name, Sha256]
    """Hash of each file of the export."""
    architecture: Architecture
    activation: Literal["GELU", "QuickGELU"]
    preprocessing: Preprocessing
    head: Head
    classes: tuple[Name, ...] | None = None
    class_ids: tuple[Name, ...] | None = None
    prompts_sha256: PromptsSha256 | None = None
    trained_on: tuple[TrainedOn, ...] | None = None
    recipe: Name | None = None
    seed: RecordedSeed | None = None
    unfinished: Text = ""
    """Progress of the training, if it has not finished."""
    base_model: Name | None = None
    """The model of the hub that it started from, if known."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Divisor of the logits for probabilities, if a temperature was fitted."""
    # for readers of the card; rft does not use them
    settings: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    card_sha256: Sha256 | None = None
    """Hash of the other fields, by which an edited card is recognised."""

    def __post_init__(self) -> None:
        if self.label_space is not None and len(self.label_space) != self.head.classes:
            raise ValueError(
                f"head.classes is {self.head.classes}; classes names {len(self.label_space)}"
            )
        tower, pixels = self.architecture, self.preprocessing
        # these are stored twice for readers: if they differed, one would win unnoticed
        for name, said, own in (
            ("activation", self.activation, "QuickGELU" if tower.quick_gelu else "GELU"),
            ("preprocessing.size", pixels.size, tower.image_size),
            ("preprocessing.mean", pixels.mean, tower.mean),
            ("preprocessing.std", pixels.std, tower.std),
            ("head.features", self.head.features, tower.embed_dim),
        ):
            if said != own:
                raise ValueError(f"{name} is {said}, but by architecture it is {own}")

    @property
    def label_space(self) -> Classes | None:
        """Classes of the head, if the card names them."""
        if self.classes is None:
            return None
        prompts = self.prompts_sha256 or ""
        return Classes(ids=self.class_ids or (), names=self.classes, prompts_sha256=prompts)


def with_hash(document: dict[str, Any]) -> dict[str, Any]:
    """Add the hash of the other fields to a card's document."""
    others = {name: value for name, value in document.items() if name != "card_sha256"}
    return others | {"card_sha256": files.sha256_json(others)}


def is_edited(path: Path) -> bool:
    """Whether the card at a path was changed since its export; False for a card without hash."""
    found: Any = documents.parse(files.read_bytes(str(path), header.BYTES), str(path))
    return found.get("card_sha256") not in (None, with_hash(found)["card_sha256"])


def read(path: Path) -> Card | None:
    """Read the card at a path; None if it does not exist or is a document of a different kind.

    Raises:
        ValueError: naming file and field, if it is not JSON, or is a malformed card.
    """
    if not path.is_file():
        return None
    data = files.read_bytes(str(path), header.BYTES)
    found = documents.parse(data, str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} is {short(found)}; it must be an object")
    # other programs may use this file name; an export's card has both fields
    if not {"format", "architecture"} <= found.keys():
        return None
    return documents.decode(data, Card, str(path))
