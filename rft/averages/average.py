"""WiSE-FT models, soups and Model Stock as data: ingredients, and content of their run folders.

`rft.merge` writes their weights; `rft.evaluate` evaluates them without writing weights. Both take
names, configuration and header from here, so that their folders are alike. Only `states` reads
weights.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rft import recipes
from rft.averages.ingredients import (
    EndWeights,
    Ingredient,
    best_known,
    check_alike,
    read_end,
    read_ingredient,
    read_soup,
    shared_seed,
)
from rft.clip.classifier import Saved
from rft.method import averaging
from rft.runs import trained_on

Parts = Literal["all", "tower"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Average:
    """A model that is an average of others."""

    models: Sequence[Ingredient]
    config: dict[str, Any]
    """Its config.json."""
    origin: Mapping[str, str]
    """Metadata that its weights inherit, such as the step."""

    @property
    def name(self) -> str:
        """Name of its recipe, and of its run folder if several share a parent."""
        return self.config["recipe"]

    @property
    def classes_of(self) -> Ingredient:
        """The model from which it takes the classes."""
        return best_known(self.models)

    def saved(self, state: dict[str, Tensor]) -> Saved:
        """Make the content of its weights file with the tensors `state`."""
        # an image seen by any of the models must not test their average
        seen = trained_on.entries(set().union(*(model.seen for model in self.models)))
        metadata = {**self.origin, **seen, "recipe": self.name}
        architecture = self.models[0].saved.architecture
        return Saved(state, architecture, metadata, self.classes_of.saved.classes)


def wise(
    start_path: Path,
    end_path: Path,
    alphas: Sequence[float],
    end_weights: EndWeights,
    option: str,
    parts: Parts = "all",
) -> list[Average]:
    """Describe the WiSE-FT models between two ends: (1 - alpha) x START + alpha x END.

    `option` is the name of the option with the alphas, for messages. With `parts` "tower", only the
    image tower is interpolated and the head is END's, so that alpha 1 is END itself.

    Raises:
        ValueError: if an alpha is not in [0, 1] or named twice, or the ends cannot be averaged or
            are swapped.
    """
    _check_alphas(alphas, option)
    start, end = read_ingredient(start_path), read_end(end_path, end_weights)
    check_alike([start, end])
    check_ends(start, end)
    family = _family(end.recipe, parts)
    return [
        Average(
            models=(start, end),
            config={
                "recipe": f"{family}-{alpha:g}",
                "seed": end.seed,
                "alpha": alpha,
                # not recorded for all parts, as before this option existed
                **({} if parts == "all" else {"parts": parts}),
                # recorded, because a run's best and last weights make different models
                "end_weights": end_weights if end_path.is_dir() else "file",
                "merged_from": [start.record(), end.record()],
            },
            origin=end.saved.metadata,
        )
        for alpha in alphas
    ]


def _family(end: str, parts: Parts) -> str:
    """Name a WiSE family: wise-ft, wise-RECIPE, wise-tower, wise-tower-RECIPE."""
    known = end in ("", "vanilla")  # the name WiSE-FT is used for vanilla
    if parts == "all":
        return "wise-ft" if known else f"wise-{end}"
    return "wise-tower" if known else f"wise-tower-{end}"


def _check_alphas(alphas: Sequence[float], option: str) -> None:
    """Check that each alpha is in [0, 1] and gives a distinct model name."""
    if not alphas:
        raise ValueError(f"{option} needs at least one value in [0, 1]")
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ValueError(f"{option} is {alpha}; it must be in [0, 1]")
    # formatted as in the recipe's name, which is also the folder's
    names = [f"{alpha:g}" for alpha in alphas]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{option} has {twice[0]} twice (rounded to six digits); name each value once"
        )


# names of the two ends on a merge's command line; an ensemble's has other names
ENDS = ("START", "END")


def check_ends(start: Ingredient, end: Ingredient, names: tuple[str, str] = ENDS) -> None:
    """Check that the ends of a merge or ensemble are not swapped: trained first, untrained last."""
    if start.steps > 0 and _is_untrained(end):
        raise ValueError(
            f"{start.path} was trained for {start.steps} steps and {end.path} for none: {names[0]} "
            f"is the zero-shot model, {names[1]} the fine-tuned one; swap the two"
        )


def warn_of_ends(start: Ingredient, *ends: Ingredient, names: tuple[str, str] = ENDS) -> None:
    """Warn if START is trained, or an END is not."""
    if start.steps > 0:
        log.warning(
            f"{names[0]} {start.path} is not a zero-shot model: it was trained "
            f"({start.steps} steps)"
        )
    for end in filter(_is_untrained, ends):
        log.warning(
            f"{names[1]} {end.path} is not a fine-tuned model: it was not trained (0 steps)"
        )


def _is_untrained(end: Ingredient) -> bool:
    # step 0 of an imported model means nothing, because other code may have trained it
    training_file = end.config is None and end.recipe in recipes.TRAINED
    return end.steps == 0 and (end.is_training_run or training_file)


def uniform_soup(paths: Sequence[Path]) -> Average:
    """Describe the mean of models.

    Raises:
        ValueError: if there are fewer than two, one is named twice, or they do not match.
    """
    models = read_soup(paths)
    config = {
        "recipe": "uniform-soup",
        "seed": shared_seed(models),
        "merged_from": [model.record() for model in models],
    }
    return Average(models, config, soup_metadata(models))


def model_stock(start_path: Path, paths: Sequence[Path]) -> Average:
    """Describe the Model Stock of fine-tuned models around their common start.

    Raises:
        ValueError: if there are fewer than two fine-tuned models, one is named twice, or they and
            the start do not match.
    """
    if len(paths) < 2:
        raise ValueError(
            f"a Model Stock needs START and at least two fine-tuned models, {len(paths)} named "
            "after START"
        )
    start = read_ingredient(start_path)
    models = read_soup(paths)
    for model in models:
        if model.sha256 == start.sha256:
            raise ValueError(
                f"{start.path} and {model.path} are the same weights; START is the zero-shot model"
            )
        check_ends(start, model)
    check_alike([start, *models])
    config = {
        "recipe": "model-stock",
        "seed": shared_seed(models),
        "merged_from": [start.record(), *(model.record() for model in models)],
    }
    return Average([start, *models], config, soup_metadata(models))


def soup_metadata(models: Sequence[Ingredient]) -> dict[str, str]:
    """Make the metadata of a soup's weights, with the steps of the longest run."""
    return {"step": str(max(model.steps for model in models))}


def states(averages: Iterable[Average]) -> Iterator[dict[str, Tensor]]:
    """Yield the weights of WiSE models, uniform soups and Model Stock, one by one.

    Ends are read once for consecutive WiSE models of the same ends, a soup's models one by one. A
    Model Stock's configuration is completed with the ratio of each tensor before its weights are
    yielded.

    Raises:
        ValueError: if a weight of an ingredient is not finite.
    """
    for _, group in groupby(averages, key=lambda one: [model.sha256 for model in one.models]):
        ends: list[dict[str, Tensor]] = []
        for one in group:
            alpha = one.config.get("alpha")
            if one.name == "model-stock":
                start, *models = one.models
                state, ratios = averaging.model_stock(
                    start.load(), (model.load() for model in models)
                )
                one.config["stock"] = {"ratios": ratios}
                yield state
                continue
            if alpha is None:
                yield averaging.uniform_soup(model.load() for model in one.models)
                continue
            ends = ends or [model.load() for model in one.models]
            tower = one.config.get("parts") == "tower"
            mix = averaging.interpolate_tower if tower else averaging.interpolate
            yield mix(ends[0], ends[1], alpha)
