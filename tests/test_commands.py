"""`rft COMMAND`: its list, its child processes, and one line for a mistake or an interruption."""

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
import torch

from rft import cli, commands, entry
from rft.entry import main
from rft.storage import files
from tests import tiny

# the call made by the installed `rft`
START = "from rft.entry import main; main()"
EVERY = [
    *(one for one in commands.COMMANDS.values() if isinstance(one, commands.Command)),
    *commands.PACK.values(),
]


@pytest.fixture
def rft(monkeypatch, capsys):
    """Run `rft WORD...` in this process; return its exit code and output."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rft", *words])
        monkeypatch.delenv(commands.STARTED, raising=False)
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 0
        # it is set for the complete process, which continues with other tests
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


def test_the_list_begins_with_what_most_people_want(rft):
    lines = rft("--help")[1].splitlines()
    start = lines.index("Start here:")
    assert [line.split()[0] for line in lines[start + 1 : start + 3]] == ["photos", "predict"]
    assert "Try it without photos: rft photos --example" in lines
    assert sum(map(len, commands.GROUPS.values())) == len(commands.COMMANDS)


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
        (("--versoin",), "error: unknown option '--versoin'; did you mean '--version'?"),
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
    # it starts one rank per GPU by itself
    for ranks in (1, 8):
        assert cli.next_step(words, ranks=ranks) == "next: rft evaluate runs/a --data d"
    assert "torchrun" not in cli.next_step(words, on_gpus=True)
    verify = ["tools/verify_shards.py", "d/train", "--deep"]
    assert cli.next_step(verify) == "next: rft verify d/train --deep"
    pack = ["tools/shard_folder.py", "--source", "a b"]
    assert cli.next_step(pack) == "next: rft pack folder --source 'a b'"


@pytest.mark.parametrize(
    ("started", "words", "typed"),
    [
        ("rft train", ["/bin/rft", "vanilla"], ["rft", "train", "vanilla"]),
        ("rft pack set", ["rft", "--name", "a"], ["rft", "pack", "set", "--name", "a"]),
        ("rft reproduce", ["rft", "paper", "--out", "a"], ["rft", "reproduce", "--out", "a"]),
        # a stage of a plan, and a rank that rft started
        ("rft merge", ["rft merge", "wise"], ["rft", "merge", "wise"]),
        ("rft choose", ["/x/rft/merge/choose/__main__.py", "a"], ["rft", "choose", "a"]),
        ("rft train", ["/x/rft/train/__main__.py", "a"], ["rft", "train", "a"]),
        # a process of a plan that is a different command
        ("rft demo", ["/x/rft/train/__main__.py", "a"], ["rft", "train", "a"]),
        # Python itself, also through torchrun
        ("", ["/x/rft/train/__main__.py", "a"], ["python", "-m", "rft.train", "a"]),
        ("", ["tools/verify_shards.py", "a"], ["verify_shards.py", "a"]),
    ],
)
def test_a_record_has_the_command_as_it_was_typed(monkeypatch, started, words, typed):
    monkeypatch.setenv(commands.STARTED, started)
    monkeypatch.setattr(sys, "argv", words)
    assert files.provenance()["command"] == typed


@pytest.mark.parametrize(
    "words", [(), ("pack",), ("pack", "set"), ("convert",), ("index",), ("env",), ("merge", "wise")]
)
def test_every_command_has_help_all(rft, words):
    helps = [rft(*words, option) for option in ("--help", "--help-all")]
    assert helps[0] == helps[1]
    assert (helps[0][0], helps[0][2]) == (0, "")


def test_examples_of_a_help_can_be_pasted(rft, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    for words in (("index",), ("pack", "set")):
        lines = rft(*words, "--help")[1].splitlines()
        first = next(n for n, line in enumerate(lines) if line.startswith("rft "))
        example = "\n".join(lines[first:]).partition("\n╭")[0]
        for command in example.split("\n\n"):
            assert "\n" not in command.replace("\\\n", "").strip(), command
        # a line that begins with a dot would be kept apart from its sentence
        assert not any(line.startswith(".") for line in lines)


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
    every = [line for line in everything.splitlines() if cli.OPTION.match(line)]
    assert f"{len(every) - len(options)} more options" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *(("train",), ("evaluate",), ("convert",), ("convert", "export"), ("merge", "wise")),
        *(("verify",), ("report",), ("predict",), ("env",), ("pack", "folder")),
    ],
    ids=" ".join,
)
def test_help_fits_and_names_commands_as_they_were_started(rft, words, monkeypatch):
    for columns in (80, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, printed, errors = rft(*words, "--help")
        assert (code, errors) == (0, "")
        assert f"usage: rft {' '.join(words)} " in printed
        assert max(map(len, printed.splitlines())) <= columns
        # boxes keep their right border
        boxes = [line for line in printed.splitlines() if line.startswith(("│", "|"))]
        assert all(len(line) == len(boxes[0]) and line[-1] in "│|" for line in boxes)
        assert not re.search("python -m|torchrun|tools/[a-z]|{None}", printed)
        assert not re.search(r"rft\.(train|evaluate|merge|report|convert)\b", printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("predict", "--hmtl", "x"), "unknown option '--hmtl'; did you mean '--html'?"),
        (("photos", "a", "--epochs", "ten"), "--epochs is 'ten'; it must be a whole number"),
        (("predict", "a", "--top", "x"), "--top is 'x'; it must be a whole number"),
        (("photos", "a", "--test-share", "x"), "--test-share is 'x'; it must be a number"),
        (("env", "all"), "Unrecognized options: all"),
    ],
)
def test_a_mistake_in_an_option_names_it(rft, words, line):
    code, printed, errors = rft(*words)
    assert (code, printed) == (2, "")
    assert errors.startswith(f"error: {line}")
    assert len(errors.splitlines()) == 1


@pytest.mark.slow
def test_messages_name_commands_as_they_were_started(rft, tmp_path):
    from rft import recipes

    errors = rft("train", "wise-ft", "--data", "d", "--run-dir", str(tmp_path / "r"))[2]
    assert "not trained but merged: rft merge --help" in errors
    with pytest.raises(ValueError, match=r"python -m rft\.merge --help"):
        recipes.build("wise-ft")
    assert commands.by_name("python -m rft.train") == "python -m rft.train"


@pytest.mark.slow
def test_a_mistyped_option_is_answered_with_the_right_one(rft):
    code, _, errors = rft("train", "vanilla", "--loader.batchsize", "4")
    assert code == 2
    assert "did you mean --loader.batch-size?" in errors
    # an option with two names
    assert "did you mean --run-dir?" in rft("train", "vanilla", "--rundir", "r")[2]


# Ctrl-C while a module is imported: an event instead of a time
INTERRUPTING = """
import os, signal, sys

