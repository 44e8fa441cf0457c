"""`rft.train` with disturbances from environment variables: a test cannot reach into its ranks.

SECONDS: additional time per checkpoint. HELD: checkpoints are written only when the run ends, so
that one is pending then. NAN_AT_STEP: the step with a NaN loss. The last rank gets a stop request
in step STOP_AT_STEP, dies in DIE_AT_STEP, hangs in HANG_AT_STEP. BF16_RANKS: ranks whose device
has native bf16. COLLECTIVES: a file name, without the rank, for the ordered list of rft's
collectives. With it, ranks on CPUs have a control group, like those on GPUs.
"""

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rft import cli, dist
from rft.train import checkpoint, loop
from rft.train import command as train_command

NAMES = (
    "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast_object_list",
)  # fmt: skip


def recorded(name: str, call: Callable, path: Path) -> Callable:
    """The collective; each call first appends its name and group to the file."""

    @functools.wraps(call)
    def record(*arguments, group=None, **options):
        with path.open("a") as stream:
            print(json.dumps([name, "control" if group else "tensors"]), file=stream)
        return call(*arguments, group=group, **options)

    return record


def hang() -> None:
    # SIGTERM would count as a request to stop after this step
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(600)


if __name__ == "__main__":
    write, accumulate = checkpoint.Store.write, loop.accumulate_gradients
    seconds = float(os.environ.get("SECONDS", "0"))
    poisoned, stopped, dies, hangs = (
        os.environ.get(f"{what}_AT_STEP") for what in ("NAN", "STOP", "DIE", "HANG")
    )
    if "COLLECTIVES" in os.environ:
        path = Path(f"{os.environ['COLLECTIVES']}-{os.environ['RANK']}")
        for name in NAMES:
            call = recorded(name, getattr(torch.distributed, name), path)
            setattr(torch.distributed, name, call)
        dist._backends = lambda device: ("gloo", "gloo")

    ending, leave = threading.Event(), checkpoint.Writer.__exit__
    if "HELD" not in os.environ:
        ending.set()

    def slow(store, content):
        ending.wait()
        time.sleep(seconds)
        return write(store, content)

    def end(writer, *error):
        ending.set()
        leave(writer, *error)

    def disturb(job, module, batch, step, *rest):
        if job.world.rank == job.world.size - 1:
            if str(step) == stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            if str(step) == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if str(step) == hangs:
                hang()
        terms, grad_norm = accumulate(job, module, batch, step, *rest)
        return (terms * torch.nan if str(step) == poisoned else terms), grad_norm

    bf16_ranks = os.environ.get("BF16_RANKS", "").split()
    dist.has_bf16 = lambda _: os.environ.get("RANK") in bf16_ranks
    checkpoint.Store.write, checkpoint.Writer.__exit__ = slow, end
    loop.accumulate_gradients = disturb
    cli.run(train_command.main, ranks=True)
