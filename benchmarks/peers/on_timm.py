"""timm's ReaderWds: python -m benchmarks.peers.on_timm --work FOLDER, in its environment."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from timm.utils import random_seed

from benchmarks.peers import program, samples
from benchmarks.peers.experiments import Peer
from benchmarks.peers.samples import Batch, Reading, Sample
from rft import cli
from rft.dist import world_from_env

SPLIT = "photos"


def write(photographs: Sequence[Sample], folder: Path) -> None:
    """Write shards and the `_info.json` that it reads lengths from."""
    samples.write_tars(photographs, folder)
    split = {
        "name": SPLIT,
        "num_samples": len(photographs),
        "filenames": sorted(path.name for path in folder.glob("*.tar")),
        "shard_lengths": samples.SHARD_SIZES,
    }
    (folder / "_info.json").write_text(json.dumps({"splits": {SPLIT: split}}))


def _loader(reading: Reading, training: bool) -> Any:
    random_seed(reading.seed, world_from_env().rank)
    dataset = create_dataset(
        "wds/photos",
        root=reading.source,
        split=SPLIT,
        is_training=training,
        batch_size=reading.batch_size,
        seed=reading.seed,
    )
    loader = create_loader(
        dataset,
        input_size=(3, samples.SIDE, samples.SIDE),
        batch_size=reading.batch_size,
        is_training=training,
        no_aug=True,
        num_workers=reading.workers,
        distributed=world_from_env().size > 1,
        use_prefetcher=False,
        persistent_workers=reading.workers > 0,
        device=torch.device("cpu"),
    )
    dataset.transform = reading.decode
    return loader


def train(reading: Reading) -> Callable[[int], Iterator[Batch]]:
    """Return its loader as its training script makes it."""
    loader = _loader(reading, True)

    def epoch(number: int) -> Iterator[Batch]:
        loader.dataset.set_epoch(number)
        for images_BCHW, numbers_B in loader:
            yield Batch(numbers_B, images_BCHW)

    return epoch


def evaluate(reading: Reading) -> Iterator[Batch]:
    """Return one pass for validation."""
    for images_BCHW, numbers_B in _loader(reading, False):
        yield Batch(numbers_B, images_BCHW)


def peek(reading: Reading) -> Any:
    """Look at the first sample."""
    data = create_dataset("wds/photos", root=reading.source, split=SPLIT)
    stream = iter(data)
    next(stream)
    return stream


def names(folder: Path) -> list[str]:
    """Read a tar of ImageNet-A's files; its reader returns the names."""
    samples.write_named_tar(folder)
    data = create_dataset("wds/photos", root=str(folder), split=f"000000.tar|{len(samples.NAMES)}")
    return [Path(name).stem for name in data.filenames()]


PEER = Peer(
    write=write,
    train=train,
    evaluate=evaluate,
    suffix=".tar",
    place=samples.place_in_tar,
    remote=lambda url: (f"{url}/set", {}),
    peek=peek,
    clients=("webdataset.gopen",),
    names=names,
    own={
        "T8": "its reader has no cache",
        "T9": "it has no packer",
        "T13": "its reader has no state: a checkpoint holds the epoch and nothing of the data",
    },
)

if __name__ == "__main__":
    cli.run(lambda: program.main(PEER, ("timm", "webdataset", "torch")))
