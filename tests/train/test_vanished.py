"""A run folder that disappears during training: one line, and no new folder."""

import shutil

import pytest

from rft.evaluate.count import Count
from rft.train import checkpoint, loop, select
from tests.train.test_stop import at_step


@pytest.fixture(autouse=True)
def written_at_once(monkeypatch):
    """No checkpoint is pending when a test deletes the folder."""
    whole = checkpoint.Writer.write

    def write(self, *arguments):
        whole(self, *arguments)
        self.wait()

    monkeypatch.setattr(checkpoint.Writer, "write", write)


def delete(folder):
    shutil.rmtree(folder)


def move(folder):
    folder.rename(folder.with_name("moved"))


def empty(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace(folder):
    # deleted, and a second job with the same command has started in its place
    config = (folder / "config.json").read_bytes()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_bytes(config)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 29])
@pytest.mark.parametrize("how", [delete, move, empty, replace])
def test_the_run_says_so_and_makes_no_half_of_it(
    three_epochs, tmp_path, monkeypatch, capsys, how, step
):
    folder, left = tmp_path / "run", []

    def act():
        how(folder)
        left.extend(sorted(folder.rglob("*")) if folder.exists() else ["nothing"])

    at_step(step, monkeypatch, act)
    with pytest.raises(SystemExit) as stopped:
        three_epochs()
    assert stopped.value.code == 2
    (line,) = (one for one in capsys.readouterr().err.splitlines() if one.startswith("error"))
    kind = "replaced by a different folder" if how is replace else "was deleted, emptied or moved"
    assert f"{folder} {'was ' if how is replace else ''}{kind} while the run was training" in line
    assert (sorted(folder.rglob("*")) if folder.exists() else ["nothing"]) == left


@pytest.mark.slow
def test_the_selected_model_alone_is_deleted(three_epochs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    # the first epoch's stays the best
    monkeypatch.setattr(select, "count_correct", lambda *_, **__: [Count(1, 16)])
    at_step(15, monkeypatch, lambda: (folder / "checkpoints" / "best.safetensors").unlink())
    with pytest.raises(SystemExit):
        three_epochs()
    assert "best.safetensors was deleted while the run was training" in capsys.readouterr().err
    assert not (folder / "training.json").exists()


@pytest.mark.slow
def test_after_the_last_step(three_epochs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    end = loop.end

    def gone(*arguments):
        end(*arguments)
        shutil.rmtree(folder)

    monkeypatch.setattr(loop, "end", gone)
    with pytest.raises(SystemExit):
        three_epochs()
    assert f"{folder} was deleted, emptied or moved" in capsys.readouterr().err
    assert not folder.exists()
