"""Holding a packed or indexed set against its manifest; every difference found is one line.

The quick check reads manifest and index and asks for the size of every shard. The deep check reads
every byte: the sha256 of each shard, its tar headers, and each payload, which must be a member of
the key and place that the index names, have its crc32 and label, and decode. One problem never
hides another: the check continues.
"""

import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import IO, Any, NamedTuple

import numpy as np

from rft.classes import Classes, composed
from rft.config import MAX_PIXELS
from rft.packing.foreign.index import ALGORITHM, OTHER_SUFFIXES
from rft.packing.foreign.labels import POSITION, parse_label, resolve_label
from rft.packing.foreign.rule import LabelsAre, Rule
from rft.packing.foreign.samples import SIZE_THREADS, open_whole, read_text, shard_size, split_name
from rft.packing.pool import for_each
from rft.shards import tar
from rft.shards.folder import PLAN, QUARANTINE
from rft.shards.image_files import IMAGE_SUFFIXES, require_affordable
from rft.shards.images import Encoding, load_image, npy_header, payload_of
from rft.shards.index import Index
from rft.shards.label_space import scoring_hash
from rft.shards.manifest import Manifest, group_faults, note_other_stores
from rft.storage import documents, files
from rft.storage.documents import FOREIGN, Name, Text, document

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is not as it should be; `offset` is a byte of the shard."""

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
    """What was found; `per_class` is the number of samples of each class id."""

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
        """Return the document that `--report` writes."""
        counts = {name: getattr(self, name) for name in ("shards", "samples", "bytes", "per_class")}
        return {
            "schema": SCHEMA,
            "ok": not self.problems,
            "url": self.url,
            "deep": self.deep,
            "dataset": self.dataset,
            "manifest_sha256": self.manifest_sha256,
            "counts": counts,
            "problems": [asdict(problem) for problem in self.problems],
        }


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The index's rows of one shard, where it is, and how its labels are read.

    `size` is what the store says, in bytes; `sha256` is the manifest's. `ids_known` is whether the
    rule has the classes' ids: older manifests lack them.
    """

    name: str
    place: str
    size: int
    sha256: str
    index: Index | None
    encoding: dict[str, Any]
    rule: Rule
    ids_known: bool
    max_pixels: float


def verify(url: str, *, deep: bool, workers: int, max_pixels: float = MAX_PIXELS) -> Report:
    """Check the set at `url`; see the module's text."""
    report = Report(url=url, deep=deep)
    try:
        manifest = Manifest.load(url)
    except ValueError as error:
        report.problems.append(Problem(what=f"manifest.json cannot be used: {error}"))
        return report
    report.dataset, report.manifest_sha256 = manifest.dataset, manifest.sha256
    report.shards, report.samples = len(manifest.shards), manifest.samples
    report.bytes = sum(shard.bytes for shard in manifest.shards)
    plan = _read_plan(url, manifest, report)
    report.problems += _check_quarantine(url, manifest)
    index = _read_index(url, manifest, report)
    if index is not None:
        in_range = index.label[(index.label >= 0) & (index.label < len(manifest.classes))]
        report.per_class = np.bincount(in_range, minlength=len(manifest.classes)).tolist()
        report.problems += check_index(manifest, index)
    _check_shards(manifest, index, plan, report, workers, max_pixels)
    return report


def check_index(manifest: Manifest, index: Index) -> Iterator[Problem]:
    """Yield the rows of an index that cannot be right, whatever the shards hold."""
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
    """Return the rows of one shard among ascending ones of the whole set."""
    first, last = (rows[0], rows[-1]) if len(rows) else (0, -1)
    return found[np.searchsorted(found, first) : np.searchsorted(found, last, side="right")]


