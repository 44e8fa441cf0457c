"""One shard of a packed set: a tar, followed by a record that it is complete.

A shard is one idempotent task. The job determines the tar (`NNNNNN.tar`). The record
(`commit/NNNNNN.json`) is written after it and holds its size and hash, its rows of the index, the
images that were left out, and statistics, so the tar is never read again.
"""

import json
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rft import cpus
from rft.config import MAX_PIXELS
from rft.packing import encode
from rft.packing.shard_writer import ShardWriter
from rft.packing.source import Item, Source, read_item, where
from rft.shards.folder import COMMITS, PLAN
from rft.shards.image_files import require_affordable
from rft.shards.index import COLUMNS, KEY_BYTES
from rft.shards.manifest import Shard
from rft.shards.samples import source_hash
from rft.storage import files, local
from rft.storage.documents import Count, Sha256, Text, document

NAMED_IN_ERRORS = 3  # unreadable images
COMMIT_BYTES = 2**28  # three times the record of ImageNet in a single shard
COMMIT_VALUES = 20_000_000  # ImageNet in a single shard has 10 million
# printable ASCII without spaces
Key = Annotated[str, Field(min_length=1, max_length=KEY_BYTES, pattern="^[\\x21-\\x7e]+$")]


@document
class Quarantined:
    """An image that was left out: its path in the source, and the reason."""

    path: Text
    reason: Text


@document
class Columns:
    """A shard's rows of the index, by column (see `rft.shards.index.Index`), and of samples.npz."""

    # the bounds of the types in `rft.shards.index.COLUMNS`
    offset: tuple[Count, ...]
    length: tuple[Annotated[Count, Field(lt=2**32)], ...]
    crc32: tuple[Annotated[Count, Field(lt=2**32)], ...]
    label: tuple[Annotated[Count, Field(lt=2**31)], ...]
    width: tuple[Annotated[Count, Field(lt=2**16)], ...]
    height: tuple[Annotated[Count, Field(lt=2**16)], ...]
    key: tuple[Key, ...]
    source: tuple[Annotated[int, Field(ge=0, lt=2**64)], ...] = ()
    """The column of `rft.shards.samples`; records of older versions have none."""

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, name)) for name in COLUMNS}
        if len(lengths) != 1 or not {len(self.source)} <= {0, *lengths}:
            raise ValueError("columns have different lengths")


@document
class Statistics:
    """Statistics of packing a shard: the time it took, and the kinds of its images.

    Only `turned` and `composed` are used, for a log line. The others are kept because versions of
    rft would otherwise refuse each other's records.
    """

    seconds: Annotated[float, Field(ge=0)]
    source_bytes: Count
    formats: dict[str, Count]
    modes: dict[str, Count]
    turned: Count
    composed: Count
    classes: Count


@document
class Commit:
    """The record of a finished shard (`commit/NNNNNN.json`)."""

    plan_hash: Sha256
    shard: Shard
    columns: Columns
    quarantined: tuple[Quarantined, ...]
    statistics: Statistics

    def __post_init__(self) -> None:
        rows = len(self.columns.key)
        if rows != self.shard.samples:
            raise ValueError(f"columns have {rows} rows, the shard {self.shard.samples} samples")

    @staticmethod
    def load(job: "ShardJob") -> "Commit":
        """Read the record of a job's shard.

        Raises:
            ValueError: with advice, if it is absent or invalid.
        """
        name = job.shard_url.rsplit("/", 1)[-1]
        try:
            commit = files.read_document(job.commit_url, Commit, COMMIT_BYTES, COMMIT_VALUES)
            if commit.shard.name != name:
                raise ValueError(f"{job.commit_url}: shard.name is {commit.shard.name}, not {name}")
        except ValueError as error:
            raise ValueError(f"{error}; delete it and rerun the same command") from error
        return commit

    def finishes(self, job: "ShardJob", sizes: Mapping[str, int]) -> bool:
        """Whether the job is done, according to its record and the `sizes` of all tars.

        A record with more left-out images than are now allowed does not count, because they may
        have been repaired. Neither does one without `source`: the same bytes are written again.
        """
        return (
            self.plan_hash == job.plan_hash
            and len(self.columns.source) == self.shard.samples
            and sizes.get(self.shard.name) == self.shard.bytes
            and len(self.quarantined) <= job.max_bad
        )


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One shard to write: the part of the plan that a worker process needs."""

    root: Path
    out: str
    number: int
    items: tuple[Item, ...]
    classes: tuple[str, ...]
    encoding: dict[str, Any]
    plan_hash: str
    max_bad: int = 0
    max_pixels: float = MAX_PIXELS

    @property
    def shard_url(self) -> str:
        """URL of the tar."""
        return files.join(self.out, f"{self.number:06d}.tar")

    @property
    def commit_url(self) -> str:
        """URL of the finished tar's record."""
        return files.join(self.out, COMMITS, f"{self.number:06d}.json")


def write_shard(job: ShardJob) -> Commit:
    """Write one tar, then its record, which is returned. The same job always gives the same tar.

    Raises:
        ValueError: if more than `job.max_bad` images cannot be read, or a different plan has taken
            over the folder; then neither tar nor record appears.
    """
    try:
        return _write(job)
    except FileNotFoundError:
        # the same task may run twice: the first to finish completes the set and cleans up
        if files.exists(job.commit_url):
            commit = Commit.load(job)
            if commit.finishes(job, file_sizes(job.out)):
                return commit
        raise


