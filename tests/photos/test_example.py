"""The photos of --example: the stated number, of all classes, always the same."""

import pytest
from PIL import Image

from rft.packing.own_folder import read_folder
from rft.photos.example import write_example
from rft.shards.label_space import LabelSpace


@pytest.mark.slow
def test_photos_of_every_class_are_drawn_once(tmp_path):
    source = tmp_path / "photos"
    write_example(source)
    labels = LabelSpace.load(str(tmp_path / "photos.json"))
    train, test = read_folder(source, labels, 0.2, 0).sources
    assert (len(train.items), len(test.items)) == (240, 64)
    paths = sorted(source.rglob("*.png"))
    before = {path: path.read_bytes() for path in paths}
    # all differ, because copies would cause a warning
    assert len(set(before.values())) == 304
    with Image.open(paths[0]) as image:
        assert (image.size, image.mode) == ((48, 48), "RGB")
    # photos missing after an interrupted call are regenerated with the same bytes
    paths[7].unlink()
    written = paths[8].stat().st_mtime_ns
    write_example(source)
    assert {path: path.read_bytes() for path in paths} == before
    assert paths[8].stat().st_mtime_ns == written
