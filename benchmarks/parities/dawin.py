"""DaWin against its released code (naver-ai/dawin, dawin_rft/main_dawin.py and mixturemodel.py).

The released class runs unchanged on random models of two layers: coefficients, mixture, and the
forward of each image with the merged weights of its cluster. Stand-ins: `wandb`, `clip` and
`datasets`, which other parts import; the reader of cached logits and `get_model_from_sd`, which
return the random models in place of CLIP; and `Tensor.cuda` if there is no GPU. Temperatures are
those of the released code for ViT-B/32.

The released mixture starts from k-means with random seeds and keeps the best of three; rft's starts
from k-means at quantiles.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import parities, stand_ins
from rft.method import ensembling
from rft.method.averaging import interpolate

REPOSITORY = "naver-ai/dawin"
VARIABLE = "RFT_PEER_DAWIN"
IMAGES, PIXELS, WIDTH, CLASSES, BATCH = 400, 12, 16, 10, 64
State = dict[str, Tensor]


def measure(checkout: Path) -> dict[str, float]:
    """Run the released class and rft's functions on the same random models and images."""
    draw = torch.Generator().manual_seed(0)
    images_BP = torch.randn(IMAGES, PIXELS, generator=draw)
    start = {
        "hidden": torch.randn(PIXELS, WIDTH, generator=draw),
        "head": torch.randn(WIDTH, CLASSES, generator=draw),
    }
    noise = (0.5 * torch.randn(one.shape, generator=draw) for one in start.values())
    end = {name: one + other for (name, one), other in zip(start.items(), noise, strict=True)}
    with _imported(checkout) as theirs:
        coefficient_N, means, logits_NK = _theirs(theirs, images_BP, start, end)
    temperatures = 0.9576, 0.9733
    entropies = [
        ensembling.entropy(forward(state, images_BP), temperature)
        for state, temperature in zip((start, end), temperatures, strict=True)
    ]
    own_N = ensembling.dawin_coefficients(*entropies)
    mixture = ensembling.fit_beta_mixture(own_N)
    label_N = mixture.assign(own_N)
    own_NK = torch.stack(
        [
            forward(interpolate(start, end, float(mixture.means[label])), image[None])[0]
            for label, image in zip(label_N, images_BP, strict=True)
        ]
    )
    return {
        "coefficients": parities.difference(own_N, coefficient_N),
        "means of the clusters": parities.difference(mixture.means.sort().values, means),
        "logits of the merged models": parities.difference(own_NK, logits_NK),
    }


def forward(state: State, images_BP: Tensor) -> Tensor:
    """Compute the logits of a model of two layers."""
    return torch.tanh(images_BP @ state["hidden"]) @ state["head"]


def _theirs(
    module: ModuleType, images_BP: Tensor, start: State, end: State
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the released coefficients, means of clusters and logits of each image."""
    args = SimpleNamespace(
        **{"model": "ViT-B/32", "device": "cpu", "expertise": "negexp_ent_ratio", "seed": 1},
        **{"wise_alpha": 0.0, "offset_adjustment": True, "ensemble_coef": "", "save_outputs": 0},
        **{"bmm_ncluster": 3, "eval_batch_size": BATCH, "baseline": "", "half_prec": 0},
    )
    module.__dict__.update(args=args, device="cpu")

    def read(*_: object, state_dict: State, **__: object) -> tuple[Any, ...]:
        logits = forward(state_dict, images_BP)
        # without labels, which its entropies do not need
        labels = torch.zeros(IMAGES, dtype=torch.int64)
        return None, logits, labels, lambda z, device: z

    mixtures: list[Any] = []
    kind = module.BetaMixtureModel

    def kept(**options: Any) -> Any:
        mixtures.append(kind(**options))
        return mixtures[-1]

    for name, value in {
        "get_feats_logits_and_labels": read,
        "get_model_from_sd": lambda state, _: lambda images: forward(state, images),
        "BetaMixtureModel": kept,
    }.items():
        assert hasattr(module, name), f"main_dawin has no {name} any more"
        setattr(module, name, value)
    one = module.DaWin(torch.nn.Identity(), None, args, start, end)
    one.build_datastore(dsname="random")
    dataset = _Numbered()
    one.eval(start, end, dataset, _Batches(images_BP))
    a_J, b_J = torch.from_numpy(mixtures[0].beta_params_).T
    order = torch.cat(dataset.numbers).argsort()
    coefficient_N = one.datastore["coefficient"].flatten()
    return coefficient_N, (a_J / (a_J + b_J)).sort().values, torch.cat(dataset.logits)[order]


class _Numbered:
    """A data set whose labels are the image numbers; keeps the results given to it."""

    def __init__(self) -> None:
        self.numbers: list[Tensor] = []
        self.logits: list[Tensor] = []

    def accuracy(self, logits: Tensor, labels: Tensor, *_: object) -> tuple[float, int]:
        self.numbers.append(labels)
        self.logits.append(logits)
        return 0.0, len(labels)


class _Batches:
    """A loader of the images in their order."""

    def __init__(self, images_BP: Tensor) -> None:
        numbers = torch.arange(IMAGES).split(BATCH)
        self.parts = list(zip(images_BP.split(BATCH), numbers, strict=True))

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for images, numbers in self.parts:
            yield {"images": images, "labels": numbers, "image_paths": None}


def _stay(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return tensor


@contextmanager
def _imported(checkout: Path) -> Iterator[ModuleType]:
    """Import main_dawin with stand-ins, silent, and without a GPU."""
    names = ("wandb", "clip", "clip.model", "datasets")
    own = ("main_dawin", "utils", "mixturemodel")
    cuda, long = torch.Tensor.cuda, torch.cuda.LongTensor
    before, path = sys.stdout, list(sys.path)
    with stand_ins.modules([*names, *own]) as made:
        made["clip.model"].__dict__["convert_weights"] = None
        for name in ("2p", "", "V2", "Sketch", "R", "A"):
            made["datasets"].__dict__[f"ImageNet{name}"] = None
        made["datasets"].__dict__["ObjectNet"] = None
        for name in own:
            del sys.modules[name]
        sys.path.insert(0, str(checkout / "dawin_rft"))
        sys.stdout = sys.stderr
        torch.Tensor.cuda = _stay  # pyrefly: ignore[bad-assignment]
        torch.cuda.LongTensor = torch.int64  # pyrefly: ignore[bad-assignment]
        try:
            yield import_module("main_dawin")
        finally:
            torch.Tensor.cuda, torch.cuda.LongTensor = cuda, long
            sys.stdout, sys.path[:] = before, path
