"""`rft.train` whose checkpoints take seconds and, with NAN_AT_STEP, whose loss is NaN at a step."""

import os
import time

import torch

from rft import cli
from rft.train import __main__ as train_command
from rft.train import checkpoint, loop

SECONDS = 5  # longer than the ranks of the test wait for one that hangs

if __name__ == "__main__":
    write, accumulate = checkpoint.Store.write, loop.accumulate_gradients
    poisoned = int(os.environ.get("NAN_AT_STEP", "-1"))

    def slow(store, content):
        time.sleep(SECONDS)
        return write(store, content)

    def poison(job, module, batch, step, *rest):
        terms, grad_norm = accumulate(job, module, batch, step, *rest)
        return (terms * torch.nan if step == poisoned else terms), grad_norm

    checkpoint.Store.write, loop.accumulate_gradients = slow, poison
    cli.run(train_command.main)
