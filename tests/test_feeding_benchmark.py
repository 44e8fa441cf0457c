"""The sizing table: the basis of its numbers, and ranks that wait as long as it predicts."""

import json
import subprocess
import sys
from contextlib import ExitStack

import pytest

from benchmarks import feeding, one_rank, photos

IMAGES, BATCH = 20, 5


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> str:
    return photos.pack_as(("pixels",), tmp_path_factory.mktemp("work"), IMAGES)["pixels"]


def request_of(url: str, **changes) -> one_rank.Request:
    return one_rank.Request(**{"url": url, "batch_size": BATCH, "seconds": 0.05, **changes})


def test_a_rank_counts_what_it_took(pixels):
    answer = one_rank.take(request_of(pixels))
    assert answer.images % BATCH == 0
    # a header of 128 bytes before the pixels
    assert answer.bytes == answer.images * (128 + 3 * 224 * 224)
    assert answer.cpu_seconds > 0
    assert 0 < answer.waited <= answer.seconds


def test_ranks_take_different_images_of_each_batch(pixels):
    parts = [one_rank.training_batches(pixels, BATCH, rank, 2).samples_of(0) for rank in (0, 1)]
    assert len({*parts[0], *parts[1]}) == 2 * BATCH


def test_a_consumer_takes_no_more_than_it_computes(pixels):
    # one batch per second, and a measurement ends with the current batch
    answer = one_rank.take(request_of(pixels, images_per_second=10 * BATCH))
    assert answer.images == BATCH
    assert answer.seconds >= 0.1


@pytest.mark.slow
def test_a_rank_is_a_process_that_answers_until_its_input_ends(pixels):
    with ExitStack() as stack:
        rank = feeding.Rank(None, stack)
        for _ in range(2):
            rank.ask(request_of(pixels))
            assert rank.answer().images > 0
        rank.ask(request_of("/nowhere"))
        with pytest.raises(RuntimeError, match="without an answer"):
            rank.answer()


def test_rates_are_by_cpu_time():
    answers = [
        one_rank.Answer(images=100, seconds=2.0, waited=0.5, cpu_seconds=cpu, bytes=5000)
        for cpu in (1.0, 0.5, 2.0)
    ]
    assert feeding.summarise(answers) == {
        "images_per_cpu_second": 100,
        "lowest": 50,
        "highest": 200,
        "images_per_second": 50,
        "bytes_per_image": 50,
    }


RESULT = {
    "gpu_images_per_second": {"ViT-B-32": 5000.0, "ViT-B-16": 1000.0, "ViT-L-14": 250.0},
    "rates": {
        "pixels": {"images_per_cpu_second": 20_000, "bytes_per_image": 150_000},
        "original": {"images_per_cpu_second": 250, "bytes_per_image": 100_000},
    },
}


def test_the_table_divides_rates():
    rows = feeding.sizing(RESULT).splitlines()
    assert rows[0] == "| model | GPUs | images/s | `pixels` | `original` |"
    assert len(rows) == 2 + 3 * len(feeding.GPUS)
    assert "| ViT-B-32 | 8 | 40,000 | 2.0 cores, 6,000 MB/s | 160.0 cores, 4,000 MB/s |" in rows
    assert "| ViT-L-14 | 1 | 250 | 0.0 cores, 38 MB/s | 1.0 cores, 25 MB/s |" in rows


@pytest.mark.slow
def test_a_gpu_is_slower_by_the_operations_of_its_model():
    rates = feeding.gpu_rates()
    # 24 blocks of width 1024 and 257 tokens, beside 12 of width 768 and 197
    assert 4 < rates["ViT-B-16"] / rates["ViT-L-14"] < 5


def test_the_saved_page_is_that_of_the_saved_result():
    result = json.loads((feeding.RESULTS / "feeding_cpu.json").read_text())
    assert (feeding.RESULTS / "feeding.md").read_text() == feeding.page(result)


@pytest.mark.slow
@pytest.mark.program
def test_the_feeding_benchmark_as_a_program(tmp_path):
    command = [sys.executable, "-m", "benchmarks.feeding", "--images", "80", "--batch-size", "8"]
    command += ["--rounds", "1", "--seconds", "0.2", "--work", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    assert {"pixels", "jpeg", "original"} <= set(found["rates"])
    below, above = found["simulation"][:2]
    assert below["expected_wait"] == 0 < above["expected_wait"]
    assert below["wanted_images_per_second"] < above["wanted_images_per_second"]
    assert all(row["images_per_second"] > 0 for row in found["simulation"])
    assert feeding.page(found) in result.stdout


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rounds": 0}, "--rounds"),
        ({"seconds": 0}, "--rounds"),
        ({"batch_size": 3}, "--batch-size"),
        ({"images": 100}, "--batch-size"),
    ],
)
def test_options_are_checked(changes, named):
    with pytest.raises(ValueError, match=f"{named}.* must be"):
        feeding.Arguments(**changes)
