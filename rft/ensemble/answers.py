"""Predictions of ensembles: one pass over a set for OSE and VRF, two for DaWin.

Every image is forwarded in the same group of images for any ranks and batches
(`rft.evaluate.forward`), so results do not depend on them. DaWin's second pass treats each cluster
as a separate set: every image is forwarded only with the weights of its cluster, as in the released
code.

Shapes: B batch, K classes, G groups, E embedding, M images of the bank, N images of the set.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rft import dist
from rft.clip.classifier import Classifier, build_classifier
from rft.device import to_device
from rft.dist import World
from rft.evaluate.count import (
    Predicted,
    class_logits,
    group_logits,
    is_finite,
    predict,
    require_finite,
)
from rft.evaluate.forward import TOGETHER, Ensemble, Kept, forward
from rft.loading.batches import EvaluationBatches, rank_part
from rft.loading.dataset import PackedDataset
from rft.method import ensembling
from rft.method.averaging import interpolate
from rft.runs.predictions import Predictions
from rft.runs.records import Cluster

Both = tuple[Tensor, Tensor]  # of the zero-shot and the fine-tuned model
# maps both models' logits (B, G) and features (B, E) to log-probabilities (B, G)
Mix = Callable[[Both, Both], Tensor]


@dataclass(frozen=True)
class Work:
    """The two models on the device, and settings for running them."""

    models: tuple[Classifier, Classifier]
    """The zero-shot model first."""
    names: Sequence[str]
    """Their names in messages."""
    world: World
    device: torch.device
    batch_size: int
    workers: int
    kept: Kept | None = None

    @property
    def image_size(self) -> int:
        """Side of both models' input images, in pixels."""
        return self.models[0].architecture.image_size


def ose(alpha: float) -> Mix:
    """Make the output-space ensemble: (1 - alpha) p_zero-shot + alpha p_fine-tuned."""
    return lambda logits, _: ensembling.mixed_log_probabilities(*logits, alpha)


def vrf(bank_ME: Tensor, k: int, centre: float, scale: float, at: tuple[float, float]) -> Mix:
    """Make VRF: weights by the distance of an image's fine-tuned feature to the bank.

    Args:
        bank_ME: unit features of the fine-tuned model (`gather_bank`).
        k: distances are to the k-th nearest row.
        centre: distance at which both models have equal weight.
        scale: how fast the weight falls with the distance.
        at: temperatures of the zero-shot and the fine-tuned model.
    """

    def mix(logits: Both, features: Both) -> Tensor:
        distance_B = ensembling.kth_distance(ensembling.unit(features[1]), bank_ME, k)
        weight_B1 = ensembling.vrf_weight(distance_B, centre, scale)[:, None]
        return ensembling.mixed_log_probabilities(*logits, weight_B1, at)

    return mix


def predict_mixed(
    work: Work, mix: Mix, packed: PackedDataset, progress: Callable[[int], None]
) -> Predicted:
    """Predict each image of a set by an ensemble, in one pass, on every rank.

    Raises:
        ValueError: if a logit is not finite.
    """
    class_to_group_K = torch.from_numpy(packed.manifest.class_to_group()).to(work.device)

    def answer(features: Sequence[Tensor]) -> Tensor:
        zero_shot_BE, fine_tuned_BE = features
        logits = (
            group_logits(work.models[0].logits(zero_shot_BE), class_to_group_K),
            group_logits(work.models[1].logits(fine_tuned_BE), class_to_group_K),
        )
        return class_logits(mix(logits, (zero_shot_BE, fine_tuned_BE)), class_to_group_K)

    (found,) = predict(
        [Ensemble(work.models, answer)],
        packed,
        image_size=work.image_size,
        world=work.world,
        device=work.device,
        batch_size=work.batch_size,
        workers=work.workers,
        progress=progress,
        names=[" with ".join(work.names)],
        kept=work.kept,
    )
    return found


