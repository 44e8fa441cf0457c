"""A refused training changes no file of the run that the folder holds."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest

from rft.shards.manifest import Manifest
from rft.train import build, fastest, journal, run
from tests.train.test_checkpoint import killed

pytestmark = pytest.mark.slow  # together

Make = Callable[[pytest.MonkeyPatch, Path], tuple[str, ...]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, by its name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def other_data(tiny_data, tmp_path) -> str:
    """A data root of equal class and image counts."""
    root = shutil.copytree(tiny_data, tmp_path / "other")
    url = str(root / "imagenet-train")
    dataclasses.replace(Manifest.load(url), plan_hash="0" * 64).save(url)
    return str(root)


def options(*words: str) -> Make:
    return lambda patch, folder: words


def other_weights(patch: pytest.MonkeyPatch, _: Path) -> tuple[str, ...]:
    patch.setattr(build, "tower_sha256", lambda model: "another")
    return ()


def no_compiler(patch: pytest.MonkeyPatch, _: Path) -> tuple[str, ...]:
    patch.setattr(fastest, "first_problem", lambda *_: "nothing compiles here")
    return ("--compile", "on")


def no_login(patch: pytest.MonkeyPatch, _: Path) -> tuple[str, ...]:
    def refuse(*_: object) -> None:
        raise ValueError("--log.wandb project: no login")

    patch.setattr(journal, "Wandb", refuse)
    # the check that it is installed comes before the run folder
    patch.setattr(journal.importlib.metadata, "version", lambda _: "1")
    return ("--log.wandb", "project")


def no_selected_model(_: pytest.MonkeyPatch, folder: Path) -> tuple[str, ...]:
    (folder / "checkpoints" / "best.safetensors").unlink()
    # of step 10, as the only one before the newest
    for path in folder.glob("checkpoints/step-*.pt"):
        if path.name != "step-00000016.pt":
            path.unlink()
    return ()


def all_damaged(_: pytest.MonkeyPatch, folder: Path) -> tuple[str, ...]:
    for path in folder.glob("checkpoints/step-*.pt"):
        path.write_bytes(b"")
    return ()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (options("--data", "OTHER"), "was made on other data or by a different run"),
        (other_weights, "pretrained_sha256"),
        (options("--seed", "5"), "holds a run with a different configuration"),
        (no_compiler, "--compile on: nothing compiles here"),
        (no_login, "--log.wandb project: no login"),
        (no_selected_model, "the run's model, of step 10, is neither in"),
        (all_damaged, "none of the checkpoints in"),
    ],
    ids=["data", "weights", "option", "compiler", "login", "selected-model", "damaged"],
)
def test_an_unfinished_run_keeps_its_files(
    three_epochs, other_data, tmp_path, monkeypatch, capsys, make, says
):
    killed(three_epochs, monkeypatch, 18)
    folder = tmp_path / "run"
    words = [other_data if word == "OTHER" else word for word in make(monkeypatch, folder)]
    before = contents(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        three_epochs("run", *words)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize("what", ["data", "weights"])
def test_a_run_that_the_other_job_finished_keeps_its_files(
    three_epochs, other_data, tmp_path, monkeypatch, capsys, what
):
    folder = three_epochs()
    before = contents(folder)
    # the first job, not finished yet, holds the folder
    (folder / "training.json").unlink()
    lock = filelock.FileLock(folder / ".lock")
    lock.acquire()

    def finish(_: object) -> None:
        record = json.loads(before["training.json"])
        if what == "weights":
            record["inputs"]["pretrained_sha256"] = "0" * 64
        (folder / "training.json").write_text(json.dumps(record))
        lock.release()

    monkeypatch.setattr(run.log, "info", finish)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        three_epochs("run", *(("--data", other_data) if what == "data" else ()))
    assert stopped.value.code == 2
    other = "trained on other data" if what == "data" else "built on other weights"
    assert f"is a finished run that was {other}" in capsys.readouterr().err
    after = contents(folder)
    del before["training.json"], after["training.json"]
    assert after == before


def test_checkpoints_elsewhere_leave_a_new_folder_without_records(
    three_epochs, other_data, tmp_path, monkeypatch, capsys
):
    elsewhere = ("--log.checkpoints", f"memory://refused-{tmp_path.name}")
    killed(three_epochs, monkeypatch, 18, *elsewhere)
    # as on a different machine
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(SystemExit):
        three_epochs("run", *elsewhere, "--data", other_data)
    assert "was made on other data" in capsys.readouterr().err
    assert set(contents(tmp_path / "run")) <= {".lock"}
