"""Commands in forked processes with monitoring: time, memory, files, exit code, output.

A process that has imported everything is forked before the first test runs; it forks one process
per request. So a row costs no imports, a command that hangs or takes gigabytes is killed, and
nothing remains in the process of the tests.
"""

import contextlib
import faulthandler
import hashlib
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# imported before anything is forked; no command itself
PACKAGES = (
    "rft.clip.load",
    "rft.packing.foreign.index",
    "rft.packing.verify",
    "rft.evaluate.count",
    "rft.merge.greedy",
    "rft.predict.page",
    "rft.report.page",
    "rft.train.finish",
    "rft.train.loop",
    "rft.train.run",
    "fsspec.implementations.http",
)
SECONDS = 20.0  # of a core: the machine may be busy
HANGS = 60.0  # seconds after which a command counts as hanging
PEAK = 2 * 2**30  # bytes of resident memory
# above the resident limit, so that memory is refused only long after a row has failed
ADDRESSES = 16 * 2**30
FILE_BYTES = 2**28  # no row's command writes a larger file
PAUSE = 0.005  # seconds between two checks of a process


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command line and its working folder.

    `stdout` is a file, or "closed" for a process that has none, or "left" for a pipe whose reader
    has gone.
    """

    words: tuple[str, ...]
    folder: str
    environment: dict[str, str]
    stdout: str
    stderr: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a command; `ended` is why it was killed, empty if it ended by itself."""

    code: int
    ended: str
    seconds: float
    """Of a core."""
    peak: int
    """Bytes of memory."""


class Sandbox:
    """The process from which commands are forked; it ends with this one."""

    def __init__(self) -> None:
        for name in PACKAGES:
            importlib.import_module(name)
        theirs, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        with warnings.catch_warnings():
            # the only other threads are of the test runner, and wait for input
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(self._requests)
                os.close(self._answers)
                _serve(theirs, answers)
                code = 0
            except BaseException:  # this fork must not continue as the test runner
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(theirs)
        os.close(answers)
        self._lines = os.fdopen(self._answers)

    def run(self, request: Request) -> Outcome:
        """Run a command to its end."""
        os.write(self._requests, f"{json.dumps(asdict(request))}\n".encode())
        line = self._lines.readline()
        assert line, "the sandbox has ended"
        return Outcome(**json.loads(line))


def _serve(requests: int, answers: int) -> None:
    faulthandler.disable()
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(requests) as stream:
        while line := stream.readline():
            document = json.loads(line)
            request = Request(**{**document, "words": tuple(document["words"])})
            pid = os.fork()
            if pid == 0:
                _become(request)
            with contextlib.suppress(OSError):  # it has done so itself
                os.setpgid(pid, pid)
            outcome = _watch(pid)
            os.write(answers, f"{json.dumps(asdict(outcome))}\n".encode())


def _watch(pid: int) -> Outcome:
    began, ended, peak = time.monotonic(), "", 0
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        seconds = time.monotonic() - began
        if found:
            break
        peak = max(peak, _resident(pid))
        if not ended and (peak > PEAK or seconds > HANGS or _spent(pid) > SECONDS):
            ended = "memory" if peak > PEAK else "time"
            os.killpg(pid, signal.SIGKILL)
        time.sleep(PAUSE)
    # child processes that it did not wait for
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    peak = max(peak, usage.ru_maxrss * 1024)
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        ended=ended,
        seconds=usage.ru_utime + usage.ru_stime,
        peak=peak,
    )


def _resident(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * resource.getpagesize()


def _spent(pid: int) -> float:
    """Seconds of a core that a process has used."""
    try:
        numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0.0
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def _become(request: Request) -> None:
    """Be the command, in this process, which then ends."""
    code = 1
    try:
        _enter(request)
        program, *options = request.words
        sys.argv = [program, *options]
        if program.endswith(".sh"):
            os.execvp("bash", ["bash", program, *options])
        code = _execute(program)
    except BaseException:  # after a bug in this file, the fork must not continue as the sandbox
        traceback.print_exc()
    finally:
        os._exit(code)


def _enter(request: Request) -> None:
    # at once, so that the sandbox may end the whole group
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in enumerate((os.devnull, request.stdout, request.stderr)):
        if path not in ("closed", "left"):
            opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
            os.dup2(opened, number)
    os.closerange(3, 2**12)
    if request.stdout == "left":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    if request.stdout == "closed":
        os.close(1)
        # as in an interpreter that starts like this
        sys.stdout = sys.__stdout__ = None
    else:
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    _limit(resource.RLIMIT_AS, _address_space() + ADDRESSES)
    _limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    # in a fork, torch recreates its thread pool at first use: do it here, before several threads
    # use it at once, which torch does not support
    import torch

    torch.set_num_threads(torch.get_num_threads())
    # retries within a second, not minutes
    from rft.storage import remote

    remote.PATIENCE = remote.Patience(tries=2, stall_seconds=2.0, longest_pause=0.1)


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _address_space() -> int:
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * resource.getpagesize()


def _execute(program: str) -> int:
    """Run a module or a script like a new Python process; return the exit code."""
    code = 0
    try:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            _forget(program)
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:  # as in the interpreter
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    try:
        threading._shutdown()  # waits for non-daemon threads
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        print(f"Exception ignored: {type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    return code


def _forget(program: str) -> None:
    """Force a new import of a command: runpy warns of one that is already imported."""
    for name in (program, f"{program}.__main__"):
        module = sys.modules.get(name)
        if module is not None and not hasattr(module, "__path__"):
            del sys.modules[name]


def environment(home: Path, temporary: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a row's command: from this process only the path and locale."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "LANG": "C.UTF-8",
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "AWS_SECRET_ACCESS_KEY": CANARY,
        "AWS_ACCESS_KEY_ID": CANARY,
        "HF_TOKEN": CANARY,
        "HF_HUB_OFFLINE": "1",
        **extra,
    }


CANARY = "canary-of-the-environment"


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """The contents of a folder: kind, mode, and content or size and time of large files."""
    found: dict[str, tuple[object, ...]] = {}
    for path in _walk(folder):
        status = path.lstat()
        name = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
        content: object = ""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            small = status.st_size <= 2**20
            large = (status.st_size, status.st_mtime_ns)
            content = hashlib.sha256(path.read_bytes()).hexdigest() if small else large
        found[name] = (status.st_mode, content)
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
