"""Pack a source of images into WebDataset tar shards that readers address by offset.

The plan determines everything: which samples are in which shard, in which order. `plan.json` is
written first and protects the folder against a second, different plan. Shards are independent tasks
(`rft.packing.shard`); `manifest.json` is written last, when all commit records exist. So a killed
run resumes where it stopped, any division among processes and machines gives the same bytes, and a
folder without a manifest is not a data set.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from rft.config import MAX_PIXELS
from rft.log import ASIDE
from rft.packing import encode
from rft.packing.expected import check_count
from rft.packing.layouts import folders_read, read_source
from rft.packing.pool import each_done
from rft.packing.shard import (
    NAMED_IN_ERRORS,
    Commit,
    Quarantined,
    ShardJob,
    compact_json,
    file_sizes,
    too_many,
    write_shard,
)
from rft.packing.source import Item, Source, require_apart, where
from rft.progress import progress
from rft.shards.folder import COMMITS, INDEX, MANIFEST, PLAN, QUARANTINE, SAMPLES
from rft.shards.images import Kind, Quality, Square, encoding_parameters
from rft.shards.index import COLUMNS, INDEX_BYTES, KEY_BYTES, ROW_BYTES, Index
from rft.shards.label_space import LabelSpace, scoring_hash
from rft.shards.manifest import DOMAINS, Manifest, Shard, declared
from rft.shards.ranges import cut
from rft.shards.samples import Samples
from rft.storage import files, local
from rft.storage.documents import Above0, Megapixels, Positive, Seed, Whole, document
from rft.text import counted, printable

ALGORITHM = 2  # part of the plan: raise it when the order, the cut or the members change
# parameters of a plan that are hashes, and what a different hash means
HASHED = {
    "items": "the images, or their sizes, classes or domains, changed",
    "labels": "the names, ids or templates of the classes (--classes) changed",
}
COMMIT_THREADS = 16  # reading commits is latency-bound on object stores

log = logging.getLogger(__name__)


@document(name="--")
class Options:
    """How to pack; `workers`, `task` and `finalize` divide the work and never change the bytes.

    Neither does `max_pixels`, nor `max_bad` if every image can be decoded.
    """

    encoding: Kind = "original"
    """original: the files' own bytes. pixels: CLIP's input, so that training decodes nothing. jpeg:
    the same square as a JPEG, a fifth of the bytes."""
    size: Square = 224
    """Side in pixels of the stored square (pixels and jpeg)."""
    quality: Quality = 95
    """Quality of the JPEG, 1 to 100 (jpeg only)."""
    shard_mb: Annotated[Above0, Field(le=1e6)] = 100
    """Size of a shard in MiB."""
    seed: Seed = 0
    """Seed of the global shuffle."""
    workers: Positive | None = None
    """Processes that write shards; None is one per core that this process may use."""
    task: str | None = None
    """I/N with I from 0 to N-1: this task's part of the shards; the last to finish writes the
    manifest."""
    finalize: bool = False
    """Write no shards, only the manifest, once all shards exist."""
    max_bad: Whole = 0
    """How many images of the entire set may be left out because they cannot be decoded; each is
    listed with its reason in quarantine.jsonl. A rerun with a larger number resumes, with a smaller
    one it retries those images."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that an image may have: a small file may claim more than memory holds.
    Raise it for your own panoramas; it never changes the bytes."""


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """The assignment of samples to shards, and the parameters that determine it (`plan.json`)."""

    source: Source
    labels: LabelSpace
    encoding: dict[str, Any]
    shards: tuple[tuple[Item, ...], ...]
    parameters: dict[str, Any]

    @cached_property
    def hash(self) -> str:
        """Identity of the plan."""
        return files.sha256_json(self.parameters)


def pack(
    dataset: str,
    source: str,
    out: str,
    labels: LabelSpace,
    options: Options,
    allowed_count: int | None = None,
) -> bool:
    """Pack one data set, as `pack_all`."""
    allowed = {} if allowed_count is None else {dataset: allowed_count}
    return pack_all([dataset], source, out, labels, options, allowed)


def pack_all(
    datasets: Sequence[str],
    source: str,
    out: str,
    labels: LabelSpace,
    options: Options,
    allowed: Mapping[str, int],
) -> bool:
    """Pack `datasets`, found at or below the folder `source`, into `out/DATASET` each.

    All are listed before the first is packed, which may take hours. In ImageNet's label space the
    number of images must be the published one, or the one in `allowed`.

    Returns:
        Whether all are complete, as `pack_source`.

    Raises:
        ValueError: as `pack_source`; one error for all sets that cannot be listed.
    """
    _check(options)  # before a listing that may take minutes
    sources, errors = [], []
    for dataset in datasets:
        try:
            sources.append(_listed(dataset, source, out, labels, allowed.get(dataset)))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("; and ".join(dict.fromkeys(errors)))
    complete = [pack_source(found, out, labels, options) for found in sources]
    return all(complete)


def _listed(dataset: str, source: str, out: str, labels: LabelSpace, allowed: int | None) -> Source:
    """List the images of a benchmark, and check their number and the output folder."""
    require_apart(folders_read(dataset, Path(source)), out, [dataset])
    found = read_source(dataset, Path(source), labels)
    log.info(f"{dataset}: {counted(len(found.items), 'image')} in {printable(found.layout)}")
    if found.links:
        log.info(f"{dataset}: {found.links}", extra=ASIDE)
    check_count(dataset, len(found.items), labels, allowed)
    return found


def pack_source(source: Source, out: str, labels: LabelSpace, options: Options) -> bool:
    """Pack a source whose images are already listed into `out/source.dataset`.

    A rerun resumes where the last one stopped; a complete set is not changed.

    Returns:
        Whether the data set is complete; False while other tasks still have shards to write.

    Raises:
        ValueError: if the source, an image or an option is invalid, or `out` holds other data.
    """
    index, count = _check(options)
    plan = make_plan(source, labels, options)
    _require_readable(plan)
    url = files.join(out, source.dataset)
    claim(plan, url, create=not options.finalize)
    jobs = make_jobs(plan, url, options.max_bad, options.max_pixels)
    if _is_complete(plan, url, options.max_bad):
        return True
    if not options.finalize:
        mine = jobs[index::count]
        todo = [job for job, commit in zip(mine, _commits(mine), strict=True) if commit is None]
        _write_shards(source.dataset, todo, options.workers, options.max_bad)
    # the records of all tasks: the last task finds every record and completes the set
    found = _commits(jobs)
    commits = [commit for commit in found if commit is not None]
    missing = len(found) - len(commits)
    if missing and options.finalize:
        raise ValueError(
            f"{missing} of {len(jobs)} shards of {url} are not packed yet (first: "
            f"{found.index(None):06d}); run the same command without --finalize first"
        )
    if missing:
        log.info(
            f"{source.dataset}: task {index}/{count} is done; {missing} of {len(jobs)} shards are "
            f"left to other tasks, the last of which writes the manifest"
        )
        return False
    manifest = finalize(plan, url, commits, options.max_bad)
    total = sum(shard.bytes for shard in manifest.shards)
    bad = [entry.path for commit in commits for entry in commit.quarantined]
    names = f"{', '.join(bad[:NAMED_IN_ERRORS])}{', ...' if len(bad) > NAMED_IN_ERRORS else ''}"
    left_out = f", {len(bad):,} left out: {names} ({files.join(url, QUARANTINE)})" if bad else ""
    log.info(
        f"{source.dataset}: {counted(manifest.samples, 'sample')} in "
        f"{counted(len(manifest.shards), 'shard')}, {max(total / 2**20, 0.1):,.1f} MiB at "
        f"{url}{left_out}"
    )
    if source.photos:
        turned = sum(commit.statistics.turned for commit in commits)
        composed = sum(commit.statistics.composed for commit in commits)
        if turned:
            log.info(f"{source.dataset}: photos turned upright (EXIF orientation): {turned:,}")
        if composed:
            log.info(f"{source.dataset}: transparent photos composed on white: {composed:,}")
    return True


def make_plan(source: Source, labels: LabelSpace, options: Options) -> PackPlan:
    """Make the plan: a global shuffle of the items, cut into shards by bytes.

    The result does not depend on the order of `source.items`.
    """
    encoding = encoding_parameters(
        options.encoding,
        options.size,
        source.crop_border,
        options.quality,
        photos=source.photos,
    )
    shard_bytes = int(options.shard_mb * 2**20)
    order = shuffle(source.items, options.seed)
    sizes = [encode.expected_bytes(encoding, item.bytes) for item in order]
    domains = source.domains
    listing = sorted(
        (item.key, item.path, item.label, item.bytes, *([item.domain] if domains else []))
        for item in order
    )
    parameters = {
        "algorithm": ALGORITHM,
        "dataset": source.dataset,
        "encoding": encoding,
        "seed": options.seed,
        "shard_bytes": shard_bytes,
        "samples": len(order),
        "source_bytes": sum(item.bytes for item in order),
        # shortened, to be compared by eye; nothing is gained by forging it
        "items": files.sha256_json(listing)[:16],
        "labels": scoring_hash(labels.ids, labels.names, labels.templates, source.groups),
        **declared(source.score, ood=source.ood),
    }
    shards = tuple(tuple(order[start:stop]) for start, stop in cut(sizes, shard_bytes))
    return PackPlan(
        source=source, labels=labels, encoding=encoding, shards=shards, parameters=parameters
    )


def shuffle(items: Sequence[Item], seed: int) -> list[Item]:
    """Sort the items by a hash of seed and key, so that no library version changes the order."""
    # not this module's name: a different text would reorder every packed set
    salt = hashlib.blake2b(f"rft.data.pack {seed}".encode()).digest()

    def position(item: Item) -> tuple[bytes, str]:
        digest = hashlib.blake2b(item.key.encode("ascii"), key=salt, digest_size=16).digest()
        return digest, item.key

    return sorted(items, key=position)


def make_jobs(
    plan: PackPlan, url: str, max_bad: int = 0, max_pixels: float = MAX_PIXELS
) -> list[ShardJob]:
    """Make one job for each shard of the plan."""
    return [
        ShardJob(
            root=plan.source.root,
            out=url,
            number=number,
            items=items,
            classes=plan.labels.names,
            encoding=plan.encoding,
            plan_hash=plan.hash,
            max_bad=max_bad,
            max_pixels=max_pixels,
        )
        for number, items in enumerate(plan.shards)
    ]


def claim(plan: PackPlan, url: str, *, create: bool = True) -> None:
    """Make `url` the folder of this plan, or check that it already is.

    A different plan without any shard yet is replaced.

    Raises:
        ValueError: if the folder holds a different plan's data (with the differences) or other
            files, or is empty and may not be created.
    """
    plan_url = files.join(url, PLAN)
    fs, folder = files.open_store(url)
    if isinstance(fs, LocalFileSystem):
        local.require_own_folder(Path(folder), "--out")
        # records are written through commit/, which could be a link to a different folder
        local.require_no_links(Path(folder), [COMMITS])
    # a packer killed in its first write leaves a temporary file and no plan
    names = [name for name in file_sizes(url) if not files.TEMPORARY.fullmatch(name)]
    if PLAN in names:
        found = files.read_document(plan_url, dict)
        if found == plan.parameters:
            return
        changes = "; ".join(_changes(found, plan.parameters))
        records = file_sizes(files.join(url, COMMITS))
        shards = {*names, *records} - {PLAN, COMMITS}
        # an empty commit/ and temporary files are not data of that plan
        if any(not files.TEMPORARY.fullmatch(name) for name in shards) or not create:
            raise ValueError(
                f"{url} holds a different plan ({changes}); choose another --out or delete that "
                f"folder"
            )
        log.info(f"{url} held a different plan ({changes}) but no shard yet: replaced")
    elif names:
        raise ValueError(
            f"{url} is not empty and was not packed by rft (it has {names[0]} but no plan.json); "
            f"choose another --out or delete that folder"
        )
    elif not create:
        raise ValueError(f"nothing is packed at {url} yet; run without --finalize first")
    files.write_json(plan_url, plan.parameters)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Describe how two plans differ; of lists, a plan has only a hash, which would say nothing."""
    for name, was, now in files.differing(old, new):
        yield HASHED.get(name, f"{name}: {was!r} -> {now!r}")


