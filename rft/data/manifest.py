"""What a packed dataset is: `manifest.json` and `index.npz` in one folder of shards.

The manifest is the only thing readers trust. Sample i of the dataset is row i of the index, rows
are in shard order, and row i says where in its shard the payload lies and which crc32 it must have.
No torch here: packing tools and reports read this too.
"""

import dataclasses
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rft import files
from rft.classes import Classes, prompts_sha256
from rft.data.root import why_missing

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of the dataset.

    `name` is relative to the manifest's folder, or a whole URL where a manifest was made for shards
    that lie elsewhere.
    """

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a packed dataset but its per-sample rows.

    `classes` and `templates` describe the label space (index = class id; `{c}` marks the name);
    `class_ids` are the classes' folder names, empty in manifests that were written without them.
    `groups` is the scoring rule: a prediction is the argmax over the classes named in any group,
    and it is right when it lies in the same group as the label. ImageNet has one group for each
    class, ImageNet-R and -A one for each of their 200, ObjectNet 113 groups over 125 classes.
    """

    dataset: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    encoding: dict[str, Any]  # {"kind": "original" | "jpeg" | "pixels", ...}
    plan_hash: str
    index_sha256: str
    shards: tuple[Shard, ...]
    class_ids: tuple[str, ...] = ()
    quarantined: int = 0  # images of the source left out because they cannot be decoded
    schema: int = SCHEMA

    @property
    def samples(self) -> int:
        """Number of samples in the dataset."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def sha256(self) -> str:
        """Hash of the manifest's content: the identity of the data."""
        return files.sha256_json(self._document())

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
            ValueError: if it is absent (the folder was not finalised), damaged, or of another
                schema.
        """
        path = files.join(url, "manifest.json")
        try:
            document = files.read_json(path)
        except ValueError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            hint = why_missing(url)
            raise ValueError(
                f"no packed dataset at {url}: manifest.json is missing{hint and f'; {hint}'}"
            ) from error
        found = document.get("schema") if isinstance(document, dict) else None
        if found != SCHEMA:
            raise ValueError(f"{path} has schema {found}, this rft reads {SCHEMA}; pack it again")
        try:
            document["classes"] = tuple(document["classes"])
            document["class_ids"] = tuple(document.get("class_ids", ()))
            document["templates"] = tuple(document["templates"])
            document["groups"] = tuple(tuple(group) for group in document["groups"])
            document["shards"] = tuple(Shard(**shard) for shard in document["shards"])
            manifest = Manifest(**document)
            _ = manifest.label_space  # its ids and names must be one list
            return manifest
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); pack or index the set again") from error

    def save(self, url: str) -> None:
        """Write `url/manifest.json` atomically."""
        files.write_json(files.join(url, "manifest.json"), self._document())

    def _document(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        # a manifest from before there were ids keeps its hash: finished runs know the data by it
        if not self.class_ids:
            del document["class_ids"]
        return document


@dataclass(frozen=True, kw_only=True)
class Index:
    """Per-sample columns, all of length N, in shard order.

    `offset` and `length` (bytes) locate the payload inside its shard's tar; `label` is a class id
    of the manifest's label space; `width` and `height` are the source image's, in pixels; `key` is
    the sample's id as ASCII bytes (`n01440764_10026`).
    """

    offset: np.ndarray  # uint64
    length: np.ndarray  # uint32
    crc32: np.ndarray  # uint32
    label: np.ndarray  # int32
    width: np.ndarray  # uint16
    height: np.ndarray  # uint16
    key: np.ndarray  # S<longest>

    def to_bytes(self) -> bytes:
        """Return the content of `index.npz`; the same columns give the same bytes."""
        stream = io.BytesIO()
        np.savez(stream, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        return stream.getvalue()

    @staticmethod
    def load(url: str, manifest: Manifest) -> "Index":
        """Read `url/index.npz` and hold it against the manifest.

        Raises:
            ValueError: if the file is absent, was changed, or has another number of samples.
        """
        path = files.join(url, "index.npz")
        data = files.read_bytes(path)
        if files.sha256_bytes(data) != manifest.index_sha256:
            raise ValueError(f"{path} does not have the sha256 in its manifest; pack the set again")
        with np.load(io.BytesIO(data), allow_pickle=False) as columns:
            index = Index(**{name: columns[name] for name in columns.files})
        if len(index.label) != manifest.samples:
            raise ValueError(
                f"{path} has {len(index.label)} samples, its manifest {manifest.samples}; "
                f"pack the set again"
            )
        return index