def _write(job: ShardJob) -> Commit:
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    packed: list[encode.Encoded] = []
    bad: list[Quarantined] = []
    with files.publish(job.shard_url) as path:
        with local.writer(path) as stream, ShardWriter(stream) as tar:
            for item in job.items:
                read = _encode(job, item, bad)
                if read is not None:
                    encoded, source = read
                    row = write_sample(tar, item, job.classes[item.label], encoded)
                    rows.append({**row, "source": source})
                    # without the payloads, which add up to the size of the shard
                    packed.append(encoded._replace(payload=b""))
        _require_plan(job)
    shard = Shard(
        name=job.shard_url.rsplit("/", 1)[-1], bytes=tar.size, sha256=tar.sha256, samples=len(rows)
    )
    statistics = Statistics(
        seconds=round(time.monotonic() - started, 3),
        source_bytes=sum(item.bytes for item in job.items),
        formats=dict(Counter(one.header.format for one in packed)),
        modes=dict(Counter(one.header.mode for one in packed)),
        turned=sum(one.treated.orientation != 1 for one in packed),
        composed=sum(one.treated.composed for one in packed),
        classes=len({row["label"] for row in rows}),
    )
    names = (*COLUMNS, "source")
    columns: dict[str, Any] = {name: tuple(row[name] for row in rows) for name in names}
    commit = Commit(
        plan_hash=job.plan_hash,
        shard=shard,
        columns=Columns(**columns),
        quarantined=tuple(bad),
        statistics=statistics,
    )
    # after the tar has its final name: a record never precedes its tar
    files.write_bytes(job.commit_url, compact_json(asdict(commit)))
    return commit


def too_many(bad: Sequence[Quarantined], allowed: int) -> ValueError:
    """Make the error for more unreadable images than are allowed."""
    first = "; ".join(f"{entry.path} {entry.reason}" for entry in bad[:NAMED_IN_ERRORS])
    more = ", ..." if len(bad) > NAMED_IN_ERRORS else ""
    return ValueError(
        f"{len(bad)} images cannot be read, --max-bad allows {allowed} ({first}{more}); replace "
        f"them, or pass --max-bad {len(bad)} or more; finished shards are kept"
    )


def write_sample(
    tar: ShardWriter, item: Item, class_name: str, encoded: encode.Encoded
) -> dict[str, Any]:
    """Append one sample's members to a tar and return its index row.

    The class name is stored as a caption, because open_clip's training skips samples without one.
    """
    header, payload = encoded.header, encoded.payload
    description = {
        "path": item.path,
        "format": header.format,
        "mode": header.mode,
        "size": [header.width, header.height],
    }
    members = {
        "cls": str(item.label).encode(),
        "json": compact_json(description),
        "txt": class_name.encode(),
    }
    return {
        "offset": tar.add(item.key, members, encoded.suffix, payload),
        "length": len(payload),
        "crc32": zlib.crc32(payload),
        "label": item.label,
        "width": header.width,
        "height": header.height,
        "key": item.key,
    }


def file_sizes(url: str) -> dict[str, int]:
    """List a folder's entries as name -> bytes, never cached; empty if the folder is absent."""
    # not from a cache, because other tasks write here too
    entries = files.listing(url)
    return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] for entry in entries}


def compact_json(document: Any) -> bytes:
    """Encode as JSON with sorted keys and without white space."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")


def _encode(job: ShardJob, item: Item, bad: list[Quarantined]) -> tuple[encode.Encoded, int] | None:
    """Encode an image, and hash its file.

    None if it cannot be read; the reason is then added to `bad`.
    """
    name = where(job.root, item)
    try:
        require_affordable(item.bytes, name, job.max_pixels)
    except ValueError as error:
        return _leave_out(job, item, bad, error)
    data = read_item(job.root, item)  # a file that cannot be opened is an error, never left out
    try:
        return encode.encode(data, name, job.encoding, job.max_pixels), source_hash(data)
    except ValueError as error:
        return _leave_out(job, item, bad, error)


def unreadable(source: Source, encoding: dict[str, Any]) -> int:
    """Count all images of a source that cannot be packed."""
    job = ShardJob(
        root=source.root,
        out="",
        number=0,
        items=tuple(source.items),
        classes=(),
        encoding=encoding,
        plan_hash="",
        max_bad=len(source.items),
    )
    bad: list[Quarantined] = []

    def look(item: Item) -> None:
        _encode(job, item, bad)

    with ThreadPoolExecutor(cpus.available()) as pool:
        for _ in pool.map(look, source.items):
            pass
    return len(bad)


def _leave_out(job: ShardJob, item: Item, bad: list[Quarantined], error: ValueError) -> None:
    """Record an image that cannot be packed, or raise if it exceeds the limit."""
    if job.max_bad == 0:
        raise ValueError(f"{error}; --max-bad N leaves out up to N such images") from error
    # without the source's folder, so that records do not depend on its location
    reason = str(error).removeprefix(where(job.root, item)).strip()
    bad.append(Quarantined(path=item.path, reason=reason))
    # counts only this shard; `rft.packing.pack` adds up all shards
    if len(bad) > job.max_bad:
        raise too_many(bad, job.max_bad) from error


def _require_plan(job: ShardJob) -> None:
    """Check that the folder still belongs to the job's plan, before the tar gets its final name."""
    found = files.read_document(files.join(job.out, PLAN), dict)
    if files.sha256_json(found) != job.plan_hash:
        raise ValueError(
            f"{job.out} was taken over by a run with a different plan; choose another --out for "
            f"one of the two"
        )
