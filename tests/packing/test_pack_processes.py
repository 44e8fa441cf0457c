"""Packing by real processes: killed before any step, interrupted, started twice at once."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import tiny_world
from rft.packing import encode, shard
from rft.packing.layouts import read_source
from rft.packing.pack import Options, claim, make_jobs, make_plan, pack
from rft.packing.shard import ShardJob, write_shard
from rft.shards.label_space import LabelSpace
from tests.packing import halting

pytestmark = pytest.mark.slow

LABELS = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("a {c}.",))
PACKING = {"encoding": "pixels", "size": 64, "shard_mb": 0.05}  # four samples a shard
IMAGES, TARS = 12, 3
SET = "imagenet-train"
TOOL = Path(__file__).parents[2] / "tools" / "shard_imagenet.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set of three shards."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for n in range(IMAGES):
        stream = io.BytesIO()
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((320, 300)).save(stream, "JPEG")
        path = root / "train" / LABELS.ids[n % 2] / f"{n}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stream.getvalue())
    document = {"ids": LABELS.ids, "names": LABELS.names, "templates": LABELS.templates}
    (root / "classes.json").write_text(json.dumps(document))
    return root


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one undisturbed run."""
    out = tmp_path_factory.mktemp("reference")
    assert pack(*packing(source, out))
    found = contents(out)
    assert len([name for name in found if name.endswith(".tar")]) == TARS
    return found


def packing(source: Path, out: Path, task: str | None = None) -> tuple:
    """The arguments of `pack`, for one process."""
    return SET, str(source), str(out), LABELS, Options(**PACKING, workers=1, task=task)


def contents(out: Path) -> dict[str, bytes]:
    """Return all files except temporary ones; commit records without the time they took."""
    found = {}
    for path in sorted((out / SET).rglob("*")):
        if path.is_file() and not path.name.endswith(".tmp"):
            data = path.read_bytes()
            if path.parent.name == "commit":
                data = re.sub(rb'"seconds":[\d.]+', b"", data)
            found[str(path.relative_to(out / SET))] = data
    return found


def command(source: Path, out: Path, *options: str) -> list[str]:
    words = [sys.executable, str(TOOL), "--source", str(source), "--out", str(out)]
    words += ["--splits", "train", "--classes", str(source / "classes.json")]
    return [*words, "--encoding", "pixels", "--size", "64", "--shard-mb", "0.05", *options]


def start(words: list[str], **settings: object) -> subprocess.Popen[str]:
    """Start a command in its own session, and so in its own process group."""
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    streams |= {"env": tiny_world.environment(), "start_new_session": True}
    return subprocess.Popen(words, **{**streams, **settings})


def kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stderr is not None and not process.stderr.closed:  # read to its end already
        process.communicate()
    process.wait()


def run_watched(source: Path, out: Path, step: str | None, task: str | None) -> list[str]:
    """Pack in a separate process; return its steps, or kill it before `step`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rft.packing.pack", "tests.packing.halting"])
    here, there = context.Pipe(duplex=False)
    arguments = (there, (str(source), str(out)), step, packing(source, out, task))
    process = context.Process(target=halting.pack_watched, args=arguments)
    process.start()
    there.close()
    try:
        if step is not None:
            assert here.recv() == step
            return []
        return list(iter(here.recv, None))
    finally:
        process.kill()
        process.join()


def require_completed(
    source: Path, out: Path, reference: dict[str, bytes], tasks: list[str | None]
) -> None:
    """The remains are part of an undisturbed run's output; a rerun completes it."""
    assert contents(out).items() <= reference.items()  # files with their final name are complete
    assert [pack(*packing(source, out, task)) for task in tasks][-1]
    assert contents(out) == reference
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("tasks", [[None], ["0/2", "1/2"]], ids=["alone", "tasks"])
def test_t9_killed_before_every_step(
    source: Path, tmp_path: Path, reference: dict[str, bytes], tasks: list[str | None]
) -> None:
    """SIGKILL before each change of a file and each image, of one task after the other."""
    calm = tmp_path / "calm" / "out"
    steps = {task: run_watched(source, calm, None, task) for task in tasks}
    assert contents(calm) == reference
    every = [step for found in steps.values() for step in found]
    renamed = {step.removeprefix("os.rename .").removesuffix(".tmp") for step in every}
    assert {Path(name).name for name in reference} <= renamed
    for task, found in steps.items():
        for number, step in enumerate(dict.fromkeys(found)):
            out = tmp_path / f"{tasks.index(task)}-{number}" / "out"
            for earlier in tasks[: tasks.index(task)]:
                pack(*packing(source, out, earlier))
            run_watched(source, out, step, task)
            require_completed(source, out, reference, tasks)


