"""The loaders that `benchmarks.loader` compares, each run in a process of its own.

A contender is a function that makes what it needs from the photographs, once, and returns one that
starts a pass: an iterator of image batches that never ends within a measurement. They all deliver
CLIP's 224-pixel crops in batches of the same size, in random order, with the labels read as well:
uint8 from those that leave normalisation to the GPU, float from open_clip, whose transform it is.
Every one but open_clip's uses the same decoding and resizing code, so the figures compare what
moves the samples, and the cores spend the rest on the same arithmetic.

A pass never ends within a measurement: rft's, webdataset's and open_clip's have no end, and
streaming's and litdata's epochs are made long enough, which is checked.

This program reads a line, measures, and writes a JSON line, until its input ends: rounds of several
contenders can then be interleaved without starting Python again.
"""

import importlib.metadata
import io
import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rft import cli
from rft.loading.batches import TrainingBatches
from rft.loading.dataset import PackedDataset
from rft.loading.order import Plan
from rft.loading.read import read_batches
from rft.shards.images import clip_pixels, load_image

SIZE = 224
ENDLESS = 10**7  # samples or batches; no measurement gets there
SHUFFLE = 1000  # samples in webdataset's shuffle buffer
SHARDS = 8  # of the sets that are written for others
FASTEST = 600  # images a core decodes per second, at most: Pillow-SIMD's rate on the fastest here
Batches = Generator[Any, None, None]  # of images, (B, 3, 224, 224)
Start = Callable[[], Batches]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure one contender each time a line comes in."""

    name: str
    """Which contender."""
    work: Path
    """Folder with photos/ and what was made of them; peers add their own formats."""
    workers: int
    """Loader processes."""
    batch_size: int
    """Images in a batch."""
    seconds: float
    """Length of a measurement."""


def rft_pixels(arguments: Arguments) -> Start:
    """Return rft's loader on the set packed as pixels."""
    return _rft(arguments, "pixels")


def rft_original(arguments: Arguments) -> Start:
    """Return rft's loader on the set packed as the files' own JPEGs."""
    return _rft(arguments, "original")


def _rft(arguments: Arguments, encoding: str) -> Start:
    packed = PackedDataset(str(arguments.work / encoding / "imagenet-train"))
    samples = np.arange(len(packed))
    plan = Plan(shard_sizes=packed.shard_sizes(samples), batch_size=arguments.batch_size, seed=0)
    dataset = TrainingBatches(packed, samples, plan, image_size=SIZE, rank=0, world_size=1)

    def start() -> Batches:
        device = torch.device("cpu")
        for batch in read_batches(
            dataset, range(ENDLESS), workers=arguments.workers, device=device
        ):
            yield batch.images_BCHW

    return start


def memcpy(arguments: Arguments) -> Start:
    """Return a single thread that copies random payloads of the pixels set into one batch."""
    packed = PackedDataset(str(arguments.work / "pixels" / "imagenet-train"))
    stored_NL = np.stack([np.frombuffer(packed.payload(n), np.uint8) for n in range(len(packed))])
    batch_BL = np.empty((arguments.batch_size, stored_NL.shape[1]), dtype=np.uint8)
    rng = np.random.default_rng(0)

    def start() -> Batches:
        while True:
            for row, number in enumerate(rng.integers(len(stored_NL), size=len(batch_BL))):
                np.copyto(batch_BL[row], stored_NL[number])
            yield batch_BL[:, -3 * SIZE * SIZE :].reshape(-1, 3, SIZE, SIZE)

    return start


def bare(arguments: Arguments) -> Start:
    """Return a single thread that decodes and crops JPEGs from memory with plain Pillow calls."""
    files = [path.read_bytes() for path in _photos(arguments)]
    batch_BCHW = np.empty((arguments.batch_size, 3, SIZE, SIZE), dtype=np.uint8)
    rng = np.random.default_rng(0)

    def start() -> Batches:
        while True:
            for row, number in enumerate(rng.integers(len(files), size=len(batch_BCHW))):
                batch_BCHW[row] = bare_crop(files[number])
            yield batch_BCHW

    return start


