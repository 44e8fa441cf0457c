"""Fits the temperature that makes a model's confidences match its accuracy, on held-out images.

The images must be neither training nor test images, so they are those that the model's training
held out to select the checkpoint. The weights record which images these are
(`rft.runs.trained_on`), also after a merge.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from rft import dist
from rft.clip.classifier import Classifier
from rft.config import load_config
from rft.dist import World
from rft.evaluate.checkpoints import Loaded
from rft.evaluate.count import predict
from rft.loading.dataset import PackedDataset
from rft.loading.split import held_out_split
from rft.runs import filenames, records
from rft.runs.records import Temperature
from rft.runs.trained_on import TrainedOn, of_model
from rft.shards.guard import require_no_test_images
from rft.statistics import calibration
from rft.storage import files


def held_out_of(path: Path, metadata: Mapping[str, str]) -> TrainedOn:
    """Find the held-out images of a model, from its folder and the metadata of its weights.

    Raises:
        ValueError: if there are none.
    """
    # held-out images are new to the model, whatever its number of shots
    seen = {found._replace(shots=0) for found in of_model(path, metadata)}
    if not seen:
        return _of_untrained(path)
    if len(seen) > 1:
        raise ValueError(
            "its trainings held out different images, so none is new to the model; train all of "
            "them with the same --split-seed"
        )
    (found,) = seen
    if found.held_out == 0:
        raise ValueError(
            "its training held out no images (--loader.held-out 0), or ran with an older rft"
        )
    return found


def _of_untrained(path: Path) -> TrainedOn:
    """Find the split in the configuration of a zero-shot run, whose model has seen no image."""
    config = records.find_config(path)
    training = records.find(path / filenames.TRAINING, records.Training)
    if config is None or not config.is_training or not training or not training.manifest_sha256:
        raise ValueError("it is not a run of rft.train, so it names no held-out images")
    own = load_config(path)
    if own.loader.held_out == 0:
        raise ValueError("its run holds out no images (--loader.held-out 0)")
    return TrainedOn(
        own.train_set, training.manifest_sha256, own.loader.held_out, own.held_out_seed
    )


def fit_temperatures(
    loaded: Sequence[Loaded],
    models: Sequence[Classifier],
    data: str,
    *,
    max_pixels: float,
    world: World,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> list[Temperature | str]:
    """Fit the temperature of each model, in one pass for models with the same held-out images.

    The result is a reason instead, if a model has no such images or no temperature fits best. It is
    the same on every rank.

    Raises:
        ValueError: if a training set is missing below `data`, is not the one of the model, or
            contains an image of an OOD test set.
    """
    splits: dict[TrainedOn, list[int]] = {}
    found: list[Temperature | str] = [""] * len(models)
    for number, one in enumerate(loaded):
        try:
            splits.setdefault(held_out_of(one.path, one.saved.metadata), []).append(number)
        except ValueError as error:
            found[number] = str(error)
    for split, numbers in splits.items():
        fitted = fit_on(
            split,
            [loaded[number] for number in numbers],
            [models[number] for number in numbers],
            data,
            max_pixels=max_pixels,
            world=world,
            device=device,
            batch_size=batch_size,
            workers=workers,
        )
        for number, one in zip(numbers, fitted, strict=True):
            found[number] = one
    return found


def fit_on(
    split: TrainedOn,
    loaded: Sequence[Loaded],
    models: Sequence[Classifier],
    data: str,
    *,
    max_pixels: float,
    world: World,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> list[Temperature | str]:
    """Fit the temperature of each model on the held-out images of one split, in one pass.

    Like `fit_temperatures`, but the split need not be that of a model's own training.

    Raises:
        ValueError: if the training set is missing below `data`, is not the one of the split, or
            contains an image of an OOD test set.
    """
    packed = training_set(split, loaded[0].path, data, max_pixels, "leave --temperature out")
    index = packed.index
    _, samples = held_out_split(index.key, index.label, split.held_out, split.split_seed)
    predicted = predict(
        models,
        packed,
        image_size=models[0].architecture.image_size,
        world=world,
        device=device,
        samples=samples,
        batch_size=batch_size,
        workers=workers,
        names=[str(one.path) for one in loaded],
        logits=np.float32,
    )
    label_N = index.label[samples]
    found: list[Temperature | str] = []
    for one in predicted:
        value = dist.from_main(world, _fit(one.logits_NK, label_N))
        if not isinstance(value, str):
            value = Temperature(
                value=value,
                images=len(samples),
                train_set=split.name,
                manifest_sha256=split.manifest_sha256,
                held_out=split.held_out,
                split_seed=split.split_seed,
            )
        found.append(value)
    return found


def training_set(
    split: TrainedOn, path: Path, data: str, max_pixels: float, otherwise: str
) -> PackedDataset:
    """Open the packed set that a model was trained on.

    Args:
        split: the record of the set.
        path: the model, for messages.
        data: the data root.
        max_pixels: limit of an image, in millions of pixels.
        otherwise: an alternative for the user, for messages.

    Raises:
        ValueError: if the set is missing below `data`, is not the one of the split, or contains an
            image of an OOD test set.
    """
    url = files.join(data, split.name)
    packed = PackedDataset(url, max_pixels=max_pixels)
    if packed.manifest.sha256 != split.manifest_sha256:
        raise ValueError(
            f"{path} held out images of a different {split.name} (manifest "
            f"{split.manifest_sha256[:12]}) than {url} ({packed.manifest.sha256[:12]}); "
            f"name its --data, or {otherwise}"
        )
    require_no_test_images(data, split.name, packed.manifest, packed.index.key)
    return packed


def _fit(logits_NK: np.ndarray | None, label_N: np.ndarray) -> float | str | None:
    """Fit the temperature, or return the reason for none; None on ranks without logits."""
    if logits_NK is None:
        return None
    try:
        return calibration.fit_temperature(logits_NK, label_N)
    except ValueError as error:
        return str(error)
