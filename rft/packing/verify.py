"""Checks a packed or indexed set against its manifest; every difference is reported on one line.

The quick check reads manifest and index and queries the size of every shard. The deep check reads
every byte: the sha256 of each shard, its tar headers, and each payload, which must be a member with
the key and position in the index, have its crc32 and label, and decode. The check continues after a
problem, so that none hides another.
"""

import math
import os
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from rft.classes import Classes, composed
from rft.config import MAX_PIXELS
from rft.packing.foreign.index import OTHER_SUFFIXES
from rft.packing.foreign.labels import POSITION, parse_label, resolve_label
from rft.packing.foreign.rule import LabelsAre, Rule
from rft.packing.foreign.samples import SIZE_THREADS, open_whole, read_text, shard_size, split_name
from rft.packing.pool import for_each
from rft.sets import Score
from rft.shards import tar
from rft.shards.folder import PLAN, QUARANTINE
from rft.shards.image_files import IMAGE_SUFFIXES, require_affordable
from rft.shards.images import Encoding, load_image, npy_header, payload_of
from rft.shards.index import Index
from rft.shards.label_space import scoring_hash
from rft.shards.manifest import Manifest, Shard, declared, group_faults, note_other_stores
from rft.shards.samples import Samples, source_hash
from rft.storage import documents, files
from rft.storage.documents import FOREIGN, Name, Text, document

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One fault of a set; `offset` is a byte of the shard."""

    what: str
    shard: str = ""
    key: str = ""
    offset: int | None = None

    def __str__(self) -> str:
        place = [self.shard] if self.shard else []
        place += [f"key {self.key!r}"] if self.key else []
        place += [f"offset {self.offset:,}"] if self.offset is not None else []
        return f"{', '.join(place)}: {self.what}" if place else self.what


@dataclass(kw_only=True)
class Report:
    """The result of a check; `per_class` is the number of samples of each class id."""

    url: str
    deep: bool
    dataset: str = ""
    manifest_sha256: str = ""
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    per_class: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Build the document that `--report` writes."""
        document = asdict(self) | {"schema": SCHEMA, "ok": not self.problems}
        counted = ("shards", "samples", "bytes", "per_class")
        return document | {"counts": {name: document.pop(name) for name in counted}}

    def add(self, what: str, shard: str = "") -> None:
        """Record a problem of the set or of a shard."""
        self.problems.append(Problem(what=what, shard=shard))


@document(config=FOREIGN)
class RecordedPlan:
    """The part of plan.json that determines how labels are read.

    Only plans of third-party shards have `shards`, in all versions; a packer's plan has only data
    set, encoding and label space of these fields.
    """

    shards: Name | None = None
    dataset: Name | None = None
    encoding: Encoding | None = None
    labels: Name | None = None
    label_field: Text | None = None
    labels_are: LabelsAre | None = None
    local_labels: tuple[int, ...] | None = None
    ignore: tuple[Text, ...] = ()
    score: Score = "top1"
    ood: bool = False


@document(config=FOREIGN)
class LeftOut:
    """A line of quarantine.jsonl: a sample of a third-party shard that has no row in the index."""

    shard: Text
    path: Text


class Row(NamedTuple):
    """A row of the index as Python values (see `rft.shards.index.Index`)."""

    offset: int
    length: int
    crc32: int
    label: int
    width: int
    height: int
    key: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """Input for the deep check of a shard: its rows of the index, and how its labels are read.

    `size` is the size that the store reports, in bytes. `index` has only the rows of this shard,
    and `source` the same rows of samples.npz, which older sets lack. `ids_known` is whether the
    rule has the classes' ids, which older manifests lack. `left_out` are keys
    without a row.
    """

    shard: Shard
    place: str
    size: int
    index: Index | None
    source: np.ndarray | None
    encoding: dict[str, Any]
    rule: Rule
    ids_known: bool
    left_out: frozenset[str] = frozenset()


