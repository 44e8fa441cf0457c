"""litdata: python -m benchmarks.peers.on_litdata --work FOLDER, in its environment."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import litdata  # pyrefly: ignore[missing-import]

from benchmarks.peers import caches, program, samples
from benchmarks.peers.experiments import Peer, Verdict
from benchmarks.peers.samples import Batch, Reading, Sample
from rft import cli


def write(photographs: Sequence[Sample], folder: Path, **options: Any) -> None:
    """Write chunks by `optimize`, one process."""
    litdata.optimize(
        fn=_stored,
        inputs=[sample.number for sample in photographs],  # its checkpoints keep them as JSON
        output_dir=str(folder),
        chunk_bytes=samples.SHARD_BYTES,
        num_workers=1,
        **options,
    )


def pack(photographs: Sequence[Sample], folder: Path) -> None:
    """Write with the checkpoints that it offers against kills."""
    write(photographs, folder, use_checkpoint=True)


def _stored(number: int) -> dict[str, Any]:
    (sample,) = samples.photographs(1, first=number)
    return {"image": sample.image, "label": sample.number}


def _dataset(reading: Reading, **options: Any) -> Any:
    return litdata.StreamingDataset(
        reading.source,
        cache_dir=reading.cache,
        seed=reading.seed,
        transform=_Pair(reading),
        **options,
    )


class _Pair:
    """Reads number and tensor of a stored sample."""

    def __init__(self, reading: Reading) -> None:
        self.decode = reading.decode

    def __call__(self, sample: dict[str, Any]) -> tuple[int, Any]:
        return sample["label"], self.decode.of_bytes(sample["image"])


def train(reading: Reading) -> Callable[[int], Iterator[Batch]]:
    """Return its loader, with its state after each batch."""
    loader = litdata.StreamingDataLoader(
        _dataset(reading, shuffle=True, drop_last=True),
        batch_size=reading.batch_size,
        num_workers=reading.workers,
        drop_last=True,
    )
    if reading.state is not None:
        loader.load_state_dict(reading.state)

    def epoch(number: int) -> Iterator[Batch]:
        for numbers_B, images_BCHW in loader:
            yield Batch(numbers_B, images_BCHW, loader.state_dict())

    return epoch


def evaluate(reading: Reading) -> Iterator[Batch]:
    """Return one pass in order, nothing dropped."""
    loader = litdata.StreamingDataLoader(
        _dataset(reading, shuffle=False, drop_last=False),
        batch_size=reading.batch_size,
        num_workers=reading.workers,
        drop_last=False,
    )
    for batch in loader:
        yield Batch(*batch)


def remote(url: str) -> tuple[str, dict[str, str]]:
    """Return the access to the server: as an S3 endpoint."""
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_ALLOW_HTTP": "true"}
    plain = {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}
    return "s3://set", {"AWS_DEFAULT_REGION": "us-east-1", **plain, **keys}


def peek(reading: Reading) -> Any:
    """Look at the first sample."""
    data = _dataset(reading, shuffle=False)
    data[0]
    return data


def names(folder: Path) -> list[str]:
    """Write and read names as a field."""
    pairs = list(zip(samples.photographs(4), samples.NAMES, strict=True))
    litdata.optimize(
        fn=_named,
        inputs=pairs,
        output_dir=str(folder),
        chunk_bytes="1MB",
        num_workers=1,
        start_method="fork",
    )
    return [sample["name"] for sample in litdata.StreamingDataset(str(folder))]


def _named(pair: tuple[Sample, str]) -> dict[str, Any]:
    return {"image": pair[0].image, "name": pair[1]}


def t8(peer: Peer, work: Path) -> Verdict:
    """Read two sets with the same `cache_dir`, one after the other."""

    def read(url: str, cache: str) -> list[int]:
        data = litdata.StreamingDataset(url, cache_dir=cache)
        return [sample["label"] for sample in data]

    return caches.equal_names(write, read, work, variables=lambda url: ("s3:/", remote(url)[1]))


PEER = Peer(
    write=write,
    train=train,
    evaluate=evaluate,
    suffix=".bin",
    place=samples.place_in_table,
    remote=remote,
    cached=True,
    peek=peek,
    clients=("botocore.client", "boto3", "obstore", "litdata.streaming.client"),
    pack=pack,
    time_of_work=rb'"updated_at": "?[0-9.]+',
    names=names,
    own={"T8": t8},
)

if __name__ == "__main__":
    cli.run(lambda: program.main(PEER, ("litdata", "torch")))
