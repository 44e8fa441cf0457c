"""VRF against its released code (BeierZhu/VRF, src/knn_distance.py and src/main.py).

Both scripts run unchanged, on random features and logits in place of CLIP's. Stand-ins:
`src.models.modeling` (models that are never called), `src.datasets` and `src.datasets.common` (no
images are read), and in main.py `Calibrater`, whose search for temperatures on ImageNet's
validation images rft does not follow: both sides get the same two. faiss is required, because its
exact index computes the distances.

rft's k is a thousandth of the bank, as in the paper; the released k is 1000 times the bank's share
of the training images. This comparison uses the released k.
"""

import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import parities, stand_ins
from rft.method import ensembling

REPOSITORY = "BeierZhu/VRF"
VARIABLE = "RFT_PEER_VRF"
TRAINING, IMAGES, CLASSES, WIDTH = 3000, 200, 20, 32
TEMPERATURES = {"zs": 0.8, "ft": 1.3}
SETS = ("ImageNet", "ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR", "ObjectNet")

# features, logits and labels of a set
Outputs = tuple[Tensor, Tensor, Tensor]


def measure(checkout: Path) -> dict[str, float]:
    """Run both scripts and rft's functions on the same numbers."""
    outputs = {
        (model, name): draw(model, name, TRAINING if name == "train" else IMAGES)
        for model in ("zs", "ft")
        for name in ("train", *SETS)
    }
    scores, probabilities = _theirs(checkout, outputs)
    zero_shot, fine_tuned = outputs["zs", "train"], outputs["ft", "train"]
    labels = zero_shot[2]
    only = (zero_shot[1].argmax(1) != labels) & (fine_tuned[1].argmax(1) == labels)
    bank_ME = ensembling.unit(fine_tuned[0][only])
    k = round(1000 * len(bank_ME) / TRAINING)
    at = TEMPERATURES["zs"], TEMPERATURES["ft"]
    distances, mixed = [], []
    for name in SETS:
        feature_BE, fine_tuned_BG, _ = outputs["ft", name]
        distance_B = ensembling.kth_distance(ensembling.unit(feature_BE), bank_ME, k)
        weight_B1 = ensembling.vrf_weight(distance_B)[:, None]
        zero_shot_BG = outputs["zs", name][1]
        log_BG = ensembling.mixed_log_probabilities(zero_shot_BG, fine_tuned_BG, weight_B1, at)
        distances.append(distance_B)
        mixed.append(log_BG.exp())
    return {
        f"squared distance to the {k}-th of {len(bank_ME)}": parities.difference(
            torch.cat(distances), torch.cat(scores)
        ),
        "mixed probabilities": parities.difference(torch.cat(mixed), torch.cat(probabilities)),
    }


def draw(model: str, name: str, images: int) -> Outputs:
    """Generate features around those of their class, logits and labels."""
    shared = torch.Generator().manual_seed(len(name))
    labels = torch.randint(CLASSES, (images,), generator=shared)
    own = torch.Generator().manual_seed(1 + 2 * len(name) + (model == "ft"))
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    feature_BE = 3 * centres[labels] + 3 * torch.randn(images, WIDTH, generator=own)
    logit_BG = 2 * torch.randn(images, CLASSES, generator=own)
    logit_BG[torch.arange(images), labels] += 2 if model == "ft" else 1
    return feature_BE, logit_BG, labels


def _theirs(
    checkout: Path, outputs: dict[tuple[str, str], Outputs]
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the distances and the mixed probabilities of each set with the released scripts."""
    names = ("src", "src.models", "src.models.modeling", "src.datasets", "src.datasets.common")
    found: list[Tensor] = []
    with stand_ins.modules(names) as made, tempfile.TemporaryDirectory() as cache:
        made["src"].__path__ = [str(checkout / "src")]
        made["src.models"].__path__ = [str(checkout / "src/models")]
        made["src.models.modeling"].__dict__["ImageClassifier"] = _Model
        for attribute in ("get_dataloader", "maybe_dictionarize"):
            made["src.datasets.common"].__dict__[attribute] = None
        args = SimpleNamespace(load=["vit-16/zs", "vit-16/ft"], device="cpu", cache_dir=cache)
        knn, mix = (import_module(f"src.{name}") for name in ("knn_distance", "main"))
        for script in (knn, mix):
            _set(script, "get_feats_logits_and_labels", _reader(outputs))
        _set(mix, "Calibrater", _calibrater(outputs))
        keep = mix.compute_accuracy

        def kept(answers: Tensor, labels: Tensor) -> float:
            found.append(answers)
            return keep(answers, labels)

        _set(mix, "compute_accuracy", kept)
        _quietly(lambda: knn.main(args))
        _quietly(lambda: mix.main(args))
        with np.load(Path(cache) / "vit-16_zs_vit-16_ft_knn.npz") as scores:
            distances = [-torch.from_numpy(scores[f"ft_scores_{name}"]) for name in SETS]
    # the first two are the accuracies of both models, for temperatures
    return distances, found[2:]


class _Model:
    """Stand-in for a model that is loaded and moved to a device."""

    @classmethod
    def load(cls, _: str) -> "_Model":
        return cls()

    def to(self, _: str) -> None:
        pass


def _set(module: ModuleType, name: str, value: Any) -> None:
    assert hasattr(module, name), f"{module.__name__} has no {name} any more"
    setattr(module, name, value)


def _reader(outputs: dict[tuple[str, str], Outputs]) -> Callable[..., tuple[Any, ...]]:
    """Stand in for their forward pass: return a copy of the generated numbers."""

    def read(_: object, __: object, save_prefix: str, dataset_name: str, is_train: bool = False):
        model = save_prefix.rpartition("_")[2]
        found = outputs[model, "train" if is_train else dataset_name]
        return (*(one.clone() for one in found), lambda logits: logits)

    return read


def _calibrater(outputs: dict[tuple[str, str], Outputs]) -> type:
    """Stand in for their search: return the temperature of the model with these logits."""

    class Calibrater:
        def __init__(self, logits: Tensor, _: float) -> None:
            own = torch.equal(logits, outputs["zs", SETS[0]][1])
            self.temperature = TEMPERATURES["zs" if own else "ft"]

        def search_T(self) -> tuple[float, float]:  # noqa: N802 (their name)
            return self.temperature, 0.0

    return Calibrater


def _quietly(run: Callable[[], object]) -> None:
    """Print results to stderr, because the last line of stdout is the benchmark's own."""
    before, sys.stdout = sys.stdout, sys.stderr
    try:
        run()
    finally:
        sys.stdout = before
