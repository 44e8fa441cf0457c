"""Packing speed: `python -m benchmarks.pack --save`.

A fixed number of processes packs the photographs (benchmarks/photos.py), each its own task of a job
array as on a cluster. For comparison, as many processes do only the necessary work: copy the files,
or decode and crop (and compress) them in memory. The sources are in the page cache, rounds are
interleaved, ratios are taken round by round, and the last line is one JSON object. Copying without
waiting for the disk is not compared: its time varied by a factor of three, depending on when the
system wrote.

    original_over_copy_synced  packing --encoding original / shutil.copyfile of the same files and
                               a wait for the disk, as in packing
    pixels_over_bare           packing --encoding pixels / processes x one that decodes and crops
    jpeg_over_bare             packing --encoding jpeg / processes x one that also compresses
"""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import machine, photos, ratios
from benchmarks.contenders import bare_crop
from rft import cli
from rft.packing.pack import Options, pack
from rft.shards.images import SUBSAMPLING, Kind
from rft.shards.label_space import LabelSpace
from rft.storage import files

RESULTS = Path(__file__).parent / "results"
ENCODINGS: tuple[Kind, ...] = ("original", "jpeg", "pixels")
ALONE = ("crop", "compress")  # by one process, on its share
SHARDS_PER_PROCESS = 8
# descriptions of the measured work
WORK = {
    "copy_synced": "copy the files and have them on the disk, as packed shards are",
    "original": "pack `original`",
    "crop": "decode and crop, 1 process",
    "pixels": "pack `pixels`",
    "compress": "decode, crop and compress, 1 process",
    "jpeg": "pack `jpeg`",
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare packing with copying and with bare decoding."""

    images: int = 2000
    """Photographs to generate and pack."""
    processes: int = 2
    """Processes on either side, and CPUs to which they are confined."""
    rounds: int = 5
    """Rounds, after one warm-up."""
    work: Path = Path("build/pack")
    """Folder for the photographs and temporary output."""
    quick: bool = False
    """Smoke test: 200 images, one round."""
    save: bool = False
    """Also write the result to benchmarks/results/."""

    def __post_init__(self) -> None:
        available = len(os.sched_getaffinity(0))
        if not 1 <= self.processes <= available:
            raise ValueError(
                f"--processes must be 1 to {available}, the CPUs there are, not {self.processes}"
            )
        if self.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, not {self.rounds}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process's share of the work."""

    source: Path
    out: Path
    labels: LabelSpace
    number: int
    parts: int
    shard_mb: float

    def paths(self) -> list[Path]:
        """List the photographs of this share."""
        return sorted((self.source / "train").glob("*/*.JPEG"))[self.number :: self.parts]


def pack_part(part: Part, encoding: Kind) -> None:
    """Pack one task of the array; the last one to end writes the manifest."""
    options = Options(
        encoding=encoding,
        workers=1,
        shard_mb=part.shard_mb,
        task=f"{part.number}/{part.parts}",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        pack("imagenet-train", str(part.source), str(part.out), part.labels, options)


def copy_part(part: Part) -> None:
    """Copy the share's files unchanged to a different folder and wait for the disk."""
    for path in part.paths():
        target = part.out / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    os.sync()


def crop_part(part: Part) -> None:
    """Decode and crop the share's files and discard the result."""
    for path in part.paths():
        np.ascontiguousarray(bare_crop(path.read_bytes()))


def compress_part(part: Part) -> None:
    """Decode, crop and compress the share's files like --encoding jpeg; discard the result."""
    for path in part.paths():
        compress(bare_crop(path.read_bytes()))


def compress(crop_CHW: np.ndarray) -> bytes:
    """Compress a square as JPEG with plain Pillow."""
    stream = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(crop_CHW.transpose(1, 2, 0)))
    image.save(stream, "JPEG", quality=Options().quality, subsampling=SUBSAMPLING)
    return stream.getvalue()


def parts(arguments: Arguments, labels: LabelSpace, encoding: str) -> list[Part]:
    """List the shares of all processes, with shards small enough to distribute evenly."""
    source, count = photographs(arguments), arguments.processes
    sizes = [path.stat().st_size for path in (source / "train").glob("*/*.JPEG")]
    sample = {"original": sum(sizes) / len(sizes), "jpeg": 224 * 224, "pixels": 3 * 224 * 224}
    total = sample.get(encoding, 0) * len(sizes) / 2**20
    part = Part(
        source=source,
        out=(arguments.work / "out").resolve(),
        labels=labels,
        number=0,
        parts=count,
        shard_mb=max(total / (count * SHARDS_PER_PROCESS), 0.5),
    )
    return [replace(part, number=number) for number in range(count)]


def photographs(arguments: Arguments) -> Path:
    """Return the folder of the photographs."""
    return (arguments.work / f"{arguments.images}" / "photos").resolve()


def measure(arguments: Arguments, labels: LabelSpace) -> dict[str, list[float]]:
    """Time each kind of work in every round."""
    todo: dict[str, tuple[Callable[..., None], tuple[Any, ...], list[Part]]] = {
        "copy_synced": (copy_part, (), parts(arguments, labels, "copy")),
        "crop": (crop_part, (), parts(arguments, labels, "crop")[:1]),
        "compress": (compress_part, (), parts(arguments, labels, "compress")[:1]),
    }
    for encoding in ENCODINGS:
        todo[encoding] = (pack_part, (encoding,), parts(arguments, labels, encoding))
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    # spawned once and kept, so that no round pays for starting Python
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        for number in range(arguments.rounds + 1):
            for name, (work, options, shares) in todo.items():
                shutil.rmtree(shares[0].out, ignore_errors=True)
                os.sync()  # one's data must not still be on its way to the disk
                started = time.perf_counter()
                for done in [pool.submit(work, share, *options) for share in shares]:
                    done.result()
                seconds[name].append(time.perf_counter() - started)
                print(f"round {number}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    shutil.rmtree(arguments.work / "out", ignore_errors=True)
    return {name: values[1:] for name, values in seconds.items()}


def row(name: str, seconds: list[float], arguments: Arguments, mib: float) -> dict[str, Any]:
    """Build the line of the result for a kind of work; `mib` is the size of all sources."""
    processes = 1 if name in ALONE else arguments.processes
    images = arguments.images * processes / arguments.processes
    median = images / statistics.median(seconds)
    return {
        "images_per_second": round(median, 1),
        "lowest": round(images / max(seconds), 1),
        "highest": round(images / min(seconds), 1),
        "source_mib_per_second": round(median * mib / arguments.images, 1),
        "processes": processes,
    }


def figures(seconds: dict[str, list[float]]) -> dict[str, ratios.Ratio | None]:
    """Compute the ratios of this benchmark from the seconds of every round.

    Of `crop` and `compress` a process does its own share, so their seconds are those of all.
    """

    def rates(name: str) -> list[float]:
        return [1 / value for value in seconds[name]]

    return {
        "original_over_copy_synced": ratios.of_rounds(rates("original"), rates("copy_synced")),
        "pixels_over_bare": ratios.of_rounds(rates("pixels"), rates("crop")),
        "jpeg_over_bare": ratios.of_rounds(rates("jpeg"), rates("compress")),
    }


def main() -> None:
    """Measure, print the table and the result."""
    arguments = cli.parse(Arguments, prog="benchmarks.pack")
    if arguments.quick:
        arguments = replace(arguments, images=200, rounds=1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.processes])
    labels = photos.write(photographs(arguments), arguments.images)
    seconds = measure(arguments, labels)
    sources = photographs(arguments).glob("train/*/*.JPEG")
    weight = sum(path.stat().st_size for path in sources) / 2**20
    rows = {name: row(name, values, arguments, weight) for name, values in seconds.items()}
    print()
    for name, line in rows.items():
        print(
            f"{name:12s} {line['images_per_second']:9,.0f} images/s "
            f"{line['source_mib_per_second']:8,.1f} MiB/s read, {line['processes']} processes"
        )
    result = {
        "benchmark": "pack",
        **machine.describe(machine.DATA_PLANE),
        "images": arguments.images,
        "rounds": arguments.rounds,
        "cpus": arguments.processes,
        **figures(seconds),
        "rows": rows,
    }
    if arguments.save:
        files.write_json(str(RESULTS / "pack_cpu.json"), result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
