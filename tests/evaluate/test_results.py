"""results.json: counts belong to the weights and the data from which they were computed."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from rft.clip.classifier import load_state, save_classifier
from rft.evaluate import command
from rft.evaluate.checkpoints import Loaded
from rft.evaluate.results import Evaluated, is_current, write_results
from rft.runs.folder import checkpoint_path, current_results
from rft.storage import files
from tests.conftest import build_model
from tests.predicted import evaluated

OLD, NEW = "0" * 64, "1" * 64


class Packed(NamedTuple):
    """The required parts of a manifest."""

    sha256: str
    samples: int = 10


def current(path: Path, sets: dict[str, str], samples: int = 10) -> bool:
    return is_current(path, {name: Packed(sha256, samples) for name, sha256 in sets.items()})


def weights(path: Path, seed: int = 0) -> Path:
    save_classifier(str(path), build_model(seed), {"step": "3"}, None)
    return path


def record(path: Path, sets: dict[str, Evaluated]) -> None:
    """Write counts like an evaluation of the current weights."""
    weights = checkpoint_path(path)
    write_results(Loaded(path, files.sha256_file(weights), load_state(weights)), sets)


def recorded_sets(path: Path) -> dict[str, tuple[int, str]]:
    """The number of correct images per set, and the data it belongs to."""
    results = current_results(path)
    sets = results.sets if results else {}
    return {name: (count.correct, count.manifest_sha256) for name, count in sets.items()}


@pytest.fixture
def model(tmp_path) -> Path:
    path = weights(tmp_path / "model.safetensors")
    record(path, {"imagenet-val": evaluated(7), "imagenet-r": evaluated(3)})
    return path


@pytest.mark.slow
def test_no_predictions_are_written_behind_a_link(train, tiny_data, tmp_path, refused):
    run = train("vanilla", "--optim.epochs", 0)
    (tmp_path / "theirs").mkdir()
    (run / "predictions").symlink_to(tmp_path / "theirs")
    line = refused(command, run, "--data", tiny_data, "--sets", "imagenet-r", "--workers", 0)
    assert line == (
        f"error: {run / 'predictions'} is a link; rft never writes or deletes through links: "
        "remove it"
    )
    assert not list((tmp_path / "theirs").iterdir())
    assert not (run / "results.json").exists()


def document(model: Path) -> dict:
    return json.loads(model.with_suffix(".results.json").read_text())


def test_counts_say_what_they_were_made_of(model):
    assert document(model)["checkpoint_sha256"] == files.sha256_file(model)
    assert document(model)["step"] == 3
    assert recorded_sets(model) == {"imagenet-val": (7, OLD), "imagenet-r": (3, OLD)}


def test_counts_of_other_weights_are_none(model):
    weights(model, seed=1)
    assert recorded_sets(model) == {}
    assert not current(model, {"imagenet-val": OLD})
    record(model, {"imagenet-val": evaluated(2)})
    # R was not evaluated for these weights
    assert recorded_sets(model) == {"imagenet-val": (2, OLD)}


def test_counts_of_other_data_are_replaced(model):
    assert current(model, {"imagenet-val": OLD, "imagenet-r": OLD})
    assert current(model, {"imagenet-r": OLD})
    assert not current(model, {"imagenet-val": NEW})
    assert not current(model, {"imagenet-val": OLD, "imagenet-a": OLD})
    record(model, {"imagenet-val": evaluated(5, NEW)})
    assert recorded_sets(model) == {"imagenet-val": (5, NEW), "imagenet-r": (3, OLD)}
    assert current(model, {"imagenet-val": NEW, "imagenet-r": OLD})


def test_counts_of_another_number_of_samples_are_replaced(model):
    """A file that names the right weights and data may still have been edited by hand."""
    assert current(model, {"imagenet-val": OLD}, 10)
    assert not current(model, {"imagenet-val": OLD}, 11)


def test_nothing_is_recorded_before_the_first_count(tmp_path):
    path = weights(tmp_path / "new.safetensors")
    assert recorded_sets(path) == {}
    assert not current(path, {"imagenet-val": OLD})
