"""`rft.train`, disturbed as the environment says: a test cannot reach into its ranks.

SECONDS: what each checkpoint takes longer. NAN_AT_STEP: whose loss is NaN. STOP_AT_STEP: step in
which the last rank is asked to stop. BF16_RANKS: those whose device has native bf16.
"""

import os
import signal
import time

import torch

from rft import cli, dist
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

    bf16_ranks = os.environ.get("BF16_RANKS", "").split()
    dist.has_bf16 = lambda _: os.environ.get("RANK") in bf16_ranks
    checkpoint.Store.write, loop.accumulate_gradients = slow, disturb
    cli.run(train_command.main)
