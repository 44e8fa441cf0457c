"""A stopped run leaves a checkpoint; the same command ends with the same weights."""

import json
import os
import signal
import subprocess
import sys

import filelock
import pytest

from rft.start import STOPPED
from rft.train import loop, run, stop
from rft.train.stop import StopRequest
from tests.tiny import weights

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


def at_step(step: int, monkeypatch, action) -> None:
    """Run an action in the middle of a step."""
    whole = loop.accumulate_gradients

    def acting(job, module, batch, at, *rest):
        if at == step:
            action()
        return whole(job, module, batch, at, *rest)

    monkeypatch.setattr(loop, "accumulate_gradients", acting)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", *SIGNALS], ids=str)
def test_it_stops_after_the_step_with_a_checkpoint(
    three_epochs, tmp_path, monkeypatch, capsys, how
):
    stop_file = tmp_path / "stop"
    handlers = [signal.getsignal(number) for number in SIGNALS]

    def ask():
        if how == "file":
            stop_file.touch()
        else:
            os.kill(os.getpid(), how)
            os.kill(os.getpid(), how)  # torchrun repeats it

    with monkeypatch.context() as patch:
        at_step(6, patch, ask)
        with pytest.raises(SystemExit) as stopped:
            three_epochs("run", "--cluster.stop-file", str(stop_file))
    assert stopped.value.code == STOPPED == 75
    reason = str(stop_file) if how == "file" else how.name
    said = capsys.readouterr().out
    assert f"stopped after step 7 of 30 ({reason}); the same command resumes there" in said
    folder = tmp_path / "run"
    assert not (folder / "training.json").exists()
    assert json.loads((folder / "progress.json").read_text())["step"] == 7
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["lr"] > 0) == (7, True)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers

    stop_file.unlink(missing_ok=True)
    three_epochs("run", "--cluster.stop-file", str(stop_file))
    assert "resuming after step 7" in capsys.readouterr().out
    assert weights(folder) == weights(three_epochs("calm"))


@pytest.mark.slow
def test_a_stop_in_the_last_step_is_the_end(three_epochs, tmp_path, monkeypatch):
    at_step(29, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert (three_epochs() / "training.json").exists()


@pytest.mark.slow
def test_a_stop_before_the_first_step_leaves_nothing_to_go_on_from(three_epochs, tmp_path, capsys):
    stop_file = tmp_path / "stop"
    stop_file.touch()
    with pytest.raises(SystemExit) as stopped:
        three_epochs("run", "--cluster.stop-file", str(stop_file))
    assert stopped.value.code == STOPPED
    assert "stopped after step 0 of 30" in capsys.readouterr().out
    assert not list(tmp_path.glob("run/checkpoints/*.pt"))


def test_what_the_shell_ignores_stays_ignored():
    # nohup ignores SIGHUP on purpose: the run must survive the terminal
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest("") as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.reason == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_stops_when_its_launcher_is_gone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with StopRequest("") as request:
        assert request.reason == ""
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert request.reason == "the process that started this one is gone"
    # a run started by hand survives the user's logout
    monkeypatch.undo()
    with StopRequest("") as request:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert request.reason == ""


def test_what_was_asked_once_stays_asked(tmp_path):
    stop_file = tmp_path / "stop"
    with StopRequest(str(stop_file)) as request:
        assert request.reason == ""
        stop_file.touch()
        assert request.reason == str(stop_file)
        stop_file.unlink()
        assert request.reason == str(stop_file)


def test_a_second_ctrl_c_of_a_person_ends_it_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    with StopRequest("") as request:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.1  # torchrun's own
        os.kill(os.getpid(), signal.SIGINT)
        assert request.reason == "SIGINT"
        now[0] += stop.SECONDS_TO_WONDER
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


HOLD = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
input()
"""


@pytest.fixture
def other_job(tmp_path):
    """A second process that is in the run folder."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.slow
def test_a_second_job_is_refused(three_epochs, other_job, capsys):
    with pytest.raises(SystemExit) as stopped:
        three_epochs("run", "--cluster.lock-wait", "0.5")
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert "waiting up to 0.5 s for another job to leave" in output.out
    assert "another job is writing" in output.err
    assert len(output.err.splitlines()) == 1


@pytest.mark.slow
def test_a_job_that_is_stopped_while_it_waits_says_so(three_epochs, other_job, monkeypatch, capsys):
    monkeypatch.setattr(run.log, "info", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        three_epochs("run", "--cluster.lock-wait", "3600")
    assert stopped.value.code == 2
    assert "error: stopped (SIGTERM) while another job was writing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_waits_for_another_that_leaves(three_epochs, other_job, monkeypatch):
    # its log before it waits
    monkeypatch.setattr(run.log, "info", lambda _: other_job.kill() or other_job.wait())
    assert (three_epochs() / "training.json").exists()
    assert other_job.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_that_the_other_job_finished_is_left_alone(
    three_epochs, tmp_path, monkeypatch, capsys
):
    folder = three_epochs()
    summary = (folder / "training.json").read_bytes()
    (folder / "training.json").unlink()
    lock = filelock.FileLock(folder / ".lock")
    lock.acquire()

    def finish(_):
        (folder / "training.json").write_bytes(summary)
        lock.release()

    monkeypatch.setattr(run.log, "info", finish)
    capsys.readouterr()
    three_epochs()
    assert "run already finished" in capsys.readouterr().out
    assert (folder / "training.json").read_bytes() == summary


@pytest.mark.slow
def test_a_run_that_the_other_job_began_keeps_its_configuration(
    three_epochs, tmp_path, monkeypatch, capsys
):
    folder = three_epochs()
    (folder / "training.json").unlink()
    before = (folder / "config.json").read_bytes()
    begun = folder.rename(tmp_path / "begun")
    folder.mkdir()
    lock = filelock.FileLock(folder / ".lock")
    lock.acquire()

    def leave(_):
        for path in begun.iterdir():
            path.rename(folder / path.name)
        lock.release()

    monkeypatch.setattr(run.log, "info", leave)
    with pytest.raises(SystemExit):
        three_epochs("run", "--optim.lr", "0.5")
    assert "holds a run with another configuration: optim.lr" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before
