"""A run that is logged to Weights & Biases, offline, as recorded in wandb's own file.

wandb is not among the packages of the tests: open_clip imports it if it is installed, which costs
each process of each test more than a second. `.ci/run` installs it and runs these tests.
"""

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
from pathlib import Path

import pytest

from benchmarks import tiny_world
from benchmarks.waiting import until
from rft.evaluate.count import Count
from rft.start import STOPPED
from rft.storage import files
from rft.train.journal import Journal, Wandb, require_packages
from tests import tiny
from tests.train.test_journal import COUNTERFACTUALS, SHAPE, VALUES, begun, configuration

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install '.[wandb]'")
Record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record


@pytest.fixture
def stranger(monkeypatch, tmp_path):
    """A user without wandb settings and without a login."""
    wandb.teardown()  # cached by a different test's process
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    with contextlib.suppress(ConnectionError):  # its process may be gone
        wandb.teardown()


@pytest.fixture
def offline(stranger, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(path: Path) -> list:
    """The records of an offline wandb run: LevelDB's log of protobufs after a header."""
    wandb.teardown()  # waits for the process that writes them
    data, place, found, parts = path.read_bytes(), 7, [], b""
    while place < len(data):
        if 32768 - place % 32768 < 7:  # no header fits the rest of a block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # complete, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(path: Path, name: str) -> list[tuple[int, object]]:
    """The logged (step, value) of one name."""
    rows = []
    for record in records(path):
        if record.HasField("history"):
            row = {
                ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if name in row:
                rows.append((record.history.step.num, row[name]))
    return rows


def test_a_run_is_one_wandb_run_with_scalars_and_pictures(tmp_path, offline):
    require_packages(configuration(tmp_path, wandb="project"))
    config = begun(tmp_path / "run", wandb="project")
    with Journal(config, 0, 100, writes=True) as log:
        log.metrics(10, VALUES)
        log.held_out(10, Count(3, 4))
        log.pictures(10, [COUNTERFACTUALS], 8)
        log.metrics(20, VALUES)
    with Journal(config, 20, 100, writes=True) as log:
        log.metrics(30, {**VALUES, "loss": 1.25})
    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name
    assert history(first, "loss") == [(10, 1.5), (20, 1.5)]
    assert history(first, "held_out_correct") == [(10, 3)]
    assert history(first, "counterfactuals.width") == [(10, SHAPE[1])]
    assert history(second, "loss") == [(30, 1.25)]
    # a restarted folder is a new run
    with Journal(config, 0, 100, writes=True) as log:
        log.metrics(10, VALUES)
    names = {path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")}
    assert len(names) == 2


def test_wandb_hears_nothing_of_the_machine(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")  # rft.config refuses those in URLs
    config = begun(tmp_path / "run", wandb="project")
    with Journal(config, 0, 100, writes=True) as log:
        log.metrics(10, VALUES)
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    (run,) = [record.run for record in records(path) if record.HasField("run")]
    assert (run.project, run.display_name, run.host) == ("project", "run", "")
    assert not run.git.remote_url
    sent = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert sent["optim"] == config.to_dict()["optim"]
    assert sent["data"] == "https://store/x"
    folder = path.parent / "files"
    assert not [file for file in folder.rglob("*") if file.is_file()]
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert b"secret" not in file.read_bytes(), file


def test_wandb_takes_no_step_twice(tmp_path, offline):
    config = configuration(tmp_path, wandb="project")
    log = Wandb(config, 0)
    for step in (10, 20, 15, 20, 25):
        log.write(step, {"loss": step})
    log.close(failed=False)
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert history(path, "loss") == [(10, 10), (20, 20), (25, 25)]


def test_wandb_without_a_login_is_one_line(tmp_path, stranger):
    with pytest.raises(ValueError, match=r"--log.wandb project: .*\(WANDB_MODE=offline needs"):
        Wandb(configuration(tmp_path, wandb="project"), 0)


def services() -> list[int]:
    """The ids of wandb's own processes below this one."""
    return [pid for pid in tiny_world.children(os.getpid()) if b"wandb-core" in command_line(pid)]


def command_line(pid: int) -> bytes:
    """A process's command line and environment; empty after it has ended."""
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_outlives_its_wandb(tmp_path, offline, capsys, number):
    config = begun(tmp_path / "run", wandb="project")
    with Journal(config, 0, 100, writes=True) as log:
        log.metrics(10, VALUES)
        (service,) = services()
        os.kill(service, number)
        until(lambda: not command_line(service), "the end of wandb's process")
        for step in range(20, 60, 10):
            log.metrics(step, VALUES)
            log.pictures(step, [COUNTERFACTUALS], 8)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40, 50]
    said = capsys.readouterr().err
    assert said.count("WARNING: logging to wandb stopped: ") == 1, said


def test_a_run_that_is_signalled_with_its_wandb_keeps_its_last_step(tmp_path, tiny_data, tiny_clip):
    run = tmp_path / "run"
    command = tiny.torchrun_command(
        *(1, "rft.train", "object-mask-single-fill", "--data", str(tiny_data), "--run-dir"),
        *(str(run), "--scale", "miniature", "--model.clip", tiny_clip, "--method.threshold", "0.5"),
        *("--loader.workers", "0", "--loader.held-out", "16", "--loader.batch-size", "6"),
        *("--optim.epochs", "20", "--log.every-steps", "1", "--log.checkpoint-steps", "1000"),
        *("--log.wandb", "project"),
    )
    variables = tiny_world.environment(WANDB_MODE="offline", HOME=str(tmp_path))
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
        progress = run / "progress.json"
        until(lambda: progress.exists() or process.poll() is not None, "the first checkpoint")
        assert process.poll() is None, log.read_text()
        for pid in [*tiny_world.children(process.pid), process.pid]:
            os.kill(pid, signal.SIGTERM)
        code = process.wait()
    assert code == STOPPED, log.read_text()
    (step,) = re.findall(r"stopped after step (\d+) of 200 \(SIGTERM\)", log.read_text())
    assert files.read_json(str(run / "progress.json"))["step"] == int(step)
    assert "WARNING: logging to wandb stopped" in log.read_text()
    subprocess.run(command, env=variables, check=True)
    assert (run / "training.json").exists()
