"""Measures how far the CAM's object masks cover the objects of a packed set (Table 2).

Batches are the same for any number of ranks, and the images' integers are gathered before anything
is divided, so that ranks change no digit of the result.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rft import dist
from rft.clip.classifier import Classifier
from rft.clip.vit import AttentionTap
from rft.config import Cam
from rft.dist import World
from rft.evaluate.count import is_finite, require_finite
from rft.evaluate.coverage import Pixels, count_masked, count_object
from rft.evaluate.measured_images import Selection
from rft.evaluate.object_masks import ObjectMask, read_mask
from rft.loading.batches import EvaluationBatches
from rft.loading.dataset import Batch, PackedDataset
from rft.loading.read import read_batches
from rft.method import counterfactual
from rft.storage import files


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was counted of one checkpoint, and which masks it was."""

    pixels: Pixels
    masks_sha256: str
    bad: int
    """Images whose map is not finite."""


def label_map(model: Classifier, images_BCHW: Tensor, labels_B: Tensor, cam: Cam) -> Tensor:
    """Return each patch's relevance for its image's label, divided by the largest, (B, P).

    An image without finite logits has no relevance: NaN everywhere.

    The CAM is the training step's own function.
    """
    taps: list[AttentionTap] = []
    # the weights are frozen, so the graph starts at the pixels
    patches_BPV = model.patches(images_BCHW).requires_grad_()
    logits_BK = model.logits(model.features(patches_BPV, taps=taps))
    relevance_BP = counterfactual.cam(cam, logits_BK, labels_B, taps).detach()
    return relevance_BP.where(is_finite(logits_BK.detach())[:, None], torch.nan)


def measure(
    models: Sequence[Classifier],
    packed: PackedDataset,
    selection: Selection,
    thresholds: Sequence[float],
    *,
    cam: Cam,
    world: World,
    device: torch.device,
    batch_size: int,
    workers: int,
    progress: Callable[[int], None] = lambda _: None,
    names: Sequence[str] = (),
) -> list[Measured]:
    """Return what the masks of each model cover, image by image, on every rank.

    Args:
        models: classifiers of one image size, frozen, on `device`.
        packed: the set that the samples are of.
        selection: samples and masks.
        thresholds: CAM thresholds.
        cam: which map.
        world: the ranks that share the work.
        device: where the models are.
        batch_size: images in one forward.
        workers: loader processes of each rank; 0 reads in this one.
        progress: called with the number of images each time this rank has done some.
        names: what to call each model in a message.

    Raises:
        ValueError: if an image or a mask is damaged, a mask has the wrong size, or a model has
            logits or a map that are NaN or infinite.
    """
    size = models[0].architecture.image_size
    # a rank takes whole batches, because a batch's size may change the last digit of a map
    batches = EvaluationBatches(packed, selection.samples, image_size=size, batch_size=batch_size)
    first, last = (len(batches) * rank // world.size for rank in (world.rank, world.rank + 1))
    digests: list[bytes] = []
    rows: list[list[np.ndarray]] = [
        [np.empty((2 * len(thresholds) + 2, 0), np.int64)] for _ in models
    ]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for batch in read_batches(batches, range(first, last), workers=workers, device=device):
            masks = _read_masks(pool, packed, selection, batch, size)
            maps = [label_map(model, batch.images_BCHW, batch.labels_B, cam) for model in models]
            read = list(masks)
            digests += [mask.sha256 for mask in read]
            object_BHW = torch.from_numpy(np.stack([mask.pixels_HW for mask in read])).to(device)
            for parts, relevance_BP in zip(rows, maps, strict=True):
                parts.append(_count(relevance_BP, object_BHW, thresholds))
            progress(len(read))
    mine = [np.concatenate(parts, axis=1) for parts in rows]
    measured = _gather(mine, digests, len(selection.samples), size * size, world)
    bad = [found.bad for found in measured]
    named = names or ["the model"] * len(models)
    require_finite(world, named, bad, len(selection.samples), packed.url)
    return measured


def _gather(
    rows: Sequence[np.ndarray], digests: Sequence[bytes], samples: int, image: int, world: World
) -> list[Measured]:
    """Return all ranks' images in the order of the samples, for each model.

    Args:
        rows: of each model, this rank's rows of `_count`.
        digests: hashes of the masks that this rank read.
        samples: images of all ranks.
        image: pixels of an image.
        world: the ranks.
    """
    gathered = dist.gather_objects(world, (rows, digests))
    all_digests = b"".join(digest for _, part in gathered for digest in part)
    measured = []
    for number in range(len(rows)):
        rows_RN = np.concatenate([part[number] for part, _ in gathered], axis=1)
        assert rows_RN.shape[1] == samples, "an image was lost or counted twice"
        masked_TN, both_TN = np.split(rows_RN[2:], 2)
        pixels = Pixels(image=image, object_N=rows_RN[1], masked_TN=masked_TN, both_TN=both_TN)
        sha256, bad = files.sha256_bytes(all_digests), int(rows_RN[0].sum())
        measured.append(Measured(pixels=pixels, masks_sha256=sha256, bad=bad))
    return measured


def _read_masks(
    pool: ThreadPoolExecutor, packed: PackedDataset, selection: Selection, batch: Batch, size: int
) -> Iterator[ObjectMask]:
    """Start to read a batch's masks; the result waits for them."""
    index, encoding = packed.index, packed.manifest.encoding

    def read(sample: int) -> ObjectMask:
        source = int(index.width[sample]), int(index.height[sample])
        return read_mask(selection.paths[sample], source, size, encoding.get("crop_border", 0))

    return pool.map(read, batch.samples_B.tolist())


def _count(relevance_BP: Tensor, object_BHW: Tensor, thresholds: Sequence[float]) -> np.ndarray:
    """Return whether the map is bad, then object, masked and both pixels, int64 (2 + 2 T, B)."""
    object_BP = count_object(object_BHW, relevance_BP.shape[1])
    patch_pixels = object_BHW[0].numel() // relevance_BP.shape[1]
    mask_TBP = torch.stack(
        [counterfactual.cam_mask("object", relevance_BP, value) for value in thresholds]
    )
    masked_TB, both_TB = count_masked(mask_TBP, object_BP, patch_pixels)
    bad_B = (~is_finite(relevance_BP)).long()
    return torch.cat([bad_B[None], object_BP.sum(dim=1)[None], masked_TB, both_TB]).cpu().numpy()
