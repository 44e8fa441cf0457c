"""Ingredients of averages, each a run folder or a weights file."""

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
    """One model to average: its location and origin."""

    path: Path
    """The run folder or weights file named by the user."""
    weights: Path
    sha256: str
    config: RunConfig | None
    """The run folder's config.json; None for a weights file."""
    saved: Saved
    """Content of the weights file: its header, and its tensors mapped without reading them."""

    @property
    def recipe(self) -> str:
        """Name of the recipe, empty if unknown."""
        return self.config.recipe if self.config else self.saved.metadata.get("recipe", "")

    @property
    def seed(self) -> int:
        """Seed of the run, 0 for a weights file."""
        return self.config.seed if self.config else 0

    @property
    def is_training_run(self) -> bool:
        """Whether it is a run folder of rft.train: not merged, imported or only a weights file."""
        return self.config is not None and self.config.is_training

    def load(self) -> dict[str, Tensor]:
        """Read the weights.

        Raises:
            ValueError: if one is not finite.
        """
        return load_state(self.weights).state

    @property
    def steps(self) -> int:
        """Optimizer steps between the start of the run and these weights."""
        return int(self.saved.metadata["step"])

    @property
    def seen(self) -> frozenset[TrainedOn]:
        """Sets that it is known to have been trained on."""
        return trained_on.of_model(self.path, self.saved.metadata)

    def record(self) -> dict[str, Any]:
        """Identify the model in a merged model's config.json."""
        return {"path": str(self.path), "sha256": self.sha256}


def read_ingredient(path: Path, weights: Path = SELECTED) -> Ingredient:
    """Read the ingredient at `path`; `weights` selects a file in a run folder.

    Raises:
        ValueError: if it does not exist, is an unfinished run, or the weights in a run folder
            belong to a different run.
    """
    config = records.find_config(path)
    if config and (reached := unfinished(path)):
        raise ValueError(
            f"{path} has not finished training ({reached}); resume it first, or name one of its "
            f"{filenames.CHECKPOINTS}/*.safetensors"
        )
    file = path / weights if path.is_dir() else path
    # a weights file named directly is accepted with a warning
    if reached := unfinished(file):
        log.warning(f"{file} belongs to a run that has not finished training ({reached})")
    # first, because it refuses a damaged file before the full file is hashed
    saved = map_state(file)
    sha256 = files.sha256_file(file)
    require_own_weights(path, file, sha256)
    return Ingredient(path, file, sha256, config, saved)


def read_end(path: Path, weights: EndWeights) -> Ingredient:
    """Read the fine-tuned end of WiSE, with its selected weights or those of the last step.

    Raises:
        ValueError: as for `read_ingredient`, or if the last weights of anything but a run folder
            are requested, or they were not kept.
    """
    if weights == "best":
        return read_ingredient(path)
    if not path.is_dir():
        raise ValueError(f"--end-weights last needs a run folder, but {path} is not a folder")
    if not (path / LAST).is_file():
        raise ValueError(f"{path} did not keep its last weights ({LAST}); use --end-weights best")
    return read_ingredient(path, LAST)


def read_soup(paths: Sequence[Path]) -> list[Ingredient]:
    """Read the ingredients of a soup.

    Raises:
        ValueError: if there are fewer than two, one is named twice, or they do not match.
    """
    if len(paths) < 2:
        raise ValueError(f"a soup needs at least two models, {len(paths)} named")
    ingredients = [read_ingredient(path) for path in paths]
    seen: dict[str, Path] = {}
    for ingredient in ingredients:
        other = seen.setdefault(ingredient.sha256, ingredient.path)
        # by identity, because one folder named twice has two equal paths
        if other is not ingredient.path:
            raise ValueError(f"{other} and {ingredient.path} are the same weights; name one")
    check_alike(ingredients)
    return ingredients


def check_alike(ingredients: Sequence[Ingredient]) -> None:
    """Check that models can be averaged with the first, before any work.

    Raises:
        ValueError: naming two models and their difference.
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
    # ImageNet's sets do not share images, however they were packed
    own = {str(one.path): [s for s in one.seen if s.name not in BENCHMARKS] for one in ingredients}
    if warning := trained_on.different_splits(own):
        warnings.append(warning)
    for warning in warnings:
        log.warning(warning)


def check_classes(ingredients: Sequence[Ingredient]) -> list[str]:
    """Check that the heads of models have the same classes; return warnings for the user."""
    known = best_known(ingredients)
    warnings = []
    for other in ingredients:
        if other is not known:
            pair = (known.saved.classes, str(known.path), other.saved.classes, str(other.path))
            warnings += [*compare(*pair), *compare_prompts(*pair)]
    return warnings


def best_known(ingredients: Sequence[Ingredient]) -> Ingredient:
    """Choose the model with the most complete class list, with which all others are compared.

    A list with ids is more complete than one without, and any list than none.
    """
    # max returns the first of equals
    return max(
        ingredients,
        key=lambda one: 0 if one.saved.classes is None else 1 + bool(one.saved.classes.ids),
    )


def shared_seed(ingredients: Sequence[Ingredient]) -> int:
    """Find the common seed of all ingredients; 0 if they differ."""
    seeds = {ingredient.seed for ingredient in ingredients}
    return seeds.pop() if len(seeds) == 1 else 0
