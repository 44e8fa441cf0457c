"""How a command ends: a line and an exit code, whatever its streams and environment are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rft import cli, dist
from tests.tiny import environment


def fail() -> None:
    raise ValueError("a\x1b[2Jb\nc \u202ed \ud800 \u00e9")


def test_an_error_is_a_line_that_any_terminal_can_show(capsys):
    with pytest.raises(SystemExit):
        cli.run(fail)
    line = "error: a\\x1b[2Jb c \\u202ed \\ud800 \u00e9\n"
    assert capsys.readouterr().err == line


def test_warnings_and_names_are_text(capsys):
    cli.warn("x\x1b[31m\ny")
    cli.say("next: 'a\x07'\n  (b)")
    assert capsys.readouterr() == ("next: 'a\\x07'\n  (b)\n", "WARNING: x\\x1b[31m\\ny\n")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_is_said_on_the_other(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: pytest.fail("it ran"))
    assert stopped.value.code == 2
    assert f"error: {name} is closed" in "".join(capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "output", "code", "said"),
    [
        ("print('x')", "closed", 2, "error: stdout is closed"),
        ("print('x' * 10**6)", "unread", 1, ""),
        ("print('x')", "unread", 1, ""),
        ("print('x')", "full", 2, "error: cannot write to stdout: No space left"),
        ("print('x'); raise ValueError('y')", "unread", 2, "error: y"),
        ("print('x'); raise ValueError('y')", "full", 2, "error: y"),
        ("print('x'); raise SystemExit(75)", "full", 2, "error: cannot write to stdout"),
    ],
)
def test_streams_of_a_process(main, output, code, said):
    text = f"from rft import cli\ndef main():\n    {main}\ncli.run(main)"
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as unread, Path("/dev/full").open("wb") as full:  # noqa: PTH123
        result = subprocess.run(
            [sys.executable, "-c", text],
            env=environment(PYTHONUNBUFFERED=""),
            stdout={"closed": None, "unread": unread, "full": full}[output],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            preexec_fn=(lambda: os.close(1)) if output == "closed" else None,
        )
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == bool(said), result.stderr


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"RANK": "1"}, "RANK is '1'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "\u0661", "WORLD_SIZE": "2"}, "RANK is "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '9"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5'"),
        ({"LOCAL_WORLD_SIZE": "x\x1b"}, "LOCAL_WORLD_SIZE is 'x\\x1b'"),
        ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is '2'"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
    ],
)
def test_an_environment_that_torchrun_never_makes(monkeypatch, capsys, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        cli.run(dist.world_from_env)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert "in the environment; torchrun sets it to a whole number from" in line
    assert len(line) < 300


@pytest.mark.slow
def test_ranks_that_cannot_meet(monkeypatch):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid"}
    for name, value in {**variables, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    group = dist.process_group(dist.world_from_env(), dist.torch.device("cpu"), timeout=1)
    said = r"^the ranks cannot meet at nowhere\.invalid:1: [^\n]*$"
    with pytest.raises(OSError, match=said), group:
        pytest.fail("they met")
