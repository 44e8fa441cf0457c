"""The `next:` commands can be pasted: they parse, and small ones run."""

import contextlib
import io
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import tiny_world
from rft import cli
from rft import next_steps as commands
from rft.evaluate import command as evaluate_command
from rft.merge import command as merge_command
from rft.report import command as report_command
from rft.sets import TEST_SETS
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import Manifest
from rft.train import command as train_command
from tests import test_tools
from tests.report.make_runs import edit, make_run
from tests.tiny import call

pytestmark = pytest.mark.slow  # together

PARSERS = {
    "rft.train": train_command.parse_command,
    "rft.evaluate": lambda options: cli.parse(evaluate_command.Arguments, args=options),
    "rft.report": lambda options: cli.parse(report_command.Arguments, args=options),
}
COMMANDS = {"rft.evaluate": evaluate_command, "rft.report": report_command}
SETS = ("imagenet-val", "imagenet-r", "imagenet-a")


def next_words(printed: str, label: str = "next") -> list[str]:
    """The words of the single next command that was printed, without `python` or torchrun."""
    (line,) = [line for line in printed.splitlines() if line.startswith(f"{label}: ")]
    launcher, *words = shlex.split(line.removeprefix(f"{label}: "))
    assert launcher in ("python", "torchrun")
    return words[words.index("-m") + 1 :] if "-m" in words else words


def parsed(words: list[str]):
    """The options as the command's own parser reads them."""
    module, *options = words
    return PARSERS[module](options)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), min_size=1)))
def test_words_come_back_from_a_shell(words):
    line = cli.next_step(words)
    assert "\n" in line or shlex.split(line) == ["next:", "python", *words]


def test_what_is_not_known_is_explained_below():
    line, note = cli.next_step(["x", "URL"], ranks=3, unknown={"URL": "of it"}).splitlines()
    assert (line, note) == ("next: torchrun --nproc_per_node 3 x URL", "  (URL: of it)")


def seed_line(runs: list[Path]) -> list[str]:
    return [str(path) for path in commands.with_seeds(runs, "results.json")]


def test_the_other_seeds_of_a_run_come_along(tmp_path):
    ours = [make_run(tmp_path, "no-mask", seed, optim={"lr": 1}) for seed in (0, 1, 2)]
    make_run(tmp_path, "vanilla", 1, optim={"lr": 1})
    make_run(tmp_path, "no-mask", 3, optim={"lr": 2})
    make_run(tmp_path, "no-mask", 4, optim={"lr": 1}, percent=(1, 2))
    (make_run(tmp_path, "no-mask", 5, optim={"lr": 1}) / "results.json").unlink()
    (make_run(tmp_path, "no-mask", 6, optim={"lr": 1}) / "config.json").write_text("[")
    shutil.copytree(ours[0], tmp_path / "seed0-again")
    (tmp_path / "link").symlink_to(ours[1], target_is_directory=True)
    (tmp_path / "notes.txt").write_text("mine")
    assert sorted(Path(path).resolve() for path in seed_line([ours[2]])) == ours
    assert seed_line([ours[2]])[0] == str(ours[2])
    assert seed_line([tmp_path / "notes.txt"]) == [str(tmp_path / "notes.txt")]


def test_seeds_trained_on_other_data_stay_apart(tmp_path):
    runs = [make_run(tmp_path, seed=seed) for seed in range(3)]
    for run, sha256 in zip(runs, "aab", strict=True):
        training = {"steps": 1, "best_step": 1, "world_size": 1, "manifest_sha256": 64 * sha256}
        (run / "training.json").write_text(json.dumps(training))
    assert commands.with_seeds(runs[:1], "training.json") == runs[:2]
    edit(runs[1] / "config.json", recipe="no-mask")
    assert commands.with_seeds(runs[:1], "training.json") == runs[:1]


