"""Reads and checks a run's gallery.npz, for `rft.train`, which writes it, and for the report.

Every array has a required type, shape and range. The limits here also bound the cost of drawing
the picture. No torch.

Shapes: B images, C H W channels and pixels, P = G * G patches in row-major order, S steps.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rft.runs.records import Recipe
from rft.storage import files
from rft.storage.arrays import read_npz
from rft.storage.documents import Text, convert

BYTES = 2**26  # of all arrays; `rft.train` writes a few megabytes
IMAGES = 16  # `rft.train` writes 8
COLUMNS = 24  # donor maps; `rft.train` writes one for each of 9 recipes
STEPS = 12  # frames of the training; `rft.train` keeps 9
SIDE = 512  # pixels, the input size of open_clip's largest model
STRENGTH = 1e6  # of relevance; an image's maximum is 1, and bicubic resizing must not overflow
DROP = -1
DONOR = "donor/"


@dataclass(frozen=True)
class Frames:
    """The model's maps and masks of the images at some steps of its training."""

    steps_S: np.ndarray
    """Steps done, int64, ascending."""
    relevance_SBP: np.ndarray
    """Normalised map of the run's own kind of CAM, float32."""
    masked_SBP: np.ndarray | None = None
    """The run's masks, bool; None if they are random."""

    def columns(self) -> dict[str, np.ndarray]:
        """Map the names of the arrays in a file to the arrays."""
        return {name: column for name, column in vars(self).items() if column is not None}


@dataclass(frozen=True)
class Gallery:
    """A checked gallery.npz."""

    images_BHWC: np.ndarray
    names: tuple[str, ...]
    """Class of each image; any text."""
    relevance_BP: np.ndarray
    patch: int
    donors: dict[str, np.ndarray]
    """Recipe -> donor map, int64 (B, P)."""
    frames: Frames | None
    """None in files of an older rft, which kept none."""


