"""The greedy soup of training runs, by the held-out images that selected all of them."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rft.averages.ingredients import Ingredient, shared_seed
from rft.classes import check_head
from rft.clip.classifier import build_classifier
from rft.config import Config, load_config
from rft.dist import World
from rft.evaluate.count import count_correct
from rft.loading.batches import plan_training
from rft.loading.dataset import PackedDataset
from rft.method.averaging import Trial, greedy_soup
from rft.runs import filenames, records
from rft.storage import files

log = logging.getLogger(__name__)


def shared_split(ingredients: Sequence[Ingredient]) -> Config:
    """Find the configuration of the held-out images that all runs share.

    Raises:
        ValueError: if one is not a training run, held out nothing, or has a different split.
    """
    configs = [_training_config(ingredient) for ingredient in ingredients]
    for ingredient, config in zip(ingredients, configs, strict=True):
        if config.loader.held_out == 0:
            raise ValueError(f"{ingredient.path} held out no images (--loader.held-out 0)")
        if changed := files.difference(_split_of(configs[0]), _split_of(config)):
            raise ValueError(
                f"{ingredients[0].path} and {ingredient.path} were selected by different held-out "
                f"images: {'; '.join(changed)}; train them with the same --train-set, "
                "--loader.held-out and --split-seed (which is --seed if not given)"
            )
    return configs[0]


def _training_config(ingredient: Ingredient) -> Config:
    path = ingredient.path
    if ingredient.config is None:
        raise ValueError(
            f"{path} is not a run folder; only the {filenames.CONFIG} of a training run records "
            "the held-out images"
        )
    if not ingredient.is_training_run:
        raise ValueError(
            f"{path} is a merged or imported model; only training runs hold out images"
        )
    return load_config(path)


def _split_of(config: Config) -> dict[str, Any]:
    """Extract the options that decide a run's held-out images, as named in its configuration."""
    return {
        "train_set": config.train_set,
        "split_seed": config.held_out_seed,
        "loader": {"held_out": config.loader.held_out},
    }


def held_out_images(
    packed: PackedDataset, config: Config, ingredients: Sequence[Ingredient]
) -> np.ndarray:
    """Find the sample numbers that selected all runs.

    Raises:
        ValueError: if a run was trained on other data, or has a head for other classes.
    """
    for ingredient in ingredients:
        training = records.find(ingredient.path / filenames.TRAINING, records.Training)
        trained_on = training.manifest_sha256 if training else None  # not recorded by older runs
        if trained_on and trained_on != packed.manifest.sha256:
            raise ValueError(
                f"{ingredient.path} was trained on other data than {packed.url}: manifest "
                f"{trained_on[:12]}, not {packed.manifest.sha256[:12]}; name its data with --data"
            )
    for ingredient in ingredients:
        rows = len(ingredient.saved.state["head.weight"])
        where, known = str(ingredient.path), packed.manifest.label_space
        for warning in check_head(ingredient.saved.classes, rows, where, known, packed.url):
            log.warning(warning)
    # by the trainer's own function, to get the same split that selected the runs
    return plan_training(packed, config)[2]


def soup_config(
    ingredients: Sequence[Ingredient], config: Config, packed: PackedDataset
) -> dict[str, Any]:
    """Make config.json as far as it is known before the soup."""
    return {
        "recipe": "greedy-soup",
        "seed": shared_seed(ingredients),
        "merged_from": [ingredient.record() for ingredient in ingredients],
        "manifest_sha256": packed.manifest.sha256,
        **_split_of(config),
    }


def make_soup(
    runs: Sequence[Ingredient],
    packed: PackedDataset,
    held_out: np.ndarray,
    *,
    world: World,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make the soup, and its part of config.json; the main rank prints each model and step.

    The runs are evaluated again instead of read from their metrics.jsonl, so that the same code on
    the same device counts runs and soups and a strict comparison is fair. All ranks share the work,
    and each gets the counts. Only one model is on the device at a time.
    """
    architecture = runs[0].saved.architecture
    # its weights are replaced for each evaluation
    model = build_classifier(runs[0].load(), architecture).to(device)

    def count(state: dict[str, Tensor], name: str) -> int:
        model.load_state_dict(state)
        (found,) = count_correct(
            [model],
            packed,
            image_size=architecture.image_size,
            world=world,
            device=device,
            samples=held_out,
            batch_size=batch_size,
            workers=workers,
            names=[name],
        )
        return found.correct

    def tell(line: str) -> None:
        if world.is_main:
            print(line, flush=True)

    def tell_trial(trial: Trial) -> None:
        verdict = "kept" if trial.kept else "left out"
        tell(f"soup with {runs[trial.model].path}: {int(trial.score)}, {verdict}")

    alone = []
    for run in runs:
        alone.append(count(run.load(), str(run.path)))
        tell(f"{run.path}: {alone[-1]} of {len(held_out)} held-out images")
    state, trials = greedy_soup(
        alone,
        lambda number: runs[number].load(),
        lambda state: count(state, "the soup"),
        tell_trial,
    )
    return state, _record(runs, alone, trials, len(held_out))


def _record(
    runs: Sequence[Ingredient], alone: Sequence[int], trials: Sequence[Trial], total: int
) -> dict[str, Any]:
    return {
        "correct": int(max(trial.score for trial in trials)),
        "total": total,
        "steps": [
            {
                **runs[trial.model].record(),
                "correct": alone[trial.model],
                "soup_correct": int(trial.score),
                "kept": trial.kept,
            }
            for trial in trials
        ],
    }
