"""mosaicml-streaming: python -m benchmarks.peers.on_streaming --work FOLDER, in its environment."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import streaming  # pyrefly: ignore[missing-import]

from benchmarks.peers import caches, program, samples
from benchmarks.peers.experiments import Peer, Verdict
from benchmarks.peers.samples import Batch, Reading, Sample
from rft import cli

COLUMNS = {"image": "bytes", "label": "int"}
# its default counts nodes; here there is one, also after a resume
CANONICAL_NODES = 1


class Photos(streaming.StreamingDataset):
    """Its dataset with our decoding."""

    def __init__(self, reading: Reading, **options: Any) -> None:
        """Copy from the source to the cache, with the checksums that it offers."""
        super().__init__(
            remote=reading.source,
            local=reading.cache,
            validate_hash="sha1",
            batch_size=reading.batch_size,
            num_canonical_nodes=CANONICAL_NODES,
            shuffle_seed=reading.seed,
            **options,
        )
        self.decode = reading.decode

    def __getitem__(self, at: Any) -> Any:
        """Return number and tensor."""
        sample = super().__getitem__(at)
        return sample["label"], self.decode.of_bytes(sample["image"])


def write(photographs: Sequence[Sample], folder: Path, **options: Any) -> None:
    """Write MDS shards with checksums."""
    with streaming.MDSWriter(
        out=str(folder),
        columns=COLUMNS,
        size_limit=samples.SHARD_BYTES,
        hashes=["sha1"],
        **options,
    ) as writer:
        for sample in photographs:
            writer.write({"image": sample.image, "label": sample.number})


def pack(photographs: Sequence[Sample], folder: Path) -> None:
    """Overwrite the existing set; without `exist_ok` it refuses."""
    write(photographs, folder, exist_ok=True)


def train(reading: Reading) -> Callable[[int], Iterator[Batch]]:
    """Return its loader, with its state after each batch."""
    loader = streaming.StreamingDataLoader(
        Photos(reading, shuffle=True),
        batch_size=reading.batch_size,
        num_workers=reading.workers,
    )
    if reading.state is not None:
        loader.load_state_dict(reading.state)

    def epoch(number: int) -> Iterator[Batch]:
        for numbers_B, images_BCHW in loader:
            yield Batch(numbers_B, images_BCHW, loader.state_dict())

    return epoch


def evaluate(reading: Reading) -> Iterator[Batch]:
    """Return one pass in order."""
    loader = streaming.StreamingDataLoader(
        Photos(reading, shuffle=False),
        batch_size=reading.batch_size,
        num_workers=reading.workers,
    )
    for batch in loader:
        yield Batch(*batch)


def remote(url: str) -> tuple[str, dict[str, str]]:
    """Return the access to the server: as an S3 endpoint."""
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    return "s3://set", {"S3_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", **keys}


def peek(reading: Reading) -> Any:
    """Look at the first sample."""
    data = Photos(reading, shuffle=False)
    data[0]
    return data


def names(folder: Path) -> list[str]:
    """Write and read names as a column."""
    columns = {"name": "str", "image": "bytes"}
    with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
        for sample, name in zip(samples.photographs(4), samples.NAMES, strict=True):
            writer.write({"name": name, "image": sample.image})
    data = streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    return [sample["name"] for sample in data]


def t8(peer: Peer, work: Path) -> Verdict:
    """Read two sets with the same `local` folder, one after the other."""

    def read(url: str, cache: str) -> list[int]:
        data = streaming.StreamingDataset(
            remote=url, local=cache, batch_size=1, validate_hash="sha1"
        )
        return [sample["label"] for sample in data]

    return caches.equal_names(write, read, work, variables=lambda url: ("s3:/", remote(url)[1]))


PEER = Peer(
    write=write,
    train=train,
    evaluate=evaluate,
    suffix=".mds",
    place=samples.place_in_table,
    remote=remote,
    cached=True,
    peek=peek,
    clients=("botocore.client", "boto3", "streaming.base.storage"),
    pack=pack,
    names=names,
    own={"T8": t8},
)

if __name__ == "__main__":
    cli.run(lambda: program.main(PEER, ("mosaicml-streaming", "torch")))
