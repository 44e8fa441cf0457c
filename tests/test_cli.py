"""How a command ends: one line and an exit code, for any streams and environment."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tiny_world import environment
from rft import cli, commands, dist
from rft.convert import command as convert_command
from rft.merge import command as merge_command
from rft.packing.commands import ood as ood_command
from rft.predict import command as predict_command
from tests.tiny import unstamped


def fail() -> None:
    raise ValueError("a\x1b[2Jb\nc \u202ed \ud800 \u00e9")


def test_an_error_is_a_line_that_any_terminal_can_show(capsys):
    with pytest.raises(SystemExit):
        cli.run(fail)
    line = "error: a\\x1b[2Jb c \\u202ed \\ud800 \u00e9\n"
    assert capsys.readouterr().err == line


def test_notes_of_an_error_are_lines_below_it(capsys):
    def fail_with_advice() -> None:
        error = ValueError("a")
        error.add_note("b\nc")
        error.add_note("d")
        raise error

    with pytest.raises(SystemExit):
        cli.run(fail_with_advice)
    assert capsys.readouterr().err == "error: a\n  b\\nc\n  d\n"


def test_warnings_and_names_are_text(capsys):
    logging.getLogger("rft.x").warning("x\x1b[31m\ny [b]z[/b] 100% :car:")
    cli.say("next: 'a\x07'\n  (b)")
    printed = capsys.readouterr()
    assert printed.out == "next: 'a\\x07'\n  (b)\n"
    assert unstamped(printed.err) == "WARNING: x\\x1b[31m\\ny [b]z[/b] 100% :car:\n"


@pytest.mark.parametrize(
    ("stopped", "again", "line"),
    [
        (KeyboardInterrupt(), "", "interrupted"),
        (KeyboardInterrupt(), "rft photos a", "interrupted; to resume: rft photos a"),
        # a stage of a plan was, and has printed its own line
        (SystemExit(130), "rft photos a", "stopped; to resume: rft photos a"),
        (SystemExit(75), "rft photos a", "stopped; to resume: rft photos a"),
        (SystemExit(130), "", ""),
        (SystemExit(0), "rft photos a", ""),
    ],
)
def test_an_interruption_is_a_line_with_what_resumes(monkeypatch, capsys, stopped, again, line):
    def main() -> None:
        print("before")
        raise stopped

    # the plan of a stage prints the line, and of several ranks the first
    for silent in ({}, {commands.STAGE: "1"}, {"RANK": "1"}):
        monkeypatch.delenv(commands.STAGE, raising=False)
        for name, value in silent.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            cli.run(main, ranks=True, again=again)
        assert ended.value.code == (stopped.args or (130,))[0]
        printed = capsys.readouterr()
        assert printed.out == "before\n"
        assert printed.err == (f"{line}\n" if line and not silent else "")


@pytest.mark.slow
def test_an_error_comes_after_what_was_printed_before_it():
    text = "from rft import cli\ndef main():\n    print('x'); raise ValueError('y')\ncli.run(main)"
    done = subprocess.run(
        [sys.executable, "-c", text],
        env=environment(PYTHONUNBUFFERED=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.stdout == "x\nerror: y\n"


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
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is '1'"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is '1'"),
        ({"LOCAL_RANK": "1", "RANK": "1"}, "RANK is '1'"),
        ({"LOCAL_RANK": "3", "WORLD_SIZE": "2", "RANK": "1"}, "LOCAL_RANK is '3'"),
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
        cli.run(dist.world_from_env, ranks=True)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert "in the environment; torchrun sets it to a whole number from" in line
    assert len(line) < 300


def test_ranks_that_are_told_no_meeting_place(monkeypatch):
    """As if RANK and WORLD_SIZE were left over from an srun."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    world = dist.World(rank=0, size=4, local_rank=0, local_size=1)
    said = r"^WORLD_SIZE is 4, but .*: start with torchrun, or unset WORLD_SIZE and RANK \(docs"
    group = dist.process_group(world, dist.torch.device("cpu"), timeout=1)
    with pytest.raises(ValueError, match=said), group:
        pytest.fail("they met")


