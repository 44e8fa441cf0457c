"""What an average is made of: ingredients, each a run folder or a weights file."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rft.classes import compare, compare_prompts
from rft.clip.classifier import Saved, load_state, map_state
from rft.method.averaging import require_alike
from rft.runs import filenames, records, trained_on
from rft.runs.derived import SHOWN
from rft.runs.filenames import LAST, SELECTED
from rft.runs.folder import require_own_weights, unfinished
from rft.runs.records import RunConfig
from rft.runs.trained_on import TrainedOn
from rft.sets import BENCHMARKS
from rft.storage import files

EndWeights = Literal["best", "last"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ingredient:
    """One model to average: where it is and what made it."""

    path: Path
    """The run folder or weights file that the user named."""
    weights: Path
    sha256: str
    config: RunConfig | None
    """The run folder's config.json; None for a weights file."""
    saved: Saved
    """What the weights file holds: its header, and its tensors mapped, of which no byte is read."""

    @property
    def recipe(self) -> str:
        """Name of the recipe, empty if it is unknown."""
        return self.config.recipe if self.config else self.saved.metadata.get("recipe", "")

    @property
    def seed(self) -> int:
        """Seed of the run, 0 for a weights file."""
        return self.config.seed if self.config else 0

    @property
    def is_training_run(self) -> bool:
        """Whether rft.train made it; a merged or imported model and a weights file are not."""
        return self.config is not None and self.config.is_training

    def load(self) -> dict[str, Tensor]:
        """Return the weights.

        Raises:
            ValueError: if one is not finite.
        """
        return load_state(self.weights).state

    @property
    def steps(self) -> int:
        """Optimizer steps that the weights are away from where their run started."""
        return int(self.saved.metadata["step"])

    @property
    def seen(self) -> frozenset[TrainedOn]:
        """What it is known to have been trained on."""
        return trained_on.of_model(self.path, self.saved.metadata)

    def record(self) -> dict[str, Any]:
        """Return what a merged model's config.json keeps of it."""
        return {"path": str(self.path), "sha256": self.sha256}


def read_ingredient(path: Path, weights: Path = SELECTED) -> Ingredient:
    """Return the ingredient at `path`; `weights` is which file of a run folder is meant.

    Raises:
        ValueError: if there is none, it is a run that is still training, or the weights in a run
            folder are not the run's.
    """
    config = records.find_config(path)
    if config and (reached := unfinished(path)):
        raise ValueError(
            f"{path} has not finished training ({reached}); resume it first, or name one of its "
            f"{filenames.CHECKPOINTS}/*.safetensors itself"
        )
    file = path / weights if path.is_dir() else path
    # a file that is named itself is meant, whatever became of its run
    if reached := unfinished(file):
        log.warning(f"{file} is of a run that has not finished training ({reached})")
    # first: it refuses a damaged file before all of it is hashed
    saved = map_state(file)
    sha256 = files.sha256_file(file)
    require_own_weights(path, file, sha256)
    return Ingredient(path, file, sha256, config, saved)


def read_end(path: Path, weights: EndWeights) -> Ingredient:
    """Return the fine-tuned end of WiSE: with its selected weights, or those of the last step.

    Raises:
        ValueError: as `read_ingredient`, or if the last weights are of no run folder, or not kept.
    """
    if weights == "best":
        return read_ingredient(path)
    if not path.is_dir():
        raise ValueError(f"--end-weights last means a run folder's, but {path} is not a folder")
    if not (path / LAST).is_file():
        raise ValueError(f"{path} did not keep its last weights ({LAST}); use --end-weights best")
    return read_ingredient(path, LAST)


def read_soup(paths: Sequence[Path]) -> list[Ingredient]:
    """Return the ingredients of a soup.

    Raises:
        ValueError: if there are fewer than two, one is named twice, or they are not alike.
    """
    if len(paths) < 2:
        raise ValueError(f"a soup needs at least two models, {len(paths)} named")
    ingredients = [read_ingredient(path) for path in paths]
    seen: dict[str, Path] = {}
    for ingredient in ingredients:
        other = seen.setdefault(ingredient.sha256, ingredient.path)
        # by identity: one folder that is named twice has two equal paths
        if other is not ingredient.path:
            raise ValueError(f"{other} and {ingredient.path} are the same weights; name one")
    check_alike(ingredients)
    return ingredients


def check_alike(ingredients: Sequence[Ingredient]) -> None:
    """Check that models can be averaged with the first, before any work is done.

    Raises:
        ValueError: naming two models and what differs.
    """
    warnings = check_classes(ingredients)
    first = ingredients[0]
    for other in ingredients[1:]:
        both = f"{first.path} and {other.path}"
        if changed := first.saved.architecture.difference(other.saved.architecture):
            raise ValueError(f"{both} have different architectures: {'; '.join(changed[:SHOWN])}")
        try:
            require_alike(first.saved.state, other.saved.state)
        except ValueError as error:
            raise ValueError(f"{both}: {error}") from error
    # none of ImageNet's sets holds images of a different one, however it was packed
    own = {str(one.path): [s for s in one.seen if s.name not in BENCHMARKS] for one in ingredients}
    if warning := trained_on.different_splits(own):
        warnings.append(warning)
    for warning in warnings:
        log.warning(warning)


def check_classes(ingredients: Sequence[Ingredient]) -> list[str]:
    """Check that the heads of models have the same classes; return what the user must know."""
    known = best_known(ingredients)
    warnings = []
    for other in ingredients:
        if other is not known:
            pair = (known.saved.classes, str(known.path), other.saved.classes, str(other.path))
            warnings += [*compare(*pair), *compare_prompts(*pair)]
    return warnings


def best_known(ingredients: Sequence[Ingredient]) -> Ingredient:
    """Return the first model whose file has most of its classes: all others are compared with it.

    A list with ids says more than one without, and both more than nothing.
    """
    # max returns the first of equals
    return max(
        ingredients,
        key=lambda one: 0 if one.saved.classes is None else 1 + bool(one.saved.classes.ids),
    )


def shared_seed(ingredients: Sequence[Ingredient]) -> int:
    """Return the seed of all ingredients, 0 if they have several."""
    seeds = {ingredient.seed for ingredient in ingredients}
    return seeds.pop() if len(seeds) == 1 else 0
