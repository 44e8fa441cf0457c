"""Pictures of counterfactual images: live ones during training, and the report's gallery.

`grid` shows the images that a step has just distilled on, from that step's own tensors.
`write_gallery` stores the selected model's masks and fills of a few fixed images, as numbers that
the report draws (Fig. 5). `keep_frame` stores how the masks of these images change during training.

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
FRAMES = 9  # steps of a run shown in its gallery
TILE = 112  # small images are enlarged to about this many pixels; large ones keep their size
GREY, LIGHT, DARK = 128, 232, 56  # a dropped patch; in a mask, kept and masked patches

log = logging.getLogger(__name__)


class Counterfactuals(NamedTuple):
    """References to a micro-batch's counterfactuals in a step; nothing is copied."""

    pool_ZCHW: Tensor  # uint8
    donor_BP: Tensor
    own_B1: Tensor


def grid(shown: Counterfactuals, side: int) -> Tensor:
    """Draw a column for each of the first images, uint8 (3, height, width) on the CPU.

    From the top: the image, its mask (dark), and the counterfactual that the models saw, with
    dropped patches in grey. A masked patch that is refilled from the image itself counts as kept.
    `side` is the side of a patch in pixels.
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
    """Assemble images (B, C, H, W) from patches; the inverse of `vit.cut_patches`."""
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
    """Write images of some samples, their relevance and each recipe's donor map to `url` (npz).

    Every mask x fill is computed on the CPU from the same relevance map of the student, by the
    functions of a training step; the samples are each other's donor pool. The arrays of `frames`
    are added. If the report could not draw the arrays, because the model diverged or its images are
    too large, nothing is written and a warning is logged.
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
        # one address for all runs, so that their galleries show the same random draws
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
    """Write arrays atomically; the same arrays give the same bytes."""
    stream = io.BytesIO()
    # zipfile dates these members 1980-01-01, so the bytes do not depend on the time
    np.savez_compressed(stream, **columns)
    files.write_bytes(url, stream.getvalue())


def keep_frame(job: Job, step: int) -> None:
    """Add the relevance maps and masks of the gallery's images to the main rank's frames.npz.

    They are those of the model whose CAM decides the masks. At most FRAMES are kept, evenly spread
    over the start and the ends of epochs. Call it before the checkpoint of the step, so that a
    resumed run finds every frame that it will not compute. No random number is drawn and no weight
    is changed.
    """
    method, samples = job.config.method, gallery_samples(job)
    steps = frame_steps(job.config.optim.epochs, job.batches.plan.steps_per_epoch)
    if not (job.world.is_main and len(samples) and step in steps):
        return
    batch = job.batches.packed.batch(samples, job.batches.image_size)
    images_BCHW, labels_B = (to_device(one, job.device) for one in batch[:2])
    # half a micro-batch at a time, because fp32 takes twice the memory of a step in bf16
    together = max(1, job.config.micro_batch(job.world.size) // 2)
    parts = zip(images_BCHW.split(together), labels_B.split(together), strict=True)
    recompute = job.objective.recompute
    if method.cam_model == "student":
        maps = [label_map(job.student, *part, method.cam, recompute=recompute) for part in parts]
    else:
        # the teacher's weights may be bf16, which need the step's own precision
        with autocast(job.device, job.config.precision):
            maps = [label_map(job.objective.teacher, *part, method.cam) for part in parts]
    relevance_BP = torch.cat(maps).cpu()
    columns = {"steps_S": np.array([step]), "relevance_SBP": relevance_BP[None].numpy()}
    if method.needs_cam:
        mask_BP = cam_mask(method.mask, relevance_BP, method.threshold)
        columns["masked_SBP"] = mask_BP[None].numpy()
    # at step 0, any frames were left by a run without a checkpoint
    kept = kept_frames(job, step) if step else {}
    if kept.keys() == columns.keys():
        columns = {name: np.concatenate([kept[name], columns[name]]) for name in columns}
    write_npz(str(Path(job.config.run) / filenames.FRAMES), columns)


def kept_frames(job: Job, before: int) -> dict[str, np.ndarray]:
    """Read the run's frames of steps before `before`; see `Frames.columns`."""
    folder, side = Path(job.config.run), job.student.patch_side
    # a finished run whose last steps are repeated has its frames in the gallery
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
    """List the steps after which `keep_frame` stores a frame, ascending."""
    ends = np.linspace(0, epochs, min(FRAMES, epochs + 1)).astype(int)
    return (ends * steps_per_epoch).tolist()


def gallery_samples(job: Job) -> np.ndarray:
    """Choose the images of a run's gallery; empty if it has no gallery."""
    labels_N = job.batches.packed.index.label
    shown = one_of_each_class(labels_N, job.held_out, IMAGES)
    # a fill needs another image
    return shown if job.config.method.masks and len(shown) > 1 else shown[:0]


def one_of_each_class(labels_B: np.ndarray, samples: np.ndarray, count: int) -> np.ndarray:
    """Choose the first image of each of `count` classes, spread over the labels."""
    _, first = np.unique(labels_B[samples], return_index=True)
    chosen = np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)
    return samples[first[chosen]]
