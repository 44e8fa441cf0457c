"""What models predict for each image of a packed set, and how often they are right. Exact.

Each rank takes a contiguous part of the set, without padding, and every image is forwarded in the
same group of images whatever the ranks and batches are (`rft.evaluate.forward`): so every sample is
predicted exactly once, and the rows are the same bit by bit for any number of ranks. Logits that
are not finite are found, because their argmax is class 0.

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
SCORED_TOGETHER = 2**21  # logits of all models; 16 MB in fp64, and some temporaries of that size


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


def group_logits(logits_BK: Tensor, class_to_group_K: Tensor) -> Tensor:
    """Return the logit of each group that a set scores, the highest of its classes, fp64 (B, G)."""
    scored_K = torch.nonzero(class_to_group_K != EXCLUDED).squeeze(1)
    group_K = class_to_group_K[scored_K]
    scored_BK = logits_BK[:, scored_K].double()
    groups = int(class_to_group_K.max()) + 1
    if torch.equal(group_K, torch.arange(groups, device=group_K.device)):
        # each class is its own group, as in most sets: the same numbers in half the time
        return scored_BK
    high_BG = scored_BK.new_full((len(logits_BK), groups), -torch.inf)
    return high_BG.scatter_reduce(1, group_K.expand_as(scored_BK), scored_BK, "amax")


def class_logits(group_BG: Tensor, class_to_group_K: Tensor) -> Tensor:
    """Return logits (B, K) whose groups have the given ones: each class has that of its group.

    A class outside every group is never scored and has the first group's.
    """
    return group_BG[:, class_to_group_K.clamp(min=0)]


def score(
    logits_BK: Tensor,
    labels_B: Tensor,
    class_to_group_K: Tensor,
    temperature: float | Tensor | None = None,
) -> Scored:
    """Hold logits against labels by a set's scoring rule.

    The prediction is the group of the highest logit over the classes that lie in a group, the first
    of equal ones, and it is right when it is the label's group. With one group for each class this
    is plain top-1; for ObjectNet it equals the benchmark's rule over its 113 categories (groups are
    disjoint). Probabilities are the softmax over groups, each with its highest logit, in fp64; the
    scaled ones of logits divided by the temperature, one for all or (B, 1). A row depends on no
    other one.
    """
    scored_K = torch.nonzero(class_to_group_K != EXCLUDED).squeeze(1)
    group_K = class_to_group_K[scored_K]
    high_BG = group_logits(logits_BK, class_to_group_K)
    if torch.equal(group_K, torch.arange(high_BG.shape[1], device=group_K.device)):
        scored_BK, first_BG = high_BG, scored_K.expand_as(high_BG)
    else:
        scored_BK = logits_BK[:, scored_K].double()
        group_BK = group_K.expand_as(scored_BK)
        # which class of a group has its highest logit: of groups with equal ones the first leads
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
    # without a temperature both are the same
    for scaled_BG in [high_BG] if temperature is None else [high_BG, high_BG / temperature]:
        log_BG = scaled_BG.log_softmax(dim=1)
        probabilities.append(log_BG.gather(1, prediction_B1).squeeze(1).exp())
        probabilities.append(log_BG.gather(1, label_B1).squeeze(1))
    probabilities = (2 * probabilities)[:4] if temperature is None else probabilities
    return Scored(prediction_B1.squeeze(1), before_BG.sum(dim=1), *probabilities)


def is_finite(logits_BK: Tensor) -> Tensor:
    """Return for each image whether it has a prediction at all: all logits finite, bool."""
    # one pass: the sum of finite fp32 numbers is finite in fp64, and inf less inf is NaN
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
    # before the work, because a damaged file ends it
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
            # looked at in the end: a look now would wait for the GPU
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
            # one model at a time, and on the main rank alone: they are large
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
    """Return the name of the domain of each of some samples, (N,); None for a set without domains.

    Raises:
        ValueError: if the set's file of them is absent or damaged.
    """
    names = packed.manifest.domains
    domain_N = Samples.load(packed.url, packed.manifest).domain if names else None
    return None if domain_N is None else np.array(names)[domain_N[samples]]


def _grouped(
    stream: Iterable[tuple[Tensor, Sequence[Tensor]]], progress: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Join labels (B,) and logits (S, B, K) of several forwards, which are then scored together.

    Scoring is many small operations: for each model and forward, they would take longer than to
    read the images. No row depends on another one, so the results are the same.
    """
    labels: list[Tensor] = []
    logits: list[Sequence[Tensor]] = []

    def joined() -> tuple[Tensor, Tensor]:
        # all at once, because each copy takes as long as a part of the scoring
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


# columns of `Predictions` that a model makes, with their types
DRAWN = {
    "prediction": np.int32,
    "rank": np.int32,
    "confidence": np.float32,
    "log_likelihood": np.float32,
    "scaled_confidence": np.float32,
    "scaled_log_likelihood": np.float32,
}


def _columns(rows: Sequence[Scored], models: int) -> dict[str, np.ndarray]:
    """Join this rank's columns (S, B) of several scorings to (S, N); a rank may have no image."""
    if not rows:
        return {name: np.empty((models, 0), kind) for name, kind in DRAWN.items()}
    joined = (torch.cat(parts, dim=1).cpu().numpy() for parts in zip(*rows, strict=True))
    return {
        name: column_SN.astype(kind)
        for (name, kind), column_SN in zip(DRAWN.items(), joined, strict=True)
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
