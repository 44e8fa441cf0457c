"""What the method makes of a few images, kept as numbers for the report's gallery (Fig. 5).

Every mask x fill of the recipes is built from one relevance map, by the same functions as in the
training step.
"""

import io

import numpy as np

from rft import cli
from rft.clip.classifier import Classifier
from rft.clip.vit import AttentionTap
from rft.config import MethodConfig
from rft.loading.dataset import PackedDataset
from rft.method import refill, relevance
from rft.runs import gallery
from rft.storage import files
from rft.train.objective import StepAddress, cam_mask, draw


def write_gallery(
    url: str,
    model: Classifier,
    packed: PackedDataset,
    samples: np.ndarray,
    methods: dict[str, MethodConfig],
) -> None:
    """Write `url` (npz): images, relevance and the donor map of each method.

    What no report would draw is not written, with a warning: the model diverged, or its images
    are too large.

    Args:
        url: where to write.
        model: the student whose relevance is shown.
        packed: the set the images come from.
        samples: sample numbers; together they are each other's donor pool.
        methods: recipe name -> mask and fill.
    """
    device = next(model.parameters()).device
    batch = packed.batch(samples, model.architecture.image_size)
    images_BCHW, labels_B = batch.images_BCHW.to(device), batch.labels_B.to(device)
    taps: list[AttentionTap] = []
    patches_BPV = model.patches(images_BCHW)
    logits_BK = model.logits(model.features(patches_BPV, taps=taps))
    relevance_BP = relevance.normalise(relevance.label_relevance(logits_BK, labels_B, taps))
    columns = {
        "images_BCHW": batch.images_BCHW.numpy(),
        "labels_B": batch.labels_B.numpy(),
        "class_names": np.array(packed.manifest.classes),
        "relevance_BP": relevance_BP.cpu().numpy(),
        "patch": np.array(model.architecture.vision_cfg["patch_size"]),
    }
    count, patches = patches_BPV.shape[:2]
    for name, method in methods.items():
        draws = draw(method, range(count), patches, count, StepAddress(0, 0, 0, 0))
        mask_BP = draws.mask_BP
        if mask_BP is None:
            mask_BP = cam_mask(method, relevance_BP).cpu()
        columns[f"{gallery.DONOR}{name}"] = refill.donors(
            mask_BP, draws.source_BP, draws.own_B1
        ).numpy()
    try:
        gallery.check(columns)
    except ValueError as error:
        cli.warn(f"the report will have no picture of masks and fills: {error}")
        return
    stream = io.BytesIO()
    np.savez_compressed(stream, **columns)
    files.write_bytes(url, stream.getvalue())


def one_of_each_class(labels_B: np.ndarray, samples: np.ndarray, count: int) -> np.ndarray:
    """Return the first sample of each of `count` classes, spread over the label range."""
    _, first = np.unique(labels_B[samples], return_index=True)
    chosen = np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)
    return samples[first[chosen]]
