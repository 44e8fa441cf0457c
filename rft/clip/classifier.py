"""The fine-tuned model: CLIP's image tower and a linear head on normalised features.

State-dict keys are `visual.*` (open_clip's own) and `head.{weight,bias}`. A saved classifier is one
safetensors file whose metadata describes the tower, so evaluation needs no other file.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from safetensors.torch import save
from torch import Tensor, nn

from rft.classes import Classes
from rft.clip import card, vit
from rft.clip.architecture import Architecture, read_header
from rft.clip.weights import card_path, difference, read_safetensors
from rft.runs import header
from rft.runs.derived import require_weights
from rft.runs.filenames import SELECTED
from rft.storage import files


class Classifier(nn.Module):
    """Image tower f and head g of the paper: logits = g(f(x) / |f(x)|)."""

    _mean_C11: Tensor
    _std_C11: Tensor

    def __init__(self, visual: VisionTransformer, head: nn.Linear, architecture: Architecture):
        super().__init__()
        self.visual = visual
        self.head = head
        self.architecture = architecture
        # images stay uint8 until they are on the device; these constants include the division by
        # 255
        for name in ("mean", "std"):
            values_C11 = torch.tensor(getattr(architecture, name)).mul(255)[:, None, None]
            # not in the state dict, because the header's architecture has them
            self.register_buffer(f"_{name}_C11", values_C11, persistent=False)

    @property
    def patch_side(self) -> int:
        """Side of a patch in pixels."""
        return self.visual.conv1.kernel_size[0]

    def patches(self, images_BCHW: Tensor, pieces: vit.Pieces = vit.EAGER) -> Tensor:
        """Cut uint8 images into patches of normalised pixels (B, P, V)."""
        # cut first, because cutting copies, and uint8 takes one byte per value instead of four
        return self.normalise(vit.cut_patches(images_BCHW, self.patch_side), pieces)

    def normalise(self, patches_BPV: Tensor, pieces: vit.Pieces = vit.EAGER) -> Tensor:
        """Normalise uint8 patches for the tower, in the type of its matrix products."""
        device = patches_BPV.device.type
        # convert once to the type to which autocast would convert in each tower
        lowered = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if lowered else torch.float32
        mean_C1, std_C1 = self._mean_C11.flatten(1), self._std_C11.flatten(1)
        return pieces.standardise(patches_BPV, mean_C1, std_C1, dtype)

    def features(
        self,
        patches_BPV: Tensor,
        *,
        keep_BP: Tensor | None = None,
        most: int | None = None,
        ragged: bool = True,
        taps: list[vit.AttentionTap] | None = None,
        recompute: bool = False,
        pieces: vit.Pieces = vit.EAGER,
    ) -> Tensor:
        """Compute projected, un-normalised features (B, E).

        Args:
            patches_BPV: normalised pixels from `patches`.
            keep_BP: bool; False patches are excluded from attention.
            most: if given, tokens are dropped instead of masked; it is the number of patches that
                an image keeps, or the largest one if images keep different numbers.
            ragged: whether images keep different numbers.
            taps: if given, one tap on each layer's attention is appended.
            recompute: recompute the layers in the backward pass to save memory.
            pieces: operations between the matrix products of a layer.
        """
        tokens_BLD = vit.embed_tokens(self.visual, patches_BPV)
        if most is not None:
            assert keep_BP is not None, "most needs keep_BP"
            tokens_BLD, keep_BP = vit.drop_tokens(tokens_BLD, keep_BP, most)
            # without a mask, attention can use its fastest kernel
            keep_BP = keep_BP if ragged else None
        return vit.encode(
            self.visual,
            tokens_BLD,
            keep_BP=keep_BP,
            taps=taps,
            recompute=recompute,
            pieces=pieces,
        )

    def logits(self, features_BE: Tensor) -> Tensor:
        """Compute fp32 logits (B, K), with CLIP's scale of about 100."""
        # fp32, because neighbouring bf16 numbers are 0.5 apart at 100
        with torch.autocast(features_BE.device.type, enabled=False):
            return self.head(F.normalize(features_BE.float(), dim=-1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Compute the logits (B, K) of uint8 images."""
        return self.logits(self.features(self.patches(images_BCHW)))


class Saved(NamedTuple):
    """Content of a weights file."""

    state: dict[str, Tensor]
    architecture: Architecture
    metadata: dict[str, str]
    """Recipe and step."""
    classes: Classes | None
    """Classes of the head; None if the file does not list them."""


def save_classifier(
    url: str, model: Classifier, metadata: dict[str, str], classes: Classes | None
) -> None:
    """Write a classifier as safetensors; see `save_state`."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    save_state(url, state, model.architecture, metadata, classes)


def save_state(
    url: str,
    state: dict[str, Tensor],
    architecture: Architecture,
    metadata: dict[str, str],
    classes: Classes | None,
) -> None:
    """Write a state dict as safetensors, atomically.

    Args:
        url: the file.
        state: weights of tower and head.
        architecture: of the tower; stored in the header with `metadata` and `classes`.
        metadata: recipe and step.
        classes: of the head; None only if they are unknown.
    """
    # serialise first, because safetensors' own writer ignores the umask
    files.write_bytes(url, to_bytes(Saved(state, architecture, metadata, classes)))


def to_bytes(saved: Saved) -> bytes:
    """Serialise a model: the same bytes for the same weights and header."""
    entries: dict[str, Any] = {**saved.metadata, "architecture": saved.architecture.to_json()}
    if saved.classes is not None:
        assert len(saved.classes) == len(saved.state["head.weight"]), "the classes of another head"
        entries["classes"] = dataclasses.asdict(saved.classes)
    # third-party weights may have another memory layout (channels last)
    state = {name: value.contiguous() for name, value in saved.state.items()}
    # one JSON string, because safetensors writes several metadata entries in no fixed order
    return save(state, metadata={"rft": json.dumps(entries)})


def load_state(path: Path) -> Saved:
    """Read a file of `save_classifier`.

    Raises:
        ValueError: if it is missing, damaged, was not written by rft, or has a weight that is not
            finite.
    """
    saved = map_state(path)
    require_finite(path, saved.state)
    return saved


def map_state(path: Path) -> Saved:
    """Read the header of a file of `save_classifier` and map its tensors without reading them.

    Use it for shapes and types, and `load_state` to compute with the weights.

    Raises:
        ValueError: if it is missing, damaged, or was not written by rft.
    """
    folder = path.parent.parent
    if folder / SELECTED == path and not path.exists() and (own := card.read(card_path(folder))):
        raise ValueError(f"{folder} is an export; name its run: {own.source.path}")
    require_weights(path)
    state, metadata = read_safetensors(path)
    entries = header.entries(metadata, path)
    architecture, classes = read_header(path, entries), entries.classes
    features = architecture.embed_dim
    # from the number of elements: any other shape of the head is then reported by `difference`
    rows = state["head.weight"].numel() // features if "head.weight" in state else 0
    expected = {
        **architecture.expected(),
        "head.weight": torch.empty((rows, features), device="meta"),
        "head.bias": torch.empty(rows, device="meta"),
    }
    if changed := difference(expected, state):
        raise ValueError(f"{path} is damaged: it has {changed}")
    if classes is not None and len(classes) != rows:
        raise ValueError(
            f"{path} is damaged: its header names {len(classes)} classes, but its head has {rows}"
        )
    return Saved(state, architecture, entries.metadata, classes)


def require_finite(path: Path | str, state: Mapping[str, Tensor]) -> None:
    """Check that all weights are finite: a model with NaN predicts class 0 for every image.

    Raises:
        ValueError: naming the file, or the model that `path` names, and the tensor.
    """
    for name, value in state.items():
        if not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise ValueError(
                f"{path}: {bad:,} of {value.numel():,} weights of {name} are not finite (NaN or "
                "infinite); use an earlier checkpoint of that run, or obtain the file again"
            )


def build_classifier(state: dict[str, Tensor], architecture: Architecture) -> Classifier:
    """Build the classifier of a state dict, in evaluation mode."""
    classes, embed_dim = state["head.weight"].shape
    head = nn.Linear(embed_dim, classes)
    model = Classifier(architecture.build_visual(), head, architecture)
    model.load_state_dict(state)
    return model.eval()


def tower_sha256(model: Classifier) -> str:
    """Hash the weights of the image tower, independent of the file format.

    The head is excluded, because text embeddings may differ in their last bits between devices.
    """
    return module_sha256(model.visual)


def module_sha256(module: nn.Module) -> str:
    """Hash the named weights of a module."""
    digest = hashlib.sha256()
    # sorted by name, so that the hash does not depend on the order of registration
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # as bytes, because NumPy has no bf16
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tower_identity(model: Classifier) -> dict[str, Any]:
    """Identify the tower by all that decides an image's features, for one precision and device."""
    # without the name, which may be a folder on another machine
    architecture = dataclasses.asdict(model.architecture) | {"clip": ""}
    return {"sha256": tower_sha256(model), "architecture": architecture}
