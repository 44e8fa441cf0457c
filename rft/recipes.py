"""Every system by name: what trains, and what is merged from trained models.

The paper's systems (PAPER, PAPER_MERGED) come first, then the methods that were published after it
(LATER, LATER_MERGED), recipes of our own (RESEARCH), and ensembles of two models (ENSEMBLES), which
`rft.ensemble` evaluates. docs/methods.md compares them.

What the paper prints for each is in rft/paper.py, under the same names.

The setting of each mask x fill is the one that the released code's example script names; the paper
prints the values it tried (SETTINGS) but not its choices. Everything a recipe does not mention is
the same for all (appendix A.1). Any recipe can be scaled to the embedded world (docs/results.md).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, assert_never, get_args

from rft.cli import unknown
from rft.config import (
    Config,
    Fill,
    LoaderConfig,
    LogConfig,
    Mask,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    Preset,
    Scale,
)

DEFAULT = "object-mask-single-fill"

# what Figure 6 tries for each mask, and Table 1 chooses from by held-out accuracy
SETTINGS: dict[str, tuple[str, tuple[float, ...]]] = {
    "random": ("--method.rate", (0.25, 0.5, 0.75)),
    "context": ("--method.threshold", (0.3, 0.4, 0.5, 0.6)),
    "object": ("--method.threshold", (0.3, 0.4, 0.5, 0.6)),
}


RATE = "--optim.lr"
# An option, and the values of it from which held-out accuracy chooses. Those of the learning rate
# are factors of the recipe's own, which the scale multiplies.
Grid = tuple[str, tuple[float, ...]]


class Recipe(NamedTuple):
    """What a system differs in from the defaults; `about` is its line of `--help`."""

    about: str
    method: MethodConfig
    # read-only: all recipes without options of their own share it
    optim: Mapping[str, Any] = MappingProxyType({})
    grid: Grid | None = None
    """What is chosen from where methods are compared on equal terms (rft/experiments.py); None for
    a method without a setting of its own."""


PLAIN = MethodConfig(distill_weight=0)  # cross-entropy alone

# Table 1: mask and fill -> the setting, which is a rate where patches are random and a threshold
# elsewhere, and the line of `--help`, which names it
GRID: dict[tuple[Mask, Fill], tuple[float, str]] = {
    ("random", "none"): (0.75, "Drop {:.0%} of the patches at random."),
    ("context", "none"): (0.6, "Drop the context: at most {} of the largest relevance."),
    ("object", "none"): (0.3, "Drop the object: above {} of the largest relevance."),
    ("random", "single"): (0.5, "Refill {:.0%} of the patches, at random, from one other image."),
    ("context", "single"): (
        0.5,
        "Refill the context, at most {} of the largest relevance, from one other image.",
    ),
    ("object", "single"): (
        0.3,
        "Refill the object, above {} of the largest relevance, from one other image.",
    ),
    ("random", "multi"): (
        0.5,
        "Refill {:.0%} of the patches, at random, each from an image of its own.",
    ),
    ("context", "multi"): (
        0.3,
        "Refill the context, at most {}, each patch from an image of its own.",
    ),
    ("object", "multi"): (0.6, "Refill the object, above {}, each patch from an image of its own."),
}


def _masked() -> Iterator[tuple[str, Recipe]]:
    for (mask, fill), (setting, about) in GRID.items():
        # the paper writes no-fill; the option's word is none
        name = f"{mask}-mask-{'no' if fill == 'none' else fill}-fill"
        match mask:
            case "random":
                method = MethodConfig(mask=mask, fill=fill, rate=setting)
            case "object" | "context":
                method = MethodConfig(mask=mask, fill=fill, threshold=setting)
            case "none":
                raise AssertionError("a recipe without masks has no setting in the grid")
            case _:
                assert_never(mask)
        yield name, Recipe(about.format(setting), method, grid=SETTINGS[mask])


MASKED_RECIPES = dict(_masked())
MASKED = {name: recipe.method for name, recipe in MASKED_RECIPES.items()}
OURS = MASKED[DEFAULT]

PAPER = {
    "zero-shot": Recipe(
        "Keep the pre-trained model, with a head of text embeddings.", PLAIN, {"epochs": 0}
    ),
    "vanilla": Recipe("Train all weights by cross-entropy alone.", PLAIN),
    # Not a row of the paper. From the zero-shot head by AdamW, with a rate for the head; LP-FT's
    # own probe starts from a random head (--model.head random) by SGD. The rate was chosen by
    # reasoning: it can move every weight by about its own size in the epochs given. --preset
    # official-parity takes the released code's: 10 epochs at 3e-5.
    "linear-probe": Recipe(
        "Train the head alone, on the frozen image tower: LP-FT's first half.",
        PLAIN,
        {"trains": "head", "epochs": 5, "lr": 1e-3, "weight_decay": 0.0},
    ),
    # The paper's row is copied from LP-FT's own paper. Half of vanilla's epochs, so that both
    # halves together cost what vanilla does.
    "lp-ft": Recipe(
        "Fine-tune from a linear probe (Kumar et al. 2022): --model.start RUN.",
        PLAIN,
        {"epochs": 5},
    ),
    "no-mask": Recipe("Distil features on the clean images themselves.", MethodConfig()),
    **MASKED_RECIPES,
    # gamma = 1 and T = 10 (appendix A.3)
    "wise-kd-vanilla": Recipe(
        "Learn from a WiSE-FT model (alpha 0.5) too (Fig. 7): --method.kd-teacher RUN.",
        replace(PLAIN, kd_weight=1, kd_temperature=10),
    ),
    "wise-kd-object-mask-single-fill": Recipe(
        "Add that second teacher to object-mask-single-fill (eq. 3, Fig. 7).",
        replace(OURS, kd_weight=1, kd_temperature=10),
    ),
}

# methods that were published after the paper, or that it does not compare with
LATER: dict[str, Recipe] = {
    # lambda 0.1 is the best of Li et al. 2018, who had no CLIP
    "l2-sp": Recipe(
        "Hold weights to the pre-trained ones by a squared distance (L2-SP, 2018).",
        PLAIN,
        {"l2_sp": 0.1, "weight_decay": 0.0},
        ("--optim.l2-sp", (0.01, 0.1, 1.0)),
    ),
    # the released code names no value for CLIP; 1 is a whole projection
    "spd": Recipe(
        "Draw tensors back whose step leads too far (selective projection decay, 2024).",
        PLAIN,
        {"optimizer": "spd", "weight_decay": 0.0},
        ("--optim.spd", (0.5, 1.0, 2.0)),
    ),
    # k = 1 and no weight decay, as the released code's script
    "ftp": Recipe(
        "Project rows onto learnt balls around the pre-trained ones (FTP, 2023).",
        PLAIN,
        {"optimizer": "ftp", "weight_decay": 0.0},
        ("--optim.ftp-k", (0.5, 1.0)),
    ),
    "car-ft": Recipe(
        "Keep what the image's context is, by the prompt templates (Mao et al. 2024).",
        replace(PLAIN, context_weight=1),
        grid=("--method.context-weight", (0.1, 1.0, 10.0)),
    ),
    # rate, weight decay and lambda are those of its released code's command for ImageNet
    "lipsum-ft": Recipe(
        "Keep the logits of random texts (Nam et al. 2024).",
        replace(PLAIN, lipsum_weight=1),
        {"lr": 1e-5, "weight_decay": 0.0},
        ("--method.lipsum-weight", (0.1, 1.0, 10.0)),
    ),
    # its batch of 512 and weight decay of 0.1 are the paper's too
    "flyp": Recipe(
        "Train both towers by CLIP's own contrastive loss (Goyal et al. 2023).",
        replace(PLAIN, loss="contrastive"),
        {"lr": 1e-5},
        (RATE, (1 / 3, 1.0, 3.0)),
    ),
}

# chosen on development seeds from 0.1 and 1 (docs/results.md, "Research recipes")
HEAD_WEIGHT = 0.1
# Of our own, for limits that the paper names: object-mask-single-fill with one change each.
RESEARCH = {
    "unlike-donors": Recipe(
        "Take each donor from the half of the pool that is least like the label.",
        replace(OURS, donor_choice="unlike"),
    ),
    "teacher-cam": Recipe(
        "Mask by the relevance of the frozen pre-trained model.",
        replace(OURS, cam_model="teacher"),
    ),
    "head-distillation": Recipe(
        "Distil the class probabilities on the counterfactuals too.",
        replace(OURS, head_weight=HEAD_WEIGHT),
    ),
    "counterfactual-plus": Recipe(
        "All three: unlike donors, the teacher's CAM, the head distilled.",
        replace(OURS, donor_choice="unlike", cam_model="teacher", head_weight=HEAD_WEIGHT),
    ),
}

TRAINED = {**PAPER, **LATER, **RESEARCH}

# compared on equal terms with the methods that came later (docs/methods.md)
SUITE = ("zero-shot", "vanilla", DEFAULT, *LATER)

# the sweep of WiSE-FT's own paper and of Figure 7; its ends are the two models themselves
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# the paper's uniform soup is Wortsman et al.'s own 72 models; here vanilla at these times its rate
SOUP_RATES = (1 / 3, 1.0, 3.0)


MergeKind = Literal["wise", "uniform-soup", "greedy-soup", "model-stock"]
EnsembleKind = Literal["ose", "vrf", "dawin"]


class Merge(NamedTuple):
    """A model that `rft.merge` makes of trained ones."""

    about: str
    kind: MergeKind
    inputs: tuple[str, ...]
    """Recipes of the models merged; those of a soup or a Model Stock are several runs."""
    options: tuple[str, ...] = ()
    """What `rft.merge` is given besides."""


PAPER_MERGED = {
    "wise-ft": Merge(
        "Mix (1 - alpha) zero-shot + alpha vanilla (Wortsman et al. 2022).",
        "wise",
        ("zero-shot", "vanilla"),
    ),
    f"wise-{DEFAULT}": Merge(
        "Mix zero-shot and object-mask-single-fill: WiSE-Ours (Fig. 7).",
        "wise",
        ("zero-shot", DEFAULT),
    ),
    "uniform-soup": Merge(
        "Average models fine-tuned with different settings (Wortsman et al. 2022).",
        "uniform-soup",
        ("vanilla",),
    ),
    "greedy-soup": Merge(
        "Add only those models that raise held-out accuracy (not a row of the paper).",
        "greedy-soup",
        ("vanilla",),
    ),
}

LATER_MERGED: dict[str, Merge] = {
    # all fine-tuned models are of one seed, with the learning rates of the soups (SOUP_RATES)
    "model-stock": Merge(
        "Average fine-tuned models, each tensor as far as they agree (Jang et al. 2024).",
        "model-stock",
        ("zero-shot", "vanilla"),
    ),
    "wise-tower": Merge(
        "Mix the image towers of zero-shot and vanilla alone; the head is vanilla's.",
        "wise",
        ("zero-shot", "vanilla"),
        ("--parts", "tower"),
    ),
}

SUITE_MERGED = ("wise-ft", f"wise-{DEFAULT}", *LATER_MERGED)

MERGED = {**PAPER_MERGED, **LATER_MERGED}


class Ensemble(NamedTuple):
    """Two models that answer together, as `rft.ensemble` evaluates them."""

    about: str
    kind: EnsembleKind
    inputs: tuple[str, str]
    """Recipes of the zero-shot and the fine-tuned model."""
    transductive: bool = False
    """Whether the answer to a test image depends on the other test images."""


ENSEMBLES = {
    "ose": Ensemble(
        "Average the probabilities of zero-shot and vanilla (output-space ensemble).",
        "ose",
        ("zero-shot", "vanilla"),
    ),
    "vrf": Ensemble(
        "Weigh both by the distance to training images that only vanilla gets (Zhu et al. 2024).",
        "vrf",
        ("zero-shot", "vanilla"),
    ),
    "dawin": Ensemble(
        "Mix their weights by entropy, in clusters of the test set: transductive (Oh et al. 2025).",
        "dawin",
        ("zero-shot", "vanilla"),
        transductive=True,
    ),
}


def build(
    name: str, *, scale: str = "paper", preset: str = "paper", data: str = "", run: str = ""
) -> Config:
    """Return the configuration of a recipe that trains.

    For the scale "small" it is not complete before `rft.small.fit` has seen the size of the set.

    Raises:
        ValueError: if there is no such recipe, scale or preset.
    """
    if name in MERGED:
        raise ValueError(f"{name} is not trained but merged: python -m rft.merge --help")
    if name in ENSEMBLES:
        raise ValueError(f"{name} is not trained but an ensemble: python -m rft.ensemble --help")
    if name not in TRAINED:
        raise unknown("recipe", name, sorted(TRAINED))
    # these come from Python too, where no parser has checked them
    if scale not in get_args(Scale):
        raise unknown("scale", scale, get_args(Scale))
    if preset not in get_args(Preset):
        raise unknown("preset", preset, get_args(Preset))
    recipe = TRAINED[name]
    optim = OptimConfig(**recipe.optim)
    config = Config(recipe=name, data=data, run=run, method=recipe.method, optim=optim)
    # before the scale, which multiplies the rate
    if preset == "official-parity":
        config = _official_parity(config)
    if scale == "miniature":
        config = _miniature(config)
    if scale == "small":
        # Model, loss and peak learning rate stay the paper's. What follows from the size of the set
        # (rft/small.py) is still the paper's here, which no small set can be trained with.
        config = replace(config, scale="small", log=LogConfig(every_steps=10, image_steps=100))
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
        # its distributed sampler is never given the seed
        order_seed=0,
        # the default of the torch it ran on, on the cards it names
        precision="tf32",
        method=replace(config.method, same_draws=True),
        optim=optim,
    )


def list_in_words() -> str:
    """Return all systems, one line each, and what Figure 6 tries, for `--help`."""
    lines = [f"  {name:32s} {recipe.about}" for name, recipe in PAPER.items()]
    lines += ["", "Methods published after the paper:"]
    lines += [f"  {name:32s} {recipe.about}" for name, recipe in LATER.items()]
    lines += ["", "rft's own, for limits that the paper names:"]
    lines += [f"  {name:32s} {recipe.about}" for name, recipe in RESEARCH.items()]
    lines += ["", "Merged from trained models by python -m rft.merge:"]
    lines += [f"  {name:32s} {merge.about}" for name, merge in MERGED.items()]
    lines += ["", "Ensembles that are evaluated by python -m rft.ensemble:"]
    lines += [f"  {name:32s} {one.about}" for name, one in ENSEMBLES.items()]
    lines += ["", "Settings that the paper tries (Figure 6):"]
    for mask, (option, values) in SETTINGS.items():
        lines.append(f"  {mask + ' mask':14s} {option} {' '.join(map(str, values))}")
    return "\n".join(lines)
