"""Runs the same work on many shards in several processes, with progress.

Parsing tar headers holds Python's lock, so threads would not help. This module adds what the
standard library's pool lacks: Ctrl-C reaches only the parent and does not wait for a shard to
finish, workers never outlive the parent, and a killed worker is a one-line error.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from rft import cpus, log
from rft.progress import progress
from rft.storage import urls

Task = TypeVar("Task")
Result = TypeVar("Result")


def for_each(
    title: str, work: Callable[[Task], Result], jobs: Sequence[Task], workers: int | None
) -> list[Result]:
    """Collect `work(job)` of every job, in order, and show progress; see `each_done`."""
    results = {}
    with progress(title, "shards", len(jobs)) as advance:

        def done(number: int, result: Result) -> None:
            results[number] = result
            advance(1, 0)

        each_done(work, jobs, workers, done)
    return [results[number] for number in range(len(jobs))]


def each_done(
    work: Callable[[Task], Result],
    jobs: Sequence[Task],
    workers: int | None,
    done: Callable[[int, Result], None],
) -> None:
    """Call `done(number, work(job))` as each job finishes; the first error stops all.

    `workers` is the number of processes; None is one per core. Work, jobs and results are pickled
    unless one worker is enough. Ctrl-C and SIGTERM interrupt the work; its `finally` clauses and
    context managers still run.

    Raises:
        ValueError: if a worker process is killed.
        Exception: any error of `work` or `done`.
    """
    count = min(workers or cpus.available(), len(jobs))
    if count <= 1:
        for number, job in enumerate(jobs):
            done(number, work(job))
        return
    # not fork: it would copy locks that threads of fsspec or rich may hold
    context = multiprocessing.get_context("forkserver")
    # each worker runs the command's own file, which imports rft.cli: preloaded once for all
    context.set_forkserver_preload(["rft.cli", work.__module__])
    # the caller's existing children are not terminated here
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)
    try:
        futures = _submit(pool, work, jobs)
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except Exception:
            # waits for running jobs and cancels all others; in this block, where Ctrl-C is still
            # handled
            pool.shutdown(cancel_futures=True)
            raise
    except KeyboardInterrupt:
        # workers ignore Ctrl-C, and the pool would wait for their current jobs
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed (out of memory?); rerun with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor, work: Callable[[Task], Result], jobs: Sequence[Task]
) -> dict[Future[Result], int]:
    # the first submit starts processes, which inherit the blocked signal until they set it to
    # ignored
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return {pool.submit(_attempt, work, job): number for number, job in enumerate(jobs)}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class _Ended(BaseException):
    """A worker received SIGTERM during a job."""


def _attempt(work: Callable[[Task], Result], job: Task) -> Result:
    """Run a job; on SIGTERM clean up and exit. Between two jobs nothing needs to be cleaned up."""

    def end(*_: object) -> None:
        # the pool sends it a second time when another worker has exited: cleaning up continues
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Ended

    try:
        try:
            signal.signal(signal.SIGTERM, end)
            return work(job)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `end` may still run here
    except _Ended:
        # an exception would become the job's result, and this worker would accept more jobs
        os._exit(1)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and exit with it: a killed parent cannot stop its workers."""
    log.setup(urls.redact)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # it may be blocked: a fork server started by the loader passes its signal mask on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        # sys.exit would end only this thread
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
