"""Ranks like torchrun's, without the seconds in which each of them imports torch.

`python -m tests.forked` imports everything that ranks need and then forks ranks on request: each
line of JSON on its standard input starts one, and is answered by a line with the exit code. A fork
inherits only the state after these imports, and none from the tests' own process.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass

# none of them is a command: runpy warns of a command that is already imported
PACKAGES = (
    "rft.clip.load",
    "rft.convert.exports",
    "rft.evaluate.count",
    "rft.merge.greedy",
    "rft.report.page",
    "rft.train.finish",
    "rft.train.loop",
    "rft.train.run",
)
SECONDS = 240  # until ranks that do not end are killed
SECONDS_TO_STOP = 30  # after one of them failed, as under torchrun


@dataclass(frozen=True, kw_only=True)
class Request:
    """The module to run and its location; `output` and `errors` are files for the ranks' output."""

    ranks: int
    words: tuple[str, ...]
    environment: dict[str, str]
    folder: str
    output: str
    errors: str

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def serve() -> None:
    """Answer requests until there are no more; in a forked rank, be that rank and return."""
    for name in PACKAGES:
        importlib.import_module(name)
    gc.freeze()  # or each rank's garbage collection would visit, and so copy, all imported objects
    # not by iteration, which reads ahead
    while line := sys.stdin.readline():
        request = Request(**json.loads(line))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        pids = []
        for rank in range(request.ranks):
            pid = os.fork()
            if pid == 0:
                become(rank, port, request)
                return
            pids.append(pid)
        print(wait_for(pids), flush=True)


def become(rank: int, port: int, request: Request) -> None:
    """Run the module as this rank, in this process, like `python -m`."""
    os.setsid()
    for descriptor, path in enumerate((os.devnull, request.output, request.errors)):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    if request.ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "forked"}
        os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(request.ranks))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # in a fork, torch recreates its thread pool at first use; do it here, before several threads
    # use it at once, which torch does not support
    import torch

    torch.set_num_threads(torch.get_num_threads())
    module, *options = request.words
    sys.argv = [module, *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def wait_for(pids: list[int]) -> int:
    """Wait for all ranks and return 1 if one failed; the others are then told to stop."""
    code, deadline = 0, time.monotonic() + SECONDS
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            pids.remove(pid)
        else:
            time.sleep(0.01)
        late = time.monotonic() > deadline
        if status and not code:
            deadline = time.monotonic() + SECONDS_TO_STOP
        if (status and not code) or late:
            code = 1
            for other in pids:
                os.kill(other, signal.SIGKILL if late else signal.SIGTERM)
    return code


if __name__ == "__main__":
    serve()
