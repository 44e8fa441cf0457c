"""Every system of the paper by name: what trains, and what is merged from trained models.

What the paper prints for each is in rft/paper.py, under the same names.

The setting of each mask x fill is the one that the released code's example script names; the paper
prints the values it tried (SETTINGS) but not its choices. Everything a function does not mention is
the same for all (appendix A.1). Any recipe can be scaled to the embedded world (docs/decisions.md).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from rft.cli import unknown
from rft.config import (
    Config,
    LoaderConfig,
    LogConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    Preset,
    Scale,
)

DEFAULT = "object-mask-single-fill"

PLAIN = MethodConfig(distill_weight=0)  # cross-entropy alone

# what Figure 6 tries for each mask, and Table 1 chooses from by held-out accuracy
SETTINGS = {
    "random": ("--method.rate", (0.25, 0.5, 0.75)),
    "context": ("--method.threshold", (0.3, 0.4, 0.5, 0.6)),
    "object": ("--method.threshold", (0.3, 0.4, 0.5, 0.6)),
}


def zero_shot(config: Config) -> Config:
    """Keep the pre-trained model, with a head of text embeddings."""
    return _with(config, PLAIN, epochs=0)


def vanilla(config: Config) -> Config:
    """Train all weights by cross-entropy alone."""
    return _with(config, PLAIN)


def linear_probe(config: Config) -> Config:
    """Train the head alone, on the frozen image tower: LP-FT's first half.

    Not a row of the paper. From the zero-shot head by AdamW, with a rate for the head; LP-FT's own
    probe starts from a random head (--model.head random) by SGD. The rate was chosen by reasoning:
    it can move every weight by about its own size in the epochs given. --preset official-parity
    takes the released code's: 10 epochs at 3e-5.
    """
    return _with(config, PLAIN, trains="head", epochs=5, lr=1e-3, weight_decay=0.0)


def lp_ft(config: Config) -> Config:
    """Fine-tune from a linear probe (Kumar et al. 2022): --model.start RUN.

    The paper's row is copied from LP-FT's own paper. Half of vanilla's epochs, so that both halves
    together cost what vanilla does.
    """
    return _with(config, PLAIN, epochs=5)


def no_mask(config: Config) -> Config:
    """Distil features on the clean images themselves."""
    return _with(config, MethodConfig())


def random_mask_no_fill(config: Config) -> Config:
    """Drop 75% of the patches at random."""
    return _with(config, MethodConfig(mask="random", fill="none", rate=0.75))


def context_mask_no_fill(config: Config) -> Config:
    """Drop the context: at most 0.6 of the largest relevance."""
    return _with(config, MethodConfig(mask="context", fill="none", threshold=0.6))


def object_mask_no_fill(config: Config) -> Config:
    """Drop the object: above 0.3 of the largest relevance."""
    return _with(config, MethodConfig(mask="object", fill="none", threshold=0.3))


def random_mask_single_fill(config: Config) -> Config:
    """Refill 50% of the patches, at random, from one other image."""
    return _with(config, MethodConfig(mask="random", fill="single", rate=0.5))


def context_mask_single_fill(config: Config) -> Config:
    """Refill the context, at most 0.5 of the largest relevance, from one other image."""
    return _with(config, MethodConfig(mask="context", fill="single", threshold=0.5))


def object_mask_single_fill(config: Config) -> Config:
    """Refill the object, above 0.3 of the largest relevance, from one other image."""
    return _with(config, MethodConfig(mask="object", fill="single", threshold=0.3))


def random_mask_multi_fill(config: Config) -> Config:
    """Refill 50% of the patches, at random, each from an image of its own."""
    return _with(config, MethodConfig(mask="random", fill="multi", rate=0.5))


def context_mask_multi_fill(config: Config) -> Config:
    """Refill the context, at most 0.3, each patch from an image of its own."""
    return _with(config, MethodConfig(mask="context", fill="multi", threshold=0.3))


def object_mask_multi_fill(config: Config) -> Config:
    """Refill the object, above 0.6, each patch from an image of its own."""
    return _with(config, MethodConfig(mask="object", fill="multi", threshold=0.6))


def wise_kd_vanilla(config: Config) -> Config:
    """Learn from a WiSE-FT model (alpha 0.5) too (Fig. 7): --method.kd-teacher RUN.

    gamma = 1 and T = 10 (appendix A.3).
    """
    return _with(config, MethodConfig(distill_weight=0, kd_weight=1, kd_temperature=10))


def wise_kd_object_mask_single_fill(config: Config) -> Config:
    """Add that second teacher to object-mask-single-fill (eq. 3, Fig. 7)."""
    ours = object_mask_single_fill(config).method
    return _with(config, replace(ours, kd_weight=1, kd_temperature=10))


TRAINED: dict[str, Callable[[Config], Config]] = {
    "zero-shot": zero_shot,
    "vanilla": vanilla,
    "linear-probe": linear_probe,
    "lp-ft": lp_ft,
    "no-mask": no_mask,
    "random-mask-no-fill": random_mask_no_fill,
    "context-mask-no-fill": context_mask_no_fill,
    "object-mask-no-fill": object_mask_no_fill,
    "random-mask-single-fill": random_mask_single_fill,
    "context-mask-single-fill": context_mask_single_fill,
    "object-mask-single-fill": object_mask_single_fill,
    "random-mask-multi-fill": random_mask_multi_fill,
    "context-mask-multi-fill": context_mask_multi_fill,
    "object-mask-multi-fill": object_mask_multi_fill,
    "wise-kd-vanilla": wise_kd_vanilla,
    "wise-kd-object-mask-single-fill": wise_kd_object_mask_single_fill,
}


@dataclass(frozen=True)
class Merge:
    """A model that `rft.merge` makes of trained ones."""

    kind: Literal["wise", "uniform-soup", "greedy-soup"]
    inputs: tuple[str, ...]
    """Recipes of the models merged; a soup's are several runs of them."""
    alphas: tuple[float, ...] = ()
    """WiSE: shares of the fine-tuned model."""