@contextlib.contextmanager
def halted(source: Path, folder: Path, step: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start the command with two workers; yield it and a function that releases it from `step`."""
    gate = folder / "gate"
    os.mkfifo(gate)
    words = ((str(source), str(folder / "out")), str(TOOL), step, str(gate))
    (folder / "sitecustomize.py").write_text(
        f"from tests.packing import halting\nhalting.halt(*{words!r})\n"
    )
    environment = tiny_world.environment()
    environment["PYTHONPATH"] = f"{folder}:{environment['PYTHONPATH']}"
    process = start(
        command(source, folder / "out", "--workers", "2"), stdout=subprocess.PIPE, env=environment
    )
    try:
        assert halting.HALTED in iter(process.stdout.readline, ""), process.stderr.read()
        yield process, gate
    finally:
        kill_group(process)


IN_WORKERS = ["open .000001.tar.tmp", "os.rename .000001.tar.tmp", "os.rename .000001.json.tmp"]


@pytest.mark.parametrize("step", [*IN_WORKERS, "os.rename .manifest.json.tmp"])
def test_t9_killed_with_its_workers(
    source: Path, tmp_path: Path, reference: dict[str, bytes], step: str
) -> None:
    with halted(source, tmp_path, step):
        pass
    require_completed(source, tmp_path / "out", reference, [None])


@pytest.mark.parametrize(
    "step", ["os.rename .plan.json.tmp", halting.FORK_SERVER, halting.WORKER, *IN_WORKERS]
)
def test_ctrl_c_is_one_line(source: Path, tmp_path: Path, step: str) -> None:
    """A terminal sends it to every process, also to one that is just starting."""
    with halted(source, tmp_path, step) as (process, gate):
        os.killpg(process.pid, signal.SIGINT)
        opened = os.open(gate, os.O_RDWR)  # only a process that the signal missed waits there
        _, errors = process.communicate()
        os.close(opened)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    "commands",
    [[["--workers", "1"]] * 3, [["--workers", "1", "--task", f"{n}/2"] for n in (0, 1, 0, 1)]],
    ids=["all", "tasks"],
)
def test_the_same_work_twice_at_once(
    source: Path, tmp_path: Path, reference: dict[str, bytes], commands: list[list[str]]
) -> None:
    processes = [start(command(source, tmp_path, *options)) for options in commands]
    try:
        errors = [process.communicate()[1] for process in processes]
    finally:
        for process in processes:
            kill_group(process)
    assert errors == [""] * len(commands)
    assert [process.returncode for process in processes] == [0] * len(commands)
    assert contents(tmp_path) == reference


def one_job(source: Path, out: Path) -> ShardJob:
    plan = make_plan(read_source(SET, source, LABELS), LABELS, Options(**PACKING))
    claim(plan, str(out / SET))
    return make_jobs(plan, str(out / SET))[0]


def test_a_twin_that_tidied_up_is_no_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that completes the set deletes unfinished files; a task may be running twice."""
    job = one_job(source, tmp_path)
    written = write_shard(job)
    before = contents(tmp_path)

    def encode_and_tidy_up(*arguments):
        for path in tmp_path.rglob("*.tmp"):
            path.unlink()
        return original(*arguments)

    original = encode.encode
    monkeypatch.setattr(shard.encode, "encode", encode_and_tidy_up)
    assert write_shard(job) == written
    assert contents(tmp_path) == before
    Path(job.commit_url).unlink()
    with pytest.raises(FileNotFoundError):
        write_shard(job)
