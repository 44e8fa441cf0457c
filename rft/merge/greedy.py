"""The greedy soup of training runs, by the held-out images that selected all of them."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rft.classes import check_head
from rft.clip.classifier import build_classifier
from rft.config import Config, load_config
from rft.dist import World
from rft.evaluate.count import count_correct
from rft.loading.batches import plan_training
from rft.loading.dataset import PackedDataset
from rft.merge.ingredients import Ingredient, shared_seed
from rft.method.averaging import Trial, greedy_soup
from rft.runs import filenames, records
from rft.storage import files

Count = Callable[[dict[str, Tensor], str], int]

log = logging.getLogger(__name__)


def shared_split(ingredients: Sequence[Ingredient]) -> Config:
    """Return a configuration whose held-out images are those of all runs.

    Raises:
        ValueError: if one is not a training run, held nothing out, or has another split.
    """
    configs = [_training_config(ingredient) for ingredient in ingredients]
    for ingredient, config in zip(ingredients, configs, strict=True):
        if config.loader.held_out == 0:
            raise ValueError(
                f"{ingredient.path} held no images out that a greedy soup could choose by "
                "(--loader.held-out 0); uniform-soup needs none"
            )
        if changed := files.difference(split_of(configs[0]), split_of(config)):
            raise ValueError(
                f"{ingredients[0].path} and {ingredient.path} were selected by other held-out "
                f"images: {'; '.join(changed)}; train them with the same --train-set, "
                "--loader.held-out and --split-seed (which is --seed if not given)"
            )
    return configs[0]


def _training_config(ingredient: Ingredient) -> Config:
    path = ingredient.path
    if ingredient.config is None:
        raise ValueError(
            f"{path} is not a run folder; a greedy soup needs the {filenames.CONFIG} of each "
            "training run to find its held-out images"
        )
    if not ingredient.is_training_run:
        raise ValueError(
            f"{path} is a merged or imported model; a greedy soup takes training runs, which held "
            "images out"
        )
    return load_config(path)


def split_of(config: Config) -> dict[str, Any]:
    """Return what decides a run's held-out images, by the names of its configuration."""
    return {
        "train_set": config.train_set,
        "split_seed": config.held_out_seed,
        "loader": {"held_out": config.loader.held_out},
    }


def held_out_images(
    packed: PackedDataset, config: Config, ingredients: Sequence[Ingredient]
) -> np.ndarray:
    """Return the sample numbers that all runs were selected by.

    Raises:
        ValueError: if a run was trained on other data, or has a head for other classes.
    """
    for ingredient in ingredients:
        trained_on = _manifest_of(ingredient.path)
        if trained_on and trained_on != packed.manifest.sha256:
            raise ValueError(
                f"{ingredient.path} was trained on other data than {packed.url}: manifest "
                f"{trained_on[:12]}, not {packed.manifest.sha256[:12]}; give its --data"
            )
    for ingredient in ingredients:
        rows = len(ingredient.shapes()["head.weight"])
        where, known = str(ingredient.path), packed.manifest.label_space
        for warning in check_head(ingredient.classes, rows, where, known, packed.url):
            log.warning(warning)
    return plan_training(packed, config)[2]


def _manifest_of(run: Path) -> str | None:
    """Return the hash of the data that a run was trained on, None where it was not kept."""
    training = records.find(run / filenames.TRAINING, records.Training)
    return training.manifest_sha256 if training else None


def soup_config(
    ingredients: Sequence[Ingredient], config: Config, packed: PackedDataset
) -> dict[str, Any]:
    """Return config.json as far as it is known before the soup is made."""
    return {
        "recipe": "greedy-soup",
        "seed": shared_seed(ingredients),
        "merged_from": [ingredient.record() for ingredient in ingredients],
        "manifest_sha256": packed.manifest.sha256,
        **split_of(config),
    }


def counter(
    ingredient: Ingredient,
    packed: PackedDataset,
    held_out: np.ndarray,
    *,
    world: World,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> Count:
    """Return a function that counts on how many held-out images some weights are right.

    It takes the weights and what to call them in a message. All ranks share the work and all of
    them are told. Only one model is on the device at a time.
    """
    model = build_classifier(ingredient.load(), ingredient.architecture).to(device)

    def count(state: dict[str, Tensor], name: str) -> int:
        model.load_state_dict(state)
        (found,) = count_correct(
            [model],
            packed,
            image_size=ingredient.architecture.image_size,
            world=world,
            device=device,
            samples=held_out,
            batch_size=batch_size,
            workers=workers,
            names=[name],
        )
        return found.correct

    return count


def make_soup(
    ingredients: Sequence[Ingredient], count: Count, total: int, tell: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the soup and its part of config.json; `tell` gets a line about each model and step.

    The ingredients are counted again and not looked up in their metrics.jsonl: the same code on the
    same device then counts the soups, and a strict comparison is fair.
    """
    alone = []
    for ingredient in ingredients:
        alone.append(count(ingredient.load(), str(ingredient.path)))
        tell(f"{ingredient.path}: {alone[-1]} of {total} held-out images")

    def tell_trial(trial: Trial) -> None:
        verdict = "kept" if trial.kept else "left out"
        tell(f"soup with {ingredients[trial.model].path}: {int(trial.score)}, {verdict}")

    def count_soup(state: dict[str, Tensor]) -> int:
        return count(state, "the soup")

    state, trials = greedy_soup(alone, lambda n: ingredients[n].load(), count_soup, tell_trial)
    return state, {
        "correct": int(max(trial.score for trial in trials)),
        "total": total,
        "steps": [
            {
                **ingredients[trial.model].record(),
                "correct": alone[trial.model],
                "soup_correct": int(trial.score),
                "kept": trial.kept,
            }
            for trial in trials
        ],
    }