def _misplaced(index: Index, rows: np.ndarray) -> list[tuple[np.ndarray, str]]:
    """Return the rows of one shard that share a key or cannot lie where they do."""
    rows = rows[np.argsort(index.offset[rows], kind="stable")]
    # as floats, because a damaged uint64 would wrap around
    starts = index.offset[rows].astype(np.float64)
    ends = starts + np.ceil(index.length[rows] / tar.BLOCK) * tar.BLOCK
    aligned = (index.offset[rows] % tar.BLOCK == 0) & (index.offset[rows] > 0)
    empty = (index.width[rows] == 0) | (index.height[rows] == 0)
    _, first = np.unique(index.key[rows], return_index=True)
    return [
        (rows[~aligned], "no payload of a tar can start here"),
        (rows[empty], "its image has no pixels: width or height is 0"),
        (rows[1:][starts[1:] < ends[:-1] + tar.BLOCK], "overlaps the sample before it"),
        (np.delete(rows, first), "its key occurs more than once in this shard"),
    ]


class Walked(NamedTuple):
    """The members of a tar by key and suffix, up to byte `end` if its headers are damaged."""

    members: dict[str, dict[str, tar.Member]]
    end: float
    problems: list[Problem]


def check_rows(stream: IO[bytes], sha256: str, rows: Rows) -> Iterator[Problem]:
    """Yield every difference between a whole shard and its rows of the index, if there is one."""
    if sha256 != rows.sha256:
        what = f"sha256 is {sha256[:16]}..., the manifest says {rows.sha256[:16]}..."
        yield Problem(shard=rows.name, what=what)
    members, end, problems = _walk(stream, rows.name)
    yield from problems
    if rows.index is None:
        return
    keys = [key.decode("ascii", "replace") for key in rows.index.key]
    for row, key in enumerate(keys):
        offset = int(rows.index.offset[row])
        differences = [*_check_payload(stream, rows.index, row, rows.encoding, rows.max_pixels)]
        if offset < end:
            differences += _check_members(stream, members.get(key, {}), rows.index, row, rows)
        for what in differences:
            yield Problem(shard=rows.name, key=key, offset=offset, what=what)
    for key in sorted(members.keys() - set(keys)):
        first = next(iter(members[key].values()))
        names = ", ".join(member.name for member in members[key].values())
        what = f"the index knows nothing of {names}"
        yield Problem(shard=rows.name, key=key, offset=first.offset, what=what)


def _walk(stream: IO[bytes], shard: str) -> Walked:
    members: dict[str, dict[str, tar.Member]] = {}
    problems = []
    end = 0
    try:
        for member in tar.walk(stream, "the tar"):
            end = member.offset + member.size
            split = split_name(member.name)
            if split is None:
                continue
            key, suffix = split
            if suffix in members.setdefault(key, {}):
                what = f"a second member is called {member.name!r}"
                problems.append(Problem(shard=shard, key=key, offset=member.offset, what=what))
            members[key][suffix] = member
    except ValueError as error:
        problems.append(Problem(shard=shard, offset=end, what=str(error)))
        return Walked(members, end, problems)
    return Walked(members, math.inf, problems)


def _check_members(
    stream: IO[bytes], found: dict[str, tar.Member], index: Index, row: int, rows: Rows
) -> Iterator[str]:
    """Yield what is wrong with the members of one row's key."""
    suffixes = frozenset({"npy"}) if payload_of(rows.encoding).is_array else IMAGE_SUFFIXES
    offset, length = int(index.offset[row]), int(index.length[row])
    is_payload = False
    for suffix, member in found.items():
        if suffix in rows.rule.ignore:
            continue
        if suffix in suffixes and (member.offset, member.size) == (offset, length):
            is_payload = True
        elif suffix in suffixes:
            yield f"{member.name} lies at {member.offset:,} and has {member.size:,} bytes"
        elif suffix not in OTHER_SUFFIXES:
            yield f"the index knows nothing of {member.name}"
    if not is_payload:
        yield f"no member of this key with {length:,} bytes lies here"
    yield from _check_label(stream, found, int(index.label[row]), rows)


def _check_label(
    stream: IO[bytes], found: dict[str, tar.Member], label: int, rows: Rows
) -> Iterator[str]:
    suffix = "cls" if rows.rule.label_field is None else "json"
    if suffix not in found:
        yield f"there is no .{suffix} with a label"
        return
    here = f"its .{suffix}"
    try:
        data = read_text(stream, found[suffix], here)
        said = parse_label(data, here, rows.rule)
        if not rows.ids_known and not POSITION.fullmatch(str(said)):
            return  # it may be one of the ids that the manifest does not hold
        meant = resolve_label(said, here, rows.rule)
    except ValueError as error:
        yield str(error)
        return
    if meant != label:
        yield f"{here} says {str(said)[:40]!r}, the index has class {label}"