# the sweep of WiSE-FT's own paper and of Figure 7; its ends are the two models themselves
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# the paper's uniform soup is Wortsman et al.'s own 72 models; here vanilla at these times its rate
SOUP_RATES = (1 / 3, 1.0, 3.0)


def wise_ft() -> Merge:
    """Mix (1 - alpha) zero-shot + alpha vanilla (Wortsman et al. 2022); Table 3 has alpha 0.5."""
    return Merge("wise", ("zero-shot", "vanilla"), ALPHAS)


def wise_ours() -> Merge:
    """Mix zero-shot and object-mask-single-fill: WiSE-Ours (Fig. 7)."""
    return Merge("wise", ("zero-shot", DEFAULT), ALPHAS)


def uniform_soup() -> Merge:
    """Average models fine-tuned with different settings (Wortsman et al. 2022)."""
    return Merge("uniform-soup", ("vanilla",))


def greedy_soup() -> Merge:
    """Add only those models that raise held-out accuracy (not a row of the paper)."""
    return Merge("greedy-soup", ("vanilla",))


MERGED: dict[str, Callable[[], Merge]] = {
    "wise-ft": wise_ft,
    f"wise-{DEFAULT}": wise_ours,
    "uniform-soup": uniform_soup,
    "greedy-soup": greedy_soup,
}


def build(
    name: str, *, scale: str = "paper", preset: str = "paper", data: str = "", run: str = ""
) -> Config:
    """Return the configuration of a recipe that trains.

    For the scale "small" it is not complete: `rft.small.fit` sets what follows from the size of the
    set.

    Raises:
        ValueError: if there is no such recipe, scale or preset.
    """
    if name in MERGED:
        raise ValueError(f"{name} is not trained but merged: python -m rft.merge --help")
    if name not in TRAINED:
        raise unknown("recipe", name, sorted(TRAINED))
    if scale not in get_args(Scale):
        raise unknown("scale", scale, get_args(Scale))
    if preset not in get_args(Preset):
        raise unknown("preset", preset, get_args(Preset))
    config = TRAINED[name](Config(recipe=name, data=data, run=run))
    # before the scale, which multiplies the rate
    if preset == "official-parity":
        config = _official_parity(config)
    if scale == "miniature":
        config = _miniature(config)
    if scale == "small":
        config = _small(config)
    return config


