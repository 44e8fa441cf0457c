"""A fine-tuned model for use from Python: `rft.load("runs/first").classify(["cat.jpg"])`.

Images are treated like own photos at packing, and forwarded as in `rft.evaluate`, so logits and
probabilities are those of an evaluation. They are equal bit for bit for the same images in the same
order on the same kind of device.

Shapes: N images, B of them in one forward, K classes, E features, G patches along a side.
"""

import logging
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from rft import cli, dist
from rft.classes import Classes
from rft.clip import card, weights
from rft.clip import load as clips
from rft.clip.classifier import Classifier, build_classifier, require_finite
from rft.config import MAX_PIXELS, Device
from rft.device import to_device
from rft.dist import World
from rft.evaluate.count import is_finite
from rft.evaluate.forward import TOGETHER
from rft.evaluate.measure_cam import label_map
from rft.packing.names import has_image_suffix
from rft.predict.images import Picture, Squares, read_squares, require_several
from rft.runs.derived import require_weights
from rft.runs.folder import (
    checkpoint_path,
    read_results,
    require_own_weights,
    run_of,
    unfinished,
)
from rft.storage import files
from rft.text import short

EXPORT = "model"  # the export's folder in the --out of rft photos
MAPS_TOGETHER = 16  # images per forward for relevance, which keeps the graph in memory

log = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """The most probable classes of an image, best first; the tuples have one entry per class."""

    names: tuple[str, ...]
    ids: tuple[str, ...]
    """Folder names such as WordNet ids; the names if a model has no ids."""
    labels: tuple[int, ...]
    """Rows of the head."""
    probabilities: tuple[float, ...]
    temperature: float | None = None
    """Divisor of the logits for the probabilities; None if none was fitted."""

    @property
    def name(self) -> str:
        """The name of the best class."""
        return self.names[0]

    @property
    def probability(self) -> float:
        """The probability of the best class."""
        return self.probabilities[0]

    @property
    def shares(self) -> list[tuple[str, float]]:
        """Name and probability of each class."""
        return list(zip(self.names, self.probabilities, strict=True))


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """A classifier on its device, with its classes and temperature; see `load`.

    The methods with `images` take any number of PIL images, paths or both, and raise a ValueError
    that names the first one that cannot be read.
    """

    where: str
    """The run folder, file or export from which it was loaded."""
    classifier: Classifier
    """In evaluation mode, its weights frozen."""
    classes: Classes
    temperature: float | None
    """Fitted by `rft.evaluate --temperature` on held-out images; None if it was not fitted."""
    device: torch.device
    max_pixels: float = MAX_PIXELS
    """Millions of pixels that an image file may have."""

    def __repr__(self) -> str:
        clip, several = self.classifier.architecture.clip, len(self.classes)
        scale = "" if self.temperature is None else f", temperature {self.temperature:.3g}"
        return f"<rft.Model {self.where}: {clip}, {several:,} classes{scale}, on {self.device}>"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.classes.names

    @property
    def class_ids(self) -> tuple[str, ...]:
        """Ids of the classes, by label; their names if there are no ids."""
        return self.classes.ids or self.classes.names

    @property
    def image_size(self) -> int:
        """Side in pixels of the square that the model sees of an image."""
        return self.classifier.architecture.image_size

    def classify(self, images: Iterable[Picture], top: int = 5) -> list[Prediction]:
        """Predict the `top` most probable classes of each image, N predictions.

        Raises:
            ValueError: for an image that cannot be read, or without finite logits.
        """
        return [
            one
            for squares in self._squares(images)
            for one in self.predictions(self.forward(squares.images_BCHW)[1], top)
        ]

    def logits(self, images: Iterable[Picture]) -> np.ndarray:
        """Compute the logits (N, K), float32, without the temperature; raises as `classify`."""
        found = [self.forward(one.images_BCHW)[1].cpu().numpy() for one in self._squares(images)]
        return np.concatenate([np.empty((0, len(self.classes)), np.float32), *found])

    def features(self, images: Iterable[Picture]) -> np.ndarray:
        """Compute the image tower's features (N, E), float32; raises as `classify`.

        They are projected but not normalised: divide by their norm for cosine similarities.
        """
        found = [self.forward(one.images_BCHW)[0].cpu().numpy() for one in self._squares(images)]
        width = self.classifier.architecture.embed_dim
        return np.concatenate([np.empty((0, width), np.float32), *found])

    def relevance(
        self, images: Iterable[Picture], classes: Sequence[int | str] | None = None
    ) -> np.ndarray:
        """Compute the relevance of each patch for a class, the method's CAM, (N, G, G), float32.

        The largest value of each image is 1. The patches cover the square that the model sees: the
        centre of the image, with the full length of its shorter side.

        Args:
            images: N images.
            classes: for each image a label, or a class's id or name; the predicted one by default.

        Raises:
            ValueError: as `classify`, for an unknown class, or if the number of classes differs
                from that of the images.
        """
        if isinstance(classes, str | int):  # a name's letters would be taken for classes
            raise ValueError(f"{classes!r} is one class; pass a list with a class for each image")
        labels = None if classes is None else torch.tensor([self.label_of(one) for one in classes])
        side = self.image_size // self.classifier.patch_side
        maps, count = [np.empty((0, side, side), np.float32)], 0
        for squares in self._squares(images):
            count += len(squares.numbers)
            # checked per batch, because `images` may be an iterator of unknown length
            if labels is None:
                labels_B = self.forward(squares.images_BCHW)[1].argmax(dim=1)
            else:
                self._require_as_many(labels, count)
                labels_B = labels[squares.numbers]
            maps.append(self.maps(squares.images_BCHW, labels_B))
        if labels is not None:
            self._require_as_many(labels, count, ended=True)
        return np.concatenate(maps)

    def label_of(self, name: int | str) -> int:
        """Find the label of a class by its label, id or name.

        Raises:
            ValueError: if no class matches, or several do: a name may be repeated, or be the id of
                a different class.
        """
        if isinstance(name, str):
            pairs = enumerate(zip(self.class_ids, self.class_names, strict=True))
            labels = [label for label, pair in pairs if name in pair]
            if labels[1:]:
                raise ValueError(
                    f"{self.where}: several classes have the name or id {name!r} (labels "
                    f"{labels[0]} and {labels[1]}); pass a label"
                )
            if labels:
                return labels[0]
            close = get_close_matches(name, [*self.class_ids, *self.class_names], n=1)
            hint = f"did you mean {close[0]!r}?" if close else "pass its label instead"
            raise ValueError(f"{self.where}: no class is named {name!r}; {hint}")
        label = _whole("a class", name)
        if not 0 <= label < len(self.classes):
            raise ValueError(
                f"{self.where}: no class has label {label}; labels go from 0 to "
                f"{len(self.classes) - 1}"
            )
        return label

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features (B, E) and logits (B, K) of squares from `read_squares`, on the device.

        For at most `rft.evaluate.forward.TOGETHER` images they equal an evaluation's.

        Raises:
            ValueError: if a logit is not finite.
        """
        features_BE = self.classifier.features(
            self.classifier.patches(to_device(images_BCHW, self.device))
        )
        logits_BK = self.classifier.logits(features_BE)
        if not is_finite(logits_BK).all():
            raise ValueError(
                f"{self.where}: the logits of an image are NaN or infinite; its training diverged: "
                "use earlier weights"
            )
        return features_BE, logits_BK

    def predictions(self, logits_BK: Tensor, top: int) -> list[Prediction]:
        """List the most probable classes of each row; equal ones are in the order of labels.

        Raises:
            ValueError: if `top` is not a positive whole number, or the temperature leaves no finite
                logits.
        """
        if (top := _whole("top", top)) < 1:
            raise ValueError(f"top is {top}; it must be 1 or more")
        # fp64, as in rft.evaluate
        scaled_BK = logits_BK.double() / (self.temperature or 1.0)
        if not is_finite(scaled_BK).all():
            raise ValueError(f"{self.where}: its temperature, {self.temperature:g}, is not usable")
        order_BT = scaled_BK.sort(dim=1, descending=True, stable=True).indices[:, :top]
        share_BT = scaled_BK.softmax(dim=1).gather(1, order_BT)
        return [
            Prediction(
                tuple(self.class_names[label] for label in labels),
                tuple(self.class_ids[label] for label in labels),
                tuple(labels),
                tuple(shares),
                self.temperature,
            )
            for labels, shares in zip(order_BT.tolist(), share_BT.tolist(), strict=True)
        ]

    def maps(self, images_BCHW: Tensor, labels_B: Tensor) -> np.ndarray:
        """Compute the relevance (B, G, G) of squares from `read_squares`, for their labels."""
        side = self.image_size // self.classifier.patch_side
        parts = zip(images_BCHW.split(MAPS_TOGETHER), labels_B.split(MAPS_TOGETHER), strict=True)
        found = []
        with torch.enable_grad():  # callers may have disabled gradients
            for part in parts:
                # labels may be on the device already
                part_BCHW, part_B = to_device(part[0], self.device), part[1].to(self.device)
                found.append(label_map(self.classifier, part_BCHW, part_B, "relevance"))
        return torch.cat(found).cpu().numpy().reshape(-1, side, side)

    def _squares(self, images: Iterable[Picture]) -> Iterator[Squares]:
        require_several(images)
        return read_squares(images, self.image_size, TOGETHER, max_pixels=self.max_pixels)

    def _require_as_many(self, labels: Tensor, count: int, *, ended: bool = False) -> None:
        if len(labels) < count or (ended and len(labels) > count):
            raise ValueError(f"{len(labels)} classes were given for a different number of images")


def _whole(what: str, value: Any) -> int:
    """Return a whole number of any type, such as NumPy's, as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what} is {short(value)}; it must be a whole number") from None


