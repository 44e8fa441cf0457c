"""The device of a rank, and that disagreeing ranks are stopped before any work."""

import pytest
import torch

from benchmarks import tiny_world
from rft import dist
from rft.clip.classifier import save_classifier
from rft.dist import World
from rft.evaluate import command as evaluate_command
from rft.train import command as train_command
from tests.conftest import build_model

ALONE = World(rank=0, size=1, local_rank=0)


@pytest.fixture
def gpus(monkeypatch):
    """Simulate so many GPUs in torch; return the list of those that were made current."""
    current = []

    def let_see(count: int) -> list:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return let_see


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_a_rank_takes_the_gpu_of_its_place_on_the_node(gpus, choice):
    current = gpus(4)
    # the second node's third rank
    device = dist.pick_device(choice, World(rank=6, size=8, local_rank=2, local_size=4))
    assert device == torch.device("cuda", 2)
    assert current == [device]


def test_the_cpu_where_it_is_named_or_there_is_no_gpu(gpus):
    current = gpus(4)
    assert dist.pick_device("cpu", ALONE) == torch.device("cpu")
    gpus(0)
    assert dist.pick_device("auto", ALONE) == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees no GPU; use cpu"):
        dist.pick_device("cuda", ALONE)
    assert current == []


def test_more_ranks_than_gpus_are_refused(gpus):
    current = gpus(2)
    with pytest.raises(ValueError, match=r"rank 6 has no GPU: .* than its 2 GPUs"):
        dist.pick_device("auto", World(rank=6, size=8, local_rank=2, local_size=4))
    assert current == []


def test_a_world_is_what_torchrun_says(monkeypatch):
    variables = {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    world = dist.world_from_env()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (6, 8, 2, 4)
    # the second node of two; its ranks share a cache
    assert list(world.ranks_on_node) == [4, 5, 6, 7]
    assert not world.is_main
    assert not World(rank=4, size=8, local_rank=0, local_size=4).is_main
    for name in variables:
        monkeypatch.delenv(name)
    assert dist.world_from_env() == ALONE
    assert ALONE.is_main
    assert list(ALONE.ranks_on_node) == [0]


def test_ranks_that_differ_from_the_first_are_named(monkeypatch):
    monkeypatch.setattr(dist, "gather_objects", lambda _, value: [value, "b", value, "c"])
    with pytest.raises(ValueError, match=r"ranks \[1, 3\] have a different thing .* 'b' .* 'a'"):
        dist.require_agreement(ALONE, "thing", "a")
    monkeypatch.setattr(dist, "gather_objects", lambda _, value: [value] * 3)
    dist.require_agreement(ALONE, "thing", "a")


@pytest.mark.parametrize("what", ["precision", "data fingerprint"])
def test_training_stops_where_ranks_disagree(
    disagreeing, refused, tiny_data, tiny_clip, tmp_path, what
):
    disagreeing(what)
    options = ("--scale", "miniature", "--model.clip", tiny_clip, "--loader.batch-size", "6")
    options += ("--loader.held-out", "8", "--loader.workers", "0")
    run = tmp_path / "run"
    line = refused(train_command, "vanilla", "--data", tiny_data, "--run-dir", run, *options)
    assert f"ranks [1] have a different {what} than rank 0" in line
    assert not run.exists()


@pytest.mark.parametrize("what", ["set of packed data", "set of weights"])
def test_evaluation_stops_where_ranks_disagree(disagreeing, refused, tiny_data, tmp_path, what):
    disagreeing(what)
    model = build_model(classes=len(tiny_world.LABELS.ids))
    save_classifier(
        str(tmp_path / "model.safetensors"), model, {"step": "0"}, tiny_world.LABELS.classes
    )
    options = ("--data", tiny_data, "--sets", "imagenet-val", "--workers", "0")
    line = refused(evaluate_command, tmp_path / "model.safetensors", *options)
    assert f"ranks [1] have a different {what}" in line
