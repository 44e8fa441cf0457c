"""A killed run that is restarted ends with the undisturbed run's weights, bit for bit."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rft.runs.filenames import GALLERY, LAST, SELECTED
from rft.storage import files
from tests import tiny
from tests.tiny import kill_when, torchrun, torchrun_command, unstamped

pytestmark = pytest.mark.slow


RECIPE = "object-mask-single-fill"
OPTIONS = (
    *("--method.threshold", "0.5", "--loader.held-out", "16", "--optim.epochs", "6"),
    *("--log.checkpoint-steps", "4", "--log.every-steps", "3"),
)


# a text tower that learns, with negatives on all ranks, and a teacher that moves
TWO_TOWERS = (
    *("random-mask-single-fill", *OPTIONS[2:]),
    *("--method.loss", "contrastive", "--method.teacher", "wma"),
)


@pytest.fixture(scope="module")
def calm(tmp_path_factory, tiny_data, tiny_clip) -> Callable[..., Path]:
    """The undisturbed run on so many ranks, with all of its checkpoints."""

    @functools.cache
    def run(ranks: int, recipe: str = RECIPE, *options: str) -> Path:
        folder = tmp_path_factory.mktemp("calm") / "run"
        options = (*(options or OPTIONS), "--log.keep", "100")
        tiny.train(recipe, tiny_data, tiny_clip, folder, *options, ranks=ranks)
        assert (folder / "training.json").exists()
        return folder

    return run


def leaves(value) -> list:
    """Every tensor and number of a checkpoint, in order, tensors as their exact bytes."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in leaves(value[key])]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return [value.numpy().tobytes() if isinstance(value, torch.Tensor) else value]


def outcome(run: Path) -> tuple[list[str], list, list[dict]]:
    """The hashes of weights and gallery, the last checkpoint's content and the held-out counts."""
    last = max((run / "checkpoints").glob("step-*.pt"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)), "a resumed run logs each step once"
    times = [line.pop("time") for line in lines]
    assert times[0] < times[-1]
    return (
        [files.sha256_file(run / which) for which in (SELECTED, LAST, GALLERY)],
        leaves(torch.load(last, weights_only=True)),
        [line for line in lines if "held_out_correct" in line],
    )


# the state of FTP is the same on all ranks, and only the main one writes it
@pytest.mark.parametrize(
    ("ranks", "run"),
    [
        (1, (RECIPE, *OPTIONS)),
        (3, (RECIPE, *OPTIONS)),
        (2, (RECIPE, *OPTIONS, "--optim.optimizer", "ftp")),
        (3, TWO_TOWERS),
    ],
)
def test_kill_and_resume_is_bit_identical(tmp_path, tiny_data, tiny_clip, calm, capsys, ranks, run):
    killed, (recipe, *options) = tmp_path / "killed", run
    words = tiny.training(recipe, tiny_data, tiny_clip, killed, *options)
    command = torchrun_command(ranks, "rft.train", *words, "--loader.workers", "1")
    reached = killed / "checkpoints" / "step-00000012.pt"
    kill_when(command, lambda: reached.exists())
    assert not (killed / "training.json").exists()
    # the number of readers changes nothing
    tiny.train(recipe, tiny_data, tiny_clip, killed, *options, ranks=ranks)
    assert (killed / "training.json").exists()
    assert outcome(killed) == outcome(calm(ranks, *run))

    capsys.readouterr()
    tiny.train(recipe, tiny_data, tiny_clip, killed, *options)
    assert "already finished" in capsys.readouterr().out


def test_a_kill_between_checkpoint_and_selected_model(tmp_path, tiny_data, tiny_clip, calm):
    # the checkpoint says which model is selected; the file of that model is written after it
    run = tmp_path / "run"
    shutil.copytree(calm(1), run)
    best_step = json.loads((run / "training.json").read_text())["best_step"]
    (run / "training.json").unlink()
    (run / SELECTED).unlink()
    for path in (run / "checkpoints").glob("step-*.pt"):
        if int(path.stem.removeprefix("step-")) > best_step:
            path.unlink()
    tiny.train(RECIPE, tiny_data, tiny_clip, run, *OPTIONS, "--log.keep", "100")
    assert outcome(run) == outcome(calm(1))


@pytest.mark.program
def test_without_any_argument_it_trains_on_the_miniature(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = torchrun(2, "rft.train", "--optim.epochs", "1")
    said = unstamped(result.stdout)
    assert said.startswith("No --data given: training object-mask-single-fill on the ")
    assert "--data URL --run-dir DIR" in result.stdout.splitlines()[0]
    run = tmp_path / "runs" / "miniature-object-mask-single-fill-seed0"
    assert (run / "training.json").exists()
    assert (run / "gallery.npz").exists()