def verify(url: str, *, deep: bool, workers: int | None, max_pixels: float = MAX_PIXELS) -> Report:
    """Check the set at `url`, as the module describes. `workers` None is one per core."""
    report = Report(url=url, deep=deep)
    try:
        manifest = Manifest.load(url, as_path=True)
    except ValueError as error:
        report.add(f"manifest.json cannot be used: {error}")
        return report
    report.dataset, report.manifest_sha256 = manifest.dataset, manifest.sha256
    report.shards, report.samples = len(manifest.shards), manifest.samples
    report.bytes = sum(shard.bytes for shard in manifest.shards)
    plan = _read_plan(url, manifest, report)
    left_out = set()
    if manifest.quarantined:
        left_out = _check_quarantine(url, manifest, plan, report)
    try:
        index = Index.read(url, manifest)
    except ValueError as error:
        report.add(f"index.npz cannot be used: {error}")
        index = None
    else:
        # np.bincount refuses negative labels, and larger ones would lengthen the list
        in_range = index.label[(index.label >= 0) & (index.label < len(manifest.classes))]
        report.per_class = np.bincount(in_range, minlength=len(manifest.classes)).tolist()
        report.problems += check_index(manifest, index)
    samples = _read_samples(url, manifest, report)
    checks = _check_sizes(manifest, index, samples, plan, max_pixels, report, left_out)
    if not deep:
        return report
    names = {shard.sha256: shard.name for shard in manifest.shards}
    found = for_each("shards", check_shard, checks, workers)
    for check, (sha256, problems) in zip(checks, found, strict=True):
        # swapped shards give one line each, not one for every sample
        if sha256 != check.shard.sha256 and sha256 in names:
            report.add(f"holds the bytes of {names[sha256]}", check.shard.name)
        else:
            report.problems += problems
    return report


def _read_samples(url: str, manifest: Manifest, report: Report) -> Samples | None:
    if manifest.samples_sha256 is None:  # a set of an older version
        return None
    try:
        return Samples.load(url, manifest)
    except ValueError as error:
        report.add(f"samples.npz cannot be used: {error}")
        return None


def _check_quarantine(
    url: str, manifest: Manifest, plan: RecordedPlan, report: Report
) -> set[tuple[str, str]]:
    """Compare the list's length with the manifest; return shard and key of each sample left out.

    A packer's shards do not have the images that it left out.
    """
    path = files.join(url, QUARANTINE)
    try:
        lines = (files.find_bytes(path) or b"").splitlines()
        left_out = [documents.decode(line, LeftOut, path) for line in lines if plan.shards]
    except ValueError as error:
        report.add(str(error))
        return set()
    if (listed := len(lines)) != manifest.quarantined:
        report.add(
            f"quarantine.jsonl lists {listed} images, the manifest says {manifest.quarantined}"
        )
    return {(one.shard, one.path) for one in left_out}


def check_index(manifest: Manifest, index: Index) -> Iterator[Problem]:
    """Yield the rows of an index that are invalid whatever the shards hold."""
    unusable = list(index.unusable(manifest))
    start = 0
    for shard in manifest.shards:
        rows = np.arange(start, start + shard.samples)
        start += shard.samples
        wrong = [
            *((_within(some, rows), what) for some, what in unusable),
            *_misplaced(index, rows),
        ]
        for some, what in wrong:
            for row in some:
                key, offset = index.key[row].decode("ascii", "replace"), int(index.offset[row])
                yield Problem(shard=shard.name, key=key, offset=offset, what=what)


