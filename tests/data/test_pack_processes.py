"""Packing by real processes: killed at any moment, interrupted, started twice at once."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft.data import encode, shard
from rft.data.labels import LabelSpace
from rft.data.pack import Options, claim, make_jobs, make_plan, pack
from rft.data.shard import Job, write_shard
from rft.data.sources import read_source
from tests import tiny

LABELS = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("a {c}.",))
PACKING = {"encoding": "pixels", "size": 64, "shard_mb": 0.1}  # eight samples a shard
IMAGES, TARS = 240, 30
TOOL = Path(__file__).parents[2] / "tools" / "shard_imagenet.py"
KILLS = 10  # for each way of sharing the work


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set of 30 shards, which one process packs in about a second."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    different = []
    for _ in range(8):
        stream = io.BytesIO()
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((320, 300)).save(stream, "JPEG")
        different.append(stream.getvalue())
    for n in range(IMAGES):
        path = root / "train" / LABELS.ids[n % 2] / f"{n}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(different[n % len(different)])
    document = {"ids": LABELS.ids, "names": LABELS.names, "templates": LABELS.templates}
    (root / "classes.json").write_text(json.dumps(document))
    return root


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one undisturbed run."""
    out = tmp_path_factory.mktemp("reference")
    assert pack("imagenet-train", str(source), str(out), LABELS, Options(**PACKING, workers=1))
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    """Return all files but temporary ones; of commit records all but how long the work took."""
    found = {}
    for path in sorted((out / "imagenet-train").rglob("*")):
        if path.is_file() and not path.name.endswith(".tmp"):
            data = path.read_bytes()
            if path.parent.name == "commit":
                data = re.sub(rb'"seconds":[\d.]+', b"", data)
            found[str(path.relative_to(out / "imagenet-train"))] = data
    return found


def start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """Start the packing command in a session, and so a process group, of its own."""
    command = [sys.executable, str(TOOL), "--source", str(source), "--out", str(out)]
    command += ["--splits", "train", "--classes", str(source / "classes.json")]
    command += ["--encoding", "pixels", "--size", "64", "--shard-mb", "0.1", *options]
    return subprocess.Popen(
        command,
        env=tiny.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    "commands",
    [[["--workers", "2"]], [["--workers", "1", "--task", f"{n}/2"] for n in range(2)]],
    ids=["workers", "tasks"],
)
def test_t9_killed_at_random_points(
    source: Path, tmp_path: Path, reference: dict[str, bytes], commands: list[list[str]]
) -> None:
    """SIGKILL to every process; what is done again gives what an undisturbed run gives."""

    def run(out: Path, seconds: float | None) -> float:
        started = time.monotonic()
        processes = [start(source, out, *options) for options in commands]
        if seconds is None:
            assert [process.wait() for process in processes] == [0] * len(processes)
        else:
            time.sleep(seconds)
        for process in processes:
            kill_group(process)
        return time.monotonic() - started

    duration = run(tmp_path / "undisturbed", None)
    assert contents(tmp_path / "undisturbed") == reference
    assert len([name for name in reference if name.endswith(".tar")]) == TARS
    states = []
    for n, moment in enumerate(np.random.default_rng(9).uniform(0, duration, KILLS)):
        out = tmp_path / str(n)
        run(out, float(moment))
        left = contents(out)
        states.append(len([name for name in left if name.endswith(".tar")]))
        assert left.items() <= reference.items()  # what has its name is whole
        complete = [
            pack(
                "imagenet-train",
                str(source),
                str(out),
                LABELS,
                Options(**PACKING, workers=1, task=options[-1] if "--task" in options else None),
            )
            for options in commands
        ]
        assert complete[-1]
        assert contents(out) == reference
        left_over = [path.name for path in out.rglob("*.tmp")]
        assert not [name for name in left_over if ".tar." in name]
    assert any(0 < shards < TARS for shards in states)


@pytest.mark.parametrize("delay", [0, 0.02, 0.05, 0.1, 0.15, 0.2])
def test_ctrl_c_is_quiet(source: Path, tmp_path: Path, delay: float) -> None:
    """A terminal sends it to every process, also to one that only begins to start."""
    process = start(source, tmp_path, "--workers", "2")
    try:
        while not tiny.children(process.pid) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        kill_group(process)
    assert (process.returncode, errors) == (130, "")
    assert not list((tmp_path / "imagenet-train").glob("*.tmp"))


@pytest.mark.parametrize(
    "commands",
    [[["--workers", "1"]] * 3, [["--workers", "1", "--task", f"{n}/2"] for n in (0, 1, 0, 1)]],
    ids=["all", "tasks"],
)
def test_the_same_work_twice_at_once(
    source: Path, tmp_path: Path, reference: dict[str, bytes], commands: list[list[str]]
) -> None:
    processes = [start(source, tmp_path, *options) for options in commands]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            kill_group(process)
    assert errors == [""] * len(commands)
    assert [process.returncode for process in processes] == [0] * len(commands)
    assert contents(tmp_path) == reference


def one_job(source: Path, out: Path) -> Job:
    plan = make_plan(read_source("imagenet-train", source, LABELS), LABELS, Options(**PACKING))
    claim(plan, str(out / "imagenet-train"))
    return make_jobs(plan, str(out / "imagenet-train"))[0]


def test_a_twin_that_tidied_up_is_no_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever completes the set deletes what is unfinished, and may meet a task's second run."""
    job = one_job(source, tmp_path)
    written = write_shard(job)
    before = contents(tmp_path)

    def encode_and_tidy_up(*arguments):
        for path in tmp_path.rglob("*.tmp"):
            path.unlink()
        return original(*arguments)

    original = encode.encode
    monkeypatch.setattr(shard.encode, "encode", encode_and_tidy_up)
    assert write_shard(job).samples == written.samples
    assert contents(tmp_path) == before
    Path(job.commit_url).unlink()
    with pytest.raises(FileNotFoundError):
        write_shard(job)
