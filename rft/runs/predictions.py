"""Per-image predictions of a model: one .npz per packed set, in the run folder.

All numbers of a model on a set are computed from these rows: accuracies, intervals, paired tests,
calibration. `numpy.load` reads a file, and pandas takes two lines (docs/evaluation.md). The columns
are plain arrays of one length. Sets with domains have one column more. results.json has the hash of
the file beside those of the weights and of the data, so a file of different weights is detected.
No torch.

Classes that share a category, as in ObjectNet, are scored together: a category's logit is the
highest one of its classes, which is the benchmark's rule, and probabilities are taken over
categories. A category is named by its smallest class id. Where each class is a category of its own,
that is the class id.

Shapes: N images.
"""

import dataclasses
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from rft.runs import filenames
from rft.storage import files, local
from rft.storage.arrays import read_npz

KEY_LETTERS = 1024  # of the longest key, as in an index
DOMAIN_LETTERS = 1000  # of the longest name of a domain, as in a manifest
HEADERS_BYTES = 2**13  # an upper limit of the arrays' headers


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """A row for each image of a set, in the order of the set; all columns have N elements."""

    key: np.ndarray
    """The image's id, text."""
    label: np.ndarray
    """Its class, or category, int32."""
    prediction: np.ndarray
    """The class, or category, with the highest logit among those that are scored, int32."""
    rank: np.ndarray
    """Number of categories that the model ranks above the label, int32: 0 is right, below 5 is a
    top-5 hit."""
    confidence: np.ndarray
    """Probability of the prediction, float32."""
    log_likelihood: np.ndarray
    """Natural logarithm of the label's probability, float32."""
    scaled_confidence: np.ndarray | None = None
    """Confidence of the logits divided by the temperature in results.json, float32; None if no
    temperature was fitted."""
    scaled_log_likelihood: np.ndarray | None = None
    """Log-likelihood of the same logits."""
    domain: np.ndarray | None = None
    """Name of its domain, text, so that pandas can group by it; None for a set without domains."""

    @property
    def right(self) -> np.ndarray:
        """Which images are predicted right, bool (N,)."""
        return self.rank == 0

    def to_bytes(self) -> bytes:
        """Serialise the rows; equal rows give equal bytes."""
        stream = io.BytesIO()
        # numpy dates the members 1980-01-01, so the bytes do not depend on the clock
        columns = {name: getattr(self, name) for name in COLUMNS}
        np.savez_compressed(
            stream, **{name: column for name, column in columns.items() if column is not None}
        )
        return stream.getvalue()


COLUMNS = {
    "key": "U",
    "label": "int32",
    "prediction": "int32",
    "rank": "int32",
    "confidence": "float32",
    "log_likelihood": "float32",
    "scaled_confidence": "float32",
    "scaled_log_likelihood": "float32",
    "domain": "U",
}
RANGE = {
    **dict.fromkeys(("label", "prediction", "rank"), (0, 2**31 - 1)),
    **dict.fromkeys(("confidence", "scaled_confidence"), (0, 1)),
    **dict.fromkeys(("log_likelihood", "scaled_log_likelihood"), (-np.inf, 0)),
}
SCALED = ("scaled_confidence", "scaled_log_likelihood")  # a file has both or neither
assert list(COLUMNS) == [field.name for field in dataclasses.fields(Predictions)]
NUMBERS_BYTES = sum(np.dtype(kind).itemsize for kind in COLUMNS.values() if kind != "U")


def path_of(checkpoint: Path, name: str) -> Path:
    """Return the path of the predictions of a run folder or weights file on a packed set."""
    folder = filenames.PREDICTIONS
    if not checkpoint.is_dir():
        return checkpoint.with_suffix(f".{folder}") / f"{name}.npz"
    return checkpoint / folder / f"{name}.npz"


def require_no_links(checkpoint: Path, names: Iterable[str]) -> None:
    """Check that the folders of a model's predictions on some packed sets are not links.

    Raises:
        ValueError: naming the link.
    """
    folder = path_of(checkpoint, "").parent
    # a set's name may contain folders; the last of its parents is "."
    parents = (parent for name in names for parent in PurePosixPath(name).parents)
    local.require_no_links(folder.parent, (f"{folder.name}/{parent}" for parent in parents))


def logits_path_of(checkpoint: Path, name: str) -> Path:
    """Return the path of the logits that rft.evaluate --logits keeps for a packed set.

    The file is a .npy of half precision (N, K), with all classes of the head.
    """
    return path_of(checkpoint, name).with_suffix(".logits.npy")


def read(path: Path, images: int, sha256: str = "") -> Predictions:
    """Read a file of predictions.

    Args:
        path: the file.
        images: number of images in the set.
        sha256: hash of the file in results.json; not compared if empty.

    Raises:
        ValueError: if the file is missing, was changed, or is not a file of predictions.
    """
    limit = images * (NUMBERS_BYTES + 4 * (KEY_LETTERS + DOMAIN_LETTERS)) + HEADERS_BYTES
    data = files.read_bytes(str(path), limit)
    if sha256 and files.sha256_bytes(data) != sha256:
        raise ValueError(
            f"{path} was changed after {filenames.RESULTS} was written; evaluate the run again"
        )
    try:
        columns = read_npz(data, limit)
        if fault := _fault(columns, images):
            raise ValueError(fault)
    except ValueError as error:
        raise ValueError(f"{path} is not a file of predictions: {error}") from error
    return Predictions(**columns)


def _fault(columns: dict[str, np.ndarray], images: int) -> str:
    """Explain why arrays are not valid predictions of `images` images; empty if they are."""
    plain = [name for name in COLUMNS if name not in (*SCALED, "domain")]
    if columns.keys() - {"domain"} not in ({*plain}, {*plain, *SCALED}):
        return f"its columns are {', '.join(columns)}; they must be {', '.join(plain)}"
    for name, column in columns.items():
        kind = COLUMNS[name]
        same = column.dtype.kind == "U" if kind == "U" else column.dtype == np.dtype(kind)
        if not same or column.shape != (images,):
            return f"{name} must be {images:,} of {kind}, not {column.dtype} {column.shape}"
    for name in columns.keys() & RANGE.keys():
        lowest, highest = RANGE[name]
        # `not` around the comparison, so that NaN fails it
        if not ((columns[name] >= lowest) & (columns[name] <= highest)).all():
            return f"{name} must be from {lowest:g} to {highest:g}"
    if ((columns["rank"] == 0) != (columns["label"] == columns["prediction"])).any():
        return "rank 0 and a right prediction must coincide, and for some image they do not"
    return ""
