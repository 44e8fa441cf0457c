"""Predictions of models for each image of a packed set, and exact counts of the right ones.

Each rank takes a contiguous part of the set, without padding, and the images that share a forward
do not depend on ranks and batch size (`rft.evaluate.forward`). So every sample is predicted exactly
once, and the rows are bit-identical for any number of ranks. Non-finite logits are an error,
because their argmax would be class 0.

Shapes: B batch, K classes, G groups, N images of the set, S models.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from rft.shards.samples import Samples

EXCLUDED = -1  # in `Manifest.class_to_group`
SCORED_TOGETHER = 2**21  # logits of all models per scoring; 16 MB in fp64, plus temporaries


@dataclass(frozen=True)
class Count:
    """Correct predictions and their total; percentages are made when they are printed."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        """Accuracy as a fraction: correct / total."""
        return self.correct / self.total


@dataclass(frozen=True)
class Predicted:
    """The predictions of a model for a set."""

    predictions: Predictions
    logits_NK: np.ndarray | None
    """On the main rank, if they were requested."""

    @property
    def count(self) -> Count:
        """Number of right predictions."""
        right_N = self.predictions.right
        return Count(int(right_N.sum()), len(right_N))


class Scored(NamedTuple):
    """Logits scored against labels; see `Predictions` for the columns."""

    prediction_B: Tensor
    """The predicted group, int64."""
    rank_B: Tensor
    confidence_B: Tensor
    log_likelihood_B: Tensor
    scaled_confidence_B: Tensor
    scaled_log_likelihood_B: Tensor


def group_logits(logits_BK: Tensor, class_to_group_K: Tensor) -> Tensor:
    """Compute the logit of each scored group, the highest of its classes, fp64 (B, G)."""
    scored_K = torch.nonzero(class_to_group_K != EXCLUDED).squeeze(1)
    group_K = class_to_group_K[scored_K]
    scored_BK = logits_BK[:, scored_K].double()
    groups = int(class_to_group_K.max()) + 1
    if torch.equal(group_K, torch.arange(groups, device=group_K.device)):
        # each class is its own group, as in most sets: no reduction needed, half the time
        return scored_BK
    high_BG = scored_BK.new_full((len(logits_BK), groups), -torch.inf)
    return high_BG.scatter_reduce(1, group_K.expand_as(scored_BK), scored_BK, "amax")


def class_logits(group_BG: Tensor, class_to_group_K: Tensor) -> Tensor:
    """Expand logits of groups to logits (B, K) of classes: each class gets that of its group.

    A class outside every group is never scored; it gets that of the first group.
    """
    return group_BG[:, class_to_group_K.clamp(min=0)]


def score(
    logits_BK: Tensor,
    labels_B: Tensor,
    class_to_group_K: Tensor,
    temperature: float | Tensor | None = None,
) -> Scored:
    """Score logits against labels by the set's rule.

    The prediction is the group of the highest logit over all classes in groups, the first of equal
    ones. It is right if it is the label's group. With one group per class this is plain top-1; for
    ObjectNet it equals the benchmark's rule over its 113 categories (groups are disjoint).
    Probabilities are the softmax over groups, each with its highest logit, in fp64. The scaled ones
    are of logits divided by the temperature, a scalar or (B, 1). Rows are independent.
    """
    scored_K = torch.nonzero(class_to_group_K != EXCLUDED).squeeze(1)
    group_K = class_to_group_K[scored_K]
    high_BG = group_logits(logits_BK, class_to_group_K)
    if torch.equal(group_K, torch.arange(high_BG.shape[1], device=group_K.device)):
        scored_BK, first_BG = high_BG, scored_K.expand_as(high_BG)
    else:
        scored_BK = logits_BK[:, scored_K].double()
        group_BK = group_K.expand_as(scored_BK)
        # the first class with its group's highest logit, which breaks ties between groups
        leads_BK = torch.where(
            scored_BK == high_BG.gather(1, group_BK), scored_K, len(class_to_group_K)
        )
        first_BG = torch.full_like(high_BG, len(class_to_group_K), dtype=torch.int64)
        first_BG = first_BG.scatter_reduce(1, group_BK, leads_BK, "amin")
    label_B1 = class_to_group_K[labels_B][:, None]
    own_B1, own_first_B1 = high_BG.gather(1, label_B1), first_BG.gather(1, label_B1)
    before_BG = (high_BG > own_B1) | ((high_BG == own_B1) & (first_BG < own_first_B1))
    prediction_B1 = group_K[scored_BK.argmax(dim=1)][:, None]
    probabilities = []
    # without a temperature, the plain and the scaled columns are the same
    for scaled_BG in [high_BG] if temperature is None else [high_BG, high_BG / temperature]:
        log_BG = scaled_BG.log_softmax(dim=1)
        probabilities.append(log_BG.gather(1, prediction_B1).squeeze(1).exp())
        probabilities.append(log_BG.gather(1, label_B1).squeeze(1))
    probabilities = (2 * probabilities)[:4] if temperature is None else probabilities
    return Scored(prediction_B1.squeeze(1), before_BG.sum(dim=1), *probabilities)


def is_finite(logits_BK: Tensor) -> Tensor:
    """Mark the images whose logits are all finite, bool; the others have no valid prediction."""
    # one pass: the sum of finite fp32 numbers is finite in fp64, and inf - inf is NaN
    return logits_BK.sum(dim=-1, dtype=torch.float64).isfinite()


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
    """Predict each image with each model, in one pass over the data; all ranks get all rows.

    Classifiers that share a tower forward it once.

    Args:
        models: modules from uint8 images of `image_size` pixels a side to logits, in evaluation
            mode on `device`.
        packed: the set.
        image_size: side of the models' input in pixels.
        world: the ranks.
        device: the device of the models.
        samples: numbers of the samples to predict; all by default.
        batch_size: images per read, rounded up to whole forwards of
            `rft.evaluate.forward.TOGETHER`.
        workers: loader processes per rank; 0 reads in this process.
        progress: called with the number of images after each forward of this rank.
        names: names of the models for messages.
        kept: cache of features, read if they are there and written otherwise; it does not change
            the rows.
        logits: type in which the main rank also gets all logits.
        temperatures: temperature of each model; those that have one get scaled columns.

    Raises:
        ValueError: naming the first model with a logit that is NaN or infinite, or too large for
            half precision if `logits` is that.
    """
    if samples is None:
        samples = np.arange(len(packed))
    # read first, because a damaged file is an error
    domain_N = domains_of(packed, samples)
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
    divisor_S = torch.tensor(
        [temperature or 1.0 for temperature in temperatures or [None] * len(models)],
        dtype=torch.float64,
        device=device,
    )
    rows: list[Scored] = []
    kept_logits: list[list[np.ndarray]] = [[] for _ in models]
    bad_S = torch.zeros(len(models), dtype=torch.int64, device=device)
    logits_of = forward(models, mine, part.start, files, workers=workers, device=device)
    with closing(logits_of) as stream:
        for labels_B, logits_SBK in _grouped(stream, progress):
            scored = score(
                logits_SBK.flatten(0, 1),
                labels_B.repeat(len(models)),
                class_to_group_K,
                divisor_S.repeat_interleave(len(labels_B))[:, None] if any(temperatures) else None,
            )
            rows.append(Scored(*(column.view(len(models), -1) for column in scored)))
            kept_SBK = logits_SBK.half() if logits is np.float16 else logits_SBK
            # read only at the end: reading it here would wait for the GPU
            bad_S += (~is_finite(kept_SBK)).sum(dim=1)
            if logits is not None:
                for number, kept_BK in enumerate(kept_SBK):
                    kept_logits[number].append(kept_BK.cpu().numpy())
    counted = dist.sum_over_ranks(world, bad_S).tolist()
    require_finite(world, names or ["the model"] * len(models), counted, len(samples), packed.url)
    ranks = dist.gather_objects(world, _columns(rows, len(models)))
    columns = {name: np.concatenate([own[name] for own in ranks], axis=1) for name in DRAWN}
    total = columns["rank"].shape[1]
    assert total == len(samples), f"predicted {total} of {len(samples)} samples"
    index, called = packed.index, _called(table)
    key_N = index.key[samples].astype(str)
    label_N = called[table[index.label[samples]]]
    predicted = []
    for number in range(len(models)):
        drawn = {name: column_SN[number] for name, column_SN in columns.items()}
        drawn["prediction"] = called[drawn["prediction"]]
        all_NK = None
        if logits is not None:
            # one model at a time, and on the main rank alone, because logits are large
            parts = dist.gather_on_main(world, kept_logits[number])
            flat = [logits_BK for part in parts for logits_BK in part]
            all_NK = np.concatenate(flat) if flat else None
            kept_logits[number].clear()
        if not temperatures or temperatures[number] is None:
            drawn = {name: column_N for name, column_N in drawn.items() if name not in SCALED}
        rows_N = Predictions(key=key_N, label=label_N, domain=domain_N, **drawn)
        predicted.append(Predicted(rows_N, all_NK))
    return predicted


def domains_of(packed: PackedDataset, samples: np.ndarray) -> np.ndarray | None:
    """Look up the domain's name of each sample, (N,); None for a set without domains.

    Raises:
        ValueError: if the set's file of domains is missing or damaged.
    """
    names = packed.manifest.domains
    domain_N = Samples.load(packed.url, packed.manifest).domain if names else None
    return None if domain_N is None else np.array(names)[domain_N[samples]]


def _grouped(
    stream: Iterable[tuple[Tensor, Sequence[Tensor]]], progress: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Join labels (B,) and logits (S, B, K) of several forwards, to score them together.

    Scoring is many small operations. Per model and forward, they would take longer than reading the
    images. Rows are independent, so the results are the same.
    """
    labels: list[Tensor] = []
    logits: list[Sequence[Tensor]] = []

    def joined() -> tuple[Tensor, Tensor]:
        # one concatenation, because every copy costs as much as a part of the scoring
        by_model = [logits_BK for of_model in zip(*logits, strict=True) for logits_BK in of_model]
        return torch.cat(labels), torch.cat(by_model).unflatten(0, (len(logits[0]), -1))

    size = 0
    for labels_B, found in stream:
        labels.append(labels_B)
        logits.append(found)
        progress(len(labels_B))
        size += sum(logits_BK.numel() for logits_BK in found)
        if size >= SCORED_TOGETHER:
            yield joined()
            labels, logits, size = [], [], 0
    if labels:
        yield joined()


