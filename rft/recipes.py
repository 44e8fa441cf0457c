"""Name -> configuration: the paper's systems.

The settings of each mask x fill are those the released code's example script names; the paper does
not print its choices. Any recipe can be scaled to the embedded world (docs/decisions.md).
"""

import dataclasses
from dataclasses import replace
from typing import get_args

from rft.cli import unknown
from rft.config import Config, LoaderConfig, LogConfig, MethodConfig, ModelConfig, Scale

DEFAULT = "object-mask-single-fill"

# recipe -> method; every other number is the same for all (appendix A.1)
METHODS: dict[str, MethodConfig] = {
    "zero-shot": MethodConfig(distill_weight=0),
    "vanilla": MethodConfig(distill_weight=0),
    "no-mask": MethodConfig(),
    "random-mask-no-fill": MethodConfig(mask="random", fill="none", rate=0.75),
    "context-mask-no-fill": MethodConfig(mask="context", fill="none", threshold=0.6),
    "object-mask-no-fill": MethodConfig(mask="object", fill="none", threshold=0.3),
    "random-mask-single-fill": MethodConfig(mask="random", fill="single", rate=0.5),
    "context-mask-single-fill": MethodConfig(mask="context", fill="single", threshold=0.5),
    "object-mask-single-fill": MethodConfig(mask="object", fill="single", threshold=0.3),
    "random-mask-multi-fill": MethodConfig(mask="random", fill="multi", rate=0.5),
    "context-mask-multi-fill": MethodConfig(mask="context", fill="multi", threshold=0.3),
    "object-mask-multi-fill": MethodConfig(mask="object", fill="multi", threshold=0.6),
}


def build(name: str, *, scale: str = "paper", data: str = "", run: str = "") -> Config:
    """Return the configuration of a recipe.

    Raises:
        ValueError: if there is no such recipe or scale.
    """
    if name not in METHODS:
        raise unknown("recipe", name, sorted(METHODS))
    if scale not in get_args(Scale):
        raise unknown("scale", scale, get_args(Scale))
    config = Config(recipe=name, data=data, run=run, method=METHODS[name])
    if scale == "miniature":
        config = _miniature(config)
    if scale == "small":
        config = _small(config)
    if name == "zero-shot":
        config = replace(config, optim=replace(config.optim, epochs=0))
    return config


def _small(config: Config) -> Config:
    """Scale a recipe to some hundred or thousand photos of one's own.

    Model, loss and peak learning rate stay the paper's; batch and warm-up shrink with the set, and
    how many images select the checkpoint is for the user to say (`tools/shard_folder.py` proposes a
    number). Chosen by reasoning, not measured on any set.
    """
    return replace(
        config,
        scale="small",
        loader=LoaderConfig(batch_size=64, held_out=0),
        optim=replace(config.optim, warmup_steps=50),
        log=LogConfig(every_steps=10, checkpoint_steps=100),
    )


def _miniature(config: Config) -> Config:
    """Scale a recipe to the miniature world and its tiny CLIP.

    2000 images instead of 1.28 M and a model 180 times smaller want a smaller batch and a larger
    learning rate. beta goes from 30 to 3 because it weighs a mean square of features, and the tiny
    CLIP's features are about ten times larger in mean square than CLIP ViT-B/32's. All of it was
    set before any method ran on this world.
    """
    return replace(
        config,
        scale="miniature",
        model=ModelConfig(clip="rft-miniature", pretrained=""),
        loader=LoaderConfig(batch_size=64, held_out=400, workers=0),
        method=replace(config.method, distill_weight=config.method.distill_weight / 10),
        optim=replace(config.optim, lr=3e-4, warmup_steps=5),
        log=LogConfig(every_steps=5, checkpoint_steps=25),
    )


def names() -> list[str]:
    """Return every recipe's name in the order of the paper's tables."""
    return list(METHODS)


def describe() -> str:
    """Return the recipes, one line each, for `--help`."""
    lines = []
    for name, method in METHODS.items():
        shown = {k: v for k, v in dataclasses.asdict(method).items() if k != "distill_weight"}
        if method.mask == "none":
            shown = {}
        elif method.mask == "random":
            del shown["threshold"]
        else:
            del shown["rate"]
        values = " ".join(f"{key}={value}" for key, value in shown.items())
        lines.append(f"{name:27s} beta={method.distill_weight:g} {values}".rstrip())
    return "\n".join(lines)