def test_sets_are_those_of_the_data_root(tmp_path, tiny_data):
    assert commands.test_sets(str(tiny_data), "imagenet-train") == SETS
    assert commands.test_sets("", "imagenet-train") == TEST_SETS
    assert commands.test_sets("s3://***@bucket", "imagenet-train") == TEST_SETS
    # other sets of any name are listed
    line = commands.evaluation([tmp_path], str(tiny_data), "mine")
    assert line.endswith(f" --sets {' '.join(sorted(SETS))}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    line, note = commands.evaluation([tmp_path], str(tmp_path), "mine").splitlines()
    assert line.endswith(" --sets SET")
    assert note.startswith("  (SET: ")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "manifest.json").write_text("{}")
    assert commands.evaluation([tmp_path], str(tmp_path), "mine").endswith(" --sets test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data, tiny_clip) -> tuple[Path, str]:
    """A working folder whose names have spaces, and the last lines of its last training."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_data, root / "my data")
    options = ("--data", "my data", "--scale", "miniature", "--model.clip", tiny_clip)
    options += ("--loader.held-out", 8, "--loader.batch-size", 4, "--split-seed", 0)
    printed = io.StringIO()
    with contextlib.chdir(root), contextlib.redirect_stdout(printed):
        for recipe, seed in (("zero-shot", 0), ("vanilla", 0), ("vanilla", 1)):
            epochs = () if recipe == "zero-shot" else ("--optim.epochs", 1)
            run = ("--run-dir", f"my runs/{recipe}-{seed}", "--seed", seed)
            call(train_command, recipe, *options, *epochs, *run)
    return root, printed.getvalue().rpartition("run finished")[2]


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it to work in."""
    shutil.copytree(trained[0], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def follow(printed: str, capsys) -> str:
    """Run the next command as printed; return its output."""
    module, *options = next_words(printed)
    fewer = ("--workers", 0) if module == "rft.evaluate" else ()
    capsys.readouterr()
    call(COMMANDS[module], *options, *fewer)
    return capsys.readouterr().out


def test_from_training_to_the_report(trained, folder, capsys):
    printed = trained[1]
    evaluated = parsed(next_words(printed))
    runs = [Path(f"my runs/vanilla-{seed}") for seed in (1, 0)]
    assert list(evaluated.checkpoints) == runs
    assert (evaluated.data, evaluated.sets) == ("my data", SETS)
    printed = follow(printed, capsys)
    assert list(parsed(next_words(printed)).runs) == runs
    assert "vanilla" in follow(printed, capsys)
    assert (folder / "report" / "index.html").is_file()
    # one of them again: the report has both
    call(evaluate_command, runs[1], "--data", "my data", "--sets", *SETS, "--workers", 0)
    assert list(parsed(next_words(capsys.readouterr().out)).runs) == runs[::-1]


ENDS = ("my runs/zero-shot-0", "my runs/vanilla-1")
MERGES = {
    "wise-ft-0.6": ("wise", *ENDS, "--alpha", 0.3, 0.6),
    "uniform-soup": ("uniform-soup", *ENDS),
    "greedy-soup": ("greedy-soup", *ENDS, "--data", "my data", "--workers", 0),
}


@pytest.mark.parametrize("made", MERGES)
def test_from_a_merge_to_the_report(folder, capsys, made):
    for _ in range(2):  # created now, and existing before
        capsys.readouterr()
        call(merge_command, *MERGES[made], "--out", "my runs/made")
        printed = capsys.readouterr().out
        evaluated = parsed(next_words(printed))
        assert (evaluated.data, evaluated.sets) == ("my data", SETS)
    printed = follow(printed, capsys)
    assert parsed(next_words(printed)).runs == evaluated.checkpoints
    assert made in follow(printed, capsys)


def run_tool(tool: str, *arguments: object, capsys) -> str:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"elsewhere/{tool}.py", *map(str, arguments)])
        cli.run(test_tools.load(tool))
    return capsys.readouterr().out


def test_the_packing_tools(tmp_path, capsys):
    tiny_world.write_images(tmp_path / "my images", "imagenet-train", 3)
    tiny_world.write_images(tmp_path / "my images", "imagenet-val", 2)
    tiny_world.write_images(tmp_path / "my images", "imagenet-r", 2)
    classes = tmp_path / "classes.json"
    labels = tiny_world.LABELS
    document = {"ids": labels.ids, "names": labels.names, "templates": labels.templates}
    classes.write_text(json.dumps(document))
    assert LabelSpace.load(str(classes)) == labels
    source, out = tmp_path / "my images", tmp_path / "my shards"
    options = ("--out", out, "--workers", 1, "--classes", classes)
    imagenet = ("shard_imagenet", "--source", source / "imagenet", *options)

    config = parsed(next_words(run_tool(*imagenet, capsys=capsys))).config
    assert (config.recipe, config.data) == ("object-mask-single-fill", str(out))
    # the defaults hold out 10,240 images, and this set has fewer
    assert config.scale == "small"
    with pytest.MonkeyPatch.context() as patch:
        large = SimpleNamespace(samples=10_240 + 512, classes=("a", "b"))
        patch.setattr(Manifest, "load", lambda _: large)
        assert "--scale" not in commands.training("data")
    evaluated = parsed(next_words(run_tool(*imagenet, "--splits", "val", capsys=capsys)))
    assert (evaluated.data, evaluated.sets) == (str(out), ("imagenet-val",))
    ood = ("shard_ood", "--benchmark", "imagenet-r", "--source", source, *options)
    evaluated = parsed(next_words(run_tool(*ood, capsys=capsys)))
    assert (evaluated.data, evaluated.sets) == (str(out), ("imagenet-r",))

    own = ("shard_folder", "--source", source / "imagenet" / "train", *options)
    printed = run_tool(*own, capsys=capsys)
    config = parsed(next_words(printed)).config
    assert (config.data, config.train_set, config.scale) == (str(out), "train", "small")
    evaluated = parsed(next_words(printed, "then"))
    assert [str(path) for path in evaluated.checkpoints] == [config.run]
    assert (evaluated.data, evaluated.sets) == (str(out), ("test",))

    index = tmp_path / "index" / "imagenet-val"
    shards = out / "imagenet-val" / "000000.tar"
    words = next_words(
        run_tool("index_shards", shards, "--out", index, "--classes", classes, capsys=capsys)
    )
    assert words == ["elsewhere/verify_shards.py", str(index), "--deep"]
