"""Pack a source of images into WebDataset tar shards that readers address by offset.

Everything is a function of the plan: which samples are in which shard, in which order. `plan.json`
is written first and guards the folder against a second, different plan. One shard is one idempotent
task that writes `NNNNNN.tar`, then `commit/NNNNNN.json`; `manifest.json` is written last, when all
commits are there. So a killed run continues where it was, any split over processes and machines
gives the same bytes, and a folder without a manifest is not a data set.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rft import files
from rft.data import encode
from rft.data.labels import LabelSpace
from rft.data.manifest import Index, Manifest, Shard
from rft.data.sources import Item, Source, read_source

if TYPE_CHECKING:
    from webdataset import TarWriter

ALGORITHM = 1  # raise it when the order, the cut or the members change: it is part of the plan
TAR_BLOCK = 512
TEMPORARY = re.compile(r"\..*\.tmp")  # what rft.files.publish leaves behind when it is killed
COMMIT_THREADS = 16  # reading commits is latency-bound on object stores
SECONDS_PER_LINE = 10.0  # how often progress is printed when there is no terminal
COLUMNS = {
    "offset": np.uint64,
    "length": np.uint32,
    "crc32": np.uint32,
    "label": np.int32,
    "width": np.uint16,
    "height": np.uint16,
    "key": np.bytes_,
}
assert list(COLUMNS) == [field.name for field in fields(Index)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to pack; `workers`, `task` and `finalize` change who does the work, never the bytes."""

    encoding: Literal["original", "pixels"] = "original"
    """original: the files' own bytes. pixels: CLIP's input, so that training decodes nothing."""
    size: int = 224
    """Side in pixels of the stored square (pixels only)."""
    shard_mb: float = 100
    """Size of a shard in MiB."""
    seed: int = 0
    """Seed of the global shuffle."""
    workers: int | None = None
    """Processes that write shards; None is one for each core this process may use."""
    task: str | None = None
    """I/N with I from 0 to N-1: this job array's part of the shards; the last adds the manifest."""
    finalize: bool = False
    """Write no shards, only the manifest of shards that are all there."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which samples go into which shard, and the parameters that decided it (`plan.json`)."""

    source: Source
    labels: LabelSpace
    encoding: dict[str, Any]
    shards: tuple[tuple[Item, ...], ...]
    parameters: dict[str, Any]

    @cached_property
    def hash(self) -> str:
        """Identity of the plan."""
        return files.sha256_json(self.parameters)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard to write."""

    root: Path
    out: str
    number: int
    items: tuple[Item, ...]
    encoding: dict[str, Any]
    plan_hash: str

    @property
    def shard_url(self) -> str:
        """Where the tar goes."""
        return files.join(self.out, f"{self.number:06d}.tar")

    @property
    def commit_url(self) -> str:
        """Where the record of the finished tar goes."""
        return files.join(self.out, "commit", f"{self.number:06d}.json")


def pack(dataset: str, source: str, out: str, labels: LabelSpace, options: Options) -> bool:
    """Pack `dataset`, found at or below the folder `source`, into `out/dataset`.

    Doing it again continues where it stopped; when everything is there it changes nothing.

    Returns:
        Whether the data set is complete; it is not while other tasks still have shards to write.

    Raises:
        ValueError: if the source, an image, an option or what is already in `out` is not right.
    """
    worker_count, task = _check(options)
    plan = make_plan(read_source(dataset, Path(source), labels), labels, options)
    url = files.join(out, dataset)
    claim(plan, url)
    jobs = make_jobs(plan, url)
    if _is_complete(plan, url, jobs):
        print(f"{dataset}: already packed at {url}, nothing to do", flush=True)
        return True
    if not options.finalize:
        index, count = task
        todo = _uncommitted(jobs[index::count])
        _write_shards(dataset, todo, worker_count)
        waiting = _uncommitted(jobs)
        if waiting:
            print(
                f"{dataset}: task {index}/{count} is done; {len(waiting)} of {len(jobs)} shards "
                f"are still to come from other tasks, the last of which writes the manifest",
                flush=True,
            )
            return False
    manifest = finalize(plan, url)
    total = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{dataset}: {manifest.samples:,} samples in {len(manifest.shards):,} shards, "
        f"{total / 2**20:,.1f} MiB at {url}",
        flush=True,
    )
    return True


def make_plan(source: Source, labels: LabelSpace, options: Options) -> Plan:
    """Return the plan: a global shuffle of the items, cut into shards by bytes.

    The order does not depend on that of `source.items`.
    """
    encoding = encode.encoding_parameters(options.encoding, options.size, source.crop_border)
    shard_bytes = int(options.shard_mb * 2**20)
    order = shuffle(source.items, options.seed)
    fixed = encode.payload_bytes(encoding)
    sizes = [item.bytes if fixed is None else fixed for item in order]
    listing = sorted((item.key, item.path, item.label, item.bytes) for item in order)
    parameters = {
        "algorithm": ALGORITHM,
        "dataset": source.dataset,
        "encoding": encoding,
        "seed": options.seed,
        "shard_bytes": shard_bytes,
        "samples": len(order),
        "source_bytes": sum(item.bytes for item in order),
        # short, because they are for people to compare; nobody has a reason to forge them
        "items": files.sha256_json(listing)[:16],
        "labels": files.sha256_json([asdict(labels), source.groups])[:16],
    }
    shards = tuple(tuple(order[start:stop]) for start, stop in cut(sizes, shard_bytes))
    return Plan(
        source=source, labels=labels, encoding=encoding, shards=shards, parameters=parameters
    )


def shuffle(items: Sequence[Item], seed: int) -> list[Item]:
    """Return the items sorted by a hash of seed and key: no library version can change that."""
    salt = hashlib.blake2b(f"rft.data.pack {seed}".encode()).digest()

    def position(item: Item) -> tuple[bytes, str]:
        digest = hashlib.blake2b(item.key.encode("ascii"), key=salt, digest_size=16).digest()
        return digest, item.key

    return sorted(items, key=position)


def cut(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Return (start, stop) of consecutive shards of at most `limit` bytes, or of one sample."""
    bounds, start, filled = [], 0, 0
    for position, size in enumerate(sizes):
        if position > start and filled + size > limit:
            bounds.append((start, position))
            start, filled = position, 0
        filled += size
    if start < len(sizes):
        bounds.append((start, len(sizes)))
    return bounds


