"""Stages: output, failures and signals."""

import os
import shlex
import signal
import sys

import pytest

from rft import commands, stages
from rft.merge import choose, command

pytestmark = pytest.mark.skipif(not stages.FORKS, reason="stages are new processes here")


def test_a_stage_is_a_process_of_its_own():
    read, write = os.pipe()
    assert stages.fork(lambda: os.write(write, str(os.getpid()).encode())) == 0
    os.close(write)
    with os.fdopen(read) as stream:
        assert int(stream.read()) != os.getpid()


@pytest.mark.parametrize("code", [0, 3, 75])
def test_its_exit_code_is_returned(code):
    assert stages.fork(lambda: sys.exit(code)) == code


def test_a_signal_that_ends_it_is_its_code():
    assert stages.fork(lambda: os.kill(os.getpid(), signal.SIGKILL)) == 128 + signal.SIGKILL


def test_signals_are_handled_as_before_when_it_has_ended():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stages.fork(lambda: None)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_stage_is_printed_by_the_name_that_the_plan_was_started_by(monkeypatch, capfd):
    words = ("-m", "rft.merge", "--help")
    stages.run_here("merge", words)
    printed = capfd.readouterr().out
    assert printed.startswith("\n$ python -m rft.merge --help\n")
    assert "usage: rft.merge" in printed
    monkeypatch.setenv(commands.STARTED, "rft photos")
    stages.run_here("merge", words)
    printed = capfd.readouterr().out
    assert printed.startswith("\n$ rft merge --help\n")
    assert "usage: rft merge" in printed


def test_a_mistake_is_the_one_line_of_the_stage(capfd):
    with pytest.raises(SystemExit) as stopped:
        stages.run_here("merge", ("-m", "rft.merge", "wize"))
    assert stopped.value.code == 2
    assert capfd.readouterr().err.splitlines() == [
        "error: unknown merge 'wize'; did you mean 'wise'?"
    ]


@pytest.mark.parametrize("name", ["train", "pack folder"])
def test_commands_are_found_by_their_words(name):
    assert stages.command_of(name.split()).about


def test_every_stage_of_a_plan_can_be_named():
    for words in (
        ("tools/shard_folder.py", "--x"),
        ("-m", "rft.merge.choose"),
        ("-m", "rft.train"),
    ):
        assert stages.command_of(commands.named(words)).module
    assert command.main
    assert choose.main


def test_a_long_command_is_continued_and_can_be_pasted(capsys):
    words = ["python", "-m", "rft.train", "vanilla", "--data", "my photos/out", "--seed", "0"]
    words += ["--run-dir", "a/long/name/of/a/folder/for/runs", "--ignore", *["'*.HEIC'"] * 9]
    stages.show(words)
    printed = capsys.readouterr().out
    assert printed.startswith("\n$ python -m rft.train vanilla ")
    lines = printed.strip().splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 80
    # an option and its value stay together
    assert not [line for line in lines if line.endswith(("--seed \\", "--run-dir \\"))]
    pasted = printed.removeprefix("\n$ ").replace("\\\n", "")
    assert shlex.split(pasted) == words
