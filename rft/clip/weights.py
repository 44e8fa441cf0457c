"""Third-party CLIP weights: formats recognised by content and read into one form.

Supported are OpenAI's TorchScript files, open_clip's checkpoints, bare state dicts, safetensors
files and hub-layout folders, model-soups' state dicts, the released code's checkpoints, wise-ft's
pickled models and rft's own files. No code in a file is ever run (rft/clip/unpickle.py).

Names follow open_clip and rft: the image tower is `visual.*`, the classification head
`head.{weight,bias}`, and everything else belongs to the text tower.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rft.classes import Classes
from rft.clip import card, unpickle
from rft.clip.architecture import Architecture, read_header
from rft.clip.bounds import HubConfig
from rft.runs import header, trained_on
from rft.runs.trained_on import TrainedOn
from rft.storage import files, local

LOCAL = "local-dir:"  # open_clip's prefix of a folder in place of a model's name
HUB_CONFIG = "open_clip_config.json"
HUB_WEIGHTS = "open_clip_model.safetensors"
HUB_HEAD = "head.safetensors"  # written by rft's export; open_clip ignores it
CARD = "card.json"
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

# names that open_clip looks for in a folder, in this order
_HUB_NAMES = (
    HUB_WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
# prefixes of saved data-parallel and compiled modules
_WRAPPERS = ("module.", "_orig_mod.")
# OpenAI's archives store three numbers among their weights
_OPENAI_NUMBERS = frozenset({"input_resolution", "context_length", "vocab_size"})


@dataclass(frozen=True)
class Layout:
    """Prefixes of the image tower, the head and the text tower in a format."""

    format: str
    visual: str
    head: str
    text: str | None
    openai: bool = True
    """Whether the format's code always builds OpenAI's towers."""


LAYOUTS = (
    Layout("released", "backbone.", "classifier.", None),
    Layout(
        "wise-ft", "image_encoder.model.visual.", "classification_head.", "image_encoder.model."
    ),
    Layout("model-soups", "model.visual.", "classification_head.", "model."),
    Layout("open_clip", "visual.", "head.", "", openai=False),
)


@dataclass(frozen=True)
class Geometry:
    """Geometry of an image tower, by the shapes of its weights."""

    width: int
    patch: int
    layers: int
    grid: int
    embed_dim: int

    def __str__(self) -> str:
        return (
            f"width {self.width}, {self.layers} layers, {self.grid} x {self.grid} patches of "
            f"{self.patch} px, {self.embed_dim} features"
        )

    @staticmethod
    def of(tower: Mapping[str, Tensor], where: Path | str) -> "Geometry":
        """Infer the geometry from the shapes of `visual.*`.

        Raises:
            ValueError: naming their source `where`, if they are not the weights of a CLIP vision
                transformer.
        """
        try:
            conv = tower["visual.conv1.weight"].shape
            positions = tower["visual.positional_embedding"].shape[0] - 1
            embed_dim = tower["visual.proj"].shape[1]
            layers = sum(name.endswith(".attn.in_proj_weight") for name in tower)
            return Geometry(conv[0], conv[-1], layers, round(positions**0.5), embed_dim)
        # without positions, the root of -1 is complex, and round raises TypeError
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"{where}: it has no image tower that is a CLIP vision transformer "
                "(docs/paper.md#models)"
            ) from None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The content of one file or folder, fp32."""

    files: tuple[Path, ...]
    """Files that were read: the file, or the weights in a folder and the separate head."""
    format: str
    geometry: Geometry
    visual: dict[str, Tensor]
    """Image tower, `visual.*`."""
    head: dict[str, Tensor]
    """`head.{weight,bias}`; empty if the file has none."""
    text: dict[str, Tensor]
    """Text tower and logit scale; empty if missing or incomplete."""
    openai: bool = False
    """Whether the weights belong to OpenAI's own architecture: QuickGELU, heads 64 wide."""
    config: HubConfig | None = None
    """Content of open_clip_config.json, if the weights came in such a folder."""
    architecture: Architecture | None = None
    """The tower described by the file itself, its card or the folder's configuration."""
    classes: Classes | None = None
    """Classes of the head, if the file or its export's card names them."""
    seen: frozenset[TrainedOn] | None = None
    """Sets that the weights were trained on, if the file or the card records them."""

    @property
    def quick_gelu(self) -> bool | None:
        """Activation that the weights were trained with; None if unknown."""
        if self.openai:
            return True
        return self.architecture.quick_gelu if self.architecture else None


