"""Top-1 by counting: whole label spaces, class subsets and ObjectNet's groups, over a packed set.

Each rank takes a contiguous part of the set, without padding, and int64 counts are summed at the
end: every sample is counted exactly once for any number of ranks, and the total is checked. Logits
that are not finite are counted beside, because their argmax is class 0.

Shapes: B batch, K classes, G groups.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rft import dist
from rft.dist import World
from rft.evaluate.forward import Kept, forward
from rft.loading.batches import EvaluationBatches, rank_part
from rft.loading.dataset import PackedDataset

EXCLUDED = -1  # in `Manifest.class_to_group`


@dataclass(frozen=True)
class Count:
    """How many of how many; what prints them makes percentages."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        """Return correct / total."""
        return self.correct / self.total


def is_correct(logits_BK: Tensor, labels_B: Tensor, class_to_group_K: Tensor) -> Tensor:
    """Return for each image whether its prediction is right, bool (B,).

    The prediction is the argmax over the classes that lie in a group; it is right when it lies in
    the label's group. With one group for each class this is plain top-1; for ObjectNet it equals
    the benchmark's rule over its 113 categories (groups are disjoint).
    """
    # not left out of the tensor: the argmax must stay a class number
    excluded_K = class_to_group_K == EXCLUDED
    predicted_B = logits_BK.masked_fill(excluded_K, -torch.inf).argmax(dim=1)
    return class_to_group_K[predicted_B] == class_to_group_K[labels_B]


def is_finite(logits_BK: Tensor) -> Tensor:
    """Return for each image whether it has a prediction at all: all logits finite, bool (B,)."""
    return logits_BK.isfinite().all(dim=1)


@torch.no_grad()
def count_correct(
    models: Sequence[nn.Module],
    packed: PackedDataset,
    *,
    image_size: int,
    world: World,
    device: torch.device,
    samples: np.ndarray | None = None,
    batch_size: int = 256,
    workers: int = 0,
    progress: Callable[[int], None] = lambda _: None,
    names: Sequence[str] = (),
    kept: Kept | None = None,
) -> list[Count]:
    """Return the exact top-1 count of each model, in one pass over the data, on every rank.

    The models are modules from uint8 images of `image_size` pixels a side to logits, in evaluation
    mode on `device`; `names` are what to call them in a message. Classifiers that share a tower
    forward it once; with `kept`, its features are read from there, or else written there for the
    next call, and the counts are the same. Without `samples` all of the set are counted.
    `batch_size` is the images in one forward, `workers` the loader processes of each rank (0 reads
    in this one), and `progress` gets the number of images each time that this rank has done some.

    Raises:
        ValueError: naming the first model that has a logit which is NaN or infinite.
    """
    if samples is None:
        samples = np.arange(len(packed))
    class_to_group_K = torch.from_numpy(packed.manifest.class_to_group()).to(device)
    # right images and images without finite logits of each model, then all images
    counts = torch.zeros(2 * len(models) + 1, dtype=torch.int64, device=device)
    part = rank_part(len(samples), world.rank, world.size)
    mine = EvaluationBatches(packed, samples[part], image_size=image_size, batch_size=batch_size)
    files = kept.open(packed, samples, batch_size, world, device) if kept else {}
    logits_of = forward(models, mine, part.start, files, workers=workers, device=device)
    with closing(logits_of) as stream:
        for labels_B, logits in stream:
            for number, logits_BK in enumerate(logits):
                right_B = is_correct(logits_BK, labels_B, class_to_group_K)
                counts[number] += right_B.sum()
                # looked at in the end: a look now would wait for the GPU
                counts[len(models) + number] += (~is_finite(logits_BK)).sum()
            counts[-1] += len(labels_B)
            progress(len(labels_B))
    *found, total = dist.sum_over_ranks(world, counts).tolist()
    assert total == len(samples), f"counted {total} of {len(samples)} samples"
    correct, bad = found[: len(models)], found[len(models) :]
    require_finite(world, names or ["the model"] * len(models), bad, total, packed.url)
    return [Count(number, total) for number in correct]


def require_finite(
    world: World, names: Sequence[str], bad: Sequence[int], total: int, url: str
) -> None:
    """Check that no model has `bad` images, without finite logits, among the `total` of a set.

    Weights that are finite may still overflow on the way to the logits. All ranks have the same
    counts, and the main one raises.

    Raises:
        ValueError: naming the first model that had not, and the set.
    """
    for name, count in zip(names, bad, strict=True):
        if count == 0:
            continue
        if not world.is_main:
            dist.step_aside(world)
        raise ValueError(
            f"{name}: the logits of {count:,} of {total:,} images of {url} are NaN or infinite, "
            "so nothing is counted; its training diverged: use weights from before that, or train "
            "with a lower --optim.lr"
        )
