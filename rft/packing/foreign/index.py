"""Writes a manifest and its .npz files for third-party shards, which are never changed.

Every shard is parsed strictly and read once. A sample (see `rft.packing.foreign.samples`) needs one
image and one label. Unknown suffixes are refused, so that a second picture (`x.seg.png`) cannot go
unnoticed; `--ignore` names suffixes to skip. Only image headers are read here;
`tools/verify_shards.py --deep` decodes the images.
"""

import json
import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import IO, Any

import numpy as np

from rft.log import ASIDE
from rft.packing import encode
from rft.packing.expected import check_count, is_imagenet, parse_allowed_counts
from rft.packing.foreign.labels import contradiction, read_label, resolve_label
from rft.packing.foreign.patterns import expand
from rft.packing.foreign.rule import Options, Rule, make_rule
from rft.packing.foreign.samples import (
    SIZE_THREADS,
    BadSample,
    Sample,
    open_whole,
    read_member,
    read_samples,
    shard_size,
    whole_url,
)
from rft.packing.pool import for_each
from rft.packing.shard import Quarantined, compact_json
from rft.sets import BENCHMARKS
from rft.shards import tar
from rft.shards.folder import INDEX, MANIFEST, PLAN, QUARANTINE, SAMPLES
from rft.shards.image_files import IMAGE_SUFFIXES, require_affordable
from rft.shards.images import encoding_parameters, load_image
from rft.shards.index import COLUMNS, INDEX_BYTES, KEY_BYTES, Index
from rft.shards.label_space import LabelSpace, scoring_hash
from rft.shards.manifest import Manifest, Shard, declared, require_declarable, require_named
from rft.shards.samples import Samples, source_hash
from rft.storage import documents, files
from rft.storage.urls import check_shard_name

ALGORITHM = "index 1"  # raise it when the same shards would get a different index
OTHER_SUFFIXES = frozenset({"cls", "json", "txt"})
UNREAD_IMAGES = frozenset({"avif", "bmp", "gif", "heic", "heif", "jp2", "jxl", "tif", "tiff"})

# the options of the plan's settings
OPTION_OF = {
    "dataset": "--dataset",
    "encoding": "--crop-border",
    "label_field": "--label-field",
    "labels_are": "--labels-are",
    "local_labels": "--local-classes",
    "ignore": "--ignore",
    "score": "--score",
    "ood": "--ood",
}

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Found:
    """The content of one shard: its columns of the index, and counts of skipped members.

    `source` is the column of `rft.shards.samples`; it hashes the payloads, as no source files
    exist. `as_stored` counts the images that would look different if they were treated as photos.
    `contradicted` counts the samples whose .cls and .json name different classes; `example` is the
    first of them. `numbered` counts labels that are numbers; `bad` are the samples left out.
    """

    bytes: int
    sha256: str
    rows: dict[str, list] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    source: list[int] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    as_stored: Counter[str] = field(default_factory=Counter)
    contradicted: int = 0
    example: str = ""
    numbered: int = 0
    bad: list[Quarantined] = field(default_factory=list)