def finalize(plan: PackPlan, url: str, commits: Sequence[Commit], max_bad: int = 0) -> Manifest:
    """Write index, side files and, last, the manifest, once all shards have a record.

    Raises:
        ValueError: if more than `max_bad` images were left out.
    """
    quarantined = [(commit.shard.name, entry) for commit in commits for entry in commit.quarantined]
    if len(quarantined) > max_bad:
        raise too_many([entry for _, entry in quarantined], max_bad)
    # np.bytes_ turns the keys into ASCII bytes of the longest key's length
    columns = {
        name: np.array(
            [value for commit in commits for value in getattr(commit.columns, name)], dtype
        )
        for name, dtype in COLUMNS.items()
    }
    index = Index(**columns).to_bytes()
    source = [value for commit in commits for value in commit.columns.source]
    samples = Samples(
        source=np.array(source, np.uint64), domain=_domains(plan.source, columns["key"])
    ).to_bytes()
    shards = [commit.shard for commit in commits]
    hashes = (files.sha256_bytes(index), files.sha256_bytes(samples))
    manifest = _manifest(plan, shards, *hashes, len(quarantined))
    files.write_bytes(files.join(url, INDEX), index)
    files.write_bytes(files.join(url, SAMPLES), samples)
    for name, content in side_files(manifest).items():
        files.write_bytes(files.join(url, name), content.encode())
    if quarantined:
        lines = [
            compact_json({**asdict(entry), "shard": name}) + b"\n" for name, entry in quarantined
        ]
        files.write_bytes(files.join(url, QUARANTINE), b"".join(lines))
    # before the manifest: with it, a rerun would find the set complete and keep them
    _remove_temporaries(url)
    manifest.save(url)
    return manifest


