"""`--profile` shows all steps and changes none."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from benchmarks.step import Arguments, build_job
from rft.loading.dataset import Batch
from rft.train.optim import build_optimizer
from rft.train.profile import profiling
from rft.train.step import accumulate_gradients
from tests.conftest import build_model
from tests.tiny import unstamped


@pytest.fixture
def take_steps(images_BCHW, labels_B):
    """Run some steps of a longer run; return the weights."""

    def run(folder: Path | None, steps: int, *, first: int = 0, total: int = 0) -> torch.Tensor:
        job = build_job(Arguments(batch_size=6), torch.device("cpu"), "fp32", build_model(0))
        optimizer = build_optimizer(job.objective, job.config.optim)
        with profiling(folder, first, total or steps) as end_step:
            for step in range(first, first + steps):
                batch = Batch(images_BCHW, labels_B, labels_B)
                accumulate_gradients(job, job.objective, batch, step)
                optimizer.step()
                optimizer.zero_grad()
                end_step()
        return torch.cat([p.detach().flatten() for p in job.student.parameters()])

    return run


def counts(path: Path) -> dict[str, int]:
    """The number of occurrences of each name in a trace."""
    with gzip.open(path, "rt") as stream:
        document = json.load(stream)
    assert "host_name" not in document
    names = [event.get("name") for event in document["traceEvents"] if event.get("ph") == "X"]
    return {name: names.count(name) for name in set(names)}


@pytest.mark.slow
def test_ten_steps_after_the_first_few_and_the_same_weights(take_steps, tmp_path, capsys):
    profiled = take_steps(tmp_path / "profile", 17)
    assert torch.equal(profiled, take_steps(None, 17))
    assert "profile of 10 steps: " in capsys.readouterr().out
    assert len(list((tmp_path / "profile").iterdir())) == 2
    found = counts(tmp_path / "profile" / "steps-6-15.json.gz")
    labels = ("clean forward", "cam", "clean backward", "counterfactual forward", "clip")
    assert {name: found[name] for name in labels} == dict.fromkeys(labels, 10)
    table = (tmp_path / "profile" / "steps-6-15.txt").read_text()
    assert "Self CPU" in table
    assert "counterfactual backward" in table


@pytest.mark.slow
def test_fewer_steps_are_told(take_steps, tmp_path, capsys):
    take_steps(tmp_path, 3, first=7, total=10)
    assert "profile of 3 steps (not 10: there were no more)" in capsys.readouterr().out
    assert counts(tmp_path / "steps-8-10.json.gz")["clean forward"] == 3


@pytest.mark.slow
def test_a_run_that_stops_meanwhile(take_steps, tmp_path, capsys):
    take_steps(tmp_path, 7, first=100, total=1000)
    assert "profile of 2 steps (not 10" in capsys.readouterr().out
    assert counts(tmp_path / "steps-106-107.json.gz")["cam"] == 2
    take_steps(tmp_path / "none", 5, first=100, total=1000)
    take_steps(tmp_path / "none", 0)
    said = unstamped(capsys.readouterr().out).splitlines()
    assert said == [f"--profile: no step was done after step {step}, no trace" for step in (105, 0)]
    assert not (tmp_path / "none").exists()