def index_shards(
    patterns: Sequence[str], out: str, labels: LabelSpace, options: Options
) -> Manifest:
    """Write manifest.json, index.npz and samples.npz in `out` for the shards that patterns name.

    If all shards are in `out` or below it, the manifest names them relative to it, so that the
    folder can be moved. A rerun changes nothing.

    Raises:
        ValueError: if a shard, a sample, a label or an option is invalid, or `out` already holds a
            different data set.
    """
    urls = [whole_url(url) for url in expand(patterns)]
    dataset = options.dataset or files.name_of(out)
    require_named(out, dataset)
    require_declarable(dataset, options.score, ood=options.ood)
    allowed = parse_allowed_counts(options.allow_count, [dataset]).get(dataset)
    names = shard_names(urls, out)
    # all sizes first, so that an absent shard is an error before hours of reading, and a server
    # that is down is reported with a shard, not with a file that may exist beside it
    with ThreadPoolExecutor(SIZE_THREADS) as pool:
        sizes = list(pool.map(shard_size, urls))
    rule = make_rule(dataset, urls, labels, options)
    settings = _settings(dataset, rule, options)
    _require_same_options(out, labels, settings)
    jobs = list(zip(urls, sizes, strict=True))
    found = for_each(f"{dataset}: shards", partial(read_shard, rule=rule), jobs, options.workers)
    _require_different(urls, found)
    bad = [entry for shard in found for entry in shard.bad]
    _require_few(bad, options.max_bad)
    samples = sum(len(shard.rows["key"]) for shard in found)
    if bad and not samples:
        raise ValueError(
            f"none of the {len(bad):,} samples can be used (first: key {bad[0].path!r}: "
            f"{bad[0].reason})"
        )
    check_count(dataset, samples + len(bad), labels, allowed)
    manifest, columns, plan = _assemble(settings, names, found, labels, rule, options)
    _publish(out, manifest, columns, plan)
    _say(found)
    _warn_of_imagenet(manifest, found, labels, rule)
    return manifest


def read_shard(job: tuple[str, int], rule: Rule) -> Found:
    """Read the rows of the shard at a URL of a known size; `job` is (URL, bytes).

    Raises:
        ValueError: naming shard and key (or byte) of a fault.
    """
    where, size = job
    with open_whole(where, size) as (stream, sha256):
        found = Found(bytes=size, sha256=sha256)
        try:
            samples = read_samples(stream, where, found.passed_over)
        except tar.IncompleteError as error:
            raise ValueError(f"{error}, or leave this shard out") from error
        for sample in samples:
            try:
                _add(sample, stream, where, rule, found)
            except BadSample as error:
                if not rule.max_bad:
                    text = f"{error}; --max-bad N leaves out up to N such samples"
                    raise ValueError(text) from error
                # without the shard's location, which may change
                why = str(error).removeprefix(f"{where}, key {sample.key!r}: ")
                found.bad.append(Quarantined(path=sample.key, reason=why))
                _require_few(found.bad, rule.max_bad)
    if not (found.rows["key"] or found.bad):
        raise ValueError(f"{where} holds no samples")
    return found


def _add(sample: Sample, stream: IO[bytes], where: str, rule: Rule, found: Found) -> None:
    """Append a sample's row to those of its shard."""
    image = _pick_image(sample, where, rule.ignore, found.passed_over)
    at = f"{where}, key {sample.key!r}"
    what = f"{at}: the image"
    try:
        # checked before it is read into memory
        require_affordable(image.size, what, rule.max_pixels)
        data = read_member(stream, image)
        header, as_photo = encode.identify(data, what, rule.crop_border, rule.max_pixels)
        if rule.max_bad:
            load_image(data, what, max_pixels=rule.max_pixels)
    except ValueError as error:
        raise BadSample(str(error)) from error
    label = read_label(stream, sample, at, rule)
    class_id = resolve_label(label, at, rule)
    if said := contradiction(stream, sample, class_id, rule):
        if rule.label_field is None:
            raise ValueError(
                f"{at}: {said} as in its .cls; name the correct field with --label-field, "
                f"or skip the .json with --ignore json (docs/data.md#third-party-shards)"
            )
        found.contradicted += 1
        found.example = found.example or f"{at}: {said}"
    row = {
        "offset": image.offset,
        "length": image.size,
        "crc32": zlib.crc32(data),
        "label": class_id,
        "width": header.width,
        "height": header.height,
        "key": _encode_key(sample.key, where),
    }
    for name, value in row.items():
        found.rows[name].append(value)
    found.source.append(source_hash(data))
    found.as_stored["turned"] += as_photo.orientation != 1
    found.as_stored["transparent"] += as_photo.composed
    found.numbered += isinstance(label, int)