def _domains(source: Source, key_N: np.ndarray) -> np.ndarray | None:
    """Look up the number of each sample's domain, int32 (N,); None for a set without domains."""
    if not source.domains:
        return None
    number_of = {name: number for number, name in enumerate(source.domains)}
    domain_of = {item.key.encode(): number_of[item.domain] for item in source.items}
    return np.array([domain_of[key] for key in key_N.tolist()], np.int32)


def _manifest(
    plan: PackPlan,
    shards: Sequence[Shard],
    index_sha256: str,
    samples_sha256: str,
    quarantined: int = 0,
) -> Manifest:
    return Manifest(
        dataset=plan.source.dataset,
        classes=plan.labels.names,
        class_ids=plan.labels.ids,
        templates=plan.labels.templates,
        groups=plan.source.groups,
        encoding=plan.encoding,
        plan_hash=plan.hash,
        index_sha256=index_sha256,
        shards=tuple(shards),
        quarantined=quarantined,
        samples_sha256=samples_sha256,
        domains=plan.source.domains,
        score=plan.source.score,
        ood=plan.source.ood,
    )


def _require_readable(plan: PackPlan) -> None:
    """Check, before packing, the limits that readers of the finished set enforce.

    Raises:
        ValueError: for a key or an index that is too large, or an invalid manifest.
    """
    if (count := len(plan.source.domains)) > DOMAINS:
        raise ValueError(
            f"{plan.source.dataset} has {count:,} domains, more than the limit of {DOMAINS:,}; "
            "make them coarser"
        )
    # a manifest with a dummy shard, because only the label space is checked here
    some_hash = "0" * 64
    shards = [Shard(name="0.tar", bytes=0, sha256=some_hash, samples=1)]
    try:
        _manifest(plan, shards, some_hash, some_hash)
    except ValueError as error:
        raise ValueError(
            f"{plan.source.dataset}: a manifest cannot hold its label space ({error}); change "
            f"--classes"
        ) from error
    items = plan.source.items
    longest = max(items, key=lambda item: len(item.key))
    if (letters := len(longest.key)) > KEY_BYTES:
        raise ValueError(
            f"{where(plan.source.root, longest)} would have a key of {letters:,} letters, more "
            f"than the limit of {KEY_BYTES:,}; shorten the names of the file and its folders"
        )
    # every key takes as much space as the longest
    if len(items) * (ROW_BYTES + letters) > INDEX_BYTES:
        raise ValueError(
            f"the index of {len(items):,} images with keys of up to {letters:,} letters would have "
            f"more than the limit of {INDEX_BYTES:,} bytes; split them into several sets"
        )


