"""A complete run folder knows its weights: those of a different run in their place are refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rft.convert import command as convert
from rft.evaluate import command as evaluate_command
from rft.evaluate import localisation
from rft.merge import command as merge_command
from rft.report import command as report_command
from rft.runs.filenames import LAST, SELECTED
from rft.storage import files
from rft.train import command as train_command
from tests import tiny
from tests.tiny import call


def training(recipe: str, data: Path, clip: str, run: Path, *more: object) -> list[str]:
    return tiny.training(recipe, data, clip, run, "--split-seed", 0, *more)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data, tiny_clip) -> Path:
    """Folder of finished runs, two merges and two imports."""
    root = tmp_path_factory.mktemp("made")
    for recipe, epochs, seed in (("zero-shot", 0, 0), ("vanilla", 1, 1), ("vanilla", 1, 2)):
        run = root / f"{recipe}-{seed}"
        options = ("--optim.epochs", epochs, "--seed", seed)
        call(train_command, *training(recipe, tiny_data, tiny_clip, run, *options))
    for seed in (1, 2):
        ends = (root / "zero-shot-0", root / f"vanilla-{seed}")
        call(merge_command, "wise", *ends, "--out", root / f"merged-{seed}")
        weights = root / f"vanilla-{seed}" / SELECTED
        call(convert, "import", weights, "--out", root / f"imported-{seed}")
    return root


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of them that a test may modify."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


def swap(folder: Path, kind: str) -> tuple[Path, str]:
    """Replace seed 1's weights by seed 2's; return the run and the messages."""
    run, other = folder / f"{kind}-1", folder / f"{kind}-2"
    before, now = (files.sha256_file(path / SELECTED)[:12] for path in (run, other))
    assert before != now
    shutil.copy(other / SELECTED, run / SELECTED)
    return run, (
        f"error: {run / SELECTED} was replaced after {run} was completed: recorded is {before}, "
        f"the file is {now}; restore it, or import the file into a folder of its own: "
        "rft convert import FILE --out DIR"
    )


def evaluation(run: Path, data: Path) -> tuple[object, ...]:
    return (run, "--data", data, "--sets", "imagenet-val", "--workers", 0, "--device", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vanilla", "merged", "imported"])
def test_a_complete_run_records_its_weights(made, kind):
    run = made / f"{kind}-1"
    name = "training.json" if kind == "vanilla" else "provenance.json"
    kept = [path for path in (SELECTED, LAST) if (run / path).exists()]
    recorded = json.loads((run / name).read_text())["weights_sha256"]
    assert recorded == {path.name: files.sha256_file(run / path) for path in kept}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vanilla", "merged", "imported"])
def test_weights_of_another_run_are_refused(folder, kind, tiny_data, tmp_path, refused):
    out = ("--out", tmp_path / "out")
    call(evaluate_command, *evaluation(folder / f"{kind}-1", tiny_data))
    run, said = swap(folder, kind)
    assert refused(evaluate_command, *evaluation(run, tiny_data)) == said
    assert refused(evaluate_command, *evaluation(run / SELECTED, tiny_data)) == said
    masks = ("--data", tiny_data, "--set", "imagenet-a", "--masks", run, "--classes", "all")
    assert refused(localisation, run, *masks) == said
    assert refused(report_command, run, *out) == said
    assert refused(merge_command, "wise", folder / "zero-shot-0", run, *out) == said
    assert refused(merge_command, "uniform-soup", folder / "zero-shot-0", run, *out) == said
    file = ("--out", tmp_path / "m.safetensors")
    assert refused(convert, "export", run, "--to", "safetensors", *file) == said
    # the advice of the message
    call(convert, "import", run / SELECTED, "--out", tmp_path / "own")
    call(evaluate_command, *evaluation(tmp_path / "own", tiny_data))
    # a folder of an older rft did not record them
    tiny.forget_weights(run)
    call(evaluate_command, *evaluation(run, tiny_data))
    call(report_command, run, *out)


@pytest.mark.slow
def test_the_same_command_again_notices(folder, tiny_data, tiny_clip, tmp_path, refused, capsys):
    again: dict[str, Callable[[], tuple]] = {
        "merged": lambda: (
            merge_command,
            *("wise", folder / "zero-shot-0", folder / "vanilla-1", "--out", folder / "merged-1"),
        ),
        "imported": lambda: (
            convert,
            *("import", folder / "vanilla-1" / SELECTED, "--out", folder / "imported-1"),
        ),
        "vanilla": lambda: (
            train_command,
            *training("vanilla", tiny_data, tiny_clip, folder / "vanilla-1"),
            *("--optim.epochs", 1, "--seed", 1),
        ),
    }
    for kind, command in again.items():
        call(*command())
        assert "already" in capsys.readouterr().out
        run, said = swap(folder, kind)
        assert refused(*command()) == said
        assert run.is_dir()
    # as a run that others build on
    line = refused(
        train_command,
        *training("lp-ft", tiny_data, tiny_clip, tmp_path / "more"),
        *("--model.start", folder / "vanilla-1"),
    )
    assert line == said


@pytest.mark.slow
def test_the_last_weights_are_known_too(folder, tmp_path, refused):
    run = folder / "vanilla-1"
    shutil.copy(folder / "vanilla-2" / LAST, run / LAST)
    command = ("wise", folder / "zero-shot-0", run, "--out", tmp_path / "out")
    line = refused(merge_command, *command, "--end-weights", "last")
    assert f"{run / LAST} was replaced after {run} was completed" in line
    call(merge_command, *command)


@pytest.mark.slow
def test_weights_of_another_recipe_are_refused(folder, tiny_data, tmp_path, refused):
    """Also in a folder without a record of its weights."""
    run = folder / "vanilla-1"
    shutil.copy(folder / "zero-shot-0" / SELECTED, run / SELECTED)
    tiny.forget_weights(run)
    said = re.escape(
        f"error: {run}/config.json names recipe 'vanilla', but its weights were made by 'zero-shot'"
    )
    assert re.match(said, refused(evaluate_command, *evaluation(run, tiny_data)))
    out = ("--out", tmp_path / "out")
    assert re.match(said, refused(merge_command, "wise", folder / "merged-1", run, *out))


@pytest.mark.slow
def test_weights_that_are_gone_leave_a_run_finished(folder, tiny_data, tiny_clip, capsys):
    run = folder / "vanilla-1"
    shutil.rmtree(run / "checkpoints")
    options = ("--optim.epochs", 1, "--seed", 1)
    call(train_command, *training("vanilla", tiny_data, tiny_clip, run, *options))
    assert "already finished" in capsys.readouterr().out
