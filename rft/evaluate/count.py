"""What models predict for each image of a packed set, and how often they are right. Exact.

Each rank takes a contiguous part of the set, without padding, and every image is forwarded in the
same group of images whatever the ranks and batches are (`rft.evaluate.forward`): so every sample is
predicted exactly once, and the rows are the same bit by bit for any number of ranks. Logits that
are not finite are found, because their argmax is class 0.

Shapes: B batch, K classes, G groups, N images of the set.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rft import dist
from rft.dist import World
from rft.evaluate.forward import TOGETHER, Kept, forward
from rft.loading.batches import EvaluationBatches, rank_part
from rft.loading.dataset import PackedDataset
from rft.runs.predictions import SCALED, Predictions

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


@dataclass(frozen=True)
class Predicted:
    """What a model predicts for a set."""

    predictions: Predictions
    logits_NK: np.ndarray | None
    """On the main rank, if they are wanted."""

    @property
    def count(self) -> Count:
        """Return how many predictions are right."""
        right_N = self.predictions.right
        return Count(int(right_N.sum()), len(right_N))


class Scored(NamedTuple):
    """What the logits of some images say of their labels; see `Predictions` for the columns."""

    prediction_B: Tensor
    """Group that is predicted, int64."""
    rank_B: Tensor
    confidence_B: Tensor
    log_likelihood_B: Tensor
    scaled_confidence_B: Tensor
    scaled_log_likelihood_B: Tensor


def score(
    logits_BK: Tensor, labels_B: Tensor, class_to_group_K: Tensor, temperature: float = 1.0
) -> Scored:
    """Hold logits against labels by a set's scoring rule.

    The prediction is the group of the highest logit over the classes that lie in a group, the first
    of equal ones, and it is right when it is the label's group. With one group for each class this
    is plain top-1; for ObjectNet it equals the benchmark's rule over its 113 categories (groups are
    disjoint). Probabilities are the softmax over groups, each with its highest logit, in fp64; the
    scaled ones of logits divided by the temperature.
    """
    groups = int(class_to_group_K.max()) + 1
    scored_K = torch.nonzero(class_to_group_K != EXCLUDED).squeeze(1)
    group_BK = class_to_group_K[scored_K].expand(len(logits_BK), -1)
    scored_BK = logits_BK[:, scored_K].double()
    high_BG = scored_BK.new_full((len(logits_BK), groups), -torch.inf)
    high_BG = high_BG.scatter_reduce(1, group_BK, scored_BK, "amax")
    # which class of a group has its highest logit: of groups with equal ones the first class leads
    leads_BK = torch.where(
        scored_BK == high_BG.gather(1, group_BK), scored_K, len(class_to_group_K)
    )
    first_BG = torch.full_like(high_BG, len(class_to_group_K), dtype=torch.int64)
    first_BG = first_BG.scatter_reduce(1, group_BK, leads_BK, "amin")
    label_B1 = class_to_group_K[labels_B][:, None]
    own_B1, own_first_B1 = high_BG.gather(1, label_B1), first_BG.gather(1, label_B1)
    before_BG = (high_BG > own_B1) | ((high_BG == own_B1) & (first_BG < own_first_B1))
    best_B1 = scored_BK.argmax(dim=1, keepdim=True)
    prediction_B1 = group_BK.gather(1, best_B1)
    probabilities = []
    for divisor in (1.0, temperature):
        log_BG = (high_BG / divisor).log_softmax(dim=1)
        probabilities.append(log_BG.gather(1, prediction_B1).squeeze(1).exp())
        probabilities.append(log_BG.gather(1, label_B1).squeeze(1))
    return Scored(prediction_B1.squeeze(1), before_BG.sum(dim=1), *probabilities)


def is_finite(logits_BK: Tensor) -> Tensor:
    """Return for each image whether it has a prediction at all: all logits finite, bool (B,)."""
    return logits_BK.isfinite().all(dim=1)


@torch.no_grad()
def predict(
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
    logits: type[np.floating] | None = None,
    temperatures: Sequence[float | None] = (),
) -> list[Predicted]:
    """Return what each model predicts for each image, in one pass over the data, on every rank.

    The models are modules from uint8 images of `image_size` pixels a side to logits, in evaluation
    mode on `device`; `names` are what to call them in a message. Classifiers that share a tower
    forward it once; with `kept`, its features are read from there, or else written there for the
    next call, and the rows are the same. Without `samples` all of the set are predicted.
    `batch_size` is the images that are read together, made up to whole forwards of
    `rft.evaluate.forward.TOGETHER`, `workers` the loader processes of each rank (0 reads in this
    one), and `progress` gets the number of images each time that this rank has done some. With
    `logits`, the main rank gets all of them too, in that type. A model with a temperature has
    scaled columns.

    Raises:
        ValueError: naming the first model that has a logit which is NaN or infinite, or too large
            for half precision where logits are wanted.
    """
    if samples is None:
        samples = np.arange(len(packed))
    table = packed.manifest.class_to_group()
    class_to_group_K = torch.from_numpy(table).to(device)
    part = rank_part(len(samples), world.rank, world.size, TOGETHER)
    mine = EvaluationBatches(
        packed,
        samples[part],
        image_size=image_size,
        batch_size=-(-batch_size // TOGETHER) * TOGETHER,
    )
    files = kept.open(packed, samples, device) if kept else {}
    rows: list[list[Scored]] = [[] for _ in models]
    kept_logits: list[list[np.ndarray]] = [[] for _ in models]
    divisors = [temperature or 1.0 for temperature in temperatures or [None] * len(models)]
    bad = torch.zeros(len(models), dtype=torch.int64, device=device)
    logits_of = forward(models, mine, part.start, files, workers=workers, device=device)
    with closing(logits_of) as stream:
        for labels_B, found in stream:
            for number, logits_BK in enumerate(found):
                rows[number].append(score(logits_BK, labels_B, class_to_group_K, divisors[number]))
                kept_BK = logits_BK.half() if logits is np.float16 else logits_BK
                # looked at in the end: a look now would wait for the GPU
                bad[number] += (~is_finite(kept_BK)).sum()
                if logits is not None:
                    kept_logits[number].append(kept_BK.cpu().numpy())
            progress(len(labels_B))
    counted = dist.sum_over_ranks(world, bad).tolist()
    require_finite(world, names or ["the model"] * len(models), counted, len(samples), packed.url)
    columns = [_columns(parts) for parts in rows]
    ranks = dist.gather_objects(world, columns)
    index, called = packed.index, _called(table)
    key_N = index.key[samples].astype(str)
    label_N = called[table[index.label[samples]]]
    predicted = []
    for number in range(len(models)):
        joined = {name: np.concatenate([own[number][name] for own in ranks]) for name in DRAWN}
        total = len(joined["rank"])
        assert total == len(samples), f"predicted {total} of {len(samples)} samples"
        joined["prediction"] = called[joined["prediction"]]
        all_NK = None
        if logits is not None:
            # one model at a time, and on the main rank alone: they are large
            parts = dist.gather_on_main(world, kept_logits[number])
            flat = [logits_BK for part in parts for logits_BK in part]
            all_NK = np.concatenate(flat) if flat else None
            kept_logits[number].clear()
        if not temperatures or temperatures[number] is None:
            joined = {name: column for name, column in joined.items() if name not in SCALED}
        predicted.append(Predicted(Predictions(key=key_N, label=label_N, **joined), all_NK))
    return predicted


# columns of `Predictions` that a model makes, with their types
DRAWN = {
    "prediction": np.int32,
    "rank": np.int32,
    "confidence": np.float32,
    "log_likelihood": np.float32,
    "scaled_confidence": np.float32,
    "scaled_log_likelihood": np.float32,
}


def _columns(parts: Sequence[Scored]) -> dict[str, np.ndarray]:
    """Return this rank's rows of one model; a rank may have none."""
    if not parts:
        return {name: np.empty(0, kind) for name, kind in DRAWN.items()}
    joined = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return {
        name: column.astype(kind)
        for (name, kind), column in zip(DRAWN.items(), joined, strict=True)
    }


def _called(class_to_group_K: np.ndarray) -> np.ndarray:
    """Return what each group is called by: its smallest class id, int32 (G,)."""
    groups, first = np.unique(class_to_group_K, return_index=True)
    return first[groups != EXCLUDED].astype(np.int32)


def count_correct(
    models: Sequence[nn.Module], packed: PackedDataset, **options: Any
) -> list[Count]:
    """Return the exact top-1 count of each model; the options are those of `predict`."""
    return [one.count for one in predict(models, packed, **options)]


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