@torch.no_grad()
def gather_bank(
    work: Work, packed: PackedDataset, samples: np.ndarray, progress: Callable[[int], None]
) -> Tensor:
    """Compute VRF's bank (M, E) on every rank, of images that only the fine-tuned model gets right.

    Rows are the fine-tuned model's features of training images, normalised to length 1, in the
    order of the set.

    Raises:
        ValueError: if a logit is not finite, or there is no such image.
    """
    part = rank_part(len(samples), work.world.rank, work.world.size, TOGETHER)
    mine = EvaluationBatches(
        packed,
        samples[part],
        image_size=work.image_size,
        batch_size=-(-work.batch_size // TOGETHER) * TOGETHER,
    )
    files = work.kept.open(packed, samples, work.device) if work.kept else {}
    unit = Ensemble(work.models[1:], lambda features: ensembling.unit(features[0]))
    # an empty start, because a rank may find no such image
    rows = [torch.empty(0, work.models[1].architecture.embed_dim)]
    # counted on the device, which is then read only once
    bad_S = torch.zeros(2, dtype=torch.int64, device=work.device)
    stream = forward(
        [*work.models, unit], mine, part.start, files, workers=work.workers, device=work.device
    )
    with closing(stream):
        for labels_B, (zero_shot_BK, fine_tuned_BK, unit_BE) in stream:
            both = zero_shot_BK, fine_tuned_BK
            bad_S += torch.stack([(~is_finite(logits_BK)).sum() for logits_BK in both])
            wrong_B, right_B = both[0].argmax(1) != labels_B, both[1].argmax(1) == labels_B
            rows.append(unit_BE[wrong_B & right_B].cpu())
            progress(len(labels_B))
    bad = dist.sum_over_ranks(work.world, bad_S).tolist()
    require_finite(work.world, work.names, bad, len(samples), packed.url)
    found = dist.gather_objects(work.world, torch.cat(rows).numpy())
    bank_ME = torch.from_numpy(np.concatenate(found))
    if len(bank_ME) == 0:
        raise ValueError(
            f"VRF has no images to measure distances to: of {len(samples):,} training images of "
            f"{packed.url}, {work.names[1]} gets none right that {work.names[0]} gets wrong"
        )
    return to_device(bank_ME, work.device)


@torch.no_grad()
def predict_dawin(
    work: Work,
    packed: PackedDataset,
    temperatures: tuple[float, float],
    components: int,
    progress: Callable[[int], None],
) -> tuple[Predicted, tuple[Cluster, ...]]:
    """Predict each image of a set by DaWin, in two passes; with its clusters.

    The first pass computes both models' entropies, from which the main rank computes the clusters;
    in the second pass, each cluster is forwarded with its own merged weights.

    Raises:
        ValueError: if a logit is not finite, or the set has only one image.
    """
    options: dict[str, Any] = {
        "image_size": work.image_size,
        "world": work.world,
        "device": work.device,
        "batch_size": work.batch_size,
        "workers": work.workers,
        "progress": progress,
    }
    first = predict(
        work.models, packed, names=work.names, kept=work.kept, logits=np.float32, **options
    )

    def cluster() -> tuple[np.ndarray, list[float]]:
        table_K = torch.from_numpy(packed.manifest.class_to_group())
        entropies = []
        for one, temperature in zip(first, temperatures, strict=True):
            assert one.logits_NK is not None, "the main rank has the logits"
            # in parts, because all logits in fp64 would take twice the memory
            parts = torch.from_numpy(one.logits_NK).split(2**12)
            entropies.append(
                torch.cat(
                    [ensembling.entropy(group_logits(z, table_K), temperature) for z in parts]
                )
            )
        value_N = ensembling.dawin_coefficients(*entropies)
        mixture = ensembling.fit_beta_mixture(value_N, components)
        return mixture.assign(value_N).numpy(), mixture.means.tolist()

    label_N, means = dist.from_main(work.world, dist.on_main(work.world, cluster))
    parts, samples, clusters = [], [], []
    start, end = (model.state_dict() for model in work.models)
    for number, mean in enumerate(means):
        own = np.flatnonzero(label_N == number)
        # a component may be the most probable one of no image
        if len(own) == 0:
            continue
        merged = interpolate(start, end, mean)
        model = build_classifier(merged, work.models[0].architecture).to(work.device)
        name = f"{mean:.3f} of the way from {' to '.join(work.names)}"
        parts += predict([model], packed, samples=own, names=[name], **options)
        samples.append(own)
        clusters.append(Cluster(share=mean, images=len(own)))
    return Predicted(_joined(parts, samples), None), tuple(clusters)


def _joined(parts: Sequence[Predicted], samples: Sequence[np.ndarray]) -> Predictions:
    """Join the rows of all parts in the order of the set."""
    order_N = np.argsort(np.concatenate(samples))
    found = {
        name: [getattr(part.predictions, name) for part in parts]
        for name in (field.name for field in fields(Predictions))
    }
    # skip absent columns: the scaled ones, and domains of a set without domains
    there = {name: columns for name, columns in found.items() if columns[0] is not None}
    return Predictions(**{n: np.concatenate(columns)[order_N] for n, columns in there.items()})