def read(path: Path) -> Weights:
    """Read weights in any supported format, from a file or a folder in open_clip's hub layout.

    Raises:
        ValueError: if the file is missing or damaged, has other content, or names anything that is
            not needed to read tensors.
    """
    if path.is_dir():
        return _read_folder(path)
    files.require_file(path, "weights")
    with local.reader(path) as stream:
        start = stream.read(9)
    if start[8:] == b"{" and start[5:8] == bytes(3):  # safetensors, with a header below a terabyte
        tensors, metadata = read_safetensors(path)
        found = _sort(path, tensors)
        # the only entry that rft writes; third-party files may have other entries
        if "rft" in metadata:
            entries = header.entries(metadata, path)
            found = dataclasses.replace(
                found,
                format="rft",
                architecture=read_header(path, entries),
                classes=entries.classes,
                seen=trained_on.of_metadata(path, entries.metadata),
            )
    # a zip, or a pickle's opcode PROTO with protocol 2 (torch's) to 5; older pickles have no mark
    elif start[:2] == b"PK" or (start[:1] == b"\x80" and b"\2" <= start[1:2] <= b"\5"):
        content, scripted = unpickle.read(path)
        found = _sort(path, _load(path, content), scripted=scripted)
    else:
        raise ValueError(
            f"{path} has an unknown format; supported are safetensors, files of torch.save or "
            "torch.jit.save, and pickles"
        )
    return _with_card(found, card_path(path))


def is_export(folder: Path) -> bool:
    """Whether a folder has open_clip's hub layout, or the card of such an export."""
    if (folder / HUB_CONFIG).is_file():
        return True
    own = card.read(folder / CARD)
    return own is not None and own.format == "open-clip"


def _require_complete(folder: Path) -> None:
    """Check that an rft export has the files of its model that the card lists."""
    own = card.read(folder / CARD)
    for name in (HUB_WEIGHTS, HUB_HEAD, HUB_CONFIG):
        if own and name in own.files and not (folder / name).is_file():
            raise ValueError(
                f"{folder / name} is missing, but {CARD} lists it: copy it, or export the model "
                "again"
            )


def _read_folder(folder: Path) -> Weights:
    _require_complete(folder)
    if not (folder / HUB_CONFIG).is_file():
        raise ValueError(f"{folder} is a folder without {HUB_CONFIG}; name the weights file in it")
    names = [name for name in _HUB_NAMES if (folder / name).is_file()]
    if not names:
        raise ValueError(f"{folder} has none of the weights files {', '.join(_HUB_NAMES)}")
    # the first match; rft.convert export writes the first name of the list
    path = folder / names[0]
    found = read(path)
    config = files.read_document(str(folder / HUB_CONFIG), HubConfig, header.BYTES)
    described = Architecture.of(f"{LOCAL}{folder}", config)
    _require_one_model(folder / HUB_CONFIG, described, path, found.architecture)
    # before the card, which is compared with the configuration
    found = dataclasses.replace(found, config=config)
    head = folder / HUB_HEAD
    if head.is_file():
        tensors, _ = read_safetensors(head)
        tensors = _as_head(head, tensors, found.geometry)
        found = dataclasses.replace(found, head=tensors, files=(path, head))
    found = _with_card(found, card_path(folder))
    # last, because header and card name the model, and this only the folder
    return dataclasses.replace(found, architecture=found.architecture or described)


def card_path(path: Path) -> Path:
    """Return the path of the card that an export has in its folder, or beside its file."""
    return path / CARD if path.is_dir() else path.with_name(f"{path.name}.json")


def _with_card(found: Weights, path: Path) -> Weights:
    """Add architecture, classes and training sets from the card of rft's export, if it exists."""
    own = card.read(path)
    if own is None:
        return found
    for file in found.files:
        if own.files.get(file.name) != files.sha256_file(file):
            raise ValueError(
                f"{path} describes other weights than {file}; export them again, or remove the card"
            )
    if found.head and len(found.head["head.weight"]) != own.head.classes:
        raise ValueError(
            f"{path} describes a head of {own.head.classes} classes, but {found.files[-1]} has "
            f"{len(found.head['head.weight'])}"
        )
    _require_one_model(path, own.architecture, found.files[0], found.architecture)
    if found.config:
        config, described = path.with_name(HUB_CONFIG), Architecture.of(HUB_CONFIG, found.config)
        _require_one_model(path, own.architecture, config, described)
    seen, classes = found.seen, found.classes
    if seen is None and own.trained_on is not None:
        seen = frozenset(own.trained_on)
    if classes is None and found.head:
        classes = own.label_space
    architecture = found.architecture or own.architecture
    return dataclasses.replace(found, architecture=architecture, seen=seen, classes=classes)


