"""Work in several processes: results in order, one-line errors for failures and killed workers."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from benchmarks.waiting import until
from rft.packing.pool import each_done, for_each
from rft.storage import files


def double(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is below 0")
    return 2 * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_order(workers: int) -> None:
    assert for_each("work", double, list(range(7)), workers) == list(range(0, 14, 2))
    assert for_each("work", double, [], workers) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_through(workers: int) -> None:
    with pytest.raises(ValueError, match="-3 is below 0"):
        for_each("work", double, [1, -3, 2], workers)


@pytest.mark.slow
def test_a_killed_worker_is_told() -> None:
    with pytest.raises(ValueError, match="a worker process was killed"):
        for_each("work", die, [1, 2, 3], 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_ends_it_at_once_and_leaves_nothing(tmp_path: Path, workers: int) -> None:
    """Ctrl-C reaches the whole process group and does not wait for work that takes ten minutes."""
    program = (
        "import sys; from rft import cli; from tests.packing.test_workers import *\n"
        "cli.run(lambda: for_each('x', publish_slowly, sys.argv[2:], int(sys.argv[1])))"
    )
    names = [tmp_path / "a", tmp_path / "b"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(workers), *map(str, names)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: process.poll() is not None or len(list(tmp_path.iterdir())) == workers)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, said) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupt_while_a_result_is_taken(tmp_path: Path) -> None:
    """Ctrl-C does not wait until the other workers finish their work."""

    def interrupt(number: int, _: None) -> None:
        assert number == 1
        until(lambda: list(tmp_path.iterdir()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        each_done(publish_unless_last, [str(tmp_path / "a"), ""], 2, interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupt_after_an_error(tmp_path: Path, monkeypatch) -> None:
    """Nor does it while an error waits for the other workers."""
    shutdown, calls = ProcessPoolExecutor.shutdown, []

    def interrupted(pool: ProcessPoolExecutor, **options: bool) -> None:
        calls.append(options)
        if len(calls) == 1:
            raise KeyboardInterrupt
        shutdown(pool, **options)

    def fail(number: int, _: None) -> None:
        until(lambda: list(tmp_path.iterdir()))
        raise ValueError(number)

    monkeypatch.setattr(ProcessPoolExecutor, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        each_done(publish_unless_last, [str(tmp_path / "a"), ""], 2, fail)
    assert not list(tmp_path.iterdir())


def publish_unless_last(path: str) -> None:
    if path:
        publish_slowly(path)


def publish_slowly(path: str) -> None:
    with files.publish(path) as temporary:
        temporary.touch()
        time.sleep(600)


def end_late(number: int) -> int:
    """Receive the signal when the work is done and only its handler is left to be removed."""
    change = signal.signal

    def told(number: int, handler: object) -> object:
        if handler is signal.SIG_DFL:
            signal.signal = change
            signal.raise_signal(signal.SIGTERM)
        return change(number, handler)

    signal.signal = told
    return number


def end_twice(path: str) -> None:
    """Receive the signal, and a second one while the work cleans up."""
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGTERM)
        Path(path).touch()


@pytest.mark.slow
def test_the_end_may_come_at_the_end() -> None:
    """After the signal a worker exits; it neither continues nor keeps a handler."""
    with pytest.raises(ValueError, match="a worker process was killed"):
        for_each("work", end_late, [1, 2], 2)


@pytest.mark.slow
def test_what_cleans_up_is_not_interrupted(tmp_path: Path) -> None:
    """When one worker has exited, the pool signals the others a second time."""
    cleaned = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(ValueError, match="a worker process was killed"):
        for_each("work", end_twice, cleaned, 2)
    assert list(tmp_path.iterdir())


def test_number_of_workers() -> None:
    """None means one per core."""
    assert for_each("work", double, [1], None) == [2]


@pytest.mark.slow
def test_a_worker_for_each_core() -> None:
    assert for_each("work", double, [1, 2, 3], None) == [2, 4, 6]
