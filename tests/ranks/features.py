"""Run by torchrun: a training that keeps features, one without, one without a shared folder."""

import sys

import torch

from rft import cli, dist
from rft.train import command
from rft.train.build import prepare
from rft.train.finish import run_job
from rft.train.stop import StopRequest
from tests import tiny

CPU = torch.device("cpu")
# the 61 training images are not a multiple of the batch: the first epoch omits some
LENGTH = ("--optim.epochs", 3, "--loader.held-out", 15, "--precision", "fp32")


def main(data: str, clip: str, out: str, recipe: str) -> None:
    """Leave three run folders in `out`."""
    world = dist.world_from_env()
    kept, none = ("--loader.features-gb", 1), ("--loader.features-gb", 0)
    apart = (*kept, "--loader.features-dir", f"{out}/of-rank-{world.rank}")
    with dist.process_group(world, CPU) as world, StopRequest("") as request:
        for name, options in {"kept": kept, "none": none, "apart": apart}.items():
            line = tiny.training(recipe, data, clip, f"{out}/{name}", *LENGTH, *options)
            run_job(prepare(command.parse(line), world, CPU), request)


if __name__ == "__main__":
    cli.run(lambda: main(*sys.argv[1:]), ranks=True)