def require_inputs(config: Config) -> None:
    """Check that a recipe which builds on another run was told which, and that no other was.

    Raises:
        ValueError: naming the option.
    """
    if config.recipe == "zero-shot" and (config.model.start or config.optim.epochs):
        raise ValueError(
            "zero-shot is the pre-trained model as it is: without --model.start or epochs; vanilla "
            "trains"
        )
    if config.recipe == "lp-ft" and not config.model.start:
        raise ValueError(
            "lp-ft starts from a linear probe; train linear-probe and give its run with "
            "--model.start RUN"
        )
    if config.method.kd_weight > 0 and not config.method.kd_teacher:
        raise ValueError(
            f"{config.recipe} learns from a second teacher; give it with --method.kd-teacher RUN "
            "(a WiSE-FT model: python -m rft.merge wise)"
        )


def _with(config: Config, method: MethodConfig, **optim: Any) -> Config:
    return replace(config, method=method, optim=replace(config.optim, **optim))


def _small(config: Config) -> Config:
    """Scale a recipe to some hundred or thousand photos of one's own.

    Model, loss and peak learning rate stay the paper's. What follows from the size of the set
    (rft/small.py) is still the paper's here, which no small set can be trained with.
    """
    return replace(config, scale="small", log=LogConfig(every_steps=10, image_steps=100))


def _miniature(config: Config) -> Config:
    """Scale a recipe to the miniature world and its tiny CLIP.

    2000 images instead of 1.28 M and a model 180 times smaller want a smaller batch and a learning
    rate ten times larger. beta goes from 30 to 3 because it weighs a mean square of features, and
    the tiny CLIP's features are about ten times larger in mean square than CLIP ViT-B/32's. All of
    it was set before any method ran on this world.
    """
    return replace(
        config,
        scale="miniature",
        model=ModelConfig(clip="rft-miniature", pretrained=""),
        loader=LoaderConfig(batch_size=64, held_out=400, workers=0),
        method=replace(config.method, distill_weight=config.method.distill_weight / 10),
        optim=replace(config.optim, lr=round(config.optim.lr * 10, 9), warmup_steps=5),
        log=LogConfig(every_steps=5, checkpoint_steps=25, image_steps=25),
    )


def _official_parity(config: Config) -> Config:
    """Do what the released code does where it differs from the paper's text (docs/paper.md)."""
    optim = replace(config.optim, schedule="one-cycle", clip="micro-step")
    if config.recipe == "linear-probe":
        # its probe has fine-tuning's epochs and rate, and no weight decay
        optim = replace(optim, epochs=OptimConfig.epochs, lr=OptimConfig.lr)
    return replace(
        config,
        preset="official-parity",
        # its distributed sampler never hears of the seed
        order_seed=0,
        # the default of the torch it ran on, on the cards it names
        precision="tf32",
        method=replace(config.method, same_draws=True),
        optim=optim,
    )


def names() -> list[str]:
    """Return the name of every recipe that trains, in the order of the paper's tables."""
    return list(TRAINED)


def masked_methods() -> dict[str, MethodConfig]:
    """Return the method of each mask x fill, in the order of Table 1."""
    built = {name: build(name).method for name in names()}
    return {name: method for name, method in built.items() if method.masks and not method.kd_weight}


def describe() -> str:
    """Return all systems, one line each, and what Figure 6 tries, for `--help`."""
    lines = [f"  {name:32s} {_first_line(recipe)}" for name, recipe in TRAINED.items()]
    lines += ["", "Merged from trained models by python -m rft.merge:"]
    lines += [f"  {name:32s} {_first_line(recipe)}" for name, recipe in MERGED.items()]
    lines += ["", "Settings that the paper tries (Figure 6):"]
    for mask, (option, values) in SETTINGS.items():
        lines.append(f"  {mask + ' mask':14s} {option} {' '.join(map(str, values))}")
    return "\n".join(lines)


def _first_line(recipe: Callable[..., Any]) -> str:
    return (recipe.__doc__ or "").partition("\n")[0]
