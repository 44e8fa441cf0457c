"""Selection of the final model among a run's models."""

import types
from dataclasses import replace

import pytest
import torch

from benchmarks.step import Arguments, build_job
from rft.train.checkpoint import Progress
from rft.train.select import select
from tests.conftest import build_model


def test_of_equal_models_the_first_is_selected():
    progress = Progress()
    for step, correct in ((10, 4), (20, 7), (30, 7), (40, 6)):
        progress = replace(progress, step=step).selecting(correct)
    assert progress == Progress(step=40, best_step=20, best_correct=7)


def test_with_nothing_to_select_by_the_last_model_is_the_one():
    job = build_job(Arguments(batch_size=6), torch.device("cpu"), "fp32", build_model(0))
    journal = types.SimpleNamespace(held_out=None)  # is not called
    progress = Progress()
    for step in (0, 11, 22):
        progress = select(job, replace(progress, step=step), journal)
        assert progress.best_step == step


@pytest.mark.slow
def test_held_out_logits_that_are_not_finite_end_the_run(three_epochs, tmp_path, capsys):
    options = ("--optim.lr", "1e30", "--optim.warmup-steps", "0", "--loader.batch-size", "60")
    with pytest.raises(SystemExit) as stopped:
        three_epochs("run", *options, "--log.every-steps", "50", "--optim.epochs", "1")
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path / 'run'} (step 1, held-out images): the logits of ")
    assert not list((tmp_path / "run").glob("checkpoints/*.safetensors"))
    assert not (tmp_path / "run" / "training.json").exists()
