"""`rft.train`, disturbed as the environment says: a test cannot reach into its ranks.

SECONDS: what each checkpoint takes longer. NAN_AT_STEP: whose loss is NaN. STOP_AT_STEP: step in
which the last rank is asked to stop.
"""

import os
import signal
import time

import torch

from rft import cli
from rft.train import __main__ as train_command
from rft.train import checkpoint, loop

if __name__ == "__main__":
    write, accumulate = checkpoint.Store.write, loop.accumulate_gradients
    seconds = float(os.environ.get("SECONDS", "0"))
    poisoned, stopped = (os.environ.get(name) for name in ("NAN_AT_STEP", "STOP_AT_STEP"))

    def slow(store, content):
        time.sleep(seconds)
        return write(store, content)

    def disturb(job, module, batch, step, *rest):
        if str(step) == stopped and job.world.rank == job.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        terms, grad_norm = accumulate(job, module, batch, step, *rest)
        return (terms * torch.nan if str(step) == poisoned else terms), grad_norm

    checkpoint.Store.write, loop.accumulate_gradients = slow, disturb
    cli.run(train_command.main)