def _require_few(bad: Sequence[Quarantined], allowed: int) -> None:
    if len(bad) > allowed:
        raise ValueError(
            f"more than {allowed:,} samples cannot be used (first: key {bad[0].path!r}: "
            f"{bad[0].reason}); repair them, or raise --max-bad"
        )


def _pick_image(
    sample: Sample, where: str, ignore: frozenset[str], passed_over: Counter[str]
) -> tar.Member:
    """Find the single image of a sample; ignored suffixes are counted in `passed_over`."""
    images = {}
    for suffix, member in sample.members.items():
        # before images: --ignore may also choose between two images of a sample
        if suffix in ignore:
            passed_over[f"members with the ignored suffix .{suffix}"] += 1
        elif suffix in IMAGE_SUFFIXES:
            images[suffix] = member
        elif suffix not in OTHER_SUFFIXES:
            known = IMAGE_SUFFIXES | OTHER_SUFFIXES
            raise ValueError(
                f"{where}: unknown suffix .{suffix} of {member.name!r} (known: "
                f"{', '.join(sorted(known))}); {_suffix_hint(sample, suffix)}"
            )
    if not images:
        raise BadSample(f"{where}, key {sample.key!r}: no image")
    if len(images) > 1:
        names = ", ".join(member.name for member in images.values())
        raise ValueError(
            f"{where}: sample {sample.key!r} has {len(images)} images ({names}); drop all but one, "
            f"such as the last with --ignore {list(images)[-1]}"
        )
    return next(iter(images.values()))


def _suffix_hint(sample: Sample, suffix: str) -> str:
    """Advise about a member with an unknown suffix."""
    members, last = sample.members, suffix.rpartition(".")[2]
    # beside an image, as in x.jpg and x.seg.png, it is an additional member
    if IMAGE_SUFFIXES & members.keys() or last not in (
        IMAGE_SUFFIXES | OTHER_SUFFIXES | UNREAD_IMAGES
    ):
        return f"skip such members with --ignore {suffix}"
    if last in UNREAD_IMAGES:
        return f"convert .{last} images to JPEG, PNG or WebP"
    page = "(docs/data.md#third-party-shards)"
    if last in IMAGE_SUFFIXES and {"cls", "json"} & members.keys():
        return (
            f"it shares the label of sample {sample.key!r}: keep one image, named "
            f"{sample.key}.{last}, or give each image its own label, as in {sample.key}-0.{last} "
            f"and {sample.key}-0.cls {page}"
        )
    return (
        f"a key ends at the first dot of the file name, so this one is {sample.key!r}; rename the "
        f"members to have one dot {page}"
    )


def _encode_key(key: str, where: str) -> bytes:
    # checked early: `Index` would refuse it only after all shards are read
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{where}: key {key!r} is not printable ASCII; pack the images again")
    if len(key) > KEY_BYTES:
        raise ValueError(
            f"{where}: key {key[:40]!r}... has {len(key):,} letters, more than the limit of "
            f"{KEY_BYTES:,}; pack the images again under shorter names"
        )
    return key.encode()


def _require_different(urls: Sequence[str], found: Sequence[Found]) -> None:
    first: dict[str, str] = {}
    for url, shard in zip(urls, found, strict=True):
        # by content, because a copy or a link has a different name but counts every sample twice
        if (other := first.setdefault(shard.sha256, url)) != url:
            raise ValueError(f"{other} and {url} hold the same bytes; name only one of them")


