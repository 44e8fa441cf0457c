"""Model Stock against mergekit (arcee-ai/mergekit, mergekit/merge_methods/model_stock.py).

The authors' repository (naver-ai/model-stock) only announces its code. mergekit's is the most used
implementation, and takes the mean cosine over pairs of more than two models, as rft does. It clamps
neither t nor negative cosines, so only tensors with a positive mean cosine are compared.

The file is imported unchanged, with stand-ins for its imports: the classes of its task graph
(`Task`, `WeightInfo`, `ModelReference`, `ImmutableMap`, `MergeMethod` and its definitions) and
`rectify_embed_sizes`, which only changes embeddings of different sizes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import parities, stand_ins
from rft.method.averaging import model_stock

REPOSITORY = "arcee-ai/mergekit"
VARIABLE = "RFT_PEER_MODEL_STOCK"
SHAPES = {"visual.conv": (16, 3, 4, 4), "visual.proj": (48, 16), "head.bias": (17,)}


class Task:
    """Stand-in for a task of mergekit's graph: its fields are attributes."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __class_getitem__(cls, _: object) -> type:
        """Return the class itself for any type in brackets."""
        return cls


def measure(checkout: Path) -> dict[str, float]:
    """Merge the same random weights with both."""
    with _stand_ins():
        theirs = parities.load(checkout / "mergekit/merge_methods/model_stock.py")
    found = {}
    for count in (2, 3, 5):
        start, models = weights(count)
        merged, _ = model_stock(start, models)
        found[f"{count} models: theta - theta_0"] = max(
            parities.difference(
                merged[name] - start[name],
                _their_tensor(theirs, [start, *models], name) - start[name],
            )
            for name in SHAPES
        )
    return found


def weights(count: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Generate a start, and models that moved from it partly in the same direction."""
    draw = torch.Generator().manual_seed(count)

    def tensors(scale: float) -> dict[str, Tensor]:
        return {name: scale * torch.randn(s, generator=draw) for name, s in SHAPES.items()}

    start, common = tensors(0.05), tensors(0.01)
    own = [tensors(0.01) for _ in range(count)]
    models = [{name: start[name] + common[name] + one[name] for name in SHAPES} for one in own]
    return start, models


def _their_tensor(theirs: ModuleType, states: list[dict[str, Tensor]], name: str) -> Tensor:
    task = theirs.ModelStockMergeTask(base_model=0, weight_info=None, filter_wise=False)
    return task.execute({number: state[name] for number, state in enumerate(states)})


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Provide mergekit's modules, of which the file uses only names."""
    names = {
        "mergekit": (),
        "mergekit.architecture": ("WeightInfo",),
        "mergekit.common": ("ImmutableMap", "ModelReference"),
        "mergekit.graph": ("Task",),
        "mergekit.merge_methods": (),
        "mergekit.merge_methods.base": ("ConfigParameterDef", "MergeMethod", "MergeTensorInput"),
        "mergekit.merge_methods.rectify_embed": (),
    }
    with stand_ins.modules(names) as made:
        for name, attributes in names.items():
            for attribute in attributes:
                setattr(made[name], attribute, Task)
        rectify = made["mergekit.merge_methods.rectify_embed"]
        rectify.__dict__["rectify_embed_sizes"] = lambda *_: None
        yield
