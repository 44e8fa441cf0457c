"""The same work on many shards, in several processes, with progress.

Parsing tar headers holds Python's lock, so threads would not help. What the standard library's pool
lacks is added here: Ctrl-C reaches only the parent and does not wait for a shard to end, workers
never outlive it, and a killed worker is an error of one line.
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
    """Return `work(job)` for every job, in order, showing progress; see `each_done`."""
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
    """Call `done` with the number of a job and `work(job)`, as they end; the first error stops all.

    `workers` is the number of processes; None is one for each core. Work, jobs and results travel
    between processes unless one worker is enough. Ctrl-C and SIGTERM end work in the middle; what
    it has of `finally` and context managers is still done.

    Raises:
        ValueError: if a worker process is killed; and whatever `work` or `done` raises.
    """
    count = min(workers or cpus.available(), len(jobs))
    if count <= 1:
        for number, job in enumerate(jobs):
            done(number, work(job))
        return
    # fork would copy locks that fsspec's or rich's threads may hold
    context = multiprocessing.get_context("forkserver")
    # each worker runs the command's own file, which imports rft.cli: loaded once for all of them
    context.set_forkserver_preload(["rft.cli", work.__module__])
    # children that the caller has already are not ended here
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)
    try:
        futures = _submit(pool, work, jobs)
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except Exception:
            # jobs that workers have been given are waited for, all others are cancelled; here,
            # where Ctrl-C is still heard
            pool.shutdown(cancel_futures=True)
            raise
    except KeyboardInterrupt:
        # workers ignore Ctrl-C, and the pool would wait for the jobs they are at
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed (out of memory?); run again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor, work: Callable[[Task], Result], jobs: Sequence[Task]
) -> dict[Future[Result], int]:
    # the first submit starts processes, which inherit the blocked signal until they ignore it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return {pool.submit(_attempt, work, job): number for number, job in enumerate(jobs)}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class _Ended(BaseException):
    """A worker got SIGTERM while it worked."""


def _attempt(work: Callable[[Task], Result], job: Task) -> Result:
    """Work; at SIGTERM clean up and leave. Between two jobs there is nothing to clean up."""

    def end(*_: object) -> None:
        # the pool sends it a second time when another worker has left: cleaning up continues
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Ended

    try:
        try:
            signal.signal(signal.SIGTERM, end)
            return work(job)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `end` may still be called here
    except _Ended:
        # an exception would reach the parent as the job's result, and this worker would take more
        os._exit(1)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and never outlive it: a killed parent cannot stop its workers."""
    log.setup(urls.redact)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # it is held back where the process's fork server is one that its loader started
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        # sys.exit would end this thread alone
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