def _require_one_model(
    other: Path, described: Architecture, path: Path, found: Architecture | None
) -> None:
    """Check that two files describe the same image tower and preprocessing, if both do."""
    if found is not None and (changed := found.difference(described)):
        raise ValueError(
            f"{path} and {other} describe different models: {'; '.join(changed[:3])}; restore the "
            "wrong one"
        )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of a safetensors file, and read its metadata.

    No bytes of the tensors are read yet.

    Raises:
        ValueError: if it is damaged.
    """
    # first, because it bounds the header that the library reads
    header.read(path)
    try:
        with safe_open(path, framework="pt") as stream:
            # `keys` is the file's own list, not a dict's method
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            return tensors, stream.metadata() or {}
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or truncated: {unpickle.first_line(error)}") from error


def _load(path: Path, content: Any) -> dict[str, Tensor]:
    """Read the model's tensors from a pickled checkpoint, state dict or module.

    A checkpoint also has an optimizer, a step and so on.
    """
    try:
        entries = content if isinstance(content, Mapping) else {}
        # open_clip's training saves "state_dict", the released code "model"
        parts = (entries.get(name) for name in ("state_dict", "model"))
        models = (part for part in parts if isinstance(part, (Mapping, unpickle.StandIn)))
        content = next(models, content)
        _require_normalising(content)
        # one more than allowed is enough to detect too many
        named = dict(islice(unpickle.named_tensors(content), header.TENSORS + 1))
        if len(named) > header.TENSORS:
            raise ValueError(f"it has more than {header.TENSORS:,} tensors; a CLIP has fewer")
        # a few bytes can repeat a storage many times; twice is allowed for tied weights
        return unpickle.load_tensors(named, 2 * path.stat().st_size)
    except unpickle.DAMAGE as error:
        raise ValueError(f"{path}: {unpickle.first_line(error)}") from error


def _require_normalising(content: Any) -> None:
    """Check that a pickled head reads normalised features, as rft's does."""
    # wise-ft's ClassificationHead stores this in an attribute, which only pickled modules have
    modules = getattr(content, "attributes", {}).get("_modules", {})
    head = modules.get("classification_head")
    if getattr(head, "attributes", {}).get("normalize") is False:
        raise ValueError(
            "its head reads un-normalised features, but rft's head needs normalised ones"
        )


def _all_start_with(prefix: str, tensors: dict[str, Tensor]) -> bool:
    return bool(tensors) and all(name.startswith(prefix) for name in tensors)


def _sort(path: Path, tensors: dict[str, Tensor], *, scripted: bool = False) -> Weights:
    """Recognise the format by the tensors' names, and rename them to rft's."""
    # in any order: DDP may wrap a compiled module, or the reverse
    while wrapper := next((w for w in _WRAPPERS if _all_start_with(w, tensors)), ""):
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    # a file in two layouts at once fails below, at the first name that this layout lacks
    layout = next((one for one in LAYOUTS if f"{one.visual}conv1.weight" in tensors), None)
    if layout is None:
        some = ", ".join(list(tensors)[:3]) or "no tensors"
        raise ValueError(f"{path} has no CLIP image tower in a known layout ({some})")
    # TorchScript from other code lacks the three numbers, and may have either activation
    openai = layout.openai or (scripted and tensors.keys() >= _OPENAI_NUMBERS)
    # a scripted module saves constants among its weights
    constants = _OPENAI_NUMBERS | {"attn_mask"} if scripted else set()
    visual, head, text = {}, {}, {}
    for name, value in tensors.items():
        if name.startswith(layout.visual):
            visual[f"visual.{name.removeprefix(layout.visual)}"] = value
        elif name.startswith(layout.head):
            head[f"head.{name.removeprefix(layout.head)}"] = value
        elif layout.text is None or not name.startswith(layout.text):
            raise ValueError(f"{path} has a tensor {name!r} that its format does not have")
        elif (own := name.removeprefix(layout.text)) not in constants:
            # integer buffers, such as position ids, keep their type
            text[own] = value.float() if value.dtype in FLOATS else value
    visual = _as_floats(path, visual)
    geometry = Geometry.of(visual, path)
    # fine-tuning code that removes the text tower may leave parts of it
    has_layers = any(name.startswith(("transformer.resblocks.", "text.")) for name in text)
    return Weights(
        files=(path,),
        format="openai" if scripted and openai else layout.format,
        geometry=geometry,
        visual=visual,
        head=_as_head(path, head, geometry) if head else {},
        text=text if has_layers else {},
        openai=openai,
    )


def _as_floats(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, value in state.items():
        if value.dtype not in FLOATS:
            raise ValueError(f"{path} has {name} of {value.dtype}; weights are fp16 to fp64")
    return {name: value.float() for name, value in state.items()}


def _as_head(path: Path, head: dict[str, Tensor], tower: Geometry) -> dict[str, Tensor]:
    """Check a head; a missing bias becomes zero."""
    head = _as_floats(path, head)
    weight = head.get("head.weight")
    if weight is None or weight.ndim != 2 or head.keys() - {"head.weight", "head.bias"}:
        raise ValueError(f"{path} has a head that is not one linear layer: {', '.join(head)}")
    bias = head.get("head.bias", torch.zeros(len(weight)))
    if weight.shape[1] != tower.embed_dim or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{path} has a head of shape {tuple(weight.shape)}, but its tower has "
            f"{tower.embed_dim} features"
        )
    return {"head.weight": weight, "head.bias": bias}


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Describe the first difference of two sets of weights; empty if they match."""
    missing, surplus = (
        sorted(one.keys() - other.keys()) for one, other in ((expected, found), (found, expected))
    )
    if names := missing or surplus:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        return f"{'no' if missing else 'an unknown'} {names[0]!r}{more}"
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return f"{name} of shape {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        if found[name].dtype != value.dtype:
            return f"{name} of {found[name].dtype} instead of {value.dtype}"
    return ""
