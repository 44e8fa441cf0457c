"""Measures how well the CAM's object masks cover the objects of a packed set (Table 2).

Batches are the same for any number of ranks, and the integer counts of the images are gathered
before any division, so the result does not depend on the number of ranks.

Shapes: M models, C = 2 + 2 T counts for T thresholds, B images of a batch, N of all ranks.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

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
from rft.loading.dataset import PackedDataset
from rft.loading.read import read_batches
from rft.method import counterfactual
from rft.storage import files


def label_map(
    model: Classifier, images_BCHW: Tensor, labels_B: Tensor, cam: Cam, *, recompute: bool = False
) -> Tensor:
    """Compute the CAM outside of a training step, with the function that training uses.

    The result is the relevance of each patch for the image's label, divided by the largest, (B, P).
    It is NaN everywhere for an image without finite logits. `recompute` is that of
    `Classifier.features`.
    """
    taps: list[AttentionTap] = []
    # the weights may be frozen, so the graph must start at the pixels
    patches_BPV = model.patches(images_BCHW).requires_grad_()
    logits_BK = model.logits(model.features(patches_BPV, taps=taps, recompute=recompute))
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
    progress: Callable[[int], None],
    names: Sequence[str],
) -> tuple[list[Pixels], str]:
    """Measure the coverage of each model's masks per image; also hash the object masks.

    All ranks get all images, in the order of the samples. The models are frozen and have the same
    image size. `cam` is the kind of map, `workers` is also the number of threads that read masks,
    and the other keywords are those of `rft.evaluate.count.predict`.

    Raises:
        ValueError: if an image or a mask is damaged, a mask has the wrong size, or a model has
            logits or a map that are NaN or infinite.
    """
    size, total = models[0].architecture.image_size, len(selection.samples)
    index, border = packed.index, packed.manifest.encoding.get("crop_border", 0)

    def read(sample: int) -> ObjectMask:
        source = int(index.width[sample]), int(index.height[sample])
        return read_mask(selection.paths[sample], source, size, border, packed.max_pixels)

    # a rank takes whole batches, because a batch's size may change the last digit of a map
    batches = EvaluationBatches(packed, selection.samples, image_size=size, batch_size=batch_size)
    first, last = (len(batches) * rank // world.size for rank in (world.rank, world.rank + 1))
    digests: list[bytes] = []
    # a rank may have no batch at all
    mine_MCB = [np.empty((len(models), 2 * len(thresholds) + 2, 0), np.int64)]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for batch in read_batches(batches, range(first, last), workers=workers, device=device):
            # read while the device makes the maps
            coming = pool.map(read, batch.samples_B.tolist())
            # models run one after the other, so that only one graph is in memory at a time
            maps = [label_map(model, batch.images_BCHW, batch.labels_B, cam) for model in models]
            masks = list(coming)
            digests += [mask.sha256 for mask in masks]
            object_BHW = torch.from_numpy(np.stack([mask.pixels_HW for mask in masks])).to(device)
            counts = [_count(relevance_BP, object_BHW, thresholds) for relevance_BP in maps]
            mine_MCB.append(torch.stack(counts).cpu().numpy())
            progress(len(masks))
    parts = dist.gather_objects(world, (np.concatenate(mine_MCB, axis=2), b"".join(digests)))
    counts_MCN = np.concatenate([counts_MCB for counts_MCB, _ in parts], axis=2)
    assert counts_MCN.shape[2] == total, "an image was lost or counted twice"
    require_finite(world, names, counts_MCN[:, 0].sum(axis=1).tolist(), total, packed.url)
    measured = []
    # entry 0, the bad maps, was checked above
    for _, object_N, *covered in counts_MCN:
        masked_TN, both_TN = np.split(np.stack(covered), 2)
        pixels = Pixels(image=size**2, object_N=object_N, masked_TN=masked_TN, both_TN=both_TN)
        measured.append(pixels)
    return measured, files.sha256_bytes(b"".join(digest for _, digest in parts))


def _count(relevance_BP: Tensor, object_BHW: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Count per image: a bad map (0 or 1), then object, masked and both pixels, int64 (C, B)."""
    object_BP = count_object(object_BHW, relevance_BP.shape[1])
    patch_pixels = object_BHW[0].numel() // relevance_BP.shape[1]
    mask_TBP = torch.stack(
        [counterfactual.cam_mask("object", relevance_BP, value) for value in thresholds]
    )
    masked_TB, both_TB = count_masked(mask_TBP, object_BP, patch_pixels)
    bad_B = (~is_finite(relevance_BP)).long()
    # `measure` splits the rows in this order
    return torch.cat([bad_B[None], object_BP.sum(dim=1)[None], masked_TB, both_TB])
