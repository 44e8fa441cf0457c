"""Features of frozen towers: runs with and without kept features learn the same, bit by bit.

A batch is 6 of the 60 training images: 10 steps per epoch.
"""

import json
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rft import dist
from rft.loading.dataset import Batch, PackedDataset
from rft.merge import command as merge_command
from rft.runs.filenames import FEATURES
from rft.train import command, features
from rft.train.build import prepare
from rft.train.job import Job
from tests import tiny
from tests.tiny import weights

EPOCHS = ("--optim.epochs", 3, "--loader.held-out", 16, "--loader.batch-size", 7)
OFF = ("--loader.features-gb", 0)
FROZEN = ("linear-probe", "no-mask", "wise-kd-vanilla", "wise-kd-object-mask-single-fill")


def held_out_counts(run: Path) -> list[int]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["held_out_correct"] for line in found if "held_out_correct" in line]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FROZEN)
def test_the_weights_are_those_without(train, tmp_path, capsys, recipe):
    options = [*EPOCHS, "--log.every-steps", 1]
    if recipe.startswith("wise-kd"):
        teacher = tmp_path / "wise"
        ends = (train("zero-shot", "--optim.epochs", 0), train("vanilla"))
        tiny.call(merge_command, "wise", *ends, "--out", teacher)
        options += ["--method.kd-teacher", teacher]
    capsys.readouterr()
    kept = train(recipe, *options, name="kept")
    assert "features" not in capsys.readouterr().err
    plain = train(recipe, *options, *OFF, name="plain")
    assert weights(kept) == weights(plain)
    assert held_out_counts(kept) == held_out_counts(plain)
    # a finished run no longer needs them
    assert not (kept / FEATURES).exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--precision", "bf16"), ("--optim.accumulate", 2)])
def test_the_weights_are_those_without_in_other_forwards(train, options):
    options = (*EPOCHS, "--loader.batch-size", 6, *options)
    for recipe in FROZEN[:2]:
        kept = train(recipe, *options, name=f"{recipe}-kept")
        assert weights(kept) == weights(train(recipe, *options, *OFF, name=f"{recipe}-plain"))


def blank(data: Path) -> None:
    """Overwrite all images except the first, which is read at every start."""
    packed = PackedDataset(str(data / "imagenet-train"))
    first = int(packed.index.offset[0] + packed.index.length[0])
    for number, shard in enumerate(packed.manifest.shards):
        path = data / "imagenet-train" / shard.name
        whole = path.read_bytes()
        path.write_bytes(whole[: first * (number == 0)].ljust(len(whole), b"\0"))


@pytest.fixture
def own_data(tiny_data, tmp_path) -> Path:
    """Data that a test may modify."""
    return shutil.copytree(tiny_data, tmp_path / "data")


@pytest.mark.slow
def test_a_probe_with_features_reads_no_image(own_data, tiny_clip, tmp_path, capsys):
    shared = ("--loader.features-dir", tmp_path / "shared")
    # the held-out split is the same, the order of the samples is not
    runs = [("--split-seed", 0, "--seed", seed, *EPOCHS, *shared) for seed in (0, 1)]
    tiny.train("linear-probe", own_data, tiny_clip, tmp_path / "first", *runs[0])
    plain = tiny.train("linear-probe", own_data, tiny_clip, tmp_path / "plain", *runs[1], *OFF)
    blank(own_data)
    second = tiny.train("linear-probe", own_data, tiny_clip, tmp_path / "second", *runs[1])
    assert weights(second) == weights(plain)
    assert f"features are read from {tmp_path / 'shared'}" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # missing rows are found when they are read
        tiny.train("linear-probe", own_data, tiny_clip, tmp_path / "third", *runs[1], *OFF)


def keep(folder: Path) -> None:
    pass


def lose(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil(folder: Path) -> None:
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        data[5::97] = bytes(byte ^ 1 for byte in data[5::97])
        path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 12])
@pytest.mark.parametrize("happens", [keep, lose, spoil])
def test_a_resumed_run_ends_with_the_same_weights(train, tmp_path, step, happens):
    options = (*EPOCHS, "--log.keep", 100, "--log.checkpoint-steps", 4)
    options = (*options, "--loader.features-dir", tmp_path / "shared")
    run = train("linear-probe", *options)
    expected = weights(run)
    (run / "training.json").unlink()
    for path in (run / "checkpoints").iterdir():
        if path.suffix == ".safetensors" or int(path.stem.removeprefix("step-")) > step:
            path.unlink()
    happens(tmp_path / "shared")
    train("linear-probe", *options)
    assert weights(run) == expected


@pytest.mark.slow
def test_without_space_it_trains_without(train, capsys):
    run = train("no-mask", *EPOCHS, "--loader.features-gb", 1e-6)
    assert capsys.readouterr().out.count("are not kept") == 1
    assert not list((run / FEATURES).glob("*"))
    assert weights(run) == weights(train("no-mask", *EPOCHS, *OFF, name="plain"))


