"""Photographs for benchmarks: `python -m benchmarks.photos --out build/photos --images 2000`.

Benchmarks must run without a network and without ImageNet, so the images are cut from the three
photographs that ship with scikit-learn and matplotlib (a temple, a flower, a portrait). Every image
is a different crop, mirrored or not, with its own brightness and colour, film grain, and a JPEG
quality chosen so that it has 80 to 110 KB at about 500 x 375. That is the size of an average
ImageNet file, and determines the cost of reading and decoding one. Image n is a function of n, so
an equal number of images gives equal files. The layout is ImageNet's training folder
(train/<wnid>/*.JPEG) with ten classes, so rft's own tools pack it.
"""

import dataclasses
import importlib.resources
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from rft import cli, cpus
from rft.packing.pack import Options, pack
from rft.rng import numpy_generator
from rft.shards.images import Kind
from rft.shards.label_space import LabelSpace
from rft.storage import files

CLASSES = 10
SIDES = (500, 375)
LIGHTEST, HEAVIEST = 80_000, 110_000  # bytes per file
QUALITIES = range(60, 101)
GRAIN = 5.0  # standard deviation in grey levels; without it the flower needs quality 100


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write photographs in the layout of ImageNet's training set."""

    out: Path = Path("build/photos")
    """Folder that gets train/ and classes.json."""
    images: int = 2000
    """Number of images."""


def label_space() -> LabelSpace:
    """List the classes of the photographs: the first ten of ImageNet."""
    imagenet = LabelSpace.imagenet()
    return dataclasses.replace(imagenet, ids=imagenet.ids[:CLASSES], names=imagenet.names[:CLASSES])


def originals() -> list[Image.Image]:
    """Load the photographs of scikit-learn and matplotlib, RGB."""
    shipped = Path(str(importlib.resources.files("sklearn"))) / "datasets" / "images"
    sample_data = Path(matplotlib.get_data_path()) / "sample_data"
    paths = (shipped / "china.jpg", shipped / "flower.jpg", sample_data / "grace_hopper.jpg")
    return [Image.open(path).convert("RGB") for path in paths]


def make(number: int, sources: list[Image.Image]) -> bytes:
    """Generate the JPEG of image `number`, 80 to 110 KB; one in five is upright."""
    rng = numpy_generator("photos", number)
    source = sources[rng.integers(len(sources))]
    width, height = SIDES if rng.integers(5) else SIDES[::-1]
    scale = rng.uniform(0.6, 1.0) * min(source.width / width, source.height / height)
    left = rng.uniform(0, source.width - scale * width)
    top = rng.uniform(0, source.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    image = source.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if rng.integers(2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    colour = rng.uniform(0.8, 1.1) * rng.uniform(0.9, 1.1, 3)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * GRAIN
    pixels = (np.asarray(image) * colour.astype(np.float32) + grain).clip(0, 255)
    return compress(Image.fromarray(pixels.astype(np.uint8)))


def compress(image: Image.Image) -> bytes:
    """Compress to a JPEG of 80 to 110 KB, by bisection over the quality."""
    low, high = QUALITIES.start, QUALITIES.stop
    while low < high:
        quality = (low + high) // 2
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        size = stream.tell()
        if LIGHTEST <= size <= HEAVIEST:
            return stream.getvalue()
        low, high = (quality + 1, high) if size < LIGHTEST else (low, quality)
    raise AssertionError("no quality gives a file of 80 to 110 KB")


def write(out: Path, images: int) -> LabelSpace:
    """Write so many photographs below `out`, unless they exist; return their classes.

    Raises:
        ValueError: if `images` is too small for the classes, or `out` has another number of them.
    """
    if images < CLASSES:
        raise ValueError(f"--images must be at least {CLASSES}, one of each class, not {images}")
    labels, listing = label_space(), out / "classes.json"
    if listing.exists():
        found = len(list((out / "train").glob("*/*.JPEG")))
        if found != images:
            raise ValueError(f"{out} has {found} images, not {images}; choose another or delete it")
        return labels
    sources = originals()
    for number in range(images):
        wnid = labels.ids[number % CLASSES]
        path = out / "train" / wnid / f"{wnid}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make(number, sources))
    # last, because a folder without it is rewritten
    files.write_json(str(listing), dataclasses.asdict(labels))
    return labels


def pack_as(encodings: Sequence[Kind], work: Path, images: int) -> dict[Kind, str]:
    """Write photographs below `work` unless they exist; pack them again and return the sets."""
    labels, sets = write(work / "photos", images), {}
    for encoding in encodings:
        out = work / encoding
        shutil.rmtree(out, ignore_errors=True)
        options = Options(encoding=encoding, shard_mb=16, workers=cpus.available())
        pack("imagenet-train", str(work / "photos"), str(out), labels, options)
        sets[encoding] = str(out / "imagenet-train")
    return sets


def main() -> None:
    """Write the photographs and print their size."""
    arguments = cli.parse(Arguments, prog="benchmarks.photos")
    write(arguments.out, arguments.images)
    sizes = [path.stat().st_size for path in (arguments.out / "train").glob("*/*.JPEG")]
    print(f"{len(sizes)} images in {arguments.out}, mean {np.mean(sizes) / 1000:.0f} KB")
    print(json.dumps({"images": len(sizes), "bytes": sum(sizes)}))


if __name__ == "__main__":
    cli.run(main)
