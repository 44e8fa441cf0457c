"""webdataset's reader and writer: python -m benchmarks.peers.on_webdataset --work FOLDER."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import webdataset as wds

from benchmarks.peers import program, samples
from benchmarks.peers.experiments import Peer
from benchmarks.peers.samples import Batch, Reading, Sample
from rft import cli

SHUFFLE = 1000  # samples, as in its documentation


def train(reading: Reading) -> Callable[[int], Iterator[Batch]]:
    """Return its loader: shards split by rank and worker, deterministic shuffles by a seed."""
    data = wds.WebDataset(
        reading.tars,
        shardshuffle=100,
        detshuffle=True,
        seed=reading.seed,
        nodesplitter=wds.split_by_node,
        cache_dir=None,
    )
    return _loader(data.compose(wds.detshuffle(SHUFFLE, seed=reading.seed)), reading)


def evaluate(reading: Reading) -> Iterator[Batch]:
    """Return one pass over the shards of this rank."""
    data = wds.WebDataset(reading.tars, shardshuffle=False, nodesplitter=wds.split_by_node)
    return _loader(data, reading)(0)


def _loader(data: Any, reading: Reading) -> Callable[[int], Iterator[Batch]]:
    data = data.decode("pil").to_tuple("cls", "jpg").map_tuple(int, reading.decode)
    data = data.batched(reading.batch_size)
    loader = wds.WebLoader(data, batch_size=None, num_workers=reading.workers)
    return lambda epoch: (Batch(*batch) for batch in loader)


def peek(reading: Reading) -> Any:
    """Look at the first sample."""
    stream = iter(wds.WebDataset(reading.tars, shardshuffle=False))
    next(stream)
    return stream


def pack(photographs: Sequence[Sample], folder: Path) -> None:
    """Write shards; without a fixed `mtime` the bytes differ each time."""
    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(folder / "%06d.tar"), maxcount=13, mtime=0, verbose=0) as writer:
        for sample in photographs:
            key = f"photo{sample.number:05d}"
            writer.write({"__key__": key, "jpg": sample.image, "cls": sample.number})


def names(folder: Path) -> list[str]:
    """Write and read with its own classes, with the file's name as key."""
    folder.mkdir(parents=True)
    with wds.TarWriter(str(folder / "000000.tar")) as writer:
        for sample, name in zip(samples.photographs(4), samples.NAMES, strict=True):
            writer.write({"__key__": name, "jpg": sample.image, "cls": sample.number})
    data = wds.WebDataset([str(folder / "000000.tar")], shardshuffle=False)
    return [sample["__key__"] for sample in data]


def t8(peer: Peer, work: Path) -> Any:
    """Read two sets of equal file names from a web server through one cache_dir."""
    from benchmarks.peers import caches

    def read(url: str, cache: str) -> list[int]:
        Path(cache).mkdir(exist_ok=True)
        urls = [f"{url}/000000.tar"]
        data: Any = wds.WebDataset(urls, shardshuffle=False, cache_dir=cache).decode()
        return [sample["cls"] for sample in data]

    return caches.equal_names(samples.write_tars, read, work, variables=lambda url: (url, {}))


PEER = Peer(
    write=samples.write_tars,
    train=train,
    evaluate=evaluate,
    suffix=".tar",
    place=samples.place_in_tar,
    remote=lambda url: (f"{url}/set", {}),
    peek=peek,
    clients=("webdataset.gopen",),
    pack=pack,
    names=names,
    own={"T8": t8, "T13": "it has no state to resume from that could be compared"},
)

if __name__ == "__main__":
    cli.run(lambda: program.main(PEER, ("webdataset", "torch")))
