"""ObjectNet's red frame is removed exactly once, in every encoding."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft.loading.dataset import PackedDataset
from rft.packing.pack import Options, pack
from rft.shards.label_space import LabelSpace

LABELS = LabelSpace(ids=("n01", "n02"), names=("clock", "cup"), templates=("a {c}.",))
SIDE, BORDER = 16, 2
MAPPINGS = {
    "folder_to_objectnet_label.json": {"clock": "Clock"},
    "objectnet_to_imagenet_1k.json": {"Clock": "clock"},
    "pytorch_to_imagenet_2012_id.json": {"0": 0, "1": 1},
}


def inside() -> np.ndarray:
    """The area within the frame: exactly the model's size, so nothing is resized."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.stack([0 * rows, 10 * rows, 10 * columns], axis=2).astype(np.uint8)


@pytest.fixture
def source(tmp_path) -> Path:
    root = tmp_path / "objectnet-1.0"
    (root / "mappings").mkdir(parents=True)
    for name, document in MAPPINGS.items():
        (root / "mappings" / name).write_text(json.dumps(document))
    (root / "mappings" / "imagenet_to_label_2012_v2").write_text("clock\ncup\n")
    framed = np.zeros((SIDE + 2 * BORDER, SIDE + 2 * BORDER, 3), dtype=np.uint8)
    framed[..., 0] = 255
    framed[BORDER:-BORDER, BORDER:-BORDER] = inside()
    (root / "images" / "clock").mkdir(parents=True)
    Image.fromarray(framed).save(root / "images" / "clock" / "a.png")
    return tmp_path


@pytest.mark.parametrize(("encoding", "tolerance"), [("pixels", 0), ("original", 0), ("jpeg", 12)])
def test_the_frame_is_cut_once(source, tmp_path, encoding, tolerance):
    out = tmp_path / encoding
    pack("objectnet", str(source), str(out), LABELS, Options(encoding=encoding, size=SIDE))
    found = PackedDataset(str(out / "objectnet")).image(0, SIDE)
    difference = np.abs(found.astype(int) - inside().transpose(2, 0, 1).astype(int))
    # removing a frame twice would move the first row by two, which is 20 grey levels
    assert difference.max() <= tolerance
