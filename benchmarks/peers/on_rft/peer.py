"""How rft packs, reads and resumes.

A step of the job trains a model of two weights, so that it resumes from a real checkpoint
(rft.train.checkpoint), which checks by itself whether it fits. Everything else is the default.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import caches, samples
from benchmarks.peers.experiments import Peer, Verdict
from benchmarks.peers.on_rft.photos import Photos
from benchmarks.peers.samples import SIDE, Batch, Reading, Sample
from rft import dist
from rft.config import LoaderConfig
from rft.loading.batches import EvaluationBatches, TrainingBatches, fingerprint, rank_part
from rft.loading.dataset import PackedDataset
from rft.loading.order import Plan
from rft.loading.read import read_batches
from rft.packing.own_folder import TRAIN, read_folder
from rft.packing.pack import Options, pack_source
from rft.shards import tar
from rft.shards.cache import Cache
from rft.train import checkpoint
from rft.train.kernels import Choice

CPU = torch.device("cpu")
CLASSES = 3
CACHE_BYTES = 2**30
STEPS = 10**6  # of a training; more than any experiment needs
IDENTITY = {"precision": "fp32"}  # stands for a run's options, which do not change here


def write(photographs: Sequence[Sample], folder: Path) -> None:
    """Pack a folder of photographs with one folder per class."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        named = {f"photo{sample.number:05d}": sample for sample in photographs}
        _pack(_folder(named, Path(temporary, "photos")), Path(temporary))
        Path(temporary, TRAIN).rename(folder)


def pack(photographs: Sequence[Sample], folder: Path) -> None:
    """Pack; a second call completes the work of a killed one."""
    source = folder.with_name("photos")
    if not source.exists():  # the first packing is not killed
        _folder({f"photo{sample.number:05d}": sample for sample in photographs}, source)
    _pack(source, folder)


def _folder(named: dict[str, Sample], folder: Path) -> Path:
    """Write photographs into class folders, as a user has them."""
    for name, sample in named.items():
        path = folder / f"class{sample.number % CLASSES}" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)
    return folder


def _pack(source: Path, out: Path) -> None:
    photos = read_folder(source, None, test_share=0, split_seed=0)
    options = Options(shard_mb=samples.SHARD_BYTES / 2**20, workers=1)
    pack_source(photos.sources[0], str(out), photos.labels, options)


def train(reading: Reading) -> Callable[[int], Iterator[Batch]]:
    """Return its loader, with the checkpoint that rank 0 writes after each batch."""
    world = dist.world_from_env()
    # only for training, as in `rft.train`; local sets are not copied
    cache = Cache(Path(reading.cache), CACHE_BYTES) if "://" in reading.source else None
    packed, defaults = Photos(reading, cache), LoaderConfig()
    everything = np.arange(len(packed))
    plan = Plan(
        shard_sizes=packed.shard_sizes(everything),
        batch_size=reading.batch_size * world.size,
        seed=reading.seed,
        streams=defaults.streams,
        block_shards=defaults.block_shards,
    )
    batches = TrainingBatches(
        packed, everything, plan, image_size=SIDE, rank=world.rank, world_size=world.size
    )
    job = Checkpoints(reading, fingerprint(packed, plan, held_out=0, held_out_seed=0))
    steps = range(job.resume(), STEPS)
    # one stream for all epochs, as in the training loop
    read = zip(
        steps,
        read_batches(batches, steps, workers=reading.workers, device=CPU),
        strict=True,
    )

    def epoch(number: int) -> Iterator[Batch]:
        for step, batch in read:
            state = job.save(step + 1, writes=world.is_main)
            yield Batch(packed.numbers(batch.samples_B), batch.images_BCHW, state)
            if step + 1 == plan.steps_per_epoch * (number + 1):
                return

    return epoch


class Checkpoints:
    """Real checkpoints of a model of two weights, beside the cache."""

    def __init__(self, reading: Reading, data: dict[str, Any]) -> None:
        self._folder, self._state = f"{reading.cache}-checkpoints", reading.state
        model: Any = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self._own = checkpoint.Own(
            student=model,
            optimizer=optimizer,
            must_agree={"config": IDENTITY, "data": data},
            total_steps=STEPS,
            most_correct=0,
        )

    def resume(self) -> int:
        """Load the checkpoint of the reading's state; return its step, 0 without one."""
        if self._state is None:
            return 0
        store = checkpoint.Store(self._state["folder"], keep=1)
        return checkpoint.load(store, store.record(self._state["step"]), self._own).progress.step

    def save(self, step: int, *, writes: bool) -> dict[str, Any]:
        """Train a step and write its checkpoint; return the path."""
        own = self._own
        own.student(torch.ones(1, 1)).sum().backward()
        own.optimizer.step()
        if writes:
            progress = checkpoint.Progress(step=step)
            content = checkpoint.content(
                own.student, own.optimizer, progress, own.must_agree, 0, Choice()
            )
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            # all of them: the experiments resume from one in the middle
            checkpoint.Store(self._folder, keep=STEPS).write(checkpoint.to_cpu(content))
        return {"folder": self._folder, "step": step}


def evaluate(reading: Reading) -> Iterator[Batch]:
    """Return this rank's part of one pass, as `rft.evaluate` reads it."""
    world = dist.world_from_env()
    packed = Photos(reading)
    mine = EvaluationBatches(
        packed,
        np.arange(len(packed))[rank_part(len(packed), world.rank, world.size)],
        image_size=SIDE,
        batch_size=reading.batch_size,
    )
    for batch in read_batches(mine, range(len(mine)), workers=reading.workers, device=CPU):
        yield Batch(packed.numbers(batch.samples_B), batch.images_BCHW)


def peek(reading: Reading) -> Any:
    """Look at the first sample."""
    packed = PackedDataset(reading.source)
    packed.image(0, SIDE)
    return packed


def names(folder: Path) -> list[str]:
    """Pack under the names and return those that the shards store beside each image.

    The keys of samples are made of them, without dots and spaces.
    """
    four = dict(zip(samples.NAMES, samples.photographs(4), strict=True))
    _pack(_folder(four, folder / "photos"), folder)
    found = []
    for path in sorted((folder / TRAIN).glob("*.tar")):
        with path.open("rb") as stream:
            for member in list(tar.walk(stream, path.name)):
                if member.name.endswith(".json"):
                    stream.seek(member.offset)
                    found.append(json.loads(stream.read(member.size))["path"])
    return [Path(name).stem for name in found]


def t8(peer: Peer, work: Path) -> Verdict:
    """Train on two sets through the same `--loader.cache-dir`, one after the other, twice each."""

    def read(url: str, cache: str) -> list[int]:
        loader = train(Reading(source=url, cache=cache))
        return [number for epoch in range(2) for batch in loader(epoch) for number in batch[0]]

    return caches.equal_names(write, read, work, variables=lambda url: (url, {}))


PEER = Peer(
    write=write,
    train=train,
    evaluate=evaluate,
    suffix=".tar",
    place=samples.place_in_tar,
    remote=lambda url: (f"{url}/set", {}),
    peek=peek,
    clients=("aiohttp", "fsspec"),
    pack=pack,
    time_of_work=rb'"seconds": ?[0-9.e-]+',
    names=names,
    own={"T8": t8},
)
