"""open_clip's training data: python -m benchmarks.peers.on_open_clip, in its environment."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from open_clip_train.data import get_wds_dataset
from open_clip_train.main import random_seed

from benchmarks.peers import program, samples
from benchmarks.peers.experiments import Peer
from benchmarks.peers.samples import Batch, Reading
from rft import cli
from rft.dist import world_from_env

NO_CACHE = "its pipeline has no cache"
NO_PACKER = "it has no packer (its documentation points to img2dataset)"


def _settings(reading: Reading) -> Namespace:
    return Namespace(
        train_data=reading.tars,
        val_data=reading.tars,
        train_num_samples=samples.COUNT,
        val_num_samples=samples.COUNT,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=reading.seed,
        batch_size=reading.batch_size,
        workers=reading.workers,
        world_size=world_from_env().size,
    )


def _tokens(caption: str) -> list[int]:
    return [int(caption)]


def train(reading: Reading) -> Callable[[int], Iterator[Batch]]:
    """Return its loader; the seeds are set as its main program does."""
    random_seed(reading.seed, 0)
    random_seed(reading.seed, world_from_env().rank)
    data = get_wds_dataset(_settings(reading), reading.decode, True, tokenizer=_tokens)

    def epoch(number: int) -> Iterator[Batch]:
        data.set_epoch(number)
        for images_BCHW, numbers_B in data.dataloader:
            yield Batch(numbers_B, images_BCHW)

    return epoch


def evaluate(reading: Reading) -> Iterator[Batch]:
    """Return one pass over all shards; its main program evaluates only on the first rank."""
    data = get_wds_dataset(_settings(reading), reading.decode, False, tokenizer=_tokens)
    for images_BCHW, numbers_B in data.dataloader:
        yield Batch(numbers_B, images_BCHW)


def peek(reading: Reading) -> Any:
    """Look at the first batch."""
    stream = iter(evaluate(reading))
    next(stream)
    return stream


def names(folder: Path) -> list[str]:
    """Read a tar of ImageNet-A's files with its stages; its filter requires captions."""
    import webdataset as wds
    from open_clip_train.data import tarfile_to_samples_nothrow

    samples.write_named_tar(folder)
    shards = wds.SimpleShardList([str(folder / "000000.tar")])
    pipeline = wds.DataPipeline(shards, tarfile_to_samples_nothrow)
    return [sample["__key__"].rsplit("/", 1)[1] for sample in pipeline]


PEER = Peer(
    write=samples.write_tars,
    train=train,
    evaluate=evaluate,
    first_rank_evaluates=True,
    suffix=".tar",
    place=samples.place_in_tar,
    remote=lambda url: (f"{url}/set", {}),
    peek=peek,
    clients=("webdataset.gopen",),
    names=names,
    own={
        "T8": NO_CACHE,
        "T9": NO_PACKER,
        "T13": "its pipeline has no state: a checkpoint holds the epoch and nothing of the data",
    },
)

if __name__ == "__main__":
    cli.run(lambda: program.main(PEER, ("open_clip_torch", "webdataset", "torch")))