def read(path: Path) -> Gallery:
    """Read a gallery.npz.

    Raises:
        ValueError: if it is not a gallery, naming the array that is wrong.
    """
    try:
        return check(_arrays(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a gallery of rft.train: {error}") from error


def read_frames(path: Path, batch: int, patches: int) -> Frames | None:
    """Read the frames of `batch` images in a gallery.npz or frames.npz; None if it has none.

    Raises:
        ValueError: if the frames are malformed, naming the array that is wrong.
    """
    try:
        return _frames(_arrays(path), (batch, patches))
    except ValueError as error:
        raise ValueError(f"{path} has no frames of this run: {error}") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return read_npz(files.read_bytes(str(path), BYTES), BYTES)


def check(arrays: Mapping[str, np.ndarray]) -> Gallery:
    """Check the arrays of a gallery.npz and make a `Gallery` of them; unknown arrays are ignored.

    Raises:
        ValueError: naming the array that is missing, or has a wrong type, shape or range.
    """
    donors = [name for name in arrays if name.startswith(DONOR)]
    if len(donors) > COLUMNS:
        raise ValueError(f"it has {len(donors)} donor maps; it may have {COLUMNS}")
    # also checked in read_npz; here for a training, which checks its arrays before it writes them
    if (size := sum(array.nbytes for array in arrays.values())) > BYTES:
        raise ValueError(f"its arrays have {size:,} bytes; they may have {BYTES:,}")
    images_BCHW = _array(arrays, "images_BCHW", "u", (None, 3, None, None))
    batch, _, height, width = images_BCHW.shape
    # "u" is any unsigned integer type
    if images_BCHW.dtype != np.uint8 or height != width:
        raise ValueError("images_BCHW must be square and of type uint8")
    if not (1 <= batch <= IMAGES and 1 <= height <= SIDE):
        found = f"{batch} images of {height} pixels a side"
        raise ValueError(f"images_BCHW is {found}; it may be 1 to {IMAGES} of 1 to {SIDE}")
    # item: a Python integer, which does not overflow below
    patch = _array(arrays, "patch", "iu", ()).item()
    if patch < 1 or height % patch:
        raise ValueError(f"patch is {patch}, which does not divide {height} x {width} pixels")
    shape = (batch, (height // patch) ** 2)
    relevance_BP = _relevance(arrays, "relevance_BP", shape)
    class_names = _array(arrays, "class_names", "U", (None,))
    labels_B = _array(arrays, "labels_B", "iu", (batch,), range(len(class_names)))
    # a slice, because numpy fails on a scalar text with code points outside Unicode
    names = tuple(_text(class_names[label : label + 1]) for label in labels_B.tolist())
    donor_maps = {}
    for name in donors:
        recipe = convert(name.removeprefix(DONOR), Recipe, "the name of a donor map")
        # the range is checked first: int64 would make a large unsigned number negative
        donor_BP = _array(arrays, name, "iu", shape, range(DROP, batch))
        donor_maps[recipe] = donor_BP.astype(np.int64)
    return Gallery(
        images_BHWC=images_BCHW.transpose(0, 2, 3, 1),
        names=names,
        relevance_BP=relevance_BP,
        patch=patch,
        donors=donor_maps,
        frames=_frames(arrays, shape),
    )


def _frames(arrays: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Frames | None:
    """Check the frames among the arrays, each of `shape`; None if there are none."""
    if not any(field.name in arrays for field in dataclasses.fields(Frames)):
        return None
    steps_S = _array(arrays, "steps_S", "iu", (None,), range(2**53))
    if not 1 <= len(steps_S) <= STEPS or (steps_S[1:] <= steps_S[:-1]).any():
        raise ValueError(f"steps_S must be 1 to {STEPS} ascending steps")
    found = {
        "steps_S": steps_S.astype(np.int64),
        "relevance_SBP": _relevance(arrays, "relevance_SBP", (len(steps_S), *shape)),
    }
    if "masked_SBP" in arrays:
        found["masked_SBP"] = _array(arrays, "masked_SBP", "b", (len(steps_S), *shape))
    return Frames(**found)


def _relevance(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    # float64 values beyond float32 become infinite, which the check below refuses
    with np.errstate(over="ignore"):
        relevance = _array(arrays, name, "f", shape).astype(np.float32)
    # `not` around the comparison, so that NaN fails it
    if not (relevance.min() >= -STRENGTH and relevance.max() <= STRENGTH):
        raise ValueError(f"{name} must be finite, from {-STRENGTH:,.0f} to {STRENGTH:,.0f}")
    return relevance


def _array(
    arrays: Mapping[str, np.ndarray],
    name: str,
    kinds: str,
    shape: tuple[int | None, ...],
    numbers: range | None = None,
) -> np.ndarray:
    """Check one array: `kinds` are numpy's type letters, None is any length, or any numbers."""
    if name not in arrays:
        raise ValueError(f"{name} is missing")
    array = arrays[name]
    if array.dtype.kind not in kinds:
        words = {"u": "uint8", "f": "floating-point", "U": "texts", "b": "true or false"}
        wanted = words.get(kinds, "whole numbers")
        raise ValueError(f"{name} is of type {array.dtype}; it must be {wanted}")
    if array.ndim != len(shape) or any(
        wanted not in (None, found) for found, wanted in zip(array.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} has shape {array.shape}; it must be ({wanted})")
    if (
        numbers is not None
        and array.size
        and (array.min() < numbers.start or array.max() >= numbers.stop)
    ):
        raise ValueError(f"{name} must be from {numbers.start} to {numbers.stop - 1}")
    return array


def _text(name_1: np.ndarray) -> str:
    # numpy stores code points outside Unicode, and fails to convert some of them
    try:
        text = name_1.tobytes().decode("utf-32-le")
    except UnicodeDecodeError as error:
        raise ValueError("class_names has characters that are not Unicode") from error
    # numpy pads texts with zeros
    return convert(text.rstrip("\0"), Text, "class_names")
