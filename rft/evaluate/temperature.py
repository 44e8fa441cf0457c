"""The temperature that makes a model's confidences match its accuracy, from held-out images.

It is fitted on images that the model was not trained on and that are no test images: those that its
training held out to select the checkpoint. Weights carry which images these are
(`rft.runs.trained_on`), through merges too.
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
    """Return which images may set the temperature of a model with weights of such metadata.

    Raises:
        ValueError: if there are none.
    """
    # whatever was trained on, what was held out is new to the model
    seen = {found._replace(shots=0) for found in of_model(path, metadata)}
    if not seen:
        return _of_untrained(path)
    if len(seen) > 1:
        raise ValueError(
            "its trainings held different images out, so none of them is new to it; train its "
            "models with one --split-seed"
        )
    (found,) = seen
    if found.held_out == 0:
        raise ValueError(
            "its training held no images out (--loader.held-out 0), or was one of an older rft"
        )
    return found


def _of_untrained(path: Path) -> TrainedOn:
    """Return what the run of a model that saw no image holds out: a zero-shot run has a split."""
    config = records.find_config(path)
    training = records.find(path / filenames.TRAINING, records.Training)
    if config is None or not config.is_training or not training or not training.manifest_sha256:
        raise ValueError("it is not a run of rft.train, so it names no held-out images")
    own = load_config(path)
    if own.loader.held_out == 0:
        raise ValueError("its run holds no images out (--loader.held-out 0)")
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
    """Fit the temperature of each model, in one pass for those with the same held-out images.

    For a model that has no such images, or that no temperature fits best, the reason; the same on
    every rank.

    Raises:
        ValueError: if a training set is absent below `data`, has other images than the model's, or
            holds an image of an OOD test set.
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

    As `fit_temperatures`, but the images need not be those that a model's own training held out.

    Raises:
        ValueError: if the training set is absent below `data`, has other images than the split's,
            or holds an image of an OOD test set.
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
        split: what the model has seen.
        path: the model, for messages.
        data: the data root.
        max_pixels: millions of pixels that an image may have.
        otherwise: what else the user may do, for messages.

    Raises:
        ValueError: if the set is absent below `data`, has other images than the split's, or holds
            an image of an OOD test set.
    """
    url = files.join(data, split.name)
    packed = PackedDataset(url, max_pixels=max_pixels)
    if packed.manifest.sha256 != split.manifest_sha256:
        raise ValueError(
            f"{path} held images of a different {split.name} out (manifest "
            f"{split.manifest_sha256[:12]}) than {url} has ({packed.manifest.sha256[:12]}); "
            f"name its --data, or {otherwise}"
        )
    require_no_test_images(data, split.name, packed.manifest, packed.index.key)
    return packed


def _fit(logits_NK: np.ndarray | None, label_N: np.ndarray) -> float | str | None:
    """Return the temperature, or why there is none; None on ranks that have no logits."""
    if logits_NK is None:
        return None
    try:
        return calibration.fit_temperature(logits_NK, label_N)
    except ValueError as error:
        return str(error)