def make_jobs(plan: Plan, url: str) -> list[Job]:
    """Return one job for each shard of the plan."""
    return [
        Job(
            root=plan.source.root,
            out=url,
            number=number,
            items=items,
            encoding=plan.encoding,
            plan_hash=plan.hash,
        )
        for number, items in enumerate(plan.shards)
    ]


def claim(plan: Plan, url: str) -> None:
    """Make `url` the folder of this plan, or find that it already is.

    Raises:
        ValueError: if the folder holds another plan's data, with what differs, or other files.
    """
    names = [name for name in _file_sizes(url) if not TEMPORARY.fullmatch(name)]
    plan_url = files.join(url, "plan.json")
    if "plan.json" not in names:
        if names:
            raise ValueError(
                f"{url} is not empty and was not packed by rft (it has {names[0]} but no "
                f"plan.json); choose another --out or delete that folder"
            )
        files.write_json(plan_url, plan.parameters)
        return
    found = files.read_json(plan_url)
    if found != plan.parameters:
        changes = "; ".join(files.difference(found, plan.parameters))
        raise ValueError(
            f"{url} holds another plan ({changes}); choose another --out or delete that folder"
        )


def write_shard(job: Job) -> tuple[int, int]:
    """Write one tar and its commit record; the same job always writes the same bytes.

    Returns:
        Numbers of samples and of bytes written.

    Raises:
        ValueError: if an image cannot be read; neither tar nor commit appears then.
    """
    # webdataset imports torch: only the processes that write shards pay for it
    from webdataset import TarWriter

    rows = []
    with files.publish(job.shard_url) as path:
        with (
            path.open("wb") as stream,
            # a float mtime would cost a PAX header for every member, None the reproducible bytes
            TarWriter(
                stream, encoder=False, mtime=0, user="root", group="root", mode=0o444
            ) as writer,
        ):
            for item in job.items:
                data = _read_source_file(job.root / item.path, item.bytes)
                name = str(job.root / item.path)
                rows.append(write_sample(writer, item, encode.encode(data, name, job.encoding)))
        shard = Shard(
            name=job.shard_url.rsplit("/", 1)[-1],
            bytes=path.stat().st_size,
            sha256=files.sha256_file(path),
            samples=len(rows),
        )
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    commit = {"plan_hash": job.plan_hash, "shard": asdict(shard), "columns": columns}
    files.write_bytes(job.commit_url, _compact_json(commit))
    return shard.samples, shard.bytes