def _check_payload(
    stream: IO[bytes], index: Index, row: int, encoding: dict[str, Any], max_pixels: float
) -> Iterator[str]:
    """Yield what is wrong with the bytes of one row."""
    offset, length = int(index.offset[row]), int(index.length[row])
    # not read and counted: what is read is allocated first
    there = min(max(stream.seek(0, os.SEEK_END) - offset, 0), length)
    if there != length:
        yield f"cut off: {there:,} of {length:,} bytes are there"
        return
    try:
        require_affordable(length, "the payload", max_pixels)
    except ValueError as error:
        yield str(error)
        return
    stream.seek(offset)
    data = stream.read(length)
    if zlib.crc32(data) != index.crc32[row]:
        yield "damaged bytes: they do not have the crc32 of the index"
        return
    size = (int(index.width[row]), int(index.height[row]))
    try:
        yield from _check_image(data, size, encoding, max_pixels)
    except ValueError as error:
        yield str(error)


def _check_image(
    data: bytes, source_size: tuple[int, int], encoding: dict[str, Any], max_pixels: float
) -> Iterator[str]:
    payload = payload_of(encoding)
    if payload.is_array:
        header = npy_header(encoding["size"])
        if not data.startswith(header) or len(data) != len(header) + 3 * encoding["size"] ** 2:
            yield "the payload is no array of pixels of the set's size"
        return
    image = load_image(data, "the payload", payload.treatment, max_pixels)
    size = source_size if payload.is_source else (encoding["size"], encoding["size"])
    if image.size != size:
        yield f"the image has {image.size} pixels, not {size}"


@document(config=FOREIGN)
class RecordedPlan:
    """What plan.json says of how labels are read; a packer's has no more than `dataset` of it."""

    algorithm: int | Text = ""
    dataset: Name | None = None
    encoding: Encoding | None = None
    labels: Name | None = None
    label_field: Text | None = None
    labels_are: LabelsAre | None = None
    local_labels: tuple[int, ...] | None = None
    ignore: tuple[Text, ...] = ()


def _read_plan(url: str, manifest: Manifest, report: Report) -> RecordedPlan:
    """Return plan.json, or nothing where it is gone, which readers do not mind."""
    path = files.join(url, PLAN)
    try:
        data = files.find_bytes(path)
        if data is None:
            return RecordedPlan()
        if files.sha256_json(documents.parse(data, path)) != manifest.plan_hash:
            report.problems.append(
                Problem(what="plan.json is not the plan that the manifest names")
            )
            return RecordedPlan()
        plan = documents.decode(data, RecordedPlan, path)
    except ValueError as error:
        report.problems.append(Problem(what=str(error)))
        return RecordedPlan()
    scoring = scoring_hash(
        manifest.class_ids, manifest.classes, manifest.templates, manifest.groups
    )
    if manifest.class_ids and plan.labels not in (None, scoring):
        what = "its classes, prompts or groups are not those of plan.json: the manifest was edited"
        report.problems.append(Problem(what=what))
    # a reader would treat or crop the images in another way than the packer meant
    if plan.encoding not in (None, manifest.encoding):
        what = (
            f"its encoding is not that of plan.json "
            f"({_difference(manifest.encoding, plan.encoding)}): the manifest was edited"
        )
        report.problems.append(Problem(what=what))
    if plan.dataset not in (None, manifest.dataset):
        what = (
            f"its dataset is {manifest.dataset!r}, that of plan.json is {plan.dataset!r}: the "
            f"manifest was edited"
        )
        report.problems.append(Problem(what=what))
    local = plan.local_labels
    for fault in () if local is None else group_faults([local], len(manifest.classes)):
        report.problems.append(Problem(what=f"local_labels of plan.json: {fault}"))
        return RecordedPlan()
    return plan