def bare_crop(data: bytes) -> np.ndarray:
    """Return CLIP's crop of an image file, uint8 (3, 224, 224), with nothing around Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = (max(SIZE, SIZE * side // min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    image = image.crop((left, top, left + SIZE, top + SIZE))
    return np.asarray(image).transpose(2, 0, 1)


def webdataset_pixels(arguments: Arguments) -> Start:
    """Return webdataset's reader on tars of the same arrays as rft's pixels, npy and cls."""
    return _webdataset(arguments, "pixels", "npy", _crop_of_npy)


def webdataset(arguments: Arguments) -> Start:
    """Return webdataset's reader on tars of the same JPEGs, jpg and cls."""
    return _webdataset(arguments, "original", "jpg", _crop)


def _webdataset(
    arguments: Arguments, encoding: str, suffix: str, decode: Callable[[bytes], np.ndarray]
) -> Start:
    import webdataset as wds

    folder = arguments.work / f"webdataset-{encoding}"
    if not folder.exists():
        packed = PackedDataset(str(arguments.work / encoding / "imagenet-train"))
        _write(folder, lambda path: _write_pair_tars(path, packed, suffix))
    pipeline = wds.DataPipeline(
        wds.ResampledShards([str(path) for path in sorted(folder.glob("*.tar"))]),
        wds.tarfile_to_samples(),
        wds.shuffle(SHUFFLE),
        wds.to_tuple(suffix, "cls"),
        wds.map_tuple(decode, int),
        wds.batched(arguments.batch_size, collation_fn=_collate, partial=False),
    )
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=arguments.workers)
    return lambda: (images for images, _ in loader)


def open_clip(arguments: Arguments) -> Start:
    """Return the training pipeline of open_clip on its own kind of tars (jpg and txt)."""
    import open_clip as library
    from open_clip_train.data import get_wds_dataset

    folder = arguments.work / "open_clip"
    if not folder.exists():
        _write(folder, lambda path: _write_caption_tars(path, _photos(arguments)))
    settings = Namespace(
        train_data=[str(path) for path in sorted(folder.glob("*.tar"))],
        train_num_samples=ENDLESS,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        world_size=1,
    )
    transform = library.image_transform(SIZE, is_train=False)
    # captions cost the pipeline as little as our labels do
    data = get_wds_dataset(settings, transform, True, tokenizer=lambda text: [len(text)])
    return lambda: (images for images, _ in data.dataloader)


def mosaicml_streaming(arguments: Arguments) -> Start:
    """Return streaming's dataset on MDS shards that hold the same JPEGs."""
    from streaming import MDSWriter, StreamingDataset  # pyrefly: ignore[missing-import]

    folder = arguments.work / "mds"

    def write(path: Path) -> None:
        with MDSWriter(out=str(path), columns={"image": "bytes", "label": "int"}) as writer:
            for photo in _photos(arguments):
                writer.write({"image": photo.read_bytes(), "label": len(photo.name)})

    if not folder.exists():
        _write(folder, write)

    class Photos(StreamingDataset):
        def __getitem__(self, at: Any) -> tuple[np.ndarray, int]:
            sample = super().__getitem__(at)
            return _crop(sample["image"]), sample["label"]

    dataset = Photos(
        local=str(folder), shuffle=True, batch_size=arguments.batch_size, epoch_size=ENDLESS // 10
    )
    loader = DataLoader(dataset, batch_size=arguments.batch_size, num_workers=arguments.workers)
    return lambda: (images for images, _ in loader)


def litdata(arguments: Arguments) -> Start:
    """Return litdata's dataset on chunks that hold the same JPEGs."""
    from litdata import (  # pyrefly: ignore[missing-import]
        StreamingDataLoader,
        StreamingDataset,
        optimize,
    )

    # its loader starts every epoch anew, so one must outlast a measurement
    taken = arguments.batch_size * passed_over(arguments.workers)
    taken += max(1, arguments.workers) * FASTEST * arguments.seconds
    photos = _photos(arguments)
    copies = math.ceil(taken / len(photos))
    folder = arguments.work / f"litdata-{copies}"
    if not folder.exists():
        inputs = copies * [str(path) for path in photos]
        _write(
            folder,
            lambda path: optimize(
                fn=_litdata_sample,
                inputs=inputs,
                output_dir=str(path),
                chunk_bytes="64MB",
                num_workers=1,
            ),
        )
    dataset = StreamingDataset(str(folder), shuffle=True, transform=_litdata_crop)
    loader = StreamingDataLoader(
        dataset,
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        persistent_workers=arguments.workers > 0,
        drop_last=True,
    )

    return lambda: (images for images, _ in loader)