@pytest.mark.slow
def test_dry_run_says_what_is_kept(tiny_data, tiny_clip, tmp_path, capsys):
    def words(recipe: str, *options: object) -> str:
        line = tiny.training(recipe, tiny_data, tiny_clip, tmp_path / "run", *options)
        tiny.call(command, *line, "--dry-run")
        return capsys.readouterr().out

    # 76 training and 16 held-out images of 16 numbers and a checksum
    kept = "keeps the features of the frozen student, 6.3 kB in"
    assert kept in words("linear-probe", *EPOCHS)
    assert "keeps the features of the frozen teacher, 5.2 kB in" in words("no-mask", *EPOCHS)
    assert "are more than --loader.features-gb" in words(
        "no-mask", *EPOCHS, "--loader.features-gb", 1e-6
    )
    for one in (("vanilla", *EPOCHS), ("no-mask", *EPOCHS, *OFF), ("no-mask",)):
        assert "features of the frozen" not in words(*one)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def job(tiny_data, tiny_clip, tmp_path) -> Callable[..., Job]:
    def make(recipe: str, *options: object) -> Job:
        options = (*EPOCHS, "--precision", "fp32", *options)
        config = command.parse(
            tiny.training(recipe, tiny_data, tiny_clip, tmp_path / "run", *options)
        )
        return prepare(config, dist.world_from_env(), torch.device("cpu"))

    return make


def require_right(job: Job, step: int, batch: Batch) -> None:
    """Compare a batch's features with those of its images, forwarded as in its step."""
    samples = job.batches.global_samples(step)
    assert batch.samples_B.tolist() == samples.tolist()
    images_BCHW = job.batches.packed.batch(samples, 16).images_BCHW
    expected = job.objective.frozen_features(images_BCHW)
    assert batch.features.keys() == expected.keys()
    for name, rows_BE in expected.items():
        assert torch.equal(batch.features[name], rows_BE)


def truncate(folder: Path) -> None:
    for path in folder.iterdir():
        os.truncate(path, 100)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FROZEN[:2])
@pytest.mark.parametrize("happens", [keep, lose, spoil, truncate])
def test_rows_that_vanish_while_they_are_read_are_computed(job, capsys, recipe, happens):
    made = job(recipe)
    per_epoch = made.batches.plan.steps_per_epoch
    folder = features.folder(made.config).path
    with closing(features.read_batches(made, range(3 * per_epoch))) as stream:
        for step in range(3 * per_epoch):
            batch = next(stream)
            if step == per_epoch + 1:
                happens(folder)
            require_right(made, step, batch)
            assert (batch.computing > 0) == (step < per_epoch)
            no_images = recipe == "linear-probe" and step >= per_epoch
            assert batch.images_BCHW.numel() == 0 or not no_images
    warned = "damaged or from a different file" in capsys.readouterr().err
    # an open file stays readable after it is deleted
    assert warned == (happens in (spoil, truncate))


@pytest.mark.slow
def test_two_seeds_fill_one_file_at_the_same_time(job, tmp_path):
    shared = ("--loader.features-dir", tmp_path / "shared")
    jobs = [job("linear-probe", *shared, "--seed", seed) for seed in (0, 1)]
    steps = range(2 * jobs[0].batches.plan.steps_per_epoch)
    with (
        closing(features.read_batches(jobs[0], steps)) as first,
        closing(features.read_batches(jobs[1], steps)) as second,
    ):
        for step, *batches in zip(steps, first, second, strict=True):
            for made, batch in zip(jobs, batches, strict=True):
                require_right(made, step, batch)
    assert len(list((tmp_path / "shared").iterdir())) == 1


@pytest.mark.slow
def test_a_full_disk_is_one_warning_and_no_features(job, capsys):
    made = job("no-mask")
    per_epoch = made.batches.plan.steps_per_epoch
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = []
    with closing(features.read_batches(made, range(2 * per_epoch))) as stream:
        found.append(next(stream))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the file has 5,168 bytes
        try:
            found += [next(stream) for _ in range(per_epoch - 1)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        found += list(stream)
    for step, batch in enumerate(found[:per_epoch]):
        require_right(made, step, batch)
    assert all(not batch.features for batch in found[per_epoch:])
    assert [len(batch.images_BCHW) for batch in found] == [7] * len(found)
    (warning,) = tiny.complaints(capsys.readouterr().err)
    assert "cannot be written" in warning


@pytest.mark.slow
def test_a_file_belongs_to_weights_data_and_precision(job):
    def files(made: Job) -> set[str]:
        """Names of all files after a first batch."""
        with closing(features.read_batches(made, range(20))) as stream:
            next(stream)
        return {path.name for path in features.folder(made.config).path.iterdir()}

    made = job("no-mask")
    first = files(made)
    assert len(first) == 1
    assert files(made) == first
    # a probe's tower is no-mask's teacher
    assert files(job("linear-probe")) == first
    assert len(files(job("linear-probe", "--precision", "bf16"))) == 2
    assert len(files(job("linear-probe", "--loader.batch-size", 6))) == 3
    with torch.no_grad():
        made.objective.teacher.visual.proj[0, 0] += 1e-3
    assert len(files(made)) == 4
    made.batches.packed.manifest = replace(made.batches.packed.manifest, templates=("{c}",))
    assert len(files(made)) == 5