def _difference(encoding: dict[str, Any], planned: dict[str, Any]) -> str:
    """Name the first key of an encoding that differs from the plan's, with both values."""
    for key in sorted(encoding.keys() | planned.keys()):
        here, there = (space.get(key, "absent") for space in (encoding, planned))
        if here != there:
            return f"{key} is {here!r}, not {there!r}"
    return "in the order of its fields"


def _check_quarantine(url: str, manifest: Manifest) -> Iterator[Problem]:
    """Yield whether the images that were left out are listed, with their reasons."""
    path = files.join(url, QUARANTINE)
    if manifest.quarantined == 0:
        return
    listed = len((files.find_bytes(path) or b"").splitlines())
    if listed != manifest.quarantined:
        what = f"quarantine.jsonl lists {listed} images, the manifest says {manifest.quarantined}"
        yield Problem(what=what)


def _read_index(url: str, manifest: Manifest, report: Report) -> Index | None:
    try:
        return Index.read(url, manifest)
    except ValueError as error:
        report.problems.append(Problem(what=f"index.npz cannot be used: {error}"))
        return None


def _rule(manifest: Manifest, plan: RecordedPlan) -> Rule:
    """Return how the labels of a set's shards are read."""
    # no LabelSpace, which refuses what older versions packed: a single class, names without words
    labels = Classes(
        ids=tuple(map(composed, manifest.class_ids)), names=tuple(map(composed, manifest.classes))
    )
    indexed = plan.algorithm == ALGORITHM
    return Rule(
        labels=labels,
        groups=manifest.groups,
        local=plan.local_labels,
        label_field=plan.label_field,
        labels_are=plan.labels_are if indexed else "positions",  # as the packer writes them
        ignore=frozenset(plan.ignore),
    )


def _check_shards(
    manifest: Manifest,
    index: Index | None,
    plan: RecordedPlan,
    report: Report,
    workers: int,
    max_pixels: float,
) -> None:
    """Add what is wrong with the shards themselves."""
    note_other_stores(report.url, manifest)
    places = [files.resolve(report.url, shard.name) for shard in manifest.shards]
    with ThreadPoolExecutor(SIZE_THREADS) as pool:
        sizes = list(pool.map(_size_or_reason, places))
    bounds = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    rule = _rule(manifest, plan)
    jobs = []
    for number, (shard, place, size) in enumerate(zip(manifest.shards, places, sizes, strict=True)):
        if isinstance(size, str):
            report.problems.append(Problem(shard=shard.name, what=size))
            continue
        if size != shard.bytes:
            what = f"has {size:,} bytes, the manifest says {shard.bytes:,}"
            report.problems.append(Problem(shard=shard.name, what=what))
        rows = Rows(
            name=shard.name,
            place=place,
            size=size,
            sha256=shard.sha256,
            index=None if index is None else _cut(index, bounds[number], bounds[number + 1]),
            encoding=manifest.encoding,
            rule=rule,
            ids_known=bool(manifest.class_ids),
            max_pixels=max_pixels,
        )
        jobs.append(rows)
    if not report.deep:
        return
    names = {shard.sha256: shard.name for shard in manifest.shards}
    for rows, checked in zip(jobs, for_each("shards", check_shard, jobs, workers), strict=True):
        if checked.sha256 != rows.sha256 and checked.sha256 in names:
            what = f"holds the bytes of {names[checked.sha256]}"
            report.problems.append(Problem(shard=rows.name, what=what))
        else:
            report.problems += checked.problems


class Checked(NamedTuple):
    """The hash of a shard that was read, and what is wrong with it."""

    sha256: str
    problems: list[Problem]


def check_shard(rows: Rows) -> Checked:
    """Check one shard, reading all of it."""
    try:
        with open_whole(rows.place, rows.size) as (stream, sha256):
            return Checked(sha256, list(check_rows(stream, sha256, rows)))
    except (ValueError, OSError) as error:
        return Checked("", [Problem(shard=rows.name, what=str(error))])


def _size_or_reason(url: str) -> int | str:
    try:
        return shard_size(url)
    except (ValueError, OSError) as error:
        return str(error)


def _cut(index: Index, start: int, stop: int) -> Index:
    return Index(
        **{column.name: getattr(index, column.name)[start:stop] for column in fields(index)}
    )