def write_sample(writer: "TarWriter", item: Item, encoded: encode.Encoded) -> dict[str, Any]:
    """Append one sample's members to a tar and return its index row."""
    description = {
        "path": item.path,
        "format": encoded.format,
        "mode": encoded.mode,
        "size": [encoded.width, encoded.height],
    }
    meta = {"cls": str(item.label).encode(), "json": _compact_json(description)}
    writer.write({"__key__": item.key, **meta})
    # The payload is written by itself and last, so it ends, padded to whole blocks, where the tar
    # now ends. Its offset then holds for headers of any length (long names take several blocks).
    writer.write({"__key__": item.key, encoded.suffix: encoded.payload})
    length = len(encoded.payload)
    padded = math.ceil(length / TAR_BLOCK) * TAR_BLOCK
    return {
        "offset": writer.tarstream.offset - padded,
        "length": length,
        "crc32": zlib.crc32(encoded.payload),
        "label": item.label,
        "width": encoded.width,
        "height": encoded.height,
        "key": item.key,
    }


def finalize(plan: Plan, url: str) -> Manifest:
    """Write index, side files and, last, the manifest of a folder whose shards are all there.

    Raises:
        ValueError: if shards are missing.
    """
    jobs = make_jobs(plan, url)
    waiting = _uncommitted(jobs)
    if waiting:
        raise ValueError(
            f"{len(waiting)} of {len(jobs)} shards of {url} are not packed yet (first: "
            f"{waiting[0].number:06d}); run the same command without --finalize first"
        )
    with ThreadPoolExecutor(COMMIT_THREADS) as pool:
        commits = list(pool.map(lambda job: files.read_json(job.commit_url), jobs))
    columns = {
        name: np.array([value for commit in commits for value in commit["columns"][name]], dtype)
        for name, dtype in COLUMNS.items()
    }
    index = Index(**columns).to_bytes()
    manifest = Manifest(
        dataset=plan.source.dataset,
        classes=plan.labels.names,
        templates=plan.labels.templates,
        groups=plan.source.groups,
        encoding=plan.encoding,
        plan_hash=plan.hash,
        index_sha256=files.sha256_bytes(index),
        shards=tuple(Shard(**commit["shard"]) for commit in commits),
    )
    files.write_bytes(files.join(url, "index.npz"), index)
    for name, content in side_files(manifest).items():
        files.write_bytes(files.join(url, name), content.encode())
    _remove_temporaries(url)
    manifest.save(url)
    return manifest


def side_files(manifest: Manifest) -> dict[str, str]:
    """Return the files that let timm, open_clip and CLIP_benchmark read the shards."""
    names = [shard.name for shard in manifest.shards]
    lengths = [shard.samples for shard in manifest.shards]
    split = "train" if manifest.dataset.endswith("-train") else "validation"
    info = {
        "name": split,
        "num_samples": manifest.samples,
        "filenames": names,
        "shard_lengths": lengths,
        "alt_label": "",
    }
    return {
        "_info.json": json.dumps({"splits": {split: info}}, indent=2) + "\n",
        "sizes.json": json.dumps(dict(zip(names, lengths, strict=True)), indent=2) + "\n",
        "nshards.txt": f"{len(names)}\n",
        "classnames.txt": "\n".join(manifest.classes) + "\n",
        "zeroshot_classification_templates.txt": "\n".join(manifest.templates) + "\n",
    }


