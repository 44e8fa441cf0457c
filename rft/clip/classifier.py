"""The model that is fine-tuned: CLIP's image tower and a linear head on normalised features.

State-dict keys are `visual.*` (open_clip's own) and `head.{weight,bias}`. A saved classifier is one
safetensors file whose metadata rebuilds the tower, so evaluation needs nothing else.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rft import files
from rft.clip import vit
from rft.clip.architecture import Architecture, read_header

SELECTED = Path("checkpoints") / "best.safetensors"  # of a run; the last without held-out images
LAST = Path("checkpoints") / "last.safetensors"  # after the last step


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
            self.register_buffer(f"_{name}_C11", values_C11, persistent=False)

    @property
    def patch_side(self) -> int:
        """Side of a patch in pixels."""
        return self.visual.conv1.kernel_size[0]

    def patches(self, images_BCHW: Tensor) -> Tensor:
        """Return the normalised pixels of every patch (B, P, V) of uint8 images."""
        return self.normalise(vit.cut_patches(images_BCHW, self.patch_side))

    def normalise(self, patches_BPV: Tensor) -> Tensor:
        """Return uint8 patches as the tower wants them, fp32."""
        channels = len(self._mean_C11)
        pixels_BPCR = patches_BPV.float().unflatten(-1, (channels, -1))
        mean_C1, std_C1 = self._mean_C11.flatten(1), self._std_C11.flatten(1)
        return ((pixels_BPCR - mean_C1) / std_C1).flatten(-2)

    def features(
        self,
        patches_BPV: Tensor,
        *,
        keep_BP: Tensor | None = None,
        most: int | None = None,
        ragged: bool = True,
        taps: list[vit.AttentionTap] | None = None,
        recompute: bool = False,
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
        """
        tokens_BLD = vit.embed_tokens(self.visual, patches_BPV)
        if most is not None:
            assert keep_BP is not None, "nothing says which tokens to keep"
            tokens_BLD, keep_BP = vit.drop_tokens(tokens_BLD, keep_BP, most)
            # no mask at all leaves attention its fastest kernel
            keep_BP = keep_BP if ragged else None
        return vit.encode(self.visual, tokens_BLD, keep_BP=keep_BP, taps=taps, recompute=recompute)

    def logits(self, features_BE: Tensor) -> Tensor:
        """Return fp32 logits (B, K); they carry CLIP's scale of about 100."""
        with torch.autocast(features_BE.device.type, enabled=False):
            return self.head(F.normalize(features_BE.float(), dim=-1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits (B, K) of uint8 images."""
        return self.logits(self.features(self.patches(images_BCHW)))


def save_classifier(url: str, model: Classifier, metadata: dict[str, str]) -> None:
    """Write a classifier as safetensors; `metadata` joins the architecture in its header."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_state(url, state, model.architecture, metadata)


def save_state(
    url: str, state: dict[str, Tensor], architecture: Architecture, metadata: dict[str, str]
) -> None:
    """Write a state dict with its architecture as safetensors, whole or not at all."""
    # one JSON string: safetensors writes several metadata entries in no fixed order
    header = {"rft": json.dumps({**metadata, "architecture": architecture.to_json()})}
    # to bytes first: safetensors' own writer ignores the umask
    files.write_bytes(url, save(state, metadata=header))


def checkpoint_path(path: Path) -> Path:
    """Return the weights file meant by `path`: itself, or the selected one of a run folder."""
    return path / SELECTED if path.is_dir() else path


def load_state(path: Path) -> tuple[dict[str, Tensor], Architecture, dict[str, str]]:
    """Read a file of `save_classifier`: tensors, architecture, metadata.

    Raises:
        ValueError: if it is absent, damaged, or was not written by rft.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as stream:
            header = stream.metadata() or {}
            # every name, in order: `keys` is the file's own list, not a dict's
            state = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return state, *read_header(path, header)


def build_classifier(state: dict[str, Tensor], architecture: Architecture) -> Classifier:
    """Return the classifier of a state dict, in evaluation mode."""
    classes, embed_dim = state["head.weight"].shape
    head = nn.Linear(embed_dim, classes)
    model = Classifier(architecture.build_visual(), head, architecture)
    model.load_state_dict(state)
    return model.eval()