def hook(event, details):
    if event == "import" and details[0] == MODULE:
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(hook)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "words", "line"),
    [
        # before anything of a command is imported, while its libraries are, and below `cli.run`
        ("rft.cli", ("photos", "a b", "--out", "c"), "; to resume: rft photos 'a b' --out c"),
        ("torch", ("photos", "a b", "--out", "c"), "; to resume: rft photos 'a b' --out c"),
        ("torch", ("predict", "run", "a.png"), ""),
        ("webdataset", ("env",), ""),
    ],
)
def test_an_interruption_of_the_start_is_one_line(module, words, line):
    program = INTERRUPTING.replace("MODULE", repr(module)) + START
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.stderr == f"interrupted{line}\n"
    assert (done.returncode, done.stdout) == (130, "")


@pytest.mark.slow
def test_an_interruption_of_a_module_is_one_line():
    program = INTERRUPTING.replace("MODULE", "'torch'")
    program += "sys.argv = ['rft']\nimport rft\nimport rft.predict.command"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@contextlib.contextmanager
def training(run: Path, data: Path, clip: str) -> Iterator[subprocess.Popen[str]]:
    """Start a long training on two ranks; kill its remaining processes."""
    options = tiny.training("vanilla", data, clip, run, "--optim.epochs", 5000)
    process = start("train", "--ranks", "2", *options)
    try:
        yield process
    finally:
        # it ends its ranks, which are not in its process group
        process.terminate()
        process.communicate()


def wait_for(stream, text: str) -> str:
    """Read lines until one contains the text."""
    for line in stream:
        if text in line:
            return line
    raise AssertionError(f"{text!r} was never printed")


@pytest.mark.slow
@pytest.mark.program
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
@pytest.mark.program
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
@pytest.mark.program
def test_a_mistake_of_ranks_is_one_line(tmp_path, tiny_data, tiny_clip):
    options = tiny.training("vanilla", tiny_data, tiny_clip, tmp_path / "run", "--optim.lr", -1)
    process = start("train", "--ranks", "2", *options)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: ")


@pytest.mark.parametrize("option", ["-h", "--help", "--help-all"])
def test_help_starts_no_ranks_on_a_machine_with_several_gpus(monkeypatch, option):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([folder / "nvidia0"]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert entry._take_ranks(["object-mask-single-fill"]) == 8
    assert entry._take_ranks(["object-mask-single-fill", option]) == 1
