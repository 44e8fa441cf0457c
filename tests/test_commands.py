"""`rft COMMAND`: what it lists, what it starts, and one line for a mistake or an interruption."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rft import cli, commands
from rft.entry import main
from tests import tiny

# what the installed `rft` does
START = "from rft.entry import main; main()"
EVERY = [
    *(one for one in commands.COMMANDS.values() if isinstance(one, commands.Command)),
    *commands.PACK.values(),
]


@pytest.fixture
def rft(monkeypatch, capsys):
    """Run `rft WORD...` in this process; return its exit code and what it printed."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rft", *words])
        monkeypatch.delenv(commands.STARTED, raising=False)
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 0
        # it is set for the whole of a process, which here goes on with other tests
        os.environ.pop(commands.STARTED, None)
        return code, *capsys.readouterr()

    return run


def start(*words: str, **options) -> subprocess.Popen[str]:
    """Start `rft WORD...` as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", START, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_commands_are_listed(rft, words):
    code, printed, errors = rft(*words)
    assert (code, errors) == (0, "")
    for name in [*commands.COMMANDS, *(f"pack {kind}" for kind in commands.PACK)]:
        assert f"  {name}" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_kinds_of_packing_are_listed(rft):
    for words in (("pack",), ("pack", "--help")):
        code, printed, _ = rft(*words)
        assert code == 0
        assert all(f"rft pack {kind}" in printed for kind in commands.PACK)


def test_help_imports_nothing_slow():
    program = (
        "import sys; sys.argv = ['rft', '--help']; from rft.entry import main; main(); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    modules = done.stdout.splitlines()[-1].split()
    assert "rft" in modules
    assert not {"torch", "numpy", "tyro", "rich", "fsspec", "pydantic"} & set(modules)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("trian",), "error: unknown command 'trian'; did you mean 'train'?"),
        (("pack", "fodler"), "error: unknown kind of pack 'fodler'; did you mean 'folder'?"),
        (("train", "--ranks", "two"), "error: --ranks is 'two'; it must be a whole number"),
        (("train", "--ranks=0"), "error: --ranks is '0'; it must be a whole number"),
        (("evaluate", "--ranks"), "error: --ranks is ''; it must be a whole number"),
    ],
)
def test_a_mistake_is_one_line(rft, words, line):
    code, printed, errors = rft(*words)
    assert (code, printed) == (2, "")
    assert errors.startswith(line)
    assert len(errors.splitlines()) == 1


def test_the_version(rft):
    import rft as package

    assert rft("--version")[1] == f"rft {package.__version__}\n"


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.module)
def test_every_command_is_there(one):
    # found, not imported: that takes seconds, and tests of each command do it
    assert importlib.util.find_spec(one.module) is not None
    tools = Path(__file__).parents[1] / "tools"
    assert not one.script or f"from {one.module} import main" in (tools / one.script).read_text()


def test_next_steps_have_the_name_that_was_used(monkeypatch):
    monkeypatch.delenv(commands.STARTED, raising=False)
    words = ["-m", "rft.evaluate", "runs/a", "--data", "d"]
    assert cli.next_step(words) == "next: python -m rft.evaluate runs/a --data d"
    assert "torchrun" in cli.next_step(words, on_gpus=True)
    monkeypatch.setenv(commands.STARTED, "rft train")
    # it starts a rank for each GPU by itself
    for ranks in (1, 8):
        assert cli.next_step(words, ranks=ranks) == "next: rft evaluate runs/a --data d"
    assert "torchrun" not in cli.next_step(words, on_gpus=True)
    verify = ["tools/verify_shards.py", "d/train", "--deep"]
    assert cli.next_step(verify) == "next: rft verify d/train --deep"
    pack = ["tools/shard_folder.py", "--source", "a b"]
    assert cli.next_step(pack) == "next: rft pack folder --source 'a b'"


@pytest.mark.slow
def test_help_has_what_people_need_and_help_all_the_rest(rft):
    code, printed, _ = rft("train", "--help")
    assert code == 0
    options = [line for line in printed.splitlines() if cli.OPTION.match(line)]
    assert 15 <= len(options) <= 25
    assert "--loader.batch-size" in printed
    assert "--log.wandb" not in printed
    assert "more options: --help-all" in printed
    code, everything, _ = rft("train", "--help-all")
    assert code == 0
    assert "--log.wandb" in everything
    # without boxes: what the tests catch has an encoding that has none
    every = re.findall(r"^ {2}(?:-h, )?--[a-z]", everything, re.MULTILINE)
    assert f"{len(every) - len(options)} more options" in printed


@pytest.mark.slow
def test_a_mistyped_option_is_answered_with_the_right_one(rft):
    code, _, errors = rft("train", "vanilla", "--loader.batchsize", "4")
    assert code == 2
    assert "did you mean --loader.batch-size?" in errors


@contextlib.contextmanager
def training(run: Path, data: Path, clip: str) -> Iterator[subprocess.Popen[str]]:
    """Start a training on two ranks that takes long; kill what is left of it."""
    options = tiny.training("vanilla", data, clip, run, "--optim.epochs", 5000)
    process = start("train", "--ranks", "2", *options)
    try:
        yield process
    finally:
        # it ends its ranks, which are no part of its process group
        process.terminate()
        process.communicate()


def wait_for(stream, text: str) -> str:
    """Read lines until one has the text."""
    for line in stream:
        if text in line:
            return line
    raise AssertionError(f"{text!r} was never printed")


@pytest.mark.slow
def test_two_ranks_are_started_and_an_interruption_is_one_line(tmp_path, tiny_data, tiny_clip):
    with training(tmp_path / "run", tiny_data, tiny_clip) as process:
        assert "2 x cpu" in wait_for(process.stdout, "2 x cpu")
        wait_for(process.stdout, "step ")
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate()
    assert process.returncode == 130
    assert errors == ""
    assert "(SIGINT); the same command resumes there" in printed.splitlines()[-1]
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.slow
def test_a_killed_rank_is_named(tmp_path, tiny_data, tiny_clip):
    with training(tmp_path / "run", tiny_data, tiny_clip) as process:
        wait_for(process.stdout, "step ")
        ranks = subprocess.run(
            ["pgrep", "--parent", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert len(ranks) == 2
        os.kill(int(ranks[-1]), signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == 2
    assert "was ended by SIGKILL" in errors.splitlines()[-1]
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_mistake_of_ranks_is_one_line(tmp_path, tiny_data, tiny_clip):
    options = tiny.training("vanilla", tiny_data, tiny_clip, tmp_path / "run", "--optim.lr", -1)
    process = start("train", "--ranks", "2", *options)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: ")
