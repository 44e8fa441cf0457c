"""The loaders that `benchmarks.loader` compares, each run in its own process.

A contender is a function that prepares its data from the photographs once and returns a function
that starts a pass: an iterator of image batches. All deliver CLIP's 224-pixel crops in batches of
the same size, in random order, with labels: uint8 from those that leave normalisation to the GPU,
float from open_clip, which has its own transform. All except open_clip share the same decoding and
resizing code, so the figures compare how samples are moved, and the cores spend the rest of the
time on equal arithmetic.

A pass never ends within a measurement: those of rft, webdataset and open_clip are endless, and the
epochs of streaming and litdata are long enough, which is checked.

The program reads a line, measures, and writes a JSON line, until its input ends. So rounds of
several contenders can be interleaved without restarting Python.
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
ENDLESS = 10**7  # samples or batches; more than any measurement needs
SHUFFLE = 1000  # samples in webdataset's shuffle buffer
SHARDS = 8  # of the sets written for other loaders
FASTEST = 600  # images per second and core, at most: Pillow-SIMD on the fastest machine
Batches = Generator[Any, None, None]  # of images, (B, 3, 224, 224)
Start = Callable[[], Batches]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure one contender per input line."""

    name: str
    """Which contender."""
    work: Path
    """Folder with photos/ and data derived from them; peers add their own formats."""
    workers: int
    """Loader processes."""
    batch_size: int
    """Images in a batch."""
    seconds: float
    """Seconds per measurement."""


def rft_pixels(arguments: Arguments) -> Start:
    """Build rft's loader on the set packed as pixels."""
    return _rft(arguments, "pixels")


def rft_original(arguments: Arguments) -> Start:
    """Build rft's loader on the set packed as the original JPEGs."""
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
    """Copy random payloads of the pixels set into one batch, in a single thread."""
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
    """Decode and crop JPEGs from memory with plain Pillow calls, in a single thread."""
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
    """Compute CLIP's crop of an image file with plain Pillow, uint8 (3, 224, 224)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = (max(SIZE, SIZE * side // min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    image = image.crop((left, top, left + SIZE, top + SIZE))
    return np.asarray(image).transpose(2, 0, 1)


def webdataset_pixels(arguments: Arguments) -> Start:
    """Build webdataset's reader on tars of the same arrays as rft's pixels, npy and cls."""
    return _webdataset(arguments, "pixels", "npy", _crop_of_npy)


def webdataset(arguments: Arguments) -> Start:
    """Build webdataset's reader on tars of the same JPEGs, jpg and cls."""
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
    """Build open_clip's training pipeline on its own kind of tars (jpg and txt)."""
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
    # captions that cost the pipeline as little as our labels
    data = get_wds_dataset(settings, transform, True, tokenizer=lambda text: [len(text)])
    return lambda: (images for images, _ in data.dataloader)


def mosaicml_streaming(arguments: Arguments) -> Start:
    """Build streaming's dataset on MDS shards of the same JPEGs."""
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
    """Build litdata's dataset on chunks of the same JPEGs."""
    from litdata import (  # pyrefly: ignore[missing-import]
        StreamingDataLoader,
        StreamingDataset,
        optimize,
    )

    # its loader restarts every epoch, so one must outlast a measurement
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
    # it returns a view of its chunk, which Pillow cannot read
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
    """Create a folder atomically."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    write(temporary)
    temporary.rename(folder)


def _write_pair_tars(folder: Path, packed: PackedDataset, suffix: str) -> None:
    """Write rft's packed data as its users store it: two members per sample, not rft's four."""
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
    """Count the batches of a pass before those that are measured."""
    return 1 + 4 * workers


def cpu_seconds() -> float:
    """Sum the CPU time so far of all processes of this session."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended between listing and reading
            fields = stat.read_text().rsplit(") ", 1)[1].split()
            if int(fields[3]) == os.getsid(0):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def versions(name: str) -> dict[str, str]:
    """List the versions of a contender's libraries, as this process sees them."""
    packages = {"webdataset_pixels": "webdataset", "open_clip": "open_clip_torch"}
    found = {"pillow": PIL.__version__, "torch": torch.__version__, "numpy": np.__version__}
    for package in (packages.get(name, name.replace("_", "-")), "webdataset"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main() -> None:
    """Serve measurements; libraries' output goes to stderr."""
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