def parse_task(text: str) -> tuple[int, int]:
    """Return (I, N) of `I/N`.

    Raises:
        ValueError: if it is not of that form, or I is not one of 0 ... N-1.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"--task must be I/N with I from 0 to N-1 (such as 0/4), not {text!r}")
    return int(match[1]), int(match[2])


def _check(options: Options) -> tuple[int, tuple[int, int]]:
    """Return the number of workers and the task, or say which option is wrong."""
    if options.size < 1:
        raise ValueError(f"--size must be at least 1, not {options.size}")
    if options.shard_mb <= 0:
        raise ValueError(f"--shard-mb must be above 0, not {options.shard_mb}")
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers must be at least 1, not {options.workers}")
    if options.finalize and options.task is not None:
        raise ValueError("--finalize writes no shards, so it goes without --task")
    return options.workers or _cores(), (0, 1) if options.task is None else parse_task(options.task)


def _cores() -> int:
    """Return how many cores this process may use; a cluster job rarely owns the whole machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_complete(plan: Plan, url: str, jobs: Sequence[Job]) -> bool:
    sizes = _file_sizes(url)
    if "manifest.json" not in sizes or "index.npz" not in sizes:
        return False
    manifest = Manifest.load(url)
    return (
        manifest.plan_hash == plan.hash
        and len(manifest.shards) == len(jobs)
        and all(sizes.get(shard.name) == shard.bytes for shard in manifest.shards)
    )


def _uncommitted(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs that have no valid commit, or whose tar is gone or of another size."""
    if not jobs:
        return []
    url = jobs[0].out
    sizes, commits = _file_sizes(url), _file_sizes(files.join(url, "commit"))

    def is_done(job: Job) -> bool:
        if job.commit_url.rsplit("/", 1)[-1] not in commits:
            return False
        commit = files.read_json(job.commit_url)
        shard = commit["shard"]
        return commit["plan_hash"] == job.plan_hash and sizes.get(shard["name"]) == shard["bytes"]

    with ThreadPoolExecutor(COMMIT_THREADS) as pool:
        done = list(pool.map(is_done, jobs))
    return [job for job, is_done_ in zip(jobs, done, strict=True) if not is_done_]


def _write_shards(title: str, jobs: Sequence[Job], workers: int) -> None:
    """Write the shards, in this process or in several; the first error stops it."""
    total = sum(len(job.items) for job in jobs)
    with _progress(title, total) as advance:
        if min(workers, len(jobs)) <= 1:
            for job in jobs:
                advance(*write_shard(job))
            return
        # fork would copy locks that fsspec's or rich's threads may hold
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rft.data.pack", "webdataset"])
        executor = ProcessPoolExecutor(
            min(workers, len(jobs)), mp_context=context, initializer=_start_worker
        )
        try:
            # Ctrl-C reaches every process of a terminal; the first submit starts the others, which
            # inherit the blocked signal, while here it is only put off
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = [executor.submit(write_shard, job) for job in jobs]
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for done in as_completed(futures):
                advance(*done.result())
        finally:
            executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and never outlive it: a killed parent cannot stop its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with the samples and bytes of each shard that was written."""
    start, samples, size, printed = time.monotonic(), 0, 0, time.monotonic()

    def rate() -> str:
        seconds = max(time.monotonic() - start, 1e-9)
        return f"{samples / seconds:,.0f} samples/s, {size / 2**20:,.1f} MiB"

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        disable=not sys.stdout.isatty(),
    )
    with bar:
        row = bar.add_task(title, total=total, rate="")

        def advance(more_samples: int, more_bytes: int) -> None:
            nonlocal samples, size, printed
            samples, size = samples + more_samples, size + more_bytes
            bar.update(row, completed=samples, rate=rate())
            due = time.monotonic() - printed > SECONDS_PER_LINE or samples == total
            if due and bar.disable:
                print(f"{title}: {samples:,} of {total:,} samples, {rate()}", flush=True)
                printed = time.monotonic()

        yield advance


def _read_source_file(path: Path, expected: int) -> bytes:
    data = path.read_bytes()
    if len(data) != expected:
        raise ValueError(
            f"{path} has {len(data)} bytes, {expected} when it was listed; "
            f"pack again when nothing writes to the source"
        )
    return data


def _file_sizes(url: str) -> dict[str, int]:
    """Return name -> bytes for a folder's entries, as the store sees it now; absent is empty."""
    fs, path = files.open_store(url)
    fs.invalidate_cache(path)  # other tasks write here too
    if not fs.exists(path):
        return {}
    entries = fs.ls(path, detail=True)
    return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] for entry in entries}


def _remove_temporaries(url: str) -> None:
    """Delete what killed runs left; all shards are committed, so nobody is writing one."""
    fs, path = files.open_store(url)
    for name in _file_sizes(url):
        if re.fullmatch(r"\.\d{6}\.tar\.[0-9a-f]{32}\.tmp", name):
            fs.rm_file(files.join(path, name))


def _compact_json(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")