@pytest.mark.slow
def test_ranks_that_cannot_meet(monkeypatch):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid"}
    for name, value in {**variables, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    group = dist.process_group(dist.world_from_env(), dist.torch.device("cpu"), timeout=1)
    said = r"^the ranks cannot meet at nowhere\.invalid:1: [^\n]*$"
    with pytest.raises(OSError, match=said), group:
        pytest.fail("they met")


@pytest.mark.parametrize(
    ("columns", "terminals", "kept"),
    [
        *((columns, [], "40") for columns in ("1", "4", "39")),
        *((columns, [], None) for columns in ("0", "x", "\u00b2", "-5", "10000", "9" * 5000, "")),
        *((columns, [3], columns) for columns in ("40", "9999")),
        *[(None, [], None), (None, [80], None), (None, [3], "40"), (None, [0, 3, 80], "40")],
        *[(None, [0], None), ("x", [4], "40"), ("30", [80], "40")],
    ],
)
def test_no_terminal_is_too_narrow_or_too_wide(monkeypatch, columns, terminals, kept):
    """Below 5 columns tyro's --help never ends; with 10^9, a single line has gigabytes."""

    def size(stream: int) -> os.terminal_size:
        if stream >= len(terminals):
            raise OSError("no terminal")
        return os.terminal_size((terminals[stream], 24))

    monkeypatch.setattr(os, "get_terminal_size", size)
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, columns or "")
        if columns is None:
            monkeypatch.delenv(name)
    found: list[str | None] = []
    cli.run(lambda: found.append(os.environ.get("COLUMNS")))
    assert found == [kept]


RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("changes", "quiet"),
    [
        ({}, True),
        ({"TORCHELASTIC_ERROR_FILE": "{folder}/error.json"}, True),
        # left over in a shell, so no other process prints the line
        ({"TORCHELASTIC_ERROR_FILE": "{folder}/gone/error.json"}, False),
        *(({"TORCHELASTIC_ERROR_FILE": path}, False) for path in ("error.json", "")),
        ({"TORCHELASTIC_ERROR_FILE": None}, True),
        ({"TORCHELASTIC_RUN_ID": None}, False),
        *(({name: None}, False) for name in RANK),
        *(({"LOCAL_RANK": value}, False) for value in ("0", "2", "-1", "x", "", "9" * 5000)),
        *[({"RANK": "4"}, False), ({"WORLD_SIZE": "1"}, False), ({"RANK": "0"}, False)],
    ],
)
@pytest.mark.parametrize("ranks", [True, False])
def test_a_mistake_is_silent_only_where_another_rank_prints_it(
    monkeypatch, capsys, tmp_path, changes, quiet, ranks
):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", **RANK, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value.format(folder=tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.run(fail, ranks=ranks)
    assert bool(capsys.readouterr().err) == (not (quiet and ranks))


def test_missing_arguments_are_named_with_their_help(refused):
    line = refused(predict_command)
    assert line.startswith("error: missing: RUN: Run folder, weights file ")
    assert "required" not in line
    line = refused(convert_command, "export")
    assert "error: missing: PATH: Run folder (its selected model" in line
    assert re.search(r"file; --to \{open-clip,[^:}]*\}: ", line), line
    assert line.endswith("file to write (see --help)")
    # tyro wraps the choices of one, and the last word of another
    line = refused(ood_command, "--source", "x")
    sets = "imagenet-v2,imagenet-r,imagenet-sketch,objectnet, imagenet-a"
    assert f"missing: --benchmark [{{{sets}}} [...]]: Which benchmarks; " in line
    line = refused(merge_command, "wise", "a")
    assert ".safetensors file; --out PATH: Run folder to create" in line
