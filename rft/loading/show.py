"""Show the samples of a training step: `python -m rft.data.show RUN --epoch E --step T`.

A batch depends only on the run's configuration and the data. This therefore needs neither logs nor
checkpoints of the run, and works for future steps too.
"""

import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from rft import cli
from rft.config import load_config
from rft.loading.batches import plan_training
from rft.loading.dataset import PackedDataset
from rft.loading.order import EpochOrder
from rft.runs import filenames
from rft.storage import files
from rft.storage.documents import Positive, Whole, document
from rft.text import plain


@document(name="--")
class Arguments:
    """List the samples of one training step: id, class, shard and offset, rank by rank."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    epoch: Whole = 0
    """Epoch, counted from 0."""
    step: Whole
    """Step within the epoch, counted from 0."""
    world_size: Positive = 1
    """Number of ranks that share the batch."""
    data: str | None = None
    """Data root, if it has moved since the run started."""


def main() -> None:
    """Find the samples and print them."""
    arguments = cli.parse(Arguments, prog="rft.data.show")
    path = arguments.run / filenames.CONFIG
    if not path.is_file():
        raise ValueError(f"{arguments.run} is not a run folder: it has no {filenames.CONFIG}")
    config = load_config(arguments.run)
    url = files.join(arguments.data or config.data, config.train_set)
    packed = PackedDataset(url, max_pixels=config.loader.max_pixels)
    plan, samples, _ = plan_training(packed, config)
    if not arguments.step < plan.steps_per_epoch:
        raise ValueError(
            f"epoch {arguments.epoch} has no step {arguments.step}: epochs count from 0, and their "
            f"steps from 0 to {plan.steps_per_epoch - 1}"
        )
    if plan.batch_size % arguments.world_size:
        raise ValueError(f"--world-size must divide the batch of {plan.batch_size}")
    # the order counts positions among the training samples, without held-out ones
    batch = samples[EpochOrder(plan, arguments.epoch).batch(arguments.step)]
    number = arguments.epoch * plan.steps_per_epoch + arguments.step
    table = Table("slot", "rank", "id", "class", "shard", "offset", box=None)
    share = plan.batch_size // arguments.world_size
    for slot, sample in enumerate(batch.tolist()):
        label = int(packed.index.label[sample])
        table.add_row(
            str(slot),
            str(slot // share),
            plain(packed.key(sample)),
            plain(f"{label} {packed.manifest.classes[label]}"),
            plain(packed.manifest.shards[packed.shard_of(sample)].name),
            str(packed.index.offset[sample]),
        )
    print(f"epoch {arguments.epoch}, step {arguments.step} (step {number} of the run):")
    # a file or a pipe has no width
    width = None if sys.stdout.isatty() else 200
    # third-party names are not markup: "[b]" would vanish, and "[/b]" would be an error
    Console(width=width, markup=False, emoji=False).print(table)


if __name__ == "__main__":
    cli.run(main)
