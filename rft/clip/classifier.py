"""The model that is fine-tuned: CLIP's image tower and a linear head on normalised features.

State-dict keys are `visual.*` (open_clip's own) and `head.{weight,bias}`. A saved classifier is one
safetensors file whose metadata rebuilds the tower, so evaluation needs nothing else.
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
from rft.clip import vit
from rft.clip.architecture import Architecture, read_header
from rft.clip.weights import difference, read_safetensors
from rft.runs import header
from rft.runs.derived import require_weights
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
        # images stay uint8 until they are on the device; these fold the division by 255
        for name in ("mean", "std"):
            values_C11 = torch.tensor(getattr(architecture, name)).mul(255)[:, None, None]
            # not in the state dict: the header's architecture holds them
            self.register_buffer(f"_{name}_C11", values_C11, persistent=False)

    @property
    def patch_side(self) -> int:
        """Side of a patch in pixels."""
        return self.visual.conv1.kernel_size[0]

    def patches(self, images_BCHW: Tensor, pieces: vit.Pieces = vit.EAGER) -> Tensor:
        """Return the normalised pixels of every patch (B, P, V) of uint8 images."""
        # cut first, because that is a copy, of one byte for each pixel and not of four
        return self.normalise(vit.cut_patches(images_BCHW, self.patch_side), pieces)

    def normalise(self, patches_BPV: Tensor, pieces: vit.Pieces = vit.EAGER) -> Tensor:
        """Return uint8 patches as the tower wants them, in the type of its products."""
        device = patches_BPV.device.type
        # what autocast would make of them in each tower, made once
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
        """Return projected, un-normalised features (B, E).

        Args:
            patches_BPV: normalised pixels from `patches`.
            keep_BP: bool; patches that are False take no part, as if they were not there.
            most: with it, tokens are dropped and not only masked: the number of patches that an
                image keeps, or the largest one where images keep different numbers.
            ragged: whether they do.
            taps: if given, one tap on each layer's attention is appended.
            recompute: compute the layers again in the backward pass to save memory.
            pieces: what lies between the products of a layer.
        """
        tokens_BLD = vit.embed_tokens(self.visual, patches_BPV)
        if most is not None:
            assert keep_BP is not None, "nothing says which tokens to keep"
            tokens_BLD, keep_BP = vit.drop_tokens(tokens_BLD, keep_BP, most)
            # no mask at all leaves attention its fastest kernel
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
        """Return fp32 logits (B, K); they carry CLIP's scale of about 100."""
        # neighbouring numbers of bf16 are 0.5 apart at 100
        with torch.autocast(features_BE.device.type, enabled=False):
            return self.head(F.normalize(features_BE.float(), dim=-1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits (B, K) of uint8 images."""
        return self.logits(self.features(self.patches(images_BCHW)))


class Saved(NamedTuple):
    """Content of a weights file."""

    state: dict[str, Tensor]
    architecture: Architecture
    metadata: dict[str, str]
    """Recipe and step."""
    classes: Classes | None
    """Classes of the head; None in a file that does not say."""


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
    """Write a state dict as safetensors, intact or not at all.

    Args:
        url: the file.
        state: weights of tower and head.
        architecture: of the tower; with `metadata` and `classes` it makes up the header.
        metadata: recipe and step.
        classes: of the head; None only where nothing says which they are.
    """
    # to bytes first: safetensors' own writer ignores the umask
    files.write_bytes(url, to_bytes(Saved(state, architecture, metadata, classes)))


def to_bytes(saved: Saved) -> bytes:
    """Return the weights file of a model: the same bytes for the same weights and header."""
    entries: dict[str, Any] = {**saved.metadata, "architecture": saved.architecture.to_json()}
    if saved.classes is not None:
        assert len(saved.classes) == len(saved.state["head.weight"]), "the classes of another head"
        entries["classes"] = dataclasses.asdict(saved.classes)
    # weights of others may lie in memory in another order (channels last)
    state = {name: value.contiguous() for name, value in saved.state.items()}
    # one JSON string: safetensors writes several metadata entries in no fixed order
    return save(state, metadata={"rft": json.dumps(entries)})


def load_state(path: Path) -> Saved:
    """Read a file of `save_classifier`.

    Raises:
        ValueError: if it is absent, damaged, was not written by rft, or has a weight that is not
            finite.
    """
    saved = map_state(path)
    require_finite(path, saved.state)
    return saved


def map_state(path: Path) -> Saved:
    """Read the header of a file of `save_classifier` and map its tensors, of which none is read.

    For shapes and types; `load_state` is for computing with the weights.

    Raises:
        ValueError: if it is absent, damaged, or was not written by rft.
    """
    require_weights(path)
    state, metadata = read_safetensors(path)
    entries = header.entries(metadata, path)
    architecture, classes = read_header(path, entries), entries.classes
    features = architecture.embed_dim
    # by its size: a head of any other shape is then an error of `difference`
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
            f"{path} is damaged: its header names {len(classes)} classes, its head has {rows}"
        )
    return Saved(state, architecture, entries.metadata, classes)


def require_finite(path: Path | str, state: Mapping[str, Tensor]) -> None:
    """Check that no weight is NaN or infinite: such a model predicts class 0 for every image.

    Raises:
        ValueError: naming the file, or the model that `path` names, and the tensor.
    """
    for name, value in state.items():
        if not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise ValueError(
                f"{path}: {bad:,} of {value.numel():,} weights of {name} are not finite (NaN or "
                "infinite); use an earlier checkpoint of that run, or get the file again"
            )


def build_classifier(state: dict[str, Tensor], architecture: Architecture) -> Classifier:
    """Return the classifier of a state dict, in evaluation mode."""
    classes, embed_dim = state["head.weight"].shape
    head = nn.Linear(embed_dim, classes)
    model = Classifier(architecture.build_visual(), head, architecture)
    model.load_state_dict(state)
    return model.eval()


def tower_sha256(model: Classifier) -> str:
    """Hash the weights of the image tower; they do not depend on the file that they came from.

    The head is left out: text embeddings may differ in their last bits from device to device.
    """
    return module_sha256(model.visual)


def module_sha256(module: nn.Module) -> str:
    """Hash the weights of a module, by their names."""
    digest = hashlib.sha256()
    # sorted by name: the hash is the same whatever order a tower registers its weights in
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # as bytes: NumPy has no bf16
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tower_identity(model: Classifier) -> dict[str, Any]:
    """Return what decides the features of an image, in the same precision on the same device."""
    # the name may be a folder of another machine
    architecture = dataclasses.asdict(model.architecture) | {"clip": ""}
    return {"sha256": tower_sha256(model), "architecture": architecture}