def side_files(manifest: Manifest) -> dict[str, str]:
    """Make the files with which timm, open_clip and CLIP_benchmark read the shards."""
    names = [shard.name for shard in manifest.shards]
    lengths = [shard.samples for shard in manifest.shards]
    # the names that timm's own sets give their splits
    split = "train" if manifest.dataset.split("-")[-1] == "train" else "validation"
    info = {
        "name": split,
        "num_samples": manifest.samples,
        "filenames": names,
        "shard_lengths": lengths,
        "alt_label": "",
    }
    return {
        # timm
        "_info.json": json.dumps({"splits": {split: info}}, indent=2) + "\n",
        # open_clip
        "sizes.json": json.dumps(dict(zip(names, lengths, strict=True)), indent=2) + "\n",
        # CLIP_benchmark
        "nshards.txt": f"{len(names)}\n",
        "classnames.txt": "\n".join(manifest.classes) + "\n",
        "zeroshot_classification_templates.txt": "\n".join(manifest.templates) + "\n",
    }


def parse_task(text: str) -> tuple[int, int]:
    """Parse `I/N` into (I, N).

    Raises:
        ValueError: if it is malformed, or I is not one of 0 ... N-1.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"--task must be I/N with I from 0 to N-1 (such as 0/4), not {text!r}")
    return int(match[1]), int(match[2])


def _check(options: Options) -> tuple[int, int]:
    """Parse the task (I, N), and raise for contradictory options."""
    if options.finalize and options.task is not None:
        raise ValueError("--finalize writes no shards; leave out --task")
    return parse_task("0/1" if options.task is None else options.task)


def _is_complete(plan: PackPlan, url: str, max_bad: int) -> bool:
    sizes = file_sizes(url)
    if MANIFEST not in sizes or INDEX not in sizes:
        return False
    manifest = Manifest.load(url)
    # sets of older versions have none, and are kept unchanged
    if manifest.samples_sha256 is not None and SAMPLES not in sizes:
        return False
    if (
        manifest.plan_hash != plan.hash
        or len(manifest.shards) != len(plan.shards)
        # by size alone: tools/verify_shards.py --deep reads every byte
        or any(sizes.get(shard.name) != shard.bytes for shard in manifest.shards)
    ):
        return False
    if manifest.quarantined > max_bad:
        raise ValueError(
            f"{url} is packed without {counted(manifest.quarantined, 'image')}, --max-bad allows "
            f"{max_bad}; raise it, or repair them ({QUARANTINE}), delete that folder and pack again"
        )
    listed = f" ({manifest.quarantined} left out: {files.join(url, QUARANTINE)})"
    left_out = listed if manifest.quarantined else ""
    log.info(f"{manifest.dataset}: already packed at {url}{left_out}, nothing to do")
    return True


def _commits(jobs: Sequence[ShardJob]) -> list[Commit | None]:
    """Read the jobs' records; None if it is not valid, or if the tar is absent or has changed."""
    if not jobs:
        return []
    sizes, records = file_sizes(jobs[0].out), file_sizes(files.join(jobs[0].out, COMMITS))

    def find(job: ShardJob) -> Commit | None:
        # most are absent in a first run: one listing costs less than a request for each
        if job.commit_url.rsplit("/", 1)[-1] not in records:
            return None
        commit = Commit.load(job)
        return commit if commit.finishes(job, sizes) else None

    with ThreadPoolExecutor(COMMIT_THREADS) as pool:
        return list(pool.map(find, jobs))


