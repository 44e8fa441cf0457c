"""Small photographs that encode their number, tars of them, and a way to damage each kind of file.

Every peer reads the same photographs with the same decoding, so differences come from the peer. A
sample's label is its number, which identifies every delivered sample.
"""

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# uneven on purpose; not divisible by any number of ranks, workers or batches
SHARD_SIZES = (18, 9, 14, 11, 16, 13, 8, 17, 12, 15, 10, 19, 7, 14, 13, 15)
COUNT = sum(SHARD_SIZES)
SIDE = 32
SHARD_BYTES = 40_000  # for the formats that are cut by bytes
GLOBAL_BATCH = 16
NAMES = (  # as in ImageNet-A
    "0.000116_digital clock _ digital clock_0.865662",
    "0.000209_digital clock _ stopwatch_0.78116",
    "0.013472_cliff _ cliff_0.5212",
    "2.5_lion_0.9",
)


@dataclass(frozen=True)
class Sample:
    """One photograph."""

    number: int
    image: bytes
    """A JPEG file."""


class Batch(NamedTuple):
    """The samples of one rank at one step."""

    numbers_B: Any
    images_BCHW: Tensor
    state: dict[str, Any] | None = None
    """A checkpoint's record of the data position after this step."""


@dataclass(frozen=True)
class Decode:
    """Converts an image to a tensor; the first call in a process can report inherited resources."""

    report: str = ""
    """File for the report, by the process's number; empty for no report."""
    opened: tuple[str, ...] = ()
    """Targets of the parent's descriptors that were opened for data."""

    def __call__(self, image: Image.Image) -> Tensor:
        """Return uint8 (3, SIDE, SIDE)."""
        if self.report:
            self.tell()
        resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def tell(self) -> None:
        """Report how many of the parent's descriptors this process has."""
        path = Path(f"{self.report}.{os.getpid()}")
        if not path.exists():
            held = descriptors()
            inherited = sum(target in held.values() for target in self.opened)
            path.write_text(f"{os.getppid()} {inherited}")

    def of_bytes(self, data: bytes) -> Tensor:
        """Return the same for an image file."""
        return self(Image.open(io.BytesIO(data)))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How one rank reads a set."""

    source: str
    """Folder or URL of the set, in the peer's format."""
    cache: str
    """Cache folder of this node for remote data."""
    batch_size: int = GLOBAL_BATCH
    """Samples per step of this rank."""
    workers: int = 0
    seed: int = 1
    decode: Decode = field(default_factory=Decode)
    state: dict[str, Any] | None = None
    """State to resume from."""

    @property
    def tars(self) -> list[str]:
        """The shards, for the peers that read tars."""
        return [f"{self.source}/{shard:06d}.tar" for shard in range(len(SHARD_SIZES))]


def photographs(count: int = COUNT, first: int = 0) -> list[Sample]:
    """Generate so many samples, always the same."""
    found = []
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        height, width = rng.integers(SIDE, 2 * SIDE, 2)
        noise = rng.normal(128, 50, (height, width, 3)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG", quality=85)
        found.append(Sample(number, file.getvalue()))
    return found


def write_tars(samples: Sequence[Sample], folder: Path) -> None:
    """Write the samples as uneven shards; jpg, cls and txt, like those of timm and open_clip."""
    folder.mkdir(parents=True)
    left = iter(samples)
    for shard, size in enumerate(SHARD_SIZES):
        with tarfile.open(folder / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in (next(left) for _ in range(size)):
                label = str(sample.number).encode()
                parts = {"jpg": sample.image, "cls": label, "txt": label}
                for suffix, data in parts.items():
                    member = tarfile.TarInfo(f"photo{sample.number:05d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_named_tar(folder: Path) -> None:
    """Write a tar of images and labels under ImageNet-A's names, as `tar` packs a folder."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample, name in zip(photographs(len(NAMES)), NAMES, strict=True):
            for suffix, data in (("jpg", sample.image), ("cls", b"%d" % sample.number)):
                member = tarfile.TarInfo(f"n01440764/{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@dataclass(frozen=True)
class Place:
    """Where in a shard to damage it: around one sample in the middle."""

    header: int
    """Offset of a byte of the sample's metadata."""
    payload: int
    """Offset of a byte of the image."""
    boundary: int
    """Offset at which the sample begins."""


def damaged(shard: Path, place: Place) -> Iterator[str]:
    """Damage a file in three ways, one after the other, and name each; it is intact at the end."""
    whole = shard.read_bytes()
    for name, at in (
        ("flipped header byte", place.header),
        ("flipped payload byte", place.payload),
    ):
        flipped = bytearray(whole)
        flipped[at] ^= 255
        shard.write_bytes(flipped)
        yield name
    shard.write_bytes(whole[: place.boundary])
    yield "cut at a sample's beginning"
    shard.write_bytes(whole)


def place_in_tar(shard: Path) -> Place:
    """Locate the middle sample of a tar."""
    with tarfile.open(shard) as tar:
        images = [member for member in tar.getmembers() if member.name.endswith(".jpg")]
    middle = images[len(images) // 2]
    return Place(middle.offset + 100, middle.offset_data + middle.size * 3 // 4, middle.offset)


def place_in_table(shard: Path) -> Place:
    """Locate the middle sample of a file that begins with a count and offsets (u32).

    Both MDS shards and litdata's chunks do.
    """
    data = shard.read_bytes()
    count = int(np.frombuffer(data, np.uint32, 1)[0])
    offsets = np.frombuffer(data, np.uint32, count + 1, 4)
    middle = count // 2
    begin, end = int(offsets[middle]), int(offsets[middle + 1])
    return Place(4 + 4 * middle, begin + (end - begin) * 3 // 4, begin)


def descriptors() -> dict[int, str]:
    """List the targets of this process's open descriptors."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[int(link.name)] = str(link.readlink())
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return found
