"""What a packed dataset is: `manifest.json` and `index.npz` in one folder of shards.

The manifest is the only thing readers trust. Sample i of the dataset is row i of the index, rows
are in shard order, and row i says where in its shard the payload lies and which crc32 it must have.
No torch here: packing tools and reports read this too.
"""

import dataclasses
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from rft import cli
from rft.classes import Classes, prompts_sha256
from rft.sets import BENCHMARKS
from rft.shards import tar
from rft.shards.encode import Encoding
from rft.shards.label_space import MARK
from rft.shards.root import why_missing
from rft.storage import documents, files, urls
from rft.storage.arrays import read_npz
from rft.storage.documents import Count, Name, Schema, Sha256, Text, document
from rft.text import short

SCHEMA = 1
COLUMNS = {
    "offset": np.uint64,
    "length": np.uint32,
    "crc32": np.uint32,
    "label": np.int32,
    "width": np.uint16,
    "height": np.uint16,
    "key": np.bytes_,
}
ROW_BYTES = sum(np.dtype(kind).itemsize for kind in COLUMNS.values())  # of all columns but the key
KEY_BYTES = 1024
KEYS_AT_ONCE = 2**16
CLASSES = 100_000  # ImageNet-21k has 21,841
TEMPLATES = 1000  # OpenAI's are 80; a head is made of all of them for each class
HEADERS_BYTES = 2**14  # what an index has besides its rows, and more
# The index is read whole, and twice that is in memory for a moment: 600 MiB stay within 2 GB. They
# hold 15 million samples with keys like ImageNet's; ImageNet-21k has 14 million.
INDEX_BYTES = 600 * 2**20
AGAIN = "pack or index the set again"
STORES_SHOWN = 3  # in one line
ShardName = Annotated[Name, Field(max_length=2000)]


@document
class Shard:
    """One tar file of the dataset.

    `name` is relative to the manifest's folder, or a whole URL where a manifest was made for shards
    that lie elsewhere: see `rft.storage.urls.check_shard_name`.
    """

    name: ShardName
    bytes: Count
    sha256: Sha256
    samples: Count