def load(path: str | Path, *, device: Device = "auto", max_pixels: float = MAX_PIXELS) -> Model:
    """Load a model for use.

    Args:
        path: a run folder (its selected model, or without held-out images its last one), a weights
            file with a classification head, or a folder written by
            `rft convert export --to open-clip`.
        device: auto is a GPU if available.
        max_pixels: millions of pixels that an image file may have.

    Raises:
        ValueError: if `path` holds no model, a file is damaged or does not fit the others, or the
            weights have no head.
    """
    path = require_model(path)
    if device not in (known := get_args(Device)):
        raise cli.unknown("device", str(device), known)
    found, sha256 = _read(path)
    assert found.architecture is not None
    require_finite(path, {**found.visual, **found.head})
    on = dist.pick_device(device, World(rank=0, size=1, local_rank=0))
    classifier = build_classifier({**found.visual, **found.head}, found.architecture)
    return Model(
        where=str(path),
        classifier=classifier.to(on).requires_grad_(False),
        classes=found.classes or _numbered(path, len(found.head["head.weight"])),
        temperature=_temperature(path, sha256),
        device=on,
        max_pixels=max_pixels,
    )


def require_model(name: str | Path) -> Path:
    """Return the path of a model; it may start with `local-dir:`, as in open_clip, or with `~`.

    Raises:
        ValueError: if it is easily mistaken for a model: one of the model hub, an image, or the
            folder above a model; with the likely intention.
    """
    name = str(name)
    if name.startswith(clips.HUB):
        raise ValueError(
            f"{name} is on the model hub; download it: hf download "
            f"{name.removeprefix(clips.HUB)} --local-dir FOLDER, then name FOLDER"
        )
    name = name.removeprefix(weights.LOCAL)
    files.require_local(name, "the model")
    path = Path(name).expanduser()
    if has_image_suffix(path.name) and not path.is_dir():
        raise ValueError(
            f"{path} is an image; name the model first: a run folder, an export or a weights file"
        )
    if not path.is_dir() or checkpoint_path(path).is_file() or weights.is_export(path):
        return path
    # the layout of `rft photos`
    if (path / EXPORT / weights.HUB_CONFIG).is_file():
        raise ValueError(f"{path} is not a model; did you mean {path / EXPORT}?")
    return path


def _read(path: Path) -> tuple[weights.Weights, str]:
    """Read the weights that `path` names, and hash their file."""
    is_export = weights.is_export(path)
    file = path if is_export else checkpoint_path(path)
    if file != path:
        # its error names the command that writes the weights of an average
        require_weights(file)
    found = weights.read(file)
    sha256 = files.sha256_file(found.files[0])
    if not is_export:  # an export's config.json may belong to other software
        require_own_weights(path, sha256=sha256)
        if reached := unfinished(path):
            log.warning(f"{path} has not finished training ({reached})")
    if not found.head:
        raise ValueError(
            f"{path} has no classification head; make a run folder with one for your classes: "
            f"rft convert import {path} --data URL --set SET --out RUN"
        )
    if found.architecture is None:
        raise ValueError(
            f"{path} does not name its architecture; import it into a run folder: "
            f"rft convert import {path} --clip NAME --out RUN"
        )
    clips.require_fit(found, found.architecture)
    if found.config is not None:
        clips.warn_of_resize(str(path), found.config.preprocess_cfg)
    rows = len(found.head["head.weight"])
    if found.classes is not None and len(found.classes) != rows:
        raise ValueError(
            f"{path} is damaged: it names {len(found.classes)} classes, its head has {rows}"
        )
    return found, sha256


def _numbered(path: Path, rows: int) -> Classes:
    log.warning(f"{path} does not name the classes of its head; they are shown as numbers")
    return Classes(names=tuple(f"class {label}" for label in range(rows)))


def _temperature(path: Path, sha256: str) -> float | None:
    """Look up the temperature for weights by their hash, in results or an export's card.

    Raises:
        ValueError: if results.json is damaged, or has several temperatures.
    """
    # a weights file may have its own results, or those of its run folder; an export has none
    places = [] if (path / weights.HUB_CONFIG).is_file() else [path, run_of(path)]
    for place in filter(None, places):
        results = read_results(place)
        if results is not None and results.checkpoint_sha256 == sha256:
            try:
                found = results.temperature
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            if found is not None:
                return found.value
        if results is not None and results.temperature is not None:
            log.warning(
                f"{place} was evaluated with other weights, so its temperature is not used; "
                "evaluate it again with --temperature"
            )
    # the card's hash was compared when the weights were read
    own = card.read(weights.card_path(path))
    return own.temperature if own else None
