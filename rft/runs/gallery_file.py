"""A run's gallery.npz, checked: `rft.train` writes no other, and the report draws no other.

Each array has a type, a shape and a range, and what the picture of them costs follows from the
limits here. No torch.

Shapes: B images, C H W channels and pixels, P = G * G patches in row-major order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rft.runs.records import Recipe
from rft.storage import files
from rft.storage.arrays import read_npz
from rft.storage.documents import Text, convert

BYTES = 2**26  # of all arrays; `rft.train` writes some megabytes
IMAGES = 16  # `rft.train` writes 8
COLUMNS = 24  # donor maps; `rft.train` writes one for each of 9 recipes
SIDE = 512  # pixels, as open_clip's largest model has
STRENGTH = 1e6  # of relevance; an image's maximum is 1, and bicubic resizing must not overflow
DROP = -1
DONOR = "donor/"


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


def read(path: Path) -> Gallery:
    """Read a gallery.npz.

    Raises:
        ValueError: if it is not one, naming the array that is wrong.
    """
    try:
        return check(read_npz(files.read_bytes(str(path), BYTES), BYTES))
    except ValueError as error:
        raise ValueError(f"{path} is not a gallery of rft.train: {error}") from error


def check(arrays: Mapping[str, np.ndarray]) -> Gallery:
    """Return the gallery that the arrays of a gallery.npz are; those it does not know are ignored.

    Raises:
        ValueError: naming the array that is missing, or is wrong in type, shape or range.
    """
    donors = [name for name in arrays if name.startswith(DONOR)]
    if len(donors) > COLUMNS:
        raise ValueError(f"it has {len(donors)} donor maps; it may have {COLUMNS}")
    # here as well as in read_npz: a training checks its arrays before it writes them
    if (size := sum(array.nbytes for array in arrays.values())) > BYTES:
        raise ValueError(f"its arrays have {size:,} bytes; they may have {BYTES:,}")
    images_BCHW = _array(arrays, "images_BCHW", "u", (None, 3, None, None))
    batch, _, height, width = images_BCHW.shape
    # "u" is unsigned of any width
    if images_BCHW.dtype != np.uint8 or height != width:
        raise ValueError("images_BCHW must be square and of type uint8")
    if not (1 <= batch <= IMAGES and 1 <= height <= SIDE):
        found = f"{batch} images of {height} pixels a side"
        raise ValueError(f"images_BCHW is {found}; it may be 1 to {IMAGES} of 1 to {SIDE}")
    # item: a Python integer, which does not overflow below
    patch = _array(arrays, "patch", "iu", ()).item()
    if patch < 1 or height % patch:
        raise ValueError(f"patch is {patch}: {height} x {width} pixels cannot be cut into such")
    shape = (batch, (height // patch) ** 2)
    # float64 beyond float32 becomes infinite, which the next check refuses
    with np.errstate(over="ignore"):
        relevance_BP = _array(arrays, "relevance_BP", "f", shape).astype(np.float32)
    # written so that NaN does not pass
    if not (relevance_BP.min() >= -STRENGTH and relevance_BP.max() <= STRENGTH):
        raise ValueError(f"relevance_BP must be finite, from {-STRENGTH:,.0f} to {STRENGTH:,.0f}")
    class_names = _array(arrays, "class_names", "U", (None,))
    labels_B = _array(arrays, "labels_B", "iu", (batch,), range(len(class_names)))
    # a slice, because numpy fails on a single text with letters of no Unicode
    names = tuple(_text(class_names[label : label + 1]) for label in labels_B.tolist())
    donor_maps = {}
    for name in donors:
        recipe = convert(name.removeprefix(DONOR), Recipe, "the name of a donor map")
        # the range first: int64 would turn a large unsigned number into a negative one
        donor_BP = _array(arrays, name, "iu", shape, range(DROP, batch))
        donor_maps[recipe] = donor_BP.astype(np.int64)
    return Gallery(
        images_BHWC=images_BCHW.transpose(0, 2, 3, 1),
        names=names,
        relevance_BP=relevance_BP,
        patch=patch,
        donors=donor_maps,
    )


def _array(
    arrays: Mapping[str, np.ndarray],
    name: str,
    kinds: str,
    shape: tuple[int | None, ...],
    numbers: range | None = None,
) -> np.ndarray:
    """Return an array of a kind that numpy has a letter for; None is any length, or any numbers."""
    if name not in arrays:
        raise ValueError(f"{name} is missing")
    array = arrays[name]
    if array.dtype.kind not in kinds:
        wanted = {"u": "uint8", "f": "floating-point", "U": "texts"}.get(kinds, "whole numbers")
        raise ValueError(f"{name} is of type {array.dtype}; it must be {wanted}")
    if array.ndim != len(shape) or any(
        wanted not in (None, found) for found, wanted in zip(array.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} has shape {array.shape}; it must be ({wanted})")
    if numbers is not None and (array.min() < numbers.start or array.max() >= numbers.stop):
        raise ValueError(f"{name} must have numbers from {numbers.start} to {numbers.stop - 1}")
    return array


def _text(name_1: np.ndarray) -> str:
    # numpy takes letters of no Unicode, and fails on some
    try:
        text = name_1.tobytes().decode("utf-32-le")
    except UnicodeDecodeError as error:
        raise ValueError("class_names has letters that are not of Unicode") from error
    # numpy pads texts with zeros
    return convert(text.rstrip("\0"), Text, "class_names")
