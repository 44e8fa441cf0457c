"""Logits of several models on the same batches, where each tower runs at most once.

A tower shared by several classifiers forwards each batch once. With a cache of features, batches
whose rows are all cached are not even read.

The last bits of a matrix product depend on the number of images in it. So every forward takes
TOGETHER images, starting at a multiple of that in the set. Features and logits are then
bit-identical for any batch size and number of ranks.

Shapes: B batch, E embedding, K classes.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rft.clip.classifier import Classifier, tower_identity
from rft.device import to_device
from rft.loading.batches import EvaluationBatches
from rft.loading.dataset import PackedDataset
from rft.loading.features import FeatureFile, FeatureFolder, computed_by
from rft.loading.read import read_batches
from rft.storage import files

TOGETHER = 64  # images per forward; more would be little faster on a GPU
Files = dict[nn.Module, FeatureFile]


class Ensemble(nn.Module):
    """Classifiers whose features are combined to one output; a shared tower runs once."""

    def __init__(
        self, members: Sequence[Classifier], answer: Callable[[Sequence[Tensor]], Tensor]
    ) -> None:
        """`answer` maps each member's features (B, E) to logits (B, K), or any rows."""
        super().__init__()
        self.members = tuple(members)
        self.answer = answer


@dataclass(frozen=True)
class Kept:
    """A cache of the features of some towers."""

    folder: FeatureFolder
    towers: Mapping[nn.Module, tuple[Classifier, dict[str, Any]]]
    """Tower -> a classifier that has it, and the identity of the tower (`tower_identity`)."""

    @classmethod
    def of(cls, folder: FeatureFolder, models: Sequence[Classifier]) -> "Kept":
        """Make a cache for the towers of some models."""
        towers = {model.visual: model for model in models}
        return cls(folder, {visual: (one, tower_identity(one)) for visual, one in towers.items()})

    def open(self, packed: PackedDataset, samples: np.ndarray, device: torch.device) -> Files:
        """Open the file of each tower; row n of a file is sample number n of `samples`."""
        key = {
            "manifest_sha256": packed.manifest.sha256,
            "samples_sha256": files.sha256_bytes(np.ascontiguousarray(samples, np.int64).tobytes()),
            "forward": TOGETHER,
            "precision": f"fp32, matrix products {torch.get_float32_matmul_precision()}",
            "computed_by": computed_by(device),
        }
        opened = {
            visual: self.folder.open(
                {**key, "tower": identity}, len(samples), model.architecture.embed_dim
            )
            for visual, (model, identity) in self.towers.items()
        }
        return {visual: file for visual, file in opened.items() if file is not None}


def forward(
    models: Sequence[nn.Module],
    batches: EvaluationBatches,
    first: int,
    opened: Files,
    *,
    workers: int,
    device: torch.device,
) -> Generator[tuple[Tensor, list[Tensor]]]:
    """Yield the labels of TOGETHER images, the last time of fewer, and every model's logits.

    Batches are whole multiples of TOGETHER. `first` is the row of the first sample in the `opened`
    files, which are closed at the end. Raises the errors of `read_batches`.
    """
    towers = {_tower(member): member for model in models for member in _members(model)}
    reads = towers.keys() <= opened.keys()
    size = batches.batch_size
    assert first % TOGETHER == size % TOGETHER == 0, "forwards would be cut in other places"
    with ExitStack() as stack:
        for file in opened.values():
            stack.callback(file.close)
        rows = [
            np.arange(first + start, first + min(start + size, len(batches.samples)))
            for start in range(0, len(batches.samples), size)
        ]
        known = {n for n in range(len(batches)) if reads and _read(opened, rows[n]) is not None}
        unread = [batches.samples_of(n) for n in range(len(batches)) if n not in known]
        # all batches but the last are full, so the remaining samples are cut at the same boundaries
        others = replace(batches, samples=np.concatenate([batches.samples[:0], *unread]))
        stream = stack.enter_context(
            closing(read_batches(others, range(len(others)), workers=workers, device=device))
        )
        for n, rows_B in enumerate(rows):
            found = _read(opened, rows_B) if n in known else None
            if found is None:
                # rows that were intact above but are damaged now are computed right here
                batch = next(stream) if n not in known else _batch(batches, n, device)
                labels_B = batch.labels_B
                parts = batch.images_BCHW.split(TOGETHER)
                features = {
                    tower: [_features(one, images_BCHW) for images_BCHW in parts]
                    for tower, one in towers.items()
                }
                for tower in towers.keys() & opened.keys():
                    opened[tower].keep(rows_B, torch.cat(features[tower]).float().cpu().numpy())
            else:
                labels = batches.packed.index.label[batches.samples_of(n)].astype(np.int64)
                labels_B = to_device(torch.from_numpy(labels), device)
                features = {
                    tower: to_device(torch.from_numpy(found[tower]), device).split(TOGETHER)
                    for tower in towers
                }
            for part, part_labels_B in enumerate(labels_B.split(TOGETHER)):
                of_part = {tower: parts[part] for tower, parts in features.items()}
                yield part_labels_B, [_logits(model, of_part) for model in models]


def _members(model: nn.Module) -> Sequence[nn.Module]:
    return model.members if isinstance(model, Ensemble) else [model]


def _tower(model: nn.Module) -> nn.Module:
    return model.visual if isinstance(model, Classifier) else model


def _features(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Compute the features of a classifier's tower, or the logits of any other model."""
    if isinstance(model, Classifier):
        return model.features(model.patches(images_BCHW))
    return model(images_BCHW)


def _logits(model: nn.Module, features: Mapping[nn.Module, Tensor]) -> Tensor:
    """Compute a model's logits from the features of each tower."""
    found = [features[_tower(member)] for member in _members(model)]
    if isinstance(model, Ensemble):
        return model.answer(found)
    return model.logits(*found) if isinstance(model, Classifier) else found[0]


def _batch(batches: EvaluationBatches, number: int, device: torch.device) -> Any:
    batch = batches.packed.batch(batches.samples_of(number), batches.image_size)
    return batch._replace(
        images_BCHW=to_device(batch.images_BCHW, device), labels_B=to_device(batch.labels_B, device)
    )


def _read(opened: Files, rows_B: np.ndarray) -> dict[nn.Module, np.ndarray] | None:
    """Read the rows of every file; None if any row is missing."""
    found = {}
    for tower, file in opened.items():
        found[tower], whole_B = file.read(rows_B)
        if not whole_B.all():
            return None
    return found