def _litdata_sample(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "label": len(path)}


def _litdata_crop(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
    # it hands out a view of its chunk, which Pillow does not read
    return _crop(bytes(sample["image"])), sample["label"]


def _crop(data: bytes) -> np.ndarray:
    return clip_pixels(load_image(data), SIZE)


def _crop_of_npy(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)[-3 * SIZE * SIZE :].reshape(3, SIZE, SIZE)


def _collate(samples: list[tuple[np.ndarray, int]]) -> list[torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return [torch.from_numpy(np.stack(images)), torch.tensor(labels)]


def _photos(arguments: Arguments) -> list[Path]:
    return sorted((arguments.work / "photos" / "train").glob("*/*.JPEG"))


def _write(folder: Path, write: Callable[[Path], Any]) -> None:
    """Make a folder whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    write(temporary)
    temporary.rename(folder)


def _write_pair_tars(folder: Path, packed: PackedDataset, suffix: str) -> None:
    """Write what rft packed as its users have it: two members for each sample, not rft's four."""
    from webdataset import TarWriter

    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(shard, len(packed), SHARDS):
                label = int(packed.index.label[number])
                sample = {suffix: packed.payload(number), "cls": b"%d" % label}
                writer.write({"__key__": packed.key(number), **sample})


def _write_caption_tars(folder: Path, photos: list[Path]) -> None:
    from webdataset import TarWriter

    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for photo in photos[shard::SHARDS]:
                sample = {"jpg": photo.read_bytes(), "txt": f"a photo, {photo.stem}"}
                writer.write({"__key__": photo.stem, **sample})


CONTENDERS: dict[str, Callable[[Arguments], Start]] = {
    "rft_pixels": rft_pixels,
    "rft_original": rft_original,
    "memcpy": memcpy,
    "bare": bare,
    "webdataset_pixels": webdataset_pixels,
    "webdataset": webdataset,
    "open_clip": open_clip,
    "mosaicml_streaming": mosaicml_streaming,
    "litdata": litdata,
}


def rate(start: Start, arguments: Arguments) -> dict[str, float]:
    """Return images a second of one pass, and the CPUs it kept busy.

    The first batches are not counted: they were made while processes started and queues filled.

    Raises:
        ValueError: if the pass ends, because what a new one costs is not the rate of a loader.
    """
    batches = start()
    try:
        assert tuple(next(batches).shape) == (arguments.batch_size, 3, SIZE, SIZE)
        for _ in range(passed_over(arguments.workers) - 1):
            next(batches)
        count, busy, started = 0, cpu_seconds(), time.perf_counter()
        while (elapsed := time.perf_counter() - started) < arguments.seconds:
            count += len(next(batches))
    except StopIteration as end:
        raise ValueError(
            f"an epoch of {arguments.name} ended inside the measurement; use more --images or "
            "fewer --seconds"
        ) from end
    busy = cpu_seconds() - busy
    batches.close()  # loader processes end with the iterator that owns them
    return {"images_per_second": count / elapsed, "cpus": busy / elapsed}


def passed_over(workers: int) -> int:
    """Return how many batches of a pass come before those that are counted."""
    return 1 + 4 * workers


def cpu_seconds() -> float:
    """Return the CPU time of all processes of this session so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended between listing and reading
            fields = stat.read_text().rsplit(") ", 1)[1].split()
            if int(fields[3]) == os.getsid(0):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def versions(name: str) -> dict[str, str]:
    """Return the versions of what a contender stands on, as this process sees them."""
    packages = {"webdataset_pixels": "webdataset", "open_clip": "open_clip_torch"}
    found = {"pillow": PIL.__version__, "torch": torch.__version__, "numpy": np.__version__}
    for package in (packages.get(name, name.replace("_", "-")), "webdataset"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main() -> None:
    """Serve measurements; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arguments = cli.parse(Arguments, prog="benchmarks.contenders")
    if arguments.name not in CONTENDERS:
        raise cli.unknown("contender", arguments.name, list(CONTENDERS))
    start = CONTENDERS[arguments.name](arguments)
    print(json.dumps(versions(arguments.name)), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(rate(start, arguments)), file=answers, flush=True)


if __name__ == "__main__":
    cli.run(main)