def _assemble(
    settings: dict[str, Any],
    names: Sequence[str],
    found: Sequence[Found],
    labels: LabelSpace,
    rule: Rule,
    options: Options,
) -> tuple[Manifest, dict[str, bytes], dict[str, Any]]:
    """Build manifest, content of the .npz files by name, and plan from the shards' rows."""
    columns = {
        name: np.concatenate([np.array(shard.rows[name], dtype) for shard in found])
        for name, dtype in COLUMNS.items()
    }
    groups = rule.groups
    if groups is None:
        # Python integers, because json cannot encode NumPy's
        groups = tuple((int(class_id),) for class_id in np.unique(columns["label"]))
    plan: dict[str, Any] = {
        **settings,
        "algorithm": ALGORITHM,
        "labels": scoring_hash(labels.ids, labels.names, labels.templates, groups),
        "shards": files.sha256_json([shard.sha256 for shard in found]),
    }
    bad = [
        asdict(entry) | {"shard": name}
        for name, one in zip(names, found, strict=True)
        for entry in one.bad
    ]
    index = Index(**columns).to_bytes()
    source = np.array([value for shard in found for value in shard.source], np.uint64)
    samples = Samples(source=source).to_bytes()
    manifest = Manifest(
        dataset=settings["dataset"],
        classes=labels.names,
        class_ids=labels.ids,
        templates=labels.templates,
        groups=groups,
        encoding=plan["encoding"],
        plan_hash=files.sha256_json(plan),
        index_sha256=files.sha256_bytes(index),
        samples_sha256=files.sha256_bytes(samples),
        score=options.score,
        ood=options.ood,
        quarantined=len(bad),
        shards=tuple(
            Shard(name=name, bytes=one.bytes, sha256=one.sha256, samples=len(one.rows["key"]))
            for name, one in zip(names, found, strict=True)
        ),
    )
    columns = {INDEX: index, SAMPLES: samples}
    if bad:
        columns[QUARANTINE] = b"".join(compact_json(entry) + b"\n" for entry in bad)
    return manifest, columns, plan


def _settings(dataset: str, rule: Rule, options: Options) -> dict[str, Any]:
    """Build the part of the plan that is known before the shards are read."""
    settings = {
        "dataset": dataset,
        "encoding": encoding_parameters("original", 0, rule.crop_border),
        "label_field": rule.label_field,
        "local_labels": rule.local,
        "ignore": sorted(rule.ignore),
        **declared(options.score, ood=options.ood),
    }
    # absent by default, so that older plans keep their hash
    return settings if rule.labels_are is None else {**settings, "labels_are": rule.labels_are}


def _require_same_options(out: str, labels: LabelSpace, settings: dict[str, Any]) -> None:
    """Check, before reading, that an index in `out` was written with the same options.

    Raises:
        ValueError: naming the options that differ.
    """
    plan_url = files.join(out, PLAN)
    if not files.exists(files.join(out, MANIFEST)) or not files.exists(plan_url):
        return
    old, plan = Manifest.load(out), files.read_document(plan_url, dict)
    if "shards" not in plan:  # a packer's
        return
    now = json.loads(json.dumps(settings))
    differs = [option for key, option in OPTION_OF.items() if plan.get(key) != now.get(key)]
    classes = (labels.ids, labels.names, labels.templates)
    if (old.class_ids or labels.ids, old.classes, old.templates) != classes:
        differs.insert(0, "--classes")
    if differs:
        raise ValueError(
            f"{out} is already indexed with a different {' and '.join(differs)}; "
            f"delete its manifest.json or choose another --out"
        )


def shard_names(shards: Sequence[str], out: str) -> list[str]:
    """Name the shards for a manifest in `out`: relative if all are below it, otherwise in full.

    Raises:
        ValueError: if readers would refuse such names.
    """
    folder_store, folder = files.open_store(whole_url(out))
    prefix = folder.rstrip("/") + "/"
    names = []
    for url in shards:
        place = files.open_store(url)
        name = place[1].removeprefix(prefix)
        # "folder//x.tar" is below, but without the prefix its name would be an absolute path
        if place != (folder_store, prefix + name) or name.startswith("/"):
            names = list(shards)
            break
        names.append(name)
    for name in names:
        check_shard_name(name, out)
    return names


