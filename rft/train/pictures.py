"""Pictures of what the method makes of images: live ones while training, and the report's gallery.

`grid` shows what a step has just distilled on, from that step's own tensors. `write_gallery` keeps
what the selected model's masks and fills make of a few fixed images, as numbers for the report to
draw (Fig. 5).

Shapes: B images, P patches, V = C times the pixels of a patch, Z images in the donor pool.
"""

import io
import logging
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from rft.clip import vit
from rft.clip.classifier import Classifier
from rft.config import MethodConfig
from rft.evaluate.measure_cam import label_map
from rft.loading.dataset import PackedDataset
from rft.method import refill
from rft.method.counterfactual import StepAddress, donors, draw
from rft.runs import gallery_file as gallery
from rft.storage import files

COLUMNS = 8
TILE = 112  # pixels that a small image is enlarged to, about; a large one keeps its size
GREY, LIGHT, DARK = 128, 232, 56  # a dropped patch; in a mask what stays, and what is masked

log = logging.getLogger(__name__)


class Counterfactuals(NamedTuple):
    """A micro-batch's counterfactuals as the step knew them; nothing is copied."""

    pool_ZCHW: Tensor  # uint8
    donor_BP: Tensor
    own_B1: Tensor


def grid(shown: Counterfactuals, side: int) -> Tensor:
    """Draw a column for each of the first images, uint8 (3, height, width) on the CPU.

    From the top: the image, its mask (dark), and what the models saw instead, with dropped patches
    in grey. A masked patch that an image's fill takes from the image itself counts as kept. A patch
    has `side` pixels a side.
    """
    donor_BP, own_B1 = shown.donor_BP[:COLUMNS], shown.own_B1[:COLUMNS]
    images_BCHW = shown.pool_ZCHW[own_B1[:, 0]]
    images_BPV = vit.cut_patches(images_BCHW, side)
    pool_ZPV = vit.cut_patches(shown.pool_ZCHW, side)
    filled_BPV = refill.apply_donors(pool_ZPV, donor_BP, own_B1)
    filled_BPV = filled_BPV.masked_fill((donor_BP == refill.DROP)[..., None], GREY)
    mask_BP1 = (donor_BP != own_B1)[..., None]
    mask_BPV = torch.full_like(images_BPV, LIGHT).masked_fill(mask_BP1, DARK)
    rows = [join_patches(part, side) for part in (images_BPV, mask_BPV, filled_BPV)]
    picture_CHW = make_grid(torch.cat(rows), nrow=len(images_BCHW), padding=1, pad_value=255)
    times = max(1, round(TILE / images_BCHW.shape[-1]))
    return picture_CHW.repeat_interleave(times, 1).repeat_interleave(times, 2).cpu()


def join_patches(patches_BPV: Tensor, side: int) -> Tensor:
    """Return the images made of patches, (B, C, H, W); the inverse of `vit.cut_patches`."""
    across = round(patches_BPV.shape[1] ** 0.5)
    # pixel_shuffle takes channels in the order of `cut_patches`: C, row, column of the patch
    return F.pixel_shuffle(patches_BPV.mT.unflatten(2, (across, across)), side)


def write_gallery(
    url: str,
    model: Classifier,
    packed: PackedDataset,
    samples: np.ndarray,
    methods: dict[str, MethodConfig],
) -> None:
    """Write `url` (npz): images of some samples, relevance and the donor map of each recipe.

    Every mask x fill is built from the student's one relevance map, by the same functions as in a
    training step, on the CPU; the samples are each other's donor pool. What no report would draw is
    not written, with a warning: the model diverged, or its images are too large.
    """
    batch = packed.batch(samples, model.architecture.image_size)
    relevance_BP = label_map(model, batch.images_BCHW, batch.labels_B, "relevance")
    columns = {
        "images_BCHW": batch.images_BCHW.numpy(),
        "labels_B": batch.labels_B.numpy(),
        "class_names": np.array(packed.manifest.classes),
        "relevance_BP": relevance_BP.numpy(),
        "patch": np.array(model.architecture.vision_cfg["patch_size"]),
    }
    count, patches = relevance_BP.shape
    for name, method in methods.items():
        # one address for all runs, so that their pictures show the same random draws
        draws = draw(method, range(count), patches, count, StepAddress(0, 0, 0, 0))
        columns[f"{gallery.DONOR}{name}"] = donors(method, draws, relevance_BP).numpy()
    try:
        gallery.check(columns)
    except ValueError as error:
        log.warning(f"the report will have no picture of masks and fills: {error}")
        return
    stream = io.BytesIO()
    np.savez_compressed(stream, **columns)
    files.write_bytes(url, stream.getvalue())


def one_of_each_class(labels_B: np.ndarray, samples: np.ndarray, count: int) -> np.ndarray:
    """Choose the images of a gallery: the first of `count` classes each, spread over the labels."""
    _, first = np.unique(labels_B[samples], return_index=True)
    chosen = np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)
    return samples[first[chosen]]