def _write_shards(title: str, jobs: Sequence[ShardJob], workers: int | None, max_bad: int) -> None:
    """Write the shards in one or several processes; the first error stops all."""
    bad: list[Quarantined] = []
    with progress(title, "samples", sum(len(job.items) for job in jobs)) as advance:

        def done(_: int, commit: Commit) -> None:
            advance(commit.shard.samples + len(commit.quarantined), commit.shard.bytes)
            bad.extend(commit.quarantined)
            if len(bad) > max_bad:  # fails immediately rather than at the end
                raise too_many(bad, max_bad)

        each_done(write_shard, jobs, workers, done)


def _remove_temporaries(url: str) -> None:
    """Delete temporary files of killed runs.

    Those of shards and records are all deleted: every shard is committed, so none is needed. Those
    of index, side files and manifest only if unlocked: a second run of this task may be writing
    them.
    """
    for folder in (url, files.join(url, COMMITS)):
        for name in file_sizes(folder):
            if files.TEMPORARY.fullmatch(name) and re.match(r"\.[0-9]{6,}\.", name):
                files.remove(files.join(folder, name))
    fs, path = files.open_store(url)
    if isinstance(fs, LocalFileSystem):  # remote stores have none: objects appear complete
        files.remove_abandoned(Path(path))