def _within(found: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Select the rows of one shard from ascending rows of the entire set."""
    # a shard of which every image was left out has no rows, and selects none
    first, last = (rows[0], rows[-1]) if len(rows) else (0, -1)
    return found[np.searchsorted(found, first) : np.searchsorted(found, last, side="right")]


def _misplaced(index: Index, rows: np.ndarray) -> list[tuple[np.ndarray, str]]:
    """Find the rows of one shard with a repeated key or an impossible position."""
    rows = rows[np.argsort(index.offset[rows], kind="stable")]
    # as floats, because a damaged uint64 would wrap around
    starts = index.offset[rows].astype(np.float64)
    ends = starts + np.ceil(index.length[rows] / tar.BLOCK) * tar.BLOCK
    # byte 0 of a tar is a header
    aligned = (index.offset[rows] % tar.BLOCK == 0) & (index.offset[rows] > 0)
    empty = (index.width[rows] == 0) | (index.height[rows] == 0)
    _, first = np.unique(index.key[rows], return_index=True)
    return [
        (rows[~aligned], "a payload of a tar cannot start here"),
        (rows[empty], "its image has no pixels: width or height is 0"),
        # between two payloads lies at least the header block of the second
        (rows[1:][starts[1:] < ends[:-1] + tar.BLOCK], "overlaps the sample before it"),
        (np.delete(rows, first), "its key occurs more than once in this shard"),
    ]


def check_shard(check: Check) -> tuple[str, list[Problem]]:
    """Read all of a shard; return its sha256 and all problems."""
    try:
        with open_whole(check.place, check.size) as (stream, sha256):
            return sha256, list(_check_bytes(stream, sha256, check))
    except (ValueError, OSError) as error:
        # a problem, not an error: the other shards must still be checked
        return "", [Problem(shard=check.shard.name, what=str(error))]


def _check_bytes(stream: IO[bytes], sha256: str, check: Check) -> Iterator[Problem]:
    """Yield every difference between a shard's bytes and its rows of the index, if it has one."""
    name = check.shard.name
    if sha256 != check.shard.sha256:
        what = f"sha256 is {sha256[:16]}..., the manifest says {check.shard.sha256[:16]}..."
        yield Problem(shard=name, what=what)
    members: dict[str, dict[str, tar.Member]] = {}
    end = yield from _walk(stream, name, members)
    if check.index is None:
        return
    rows = _rows(check.index)
    sources = [None] * len(rows) if check.source is None else check.source.tolist()
    for row, source in zip(rows, sources, strict=True):
        differences = [*_check_payload(stream, row, source, check)]
        # after a damaged header no member is known, which would be a problem of every row
        if row.offset < end:
            differences += _check_members(stream, members.get(row.key, {}), row, check)
        for what in differences:
            yield Problem(shard=name, key=row.key, offset=row.offset, what=what)
    for key in sorted(members.keys() - {row.key for row in rows} - check.left_out):
        first = next(iter(members[key].values()))
        names = ", ".join(member.name for member in members[key].values())
        what = f"the index does not list {names}"
        yield Problem(shard=name, key=key, offset=first.offset, what=what)


def _walk(
    stream: IO[bytes], shard: str, members: dict[str, dict[str, tar.Member]]
) -> Generator[Problem, None, float]:
    """Collect the members of a tar by key and suffix; return the byte where damage starts."""
    end = 0
    try:
        for member in tar.walk(stream, "the tar"):
            end = member.offset + member.size
            if (split := split_name(member.name)) is None:
                continue  # readers of the tar skip it too
            key, suffix = split
            if suffix in members.setdefault(key, {}):
                what = f"a second member is named {member.name!r}"
                yield Problem(shard=shard, key=key, offset=member.offset, what=what)
            members[key][suffix] = member
    except ValueError as error:
        yield Problem(shard=shard, offset=end, what=str(error))
        return end
    return math.inf


def _check_members(
    stream: IO[bytes], found: dict[str, tar.Member], row: Row, check: Check
) -> Iterator[str]:
    """Yield the faults of the members of one row's key."""
    suffixes = frozenset({"npy"}) if payload_of(check.encoding).is_array else IMAGE_SUFFIXES
    is_payload = False
    for suffix, member in found.items():
        if suffix in check.rule.ignore:
            continue
        if suffix in suffixes and (member.offset, member.size) == (row.offset, row.length):
            is_payload = True
        # a second image of the key, or the payload at a position that the index does not have
        elif suffix in suffixes:
            yield f"{member.name} is at byte {member.offset:,} and has {member.size:,} bytes"
        elif suffix not in OTHER_SUFFIXES:
            yield f"the index does not list {member.name}"
    if not is_payload:
        yield f"no member of this key with {row.length:,} bytes is here"
    yield from _check_label(stream, found, row.label, check)


def _check_label(
    stream: IO[bytes], found: dict[str, tar.Member], label: int, check: Check
) -> Iterator[str]:
    suffix = check.rule.label_suffix
    if suffix not in found:
        yield f"it has no .{suffix} with a label"
        return
    here = f"its .{suffix}"
    try:
        data = read_text(stream, found[suffix], here)
        said = parse_label(data, here, check.rule)
        if not check.ids_known and not POSITION.fullmatch(str(said)):
            return  # it may be an id that the manifest lacks
        if resolve_label(said, here, check.rule) != label:
            yield f"{here} has {str(said)[:40]!r}, the index has class {label}"
    except ValueError as error:
        yield str(error)


def _check_payload(stream: IO[bytes], row: Row, source: int | None, check: Check) -> Iterator[str]:
    """Yield the faults of the bytes of one row; `source` is its hash, if it has one."""
    encoding, max_pixels = check.encoding, check.rule.max_pixels
    payload = payload_of(encoding)
    # computed without reading, which would first allocate the claimed length
    there = min(max(stream.seek(0, os.SEEK_END) - row.offset, 0), row.length)
    if there != row.length:
        yield f"truncated: {there:,} of {row.length:,} bytes exist"
        return
    try:
        require_affordable(row.length, "the payload", max_pixels)
        stream.seek(row.offset)
        data = stream.read(row.length)
        if zlib.crc32(data) != row.crc32:
            yield "damaged bytes: their crc32 differs from the index"
        elif payload.is_array:
            header = npy_header(encoding["size"])
            if not data.startswith(header) or len(data) != len(header) + 3 * encoding["size"] ** 2:
                yield "the payload is not an array of pixels of the set's size"
        else:
            image = _load(data, check)
            side = encoding.get("size")
            size = (row.width, row.height) if payload.is_source else (side, side)
            if image.size != size:
                yield f"the image has {image.size} pixels, not {size}"
            # only payloads of `original` are the files that were hashed
            if payload.is_source and source not in (None, source_hash(data)):
                yield "its hash in samples.npz is of a different image"
    except ValueError as error:
        yield str(error)


def _load(data: bytes, check: Check) -> Image.Image:
    payload = payload_of(check.encoding)
    try:
        return load_image(data, "the payload", payload.treatment, check.rule.max_pixels)
    except ValueError as error:
        # its crc32 is right: the image was stored like this
        hint = "pack or index the set again with --max-bad N, which leaves such images out"
        raise ValueError(f"{error}; {hint}") from error


def _read_plan(url: str, manifest: Manifest, report: Report) -> RecordedPlan:
    """Read plan.json; empty if it is absent, which readers do not need."""
    path = files.join(url, PLAN)
    try:
        data = files.find_bytes(path)
        if data is None:
            return RecordedPlan()
        if files.sha256_json(documents.parse(data, path)) != manifest.plan_hash:
            raise ValueError("plan.json does not have the hash in the manifest")
        plan = documents.decode(data, RecordedPlan, path)
    except ValueError as error:
        report.add(str(error))
        return RecordedPlan()
    edited = "the manifest was edited"
    scoring = scoring_hash(
        manifest.class_ids, manifest.classes, manifest.templates, manifest.groups
    )
    # the plan's hash covers ids, which older manifests lack
    if manifest.class_ids and plan.labels not in (None, scoring):
        report.add(f"its classes, prompts or groups differ from plan.json: {edited}")
    # readers would treat or crop the images differently from the packer
    if plan.encoding not in (None, manifest.encoding):
        differs = _difference(manifest.encoding, plan.encoding)
        report.add(f"its encoding differs from plan.json ({differs}): {edited}")
    if plan.dataset not in (None, manifest.dataset):
        report.add(
            f"its dataset is {manifest.dataset!r}, but {plan.dataset!r} in plan.json: {edited}"
        )
    found, planned = declared(manifest.score, ood=manifest.ood), declared(plan.score, ood=plan.ood)
    if found != planned:
        report.add(f"its score or ood ({found}) differs from plan.json ({planned}): {edited}")
    local = plan.local_labels
    for fault in () if local is None else group_faults([local], len(manifest.classes)):
        report.add(f"local_labels of plan.json: {fault}")
        return RecordedPlan()
    return plan


def _difference(encoding: dict[str, Any], planned: dict[str, Any]) -> str:
    """Describe the first key of an encoding that differs from the plan's, with both values."""
    for key in sorted(encoding.keys() | planned.keys()):
        here, there = (space.get(key, "absent") for space in (encoding, planned))
        if here != there:
            return f"{key} is {here!r}, not {there!r}"
    return "in the order of its fields"


def _check_sizes(
    manifest: Manifest,
    index: Index | None,
    samples: Samples | None,
    plan: RecordedPlan,
    max_pixels: float,
    report: Report,
    left_out: set[tuple[str, str]],
) -> list[Check]:
    """Report shards that are absent or have a different size; return the checks of the others."""
    note_other_stores(report.url, manifest)
    places = [files.resolve(report.url, shard.name) for shard in manifest.shards]
    with ThreadPoolExecutor(SIZE_THREADS) as pool:
        sizes = list(pool.map(_size_or_reason, places))
    rule = Rule(
        # not a LabelSpace, which refuses some sets of older versions: with a single class, or with
        # names without words
        labels=Classes(
            ids=tuple(map(composed, manifest.class_ids)),
            names=tuple(map(composed, manifest.classes)),
        ),
        groups=manifest.groups,
        local=plan.local_labels,
        label_field=plan.label_field,
        # packers write positions
        labels_are=plan.labels_are if plan.shards else "positions",
        ignore=frozenset(plan.ignore),
        max_pixels=max_pixels,
    )
    checks, stop = [], 0
    for shard, place, size in zip(manifest.shards, places, sizes, strict=True):
        start, stop = stop, stop + shard.samples
        if isinstance(size, str):
            report.add(size, shard.name)
            continue
        if size != shard.bytes:
            report.add(f"has {size:,} bytes, the manifest says {shard.bytes:,}", shard.name)
        check = Check(
            shard=shard,
            place=place,
            size=size,
            index=index and _part(index, start, stop),
            source=None if samples is None else samples.source[start:stop],
            encoding=manifest.encoding,
            rule=rule,
            ids_known=bool(manifest.class_ids),
            left_out=frozenset(key for name, key in left_out if name == shard.name),
        )
        checks.append(check)
    return checks


def _size_or_reason(url: str) -> int | str:
    try:
        return shard_size(url)
    except (ValueError, OSError) as error:
        return str(error)


def _part(index: Index, start: int, stop: int) -> Index:
    return Index(**{name: getattr(index, name)[start:stop] for name in Row._fields})


def _rows(index: Index) -> list[Row]:
    columns = {name: getattr(index, name).tolist() for name in Row._fields}
    columns["key"] = [key.decode("ascii", "replace") for key in columns["key"]]
    return list(map(Row, *columns.values()))
