"""Log lines: time, rank and level, their streams, and terminal output."""

import contextlib
import importlib.util
import logging
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from rich.cells import cell_len

from rft import log
from rft.progress import Bar, progress
from tests import tiny
from tests.tiny import unstamped

HOSTILE = "x\x1b[31m\ny [b]z[/b] 100% :car: \u202ed \ud800"
SHOWN = "x\\x1b[31m\\ny [b]z[/b] 100% :car: \\u202ed \\ud800"
STAMPED = re.compile(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \[(\d+)\] (INFO|WARNING): \S.*")

here = logging.getLogger("rft.tests")


def test_information_goes_to_stdout_and_all_else_to_stderr(capsys):
    here.debug("not shown")
    here.info("a")
    here.info("b", extra=log.ASIDE)
    here.warning("c")
    here.error("d")
    printed = capsys.readouterr()
    assert re.fullmatch(r"20\d\d(-\d\d){2} \d\d(:\d\d){2} \[0\] INFO: a\n", printed.out)
    assert unstamped(printed.err) == "b\nWARNING: c\nERROR: d\n"


def test_lines_of_others_are_escaped_and_lines_below_stay_lines(capsys):
    here.warning(HOSTILE, extra={"lines": [f"  {HOSTILE}", "  ..."]})
    assert unstamped(capsys.readouterr().err) == f"WARNING: {SHOWN}\n  {SHOWN}\n  ...\n"


def test_a_wrong_call_of_a_library_ends_no_command(capsys):
    logging.getLogger("other").warning("%d of", "two")
    assert unstamped(capsys.readouterr().err) == "WARNING: %d of ('two',)\n"


def test_what_all_ranks_meet_is_shown_by_the_first(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    here.warning("of all")
    here.warning("of this one", extra=log.EVERY_RANK)
    with progress("work", "things", 1) as advance:
        advance(1)
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.endswith("[3] WARNING: of this one")


def test_a_second_setup_changes_nothing(capsys):
    log.setup()
    here.info("a")
    assert capsys.readouterr().out.count("a\n") == 1


@pytest.mark.slow
def test_an_older_import_of_the_module_shows_no_line_twice(capsys):
    """As in a process that reimports rft (tools/plant_faults.py)."""
    spec = importlib.util.find_spec("rft.log")
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    older.setup()
    log.setup()
    here.info("a")
    assert capsys.readouterr().out.count("a\n") == 1


def test_a_library_that_logs_or_warns_is_not_swallowed():
    script = (
        "import logging, warnings; from rft import cli\n"
        "def main():\n"
        "    warnings.warn('of\\na\\x1b\\n library')\n"
        "    logging.getLogger('other').warning('of %s', 'https://me:secret@host/x')\n"
        "    logging.basicConfig()\n"
        "    logging.getLogger('rft.x').info('once')\n"
        "cli.run(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=tiny_environment(), capture_output=True, text=True
    )
    first, second = done.stderr.splitlines()
    assert STAMPED.fullmatch(first)
    assert STAMPED.fullmatch(second)
    assert unstamped(first) == "WARNING: UserWarning: of a\\x1b library (<string>:3)"
    assert re.fullmatch(r"WARNING: of https://\S+", unstamped(second))
    assert "secret" not in second
    assert unstamped(done.stdout) == "once\n"
    assert "once" not in done.stderr


@pytest.mark.slow
def test_without_a_command_warnings_are_pythons():
    script = "import logging, rft.progress; log = logging.getLogger('rft.x'); log.info('i'); "
    done = subprocess.run(
        [sys.executable, "-c", f"{script}log.warning('w')"],
        env=tiny_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("", "w\n")


@pytest.mark.slow
def test_a_full_disk_ends_a_command_that_logs():
    script = (
        "import logging; from rft import cli; cli.run(lambda: logging.getLogger('rft').info('x'))"
    )
    with open("/dev/full", "w") as full:  # noqa: PTH123 (a device)
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=tiny_environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: [Errno 28] No space left on device")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_terminal_shows_time_level_and_text_as_they_are(terminal):
    with terminal(80) as drawn:
        here.info(f"{HOSTILE} {'long ' * 30}")
        here.warning("w", extra={"lines": ["  [i]below[/i]"]})
    first, second, third = drawn().splitlines()
    # one line, which the terminal wraps, so that it can be copied
    assert re.fullmatch(rf"\d\d:\d\d:\d\d INFO {re.escape(SHOWN)} (long ?){{30}}\s*", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING w", second)
    assert third == "  [i]below[/i]"


@pytest.mark.slow
def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    with terminal(80) as drawn:
        monkeypatch.setenv("TERM", "dumb")
        here.info("a")
        with progress("work", "things", 1) as advance:
            advance(1)
    first, second = drawn().splitlines()
    assert STAMPED.fullmatch(first)
    assert second.endswith("0:00:00 left")


@pytest.mark.slow
def test_lines_stay_above_a_bar(terminal):
    with terminal(80) as drawn:
        with progress(f"[b]{HOSTILE[:8]}[/b]", "things", 2) as advance:
            advance(1, 2**20)
            here.info("between")
            advance(1, 2**20)
        here.info("after")
    lines = drawn().splitlines()
    between = next(line for line in lines if "between" in line)
    assert re.fullmatch(r"\s*\d\d:\d\d:\d\d INFO between\s*", between)
    assert "[b]x\\x1b[31m\\ny[/b]"[:12] in " ".join(lines)
    assert max(map(cell_len, lines)) <= 80
    assert any("2/2" in line and "0:00:00" in line for line in lines)
    assert log.Handler.above is None


def test_the_time_left_is_of_what_this_start_did(monkeypatch):
    now = [50.0]
    bar = Bar("work", total=1000, done=900)
    bar.get_time = lambda: now[0]
    for task in bar.tasks:  # the clock started before
        task._get_time = bar.get_time
        task.start_time = 50.0
    assert bar.left == "-:--:--"
    now[0] = 90.0
    bar.show(920)
    assert bar.left == "0:02:40"  # 2 s a step, 80 steps
    # an evaluation lengthens the rest
    now[0] = 50 + 40 * 40.0
    bar.show(940)
    assert bar.left == "0:40:00"
    bar.show(1000)
    assert bar.left == "0:00:00"


def test_the_speed_is_of_all_that_was_done_however_often_it_was_counted():
    now = [0.0]
    bar = Bar("work", total=4000)
    bar.get_time = lambda: now[0]
    for task in bar.tasks:
        task._get_time, task.start_time = bar.get_time, 0.0
    for done in range(1, 2001):  # a slow start, and then 1,990 at once
        now[0] = min(done, 10) * 10.0
        bar.show(done)
    assert bar.speed == 20
    assert bar.left == "0:01:40"


def test_a_line_now_and_then_and_one_at_the_end(capsys, monkeypatch):
    with progress("work", "things", 1000) as advance:
        for _ in range(999):
            advance(1)
        assert capsys.readouterr().out == ""
        monkeypatch.setattr("rft.progress.SECONDS_PER_LINE", 0.0)
        time.sleep(0.01)
        advance(0)
        advance(1)
    first, last = unstamped(capsys.readouterr().out).splitlines()
    rate = r"[\d,]+(\.\d)? things/s"
    assert re.fullmatch(rf"work: 999 of 1,000 things, {rate}, \d:\d\d:\d\d left", first)
    assert re.fullmatch(rf"work: 1,000 of 1,000 things, {rate}, 0:00:00 left", last)


def tiny_environment() -> dict[str, str]:
    return tiny.environment(TERM="xterm")


@pytest.mark.slow
def test_every_line_of_a_training_has_time_rank_and_level(tiny_data, tiny_clip, tmp_path):
    words = tiny.training("vanilla", tiny_data, tiny_clip, tmp_path / "run", "--device", "cpu")
    done = tiny.torchrun(2, "rft.train", *words)
    lines = done.stdout.splitlines()
    results = [line for line in lines if line.startswith(("next: ", "  ("))]
    logged = [line for line in lines if line not in results]
    assert results
    assert len(logged) >= 4
    assert {STAMPED.fullmatch(line)[1] for line in logged} == {"0"}
    assert any("] INFO: run finished: " in line for line in logged)
    assert all(STAMPED.fullmatch(line) for line in done.stderr.splitlines() if "rft" in line)


@pytest.mark.slow
def test_a_training_on_a_terminal_of_80_columns(tiny_data, tiny_clip, tmp_path):
    words = tiny.training("vanilla", tiny_data, tiny_clip, tmp_path / "run", "--device", "cpu")
    words += ["--log.every-steps", "1"]
    code, text = on_a_terminal("rft.train", *words)
    assert code == 0, text
    assert re.search(r"\d\d:\d\d:\d\d INFO step \d+/\d+  held-out", text)
    assert re.search(r"\d\d:\d\d:\d\d INFO run finished: ", text)
    assert re.search(r"vanilla [━╸╺ ]+ +\d+/\d+ \d:\d\d:\d\d", text)
    assert "next: python -m rft.evaluate" in text


@pytest.mark.slow
def test_a_mistake_on_a_terminal_is_a_line_without_colours():
    code, text = on_a_terminal("rft.train", "vanilla", "--nope", "1")
    assert (code, text) == (2, "error: Unrecognized options: --nope, 1 (--help tells more)\r\n")


def on_a_terminal(*module_and_options: str) -> tuple[int, str]:
    """The exit code of a module, and its output on a terminal of 80 columns."""
    master, slave = pty.openpty()
    variables = tiny_environment() | {"COLUMNS": "80", "LINES": "30"}
    command = [sys.executable, "-m", *module_and_options]
    with subprocess.Popen(command, env=variables, stdout=slave, stderr=slave) as process:
        os.close(slave)
        drawn = b""
        with contextlib.suppress(OSError):  # how Linux reports that the other end is closed
            while piece := os.read(master, 100_000):
                drawn += piece
    os.close(master)
    return process.returncode, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
