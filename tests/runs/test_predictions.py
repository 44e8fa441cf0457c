"""A file of predictions reads back unchanged, and anything else is refused in one line."""

import dataclasses
import io

import numpy as np
import pytest

from rft.runs import predictions
from rft.runs.predictions import Predictions, path_of, read, require_no_links
from rft.storage import files

ROWS = Predictions(
    key=np.array(["a", "bc", "d"]),
    label=np.array([1, 0, 2], np.int32),
    prediction=np.array([1, 2, 2], np.int32),
    rank=np.array([0, 7, 0], np.int32),
    confidence=np.array([0.5, 0.25, 1.0], np.float32),
    log_likelihood=np.array([-0.7, -9.0, 0.0], np.float32),
)


def test_what_is_written_is_read(tmp_path):
    path = path_of(tmp_path, "imagenet-val")
    data = ROWS.to_bytes()
    assert data == dataclasses.replace(ROWS, key=ROWS.key.copy()).to_bytes()
    files.write_bytes(str(path), data)
    found = read(path, 3, files.sha256_bytes(data))
    for name, column in changed().items():
        assert getattr(found, name).tolist() == column.tolist()
    assert found.scaled_confidence is None
    assert found.right.tolist() == [True, False, True]


def test_a_file_lies_beside_its_weights(tmp_path):
    assert path_of(tmp_path, "own/test") == tmp_path / "predictions" / "own" / "test.npz"
    file = tmp_path / "model.v2.safetensors"
    assert path_of(file, "imagenet-r") == tmp_path / "model.v2.predictions" / "imagenet-r.npz"


@pytest.mark.parametrize("link", ["predictions", "predictions/own"])
def test_nothing_is_written_behind_a_link(tmp_path, link):
    require_no_links(tmp_path, ["imagenet-r", "own/test"])
    (tmp_path / "theirs").mkdir()
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"^{tmp_path / link} is a link; .*: remove it$"):
        require_no_links(tmp_path, ["imagenet-r", "own/test"])
    # a file of this name is replaced
    (tmp_path / link).unlink()
    (tmp_path / "predictions").mkdir(exist_ok=True)
    path_of(tmp_path, "imagenet-r").symlink_to(tmp_path / "theirs")
    require_no_links(tmp_path, ["imagenet-r"])


def changed(**columns: object) -> dict[str, np.ndarray]:
    whole = vars(ROWS)
    return {name: value for name, value in {**whole, **columns}.items() if value is not None}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"rank": None}, "they must be key, label"),
        ({"more": np.arange(3)}, "they must be key, label"),
        ({"rank": np.array([0, 7, 0])}, "rank must be 3 of int32, not int64"),
        ({"rank": np.array([0, 7], np.int32)}, r"rank must be 3 of int32, not int32 \(2,\)"),
        ({"key": np.array([b"a", b"b", b"c"])}, "key must be 3 of U, not"),
        ({"label": np.array([1, -1, 2], np.int32)}, "label must be from 0 to"),
        ({"confidence": np.array([0.5, np.nan, 1], np.float32)}, "confidence must be from 0 to 1"),
        ({"confidence": np.array([0.5, 1.1, 1], np.float32)}, "confidence must be from 0 to 1"),
        (
            {"log_likelihood": np.array([-1, 1, 0], np.float32)},
            "log_likelihood must be from -inf to 0",
        ),
        (
            {"log_likelihood": np.array([-1, np.nan, 0], np.float32)},
            "log_likelihood must be from -inf to 0",
        ),
        ({"rank": np.array([0, 0, 0], np.int32)}, "rank 0 and a right prediction must coincide"),
        ({"rank": np.array([1, 7, 0], np.int32)}, "rank 0 and a right prediction must coincide"),
    ],
)
def test_what_cannot_be_predictions_is_refused(tmp_path, columns, says):
    stream = io.BytesIO()
    np.savez_compressed(stream, **changed(**columns))
    path = tmp_path / "imagenet-val.npz"
    path.write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match=rf"{path} is not a file of predictions: .*{says}"):
        read(path, 3)


def test_a_file_of_other_predictions_is_refused(tmp_path):
    path = tmp_path / "imagenet-val.npz"
    path.write_bytes(ROWS.to_bytes())
    with pytest.raises(ValueError, match=r"was changed after results\.json was written"):
        read(path, 3, "0" * 64)
    with pytest.raises(ValueError, match=r"rank must be 4|key must be 4"):
        read(path, 4)
    path.unlink()
    with pytest.raises(ValueError, match=r"imagenet-val\.npz"):
        read(path, 3)


def test_a_file_that_unpacks_to_more_than_its_set_is_refused(tmp_path):
    stream = io.BytesIO()
    np.savez_compressed(stream, **changed(more=np.zeros(10**6)))
    path = tmp_path / "imagenet-val.npz"
    path.write_bytes(stream.getvalue())
    assert len(stream.getvalue()) < 3 * predictions.KEY_LETTERS * 4 + predictions.HEADERS_BYTES
    with pytest.raises(ValueError, match=r"its arrays have 8,0.* bytes, more than"):
        read(path, 3)
