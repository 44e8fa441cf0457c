"""A run that is logged to Weights & Biases, offline, as wandb's own file shows it.

wandb is not among the packages of the tests: open_clip imports it where it is installed, which
costs each process of each test more than a second. `.ci/run` installs it and runs these tests.
"""

import json
import os
import struct
from pathlib import Path

import pytest

from rft.evaluate.accuracy import Count
from rft.train.journal import Journal, Wandb, require_packages
from tests.train.test_journal import COUNTERFACTUALS, SHAPE, VALUES, configuration

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install -e '.[wandb]'")
Record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record


@pytest.fixture
def stranger(monkeypatch, tmp_path):
    """A person without wandb settings and without a login."""
    wandb.teardown()  # what another test's process has read
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


@pytest.fixture
def offline(stranger, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(path: Path) -> list:
    """The records of an offline wandb run: LevelDB's log of protobufs after a header."""
    wandb.teardown()  # waits for the process that writes them
    data, place, found, parts = path.read_bytes(), 7, [], b""
    while place < len(data):
        if 32768 - place % 32768 < 7:  # no header fits what is left of a block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
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
    config = configuration(tmp_path / "run", wandb="project")
    Path(config.run).mkdir()
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
    # a folder that starts anew is another run
    with Journal(config, 0, 100, writes=True) as log:
        log.metrics(10, VALUES)
    names = {path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")}
    assert len(names) == 2


def test_wandb_hears_nothing_of_the_machine(tmp_path, offline):
    config = configuration(tmp_path / "run", wandb="project")
    Path(config.run).mkdir()
    with Journal(config, 0, 100, writes=True) as log:
        log.metrics(10, VALUES)
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    (run,) = [record.run for record in records(path) if record.HasField("run")]
    assert (run.project, run.display_name, run.host) == ("project", "run", "")
    assert not run.git.remote_url
    sent = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert sent["optim"] == config.to_dict()["optim"]
    assert sent["data"] == "https://***@store/x"
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