@document
class Manifest:
    """Everything about a packed dataset but its per-sample rows.

    `classes` and `templates` describe the label space (index = class id; `{c}` marks the name);
    `class_ids` are the classes' folder names, empty in manifests that were written without them.
    `groups` is the scoring rule: a prediction is the argmax over the classes named in any group,
    and it is right when it lies in the same group as the label. ImageNet has one group for each
    class, ImageNet-R and -A one for each of their 200, ObjectNet 113 groups over 125 classes.
    """

    dataset: Name
    classes: Annotated[tuple[Text, ...], Field(min_length=1, max_length=CLASSES)]
    templates: Annotated[tuple[Text, ...], Field(min_length=1, max_length=TEMPLATES)]
    groups: tuple[tuple[int, ...], ...]
    encoding: Encoding
    plan_hash: Sha256
    index_sha256: Sha256
    shards: tuple[Shard, ...]
    class_ids: tuple[Text, ...] = ()
    quarantined: Count = 0  # images of the source left out because they cannot be decoded
    schema: Schema = SCHEMA

    def __post_init__(self) -> None:
        if unmarked := [text for text in self.templates if MARK not in text]:
            raise ValueError(f"templates: {short(unmarked[0])} has no {MARK} for the class name")
        ids = self.class_ids
        if ids and not len(set(ids)) == len(ids) == len(self.classes):
            raise ValueError("class_ids must be as many as classes, and all different")
        for fault in group_faults(self.groups, len(self.classes)):
            raise ValueError(fault)
        names = Counter(shard.name for shard in self.shards)
        for name, count in names.items():
            if count > 1:
                raise ValueError(f"shards: {name!r} is named more than once")
        if not self.samples:
            raise ValueError("the shards hold no samples")
        first: dict[str, str] = {}
        for shard in self.shards:
            if shard.samples and (name := first.setdefault(shard.sha256, shard.name)) != shard.name:
                raise ValueError(
                    f"shards: {name!r} and {shard.name!r} hold the same bytes, so samples would "
                    "count twice; name one of them"
                )

    @property
    def samples(self) -> int:
        """Number of samples in the dataset."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def sha256(self) -> str:
        """Hash of the manifest's content: the identity of the data."""
        return files.sha256_json(self._document())

    def other_stores(self, url: str) -> list[str]:
        """Return the hosts and buckets that hold shards and are not that of the manifest's `url`.

        Files elsewhere on this machine are not among them: no line says that they are read.
        """
        places = dict.fromkeys(urls.place(shard.name) for shard in self.shards)
        return [place for place in places if place not in ("", urls.place(url))]

    @property
    def label_space(self) -> Classes:
        """What the labels mean, to compare with the classes of a head."""
        prompts = prompts_sha256(self.classes, self.templates)
        return Classes(ids=self.class_ids, names=self.classes, prompts_sha256=prompts)

    def class_to_group(self) -> np.ndarray:
        """Return for each class the group it scores in, or -1 if its logit takes no part. (K,)."""
        table = np.full(len(self.classes), -1, dtype=np.int64)
        for group, members in enumerate(self.groups):
            table[list(members)] = group
        return table

    @staticmethod
    def load(url: str) -> "Manifest":
        """Read `url/manifest.json`.

        Raises:
            ValueError: if it is absent (the folder was not finalised), damaged, of another schema,
                or holds values that cannot be right.
        """
        path = files.join(url, "manifest.json")
        try:
            data = files.read_bytes(path)
        except ValueError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            hint = why_missing(url)
            raise ValueError(
                f"no packed dataset at {url}: manifest.json is missing{hint and f'; {hint}'}"
            ) from error
        try:
            manifest = documents.decode(data, Manifest, path)
        except ValueError as error:
            newer = "a newer rft may read it; " if documents.names_unknown(error) else ""
            raise ValueError(f"{error}; {newer}{AGAIN}") from error
        for number, shard in enumerate(manifest.shards):
            try:
                urls.check_shard_name(shard.name, url)
            except ValueError as error:
                raise ValueError(f"{path}: shards[{number}].name: {error}; {AGAIN}") from error
        require_named(url, manifest.dataset)
        return manifest

    def save(self, url: str) -> None:
        """Write `url/manifest.json` atomically."""
        files.write_json(files.join(url, "manifest.json"), self._document())

    def _document(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        # a manifest from before there were ids keeps its hash: finished runs know the data by it
        if not self.class_ids:
            del document["class_ids"]
        return document


def require_named(url: str, dataset: str) -> None:
    """Check that a folder with the name of a benchmark holds that benchmark.

    Counts are stored and reported under the folder's name. Other names are the user's own.

    Raises:
        ValueError: naming both.
    """
    name = files.name_of(url)
    if name in BENCHMARKS and dataset != name:
        raise ValueError(
            f"{url} is called {name}, but the set in it is {dataset!r} and would count as {name}; "
            f"rename the folder, or index its shards anew with --dataset {name} if they are that"
        )


def note_other_stores(url: str, manifest: Manifest) -> None:
    """Print which hosts or buckets besides the manifest's own will be asked for its shards."""
    if others := manifest.other_stores(url):
        more = f" and {len(others) - STORES_SHOWN} more" if len(others) > STORES_SHOWN else ""
        own = any(urls.place(shard.name) not in others for shard in manifest.shards)
        cli.note(
            f"shards of {manifest.dataset} ({url}) are read from "
            f"{', '.join(others[:STORES_SHOWN])}{more}{' as well' if own else ''}"
        )


def group_faults(groups: Sequence[Sequence[int]], classes: int) -> Iterator[str]:
    """Yield what makes groups no scoring rule over so many classes.

    There must be a group, none empty, of class ids in range, each in one group at most.
    """
    if not groups:
        yield "groups must name at least one group of class ids"
    group_of: dict[int, int] = {}
    for number, members in enumerate(groups):
        if not members:
            yield f"groups[{number}] must name at least one class id"
        for place, class_id in enumerate(members):
            here = f"groups[{number}][{place}]"
            if not 0 <= class_id < classes:
                yield f"{here} must be a class id from 0 to {classes - 1}, not {class_id!r}"
            elif class_id in group_of:
                yield f"{here}: class {class_id} is in groups[{group_of[class_id]}] already"
            else:
                group_of[class_id] = number


@dataclass(frozen=True, kw_only=True)
class Index:
    """Per-sample columns, all of length N, in shard order.

    `offset` and `length` (bytes) locate the payload inside its shard's tar; `label` is a class id
    of the manifest's label space; `width` and `height` are the source image's, in pixels, after
    own photos are turned upright; `key` is the sample's id as ASCII bytes (`n01440764_10026`).
    """

    offset: np.ndarray  # uint64
    length: np.ndarray  # uint32
    crc32: np.ndarray  # uint32
    label: np.ndarray  # int32
    width: np.ndarray  # uint16
    height: np.ndarray  # uint16
    key: np.ndarray  # S<longest>

    def to_bytes(self) -> bytes:
        """Return the content of `index.npz`; the same columns give the same bytes.

        Raises:
            ValueError: if readers would refuse it.
        """
        if self.key.itemsize > KEY_BYTES:
            raise ValueError(
                f"a key has {self.key.itemsize:,} letters, at most {KEY_BYTES:,} are read; shorten "
                f"the names of the images"
            )
        stream = io.BytesIO()
        np.savez(stream, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        if (size := stream.tell()) > INDEX_BYTES:
            raise ValueError(
                f"the index of {len(self.key):,} samples has {size:,} bytes, more than the "
                f"{INDEX_BYTES:,} that are read; make several sets of them"
            )
        return stream.getvalue()

    @staticmethod
    def load(url: str, manifest: Manifest) -> "Index":
        """Read `url/index.npz` and hold it against the manifest.

        Raises:
            ValueError: if the file is absent or was changed, or a row cannot be right.
        """
        index = Index.read(url, manifest)
        for rows, what in index.unusable(manifest):
            if len(rows):
                key = index.key[rows[0]].decode("ascii", "replace")
                path = files.join(url, "index.npz")
                raise ValueError(f"{path}, row {rows[0]}, key {key!r}: {what}; {AGAIN}")
        return index

    @staticmethod
    def read(url: str, manifest: Manifest) -> "Index":
        """Read `url/index.npz`, whatever its rows say.

        Raises:
            ValueError: if the file is absent or was changed, or its columns are not those of the
                manifest's samples.
        """
        path = files.join(url, "index.npz")
        # as many rows as the manifest says, no more, whatever the store sends
        limit = min(manifest.samples * (ROW_BYTES + KEY_BYTES) + HEADERS_BYTES, INDEX_BYTES)
        data = files.read_bytes(path, limit)
        if files.sha256_bytes(data) != manifest.index_sha256:
            raise ValueError(f"{path} does not have the sha256 in its manifest; pack the set again")
        try:
            columns = read_npz(data, limit)
        except ValueError as error:
            raise ValueError(f"{path} is no archive of columns ({error}); {AGAIN}") from error
        for fault in _column_faults(columns, manifest.samples):
            raise ValueError(f"{path}: {fault}; {AGAIN}")
        return Index(**columns)

    def _odd_keys(self) -> np.ndarray:
        odd = np.zeros(len(self.key), bool)
        for start in range(
            0, len(self.key), KEYS_AT_ONCE
        ):  # all masks together are several indexes
            keys = np.ascontiguousarray(self.key[start : start + KEYS_AT_ONCE])
            letters = keys.view(np.uint8).reshape(len(keys), -1)
            # NumPy fills up with zeros
            wrong = ((letters < ord(" ")) & (letters > 0)) | (letters > ord("~"))
            inside = (letters[:, :-1] == 0) & (letters[:, 1:] > 0)
            odd[start : start + len(keys)] = wrong.any(axis=1) | inside.any(axis=1)
        return np.flatnonzero(odd)

    def unusable(self, manifest: Manifest) -> Iterator[tuple[np.ndarray, str]]:
        """Yield the rows that no reader may use, ascending, for each thing that is wrong with some.

        A label must be a class that is scored, or its sample would count as right or wrong whatever
        is predicted. A payload must lie in its shard. A key is printed and has ASCII letters alone.
        """
        yield self._odd_keys(), "its key is no printable ASCII text"
        classes = len(manifest.classes)
        known = (self.label >= 0) & (self.label < classes)
        yield np.flatnonzero(~known), f"its label is none of the {classes} classes"
        scored = manifest.class_to_group()[np.where(known, self.label, 0)] >= 0
        yield np.flatnonzero(known & ~scored), "its label lies in no group, so it never scores"
        sizes = [shard.bytes for shard in manifest.shards]
        size = np.repeat(np.array(sizes, float), [shard.samples for shard in manifest.shards])
        # as floats, because a damaged uint64 would wrap around
        ends = self.offset.astype(float) + np.ceil(self.length / tar.BLOCK) * tar.BLOCK
        yield np.flatnonzero(ends + tar.END > size), "its payload reaches beyond the shard's bytes"


assert list(COLUMNS) == [field.name for field in dataclasses.fields(Index)]


def _column_faults(columns: dict[str, Any], samples: int) -> Iterator[str]:
    """Yield which columns of an index cannot be those of so many samples."""
    if columns.keys() != COLUMNS.keys():
        yield f"its columns must be {', '.join(COLUMNS)}, they are {', '.join(columns)}"
        return
    for name, kind in COLUMNS.items():
        column = columns[name]
        expected = np.dtype(kind)
        # texts are as long as the longest one
        same = column.dtype.kind == "S" if kind is np.bytes_ else column.dtype == expected
        if not same or column.ndim != 1:
            yield f"column {name} must be a list of {expected}, not {column.dtype} {column.shape}"
        elif len(column) != samples:
            yield f"column {name} has {len(column)} samples, the manifest {samples}"