def _publish(out: str, manifest: Manifest, columns: dict[str, bytes], plan: dict[str, Any]) -> None:
    """Write the files that do not exist yet, the manifest last."""
    index_url, plan_url = files.join(out, INDEX), files.join(out, PLAN)
    # turns tuples into lists, to compare with the plan that is read back
    plan = json.loads(json.dumps(plan))
    if files.exists(files.join(out, MANIFEST)):
        old = Manifest.load(out)
        if old.samples_sha256 is None:
            # an older version's index is kept: finished runs identify the set by its manifest
            manifest, columns = replace(manifest, samples_sha256=None), {INDEX: columns[INDEX]}
        changed = [
            f.name for f in fields(Manifest) if getattr(old, f.name) != getattr(manifest, f.name)
        ]
        if changed:
            raise ValueError(
                f"{out} already holds a different data set or index (in {', '.join(changed)}); "
                f"delete its manifest.json or choose another --out"
            )
    # only the plan of an index has hashes of shards: this one is a packer's, not finished
    elif files.exists(plan_url) and "shards" not in files.read_document(plan_url, dict):
        raise ValueError(f"{out} is being packed; finish that or choose another --out")
    elif files.exists(index_url) and not files.exists(plan_url):
        raise ValueError(f"{out} has an index.npz that rft did not write; choose another --out")
    data = files.find_bytes(plan_url)
    # a killed run may have left a plan with different options
    if data is None or documents.parse(data, plan_url) != plan:
        files.write_json(plan_url, plan)
    for name, data in columns.items():
        if files.find_bytes(files.join(out, name), INDEX_BYTES) != data:
            files.write_bytes(files.join(out, name), data)
    if not files.exists(files.join(out, MANIFEST)):
        manifest.save(out)


def _say(found: Sequence[Found]) -> None:
    """Log skipped members, images that are read as stored, contradictions and repeated keys.

    Repeated keys matter to the held-out split, which is by image id.
    """
    as_stored = sum((shard.as_stored for shard in found), Counter())
    passed_over = sum((shard.passed_over for shard in found), Counter())
    for what, count in sorted(passed_over.items()):
        log.info(f"skipped: {count:,} {what}")
    if count := as_stored["turned"]:
        log.warning(
            f"{count:,} images are stored turned or mirrored (EXIF orientation); they are read as "
            "stored, as in torchvision and open_clip"
        )
    if count := as_stored["transparent"]:
        log.warning(
            f"{count:,} images may be transparent; hidden colours become visible, as with "
            "torchvision and open_clip"
        )
    if count := sum(shard.contradicted for shard in found):
        example = next(shard.example for shard in found if shard.example)
        log.warning(
            f"{count:,} samples have a .cls that contradicts --label-field, which was used "
            f"(first: {example}); if the field is right, skip the .cls with --ignore cls"
        )
    keys = Counter(key for shard in found for key in shard.rows["key"])
    repeated = [key for key, count in keys.items() if count > 1]
    if repeated:
        example = repeated[0].decode()
        log.info(
            f"{len(repeated):,} of the keys occur in more than one shard, such as {example!r}; "
            f"this is allowed, but the held-out images may then depend on the order of the shards",
            extra=ASIDE,
        )


def _warn_of_imagenet(
    manifest: Manifest, found: Sequence[Found], labels: LabelSpace, rule: Rule
) -> None:
    """Warn if numbers are read as ImageNet's classes and look like those of another label space.

    The sign is that they are all small, and the set is not a known benchmark.
    """
    if manifest.dataset in BENCHMARKS or rule.local is not None or not is_imagenet(labels):
        return
    present = {label for shard in found for label in shard.rows["label"]}
    if sum(shard.numbered for shard in found) and max(present) < len(labels) // 2:
        first = ", ".join(f"{n} is {labels.names[n]!r}" for n in sorted(present)[:3])
        log.warning(
            f"label numbers are read as ImageNet's classes ({first}), of which {len(present):,} "
            f"occur; for classes of your own, pass --classes FILE (docs/data.md#third-party-shards)"
        )
