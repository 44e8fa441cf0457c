"""The variants of benchmarks.reader give the same batches, and its page matches its result."""

import itertools
import json

import pytest
import torch

from benchmarks import one_rank, photos, reader

IMAGES, BATCH = 20, 5


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> str:
    return photos.pack_as(("pixels",), tmp_path_factory.mktemp("work"), IMAGES)["pixels"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("way", reader.WAYS)
def test_every_way_leads_to_the_same_batches(pixels, way, workers):
    batches = one_rank.training_batches(pixels, BATCH)
    stream = reader.WAYS[way](batches, workers)
    for number, images_BCHW in enumerate(itertools.islice(stream, 7)):
        expected = batches.packed.batch(batches.samples_of(number), reader.SIZE)
        assert torch.equal(images_BCHW, expected.images_BCHW)
    stream.close()


def test_a_measurement_counts_what_came_after_the_start(pixels):
    rate = reader.measure(reader.page_locked(one_rank.training_batches(pixels, BATCH), 0), 0, 0.01)
    assert rate.images_per_second > 0
    assert rate.all >= rate.trainer > 0


def test_the_page_has_a_row_of_medians_for_each_way():
    rates = [reader.Rate(speed, speed / 1000, speed / 500) for speed in (30.0, 10.0, 20.0)]
    row = {"way": "copied", "workers": 2, **reader.summarise(rates)}
    result = {"processor": "a", "cpus": 2, "batch_size": 5, "rounds": 3, "date": "2026-11-30T00"}
    page = reader.table({**result, "rows": [row]})
    assert "| copied | 2 | 20 (10 to 30) | 0.020 | 0.040 |" in page


def test_the_saved_page_is_that_of_the_saved_result():
    result = json.loads((reader.RESULTS / "reader_cpu.json").read_text())
    assert (reader.RESULTS / "reader.md").read_text() == reader.table(result)


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"seconds": 0}])
def test_options_are_checked(changes):
    with pytest.raises(ValueError, match="must be"):
        reader.Arguments(**changes)