# columns of `Predictions` that depend on the model, with their types
DRAWN = {
    "prediction": np.int32,
    "rank": np.int32,
    "confidence": np.float32,
    "log_likelihood": np.float32,
    "scaled_confidence": np.float32,
    "scaled_log_likelihood": np.float32,
}


def _columns(rows: Sequence[Scored], models: int) -> dict[str, np.ndarray]:
    """Join this rank's columns (S, B) of all scorings to (S, N); a rank may have no image."""
    if not rows:
        return {name: np.empty((models, 0), kind) for name, kind in DRAWN.items()}
    joined = (torch.cat(parts, dim=1).cpu().numpy() for parts in zip(*rows, strict=True))
    return {
        name: column_SN.astype(kind)
        for (name, kind), column_SN in zip(DRAWN.items(), joined, strict=True)
    }


def _called(class_to_group_K: np.ndarray) -> np.ndarray:
    """Find the id that names each group, its smallest class id, int32 (G,)."""
    groups, first = np.unique(class_to_group_K, return_index=True)
    return first[groups != EXCLUDED].astype(np.int32)


def count_correct(
    models: Sequence[nn.Module], packed: PackedDataset, **options: Any
) -> list[Count]:
    """Count the right predictions of each model; the options are those of `predict`."""
    return [one.count for one in predict(models, packed, **options)]


def require_finite(
    world: World, names: Sequence[str], bad: Sequence[int], total: int, url: str
) -> None:
    """Check that no model has `bad` images, without finite logits, among the `total` of a set.

    Finite weights may still overflow on the way to the logits. All ranks have the same counts, and
    the main rank raises.

    Raises:
        ValueError: naming the first model with such images, and the set.
    """
    for name, count in zip(names, bad, strict=True):
        if count == 0:
            continue
        if not world.is_main:
            dist.step_aside(world)
        raise ValueError(
            f"{name}: the logits of {count:,} of {total:,} images of {url} are NaN or infinite, "
            "so nothing is counted; its training diverged: use earlier weights, or train with a "
            "lower --optim.lr"
        )
