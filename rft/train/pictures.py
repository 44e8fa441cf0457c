"""Pictures of what the method makes of images: live ones while training, and the report's gallery.

`grid` shows what a step has just distilled on, from that step's own tensors. `write_gallery` keeps
what the selected model's masks and fills make of a few fixed images, as numbers for the report to
draw (Fig. 5), and `keep_frame` how the masks of these images change with the steps before.

Shapes: B images, P patches, V = C times the pixels of a patch, Z images in the donor pool, S steps.
"""

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from rft.clip import vit
from rft.clip.classifier import Classifier
from rft.config import MethodConfig
from rft.device import autocast, to_device
from rft.evaluate.measure_cam import label_map
from rft.loading.dataset import PackedDataset
from rft.method import refill
from rft.method.counterfactual import StepAddress, cam_mask, donors, draw
from rft.runs import filenames
from rft.runs import gallery_file as gallery
from rft.runs.gallery_file import Frames
from rft.storage import files
from rft.train.job import Job

COLUMNS = 8
IMAGES = 8  # of a gallery
FRAMES = 9  # steps of a run that its gallery shows
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
    frames: Mapping[str, np.ndarray],
) -> None:
    """Write `url` (npz): images of some samples, relevance and the donor map of each recipe.

    Every mask x fill is built from the student's one relevance map, by the same functions as in a
    training step, on the CPU; the samples are each other's donor pool. The arrays of `frames` are
    added. What no report would draw is not written, with a warning: the model diverged, or its
    images are too large.
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
    columns |= frames
    try:
        gallery.check(columns)
    except ValueError as error:
        log.warning(f"the report will have no picture of masks and fills: {error}")
        return
    write_npz(url, columns)


def write_npz(url: str, columns: dict[str, Any]) -> None:
    """Write arrays, intact or not at all; the same arrays give the same bytes."""
    stream = io.BytesIO()
    # zipfile dates members that are written so 1980-01-01
    np.savez_compressed(stream, **columns)
    files.write_bytes(url, stream.getvalue())


def keep_frame(job: Job, step: int) -> None:
    """Add how the model whose CAM decides sees the gallery's images to the main rank's frames.npz.

    Of the start and of the ends of epochs, FRAMES at most are kept, evenly spread. To be called
    before the checkpoint of the step, so that a resumed run finds every frame that it will not
    compute. No random number is drawn and no weight is touched.
    """
    method, samples = job.config.method, gallery_samples(job)
    steps = frame_steps(job.config.optim.epochs, job.batches.plan.steps_per_epoch)
    if not (job.world.is_main and len(samples) and step in steps):
        return
    batch = job.batches.packed.batch(samples, job.batches.image_size)
    images_BCHW, labels_B = (to_device(one, job.device) for one in batch[:2])
    # no more together than a step has memory for: fp32 takes twice the bytes of bf16
    together = max(1, job.config.micro_batch(job.world.size) // 2)
    parts = zip(images_BCHW.split(together), labels_B.split(together), strict=True)
    recompute = job.objective.recompute
    if method.cam_model == "student":
        maps = [label_map(job.student, *part, method.cam, recompute=recompute) for part in parts]
    else:
        # its matrices may be kept in bf16, which only the step's own precision can compute with
        with autocast(job.device, job.config.precision):
            maps = [label_map(job.objective.teacher, *part, method.cam) for part in parts]
    relevance_BP = torch.cat(maps).cpu()
    columns = {"steps_S": np.array([step]), "relevance_SBP": relevance_BP[None].numpy()}
    if method.needs_cam:
        mask_BP = cam_mask(method.mask, relevance_BP, method.threshold)
        columns["masked_SBP"] = mask_BP[None].numpy()
    # at the start, frames are those of a run that came no further
    kept = kept_frames(job, step) if step else {}
    if kept.keys() == columns.keys():
        columns = {name: np.concatenate([kept[name], columns[name]]) for name in columns}
    write_npz(str(Path(job.config.run) / filenames.FRAMES), columns)


def kept_frames(job: Job, before: int) -> dict[str, np.ndarray]:
    """Return the frames of the run that are of earlier steps than that; see `Frames.columns`."""
    folder, side = Path(job.config.run), job.student.patch_side
    # a run whose last steps are repeated after its end has them in its gallery
    paths = (folder / name for name in (filenames.FRAMES, filenames.GALLERY))
    found: Frames | None = None
    if path := next(filter(Path.exists, paths), None):
        patches = (job.batches.image_size // side) ** 2
        try:
            found = gallery.read_frames(path, len(gallery_samples(job)), patches)
        except ValueError as error:
            log.warning(f"the report will have no pictures of the steps before {before}: {error}")
    if found is None:
        return {}
    return {name: column[found.steps_S < before] for name, column in found.columns().items()}


def frame_steps(epochs: int, steps_per_epoch: int) -> list[int]:
    """Return the steps after which `keep_frame` keeps something, ascending."""
    ends = np.linspace(0, epochs, min(FRAMES, epochs + 1)).astype(int)
    return (ends * steps_per_epoch).tolist()


def gallery_samples(job: Job) -> np.ndarray:
    """Choose the images of a run's gallery; none if it has no gallery."""
    labels_N = job.batches.packed.index.label
    shown = one_of_each_class(labels_N, job.held_out, IMAGES)
    # a picture of a fill needs another image
    return shown if job.config.method.masks and len(shown) > 1 else shown[:0]


def one_of_each_class(labels_B: np.ndarray, samples: np.ndarray, count: int) -> np.ndarray:
    """Choose the images of a gallery: the first of `count` classes each, spread over the labels."""
    _, first = np.unique(labels_B[samples], return_index=True)
    chosen = np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)
    return samples[first[chosen]]
