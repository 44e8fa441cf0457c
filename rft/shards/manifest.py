"""The description of a packed set: `manifest.json` beside its shards.

Readers trust only the manifest: it has the shards with their hashes, the meaning of labels and the
scoring rule, the encoding of images, and the hash of the index (`rft.shards.index`). No torch here:
packing tools and reports read this too.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, get_args

import numpy as np
from pydantic import Field

from rft.classes import Classes, prompts_sha256
from rft.log import ASIDE
from rft.sets import BENCHMARKS, OOD_SETS, DomainScore, Score
from rft.shards.folder import MANIFEST
from rft.shards.images import Encoding
from rft.shards.label_space import MARK
from rft.shards.root import why_missing
from rft.storage import documents, files, urls
from rft.storage.documents import Count, Name, Schema, Sha256, Text, document
from rft.text import short

SCHEMA = 1
CLASSES = 100_000  # ImageNet-21k has 21,841
TEMPLATES = 1000  # OpenAI has 80; a head is made from all of them for each class
DOMAINS = 100_000  # iWildCam has 323
AGAIN = "pack or index the set again"
STORES_SHOWN = 3  # on one line
ShardName = Annotated[Name, Field(max_length=2000)]

log = logging.getLogger(__name__)


@document
class Shard:
    """One tar file of the dataset.

    `name` is relative to the manifest's folder, or a complete URL for shards stored elsewhere: see
    `rft.storage.urls.check_shard_name`.
    """

    name: ShardName
    bytes: Count
    sha256: Sha256
    samples: Count


@document
class Manifest:
    """Everything about a packed dataset except its per-sample rows.

    `classes` and `templates` describe the label space (index = class id; `{c}` marks the name);
    `class_ids` are the classes' folder names, empty in manifests written without them. `groups` is
    the scoring rule: a prediction is the argmax over the classes named in any group, and it is
    correct if it is in the same group as the label. ImageNet has one group for each class,
    ImageNet-R and -A one for each of their 200, ObjectNet 113 groups over 125 classes.
    `samples_sha256` is the hash of `rft.shards.samples`, whose `domain` indexes `domains`. `score`
    is the set's headline metric. `ood` declares that it counts in the OOD average; the five
    benchmarks need no declaration (`is_ood`).
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
    samples_sha256: Sha256 | None = None
    domains: Annotated[tuple[Name, ...], Field(max_length=DOMAINS)] = ()
    score: Score = "top1"
    ood: bool = False
    quarantined: Count = 0  # images of the source left out because they cannot be decoded
    schema: Schema = SCHEMA

    def __post_init__(self) -> None:
        if unmarked := [text for text in self.templates if MARK not in text]:
            raise ValueError(f"templates: {short(unmarked[0])} has no {MARK} for the class name")
        ids = self.class_ids
        if ids and not len(set(ids)) == len(ids) == len(self.classes):
            raise ValueError("class_ids must be as many as classes, and distinct")
        for fault in group_faults(self.groups, len(self.classes)):
            raise ValueError(fault)
        require_declarable(self.dataset, self.score, ood=self.ood)
        self._require_domains()
        names = Counter(shard.name for shard in self.shards)
        for name, count in names.items():
            if count > 1:
                raise ValueError(f"shards: {name!r} is named more than once")
        if not self.samples:
            raise ValueError("the shards hold no samples")
        first: dict[str, str] = {}
        for shard in self.shards:
            # empty tars all have the same bytes, and no samples to count twice
            if shard.samples and (name := first.setdefault(shard.sha256, shard.name)) != shard.name:
                raise ValueError(
                    f"shards: {name!r} and {shard.name!r} hold the same bytes, so samples would "
                    "count twice; list only one of them"
                )

    def _require_domains(self) -> None:
        if len(set(self.domains)) < len(self.domains):
            raise ValueError("domains must be distinct")
        if self.domains and self.samples_sha256 is None:
            raise ValueError("domains need samples_sha256, the hash of the file that assigns them")
        if self.score in get_args(DomainScore) and not self.domains:
            raise ValueError(f"score is {self.score!r}, but the set has no domains")

    @property
    def samples(self) -> int:
        """Number of samples in the dataset."""
        return sum(shard.samples for shard in self.shards)

    @property
    def is_ood(self) -> bool:
        """Whether it counts in the OOD average: it may not be used for training or selection."""
        return self.ood or self.dataset in OOD_SETS

    @cached_property  # stores into __dict__, so it works in a frozen class
    def sha256(self) -> str:
        """Hash of the manifest's content: the identity of the data."""
        return files.sha256_json(self._document())

    def other_stores(self, url: str) -> list[str]:
        """List the hosts and buckets of shards that differ from the one of the manifest's `url`.

        Local files in other folders are not included: reading them is not announced.
        """
        # a dict, because a set would print them in a different order each time
        places = dict.fromkeys(urls.place(shard.name) for shard in self.shards)
        return [place for place in places if place not in ("", urls.place(url))]

    @property
    def label_space(self) -> Classes:
        """The meaning of the labels, for comparison with the classes of a head."""
        prompts = prompts_sha256(self.classes, self.templates)
        return Classes(ids=self.class_ids, names=self.classes, prompts_sha256=prompts)

    def class_to_group(self) -> np.ndarray:
        """Map each class to the group it scores in, -1 if its logit is excluded. Shape (K,)."""
        table = np.full(len(self.classes), -1, dtype=np.int64)
        for group, members in enumerate(self.groups):
            # a list: NumPy interprets a tuple as one index per axis
            table[list(members)] = group
        return table

    @staticmethod
    def load(url: str, *, as_path: bool = False) -> "Manifest":
        """Read `url/manifest.json`; with `as_path`, an error names other sets by their paths.

        Raises:
            ValueError: if it is absent (packing has not finished), damaged, of a different schema,
                or holds invalid values.
        """
        path = files.join(url, MANIFEST)
        try:
            data = files.read_bytes(path)
        except ValueError as error:
            # `read_bytes` raises ValueError for every fault; only its cause reveals an absent file
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            hint = why_missing(url, as_path=as_path)
            raise ValueError(
                f"no packed dataset at {url}: manifest.json is missing{hint and f'; {hint}'}"
            ) from error
        try:
            manifest = documents.decode(data, Manifest, path)
        except ValueError as error:
            newer = "a newer rft may read it; " if documents.names_unknown(error) else ""
            raise ValueError(f"{error}; {newer}{AGAIN}") from error
        # not checked in Shard: which names are allowed depends on the manifest's location
        for number, shard in enumerate(manifest.shards):
            try:
                urls.check_shard_name(shard.name, url)
            except ValueError as error:
                raise ValueError(f"{path}: shards[{number}].name: {error}; {AGAIN}") from error
        require_named(url, manifest.dataset)
        return manifest

    def save(self, url: str) -> None:
        """Write `url/manifest.json` atomically."""
        files.write_json(files.join(url, MANIFEST), self._document())

    def _document(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        # an older manifest without these fields keeps its hash, by which runs identify the data
        for field in dataclasses.fields(self):
            if field.name in LATER and document[field.name] == field.default:
                del document[field.name]
        return document


LATER = ("class_ids", "samples_sha256", "domains", "score", "ood")
"""Fields that older manifests lack: written only if they differ from their defaults."""


def declared(score: Score, *, ood: bool) -> dict[str, Any]:
    """Build plan.json's record of a declaration; the default adds nothing, as in older plans."""
    return {**({"score": score} if score != "top1" else {}), **({"ood": True} if ood else {})}


def require_declarable(dataset: str, score: Score, *, ood: bool) -> None:
    """Check that a set's declaration does not contradict a benchmark's fixed properties.

    Raises:
        ValueError: naming the set.
    """
    if dataset in BENCHMARKS and (ood or score != "top1"):
        raise ValueError(
            f"{dataset} is a benchmark: its name determines its score (top1) and whether it counts "
            "in the OOD average; leave out --score and --ood"
        )


def require_named(url: str, dataset: str) -> None:
    """Check that a folder named after a benchmark holds that benchmark.

    Results are stored and reported under the folder's name. All other names are free.

    Raises:
        ValueError: with both names.
    """
    name = files.name_of(url)
    if name in BENCHMARKS and dataset != name:
        raise ValueError(
            f"{url} is named {name}, but holds {dataset!r}, whose results would count as {name}; "
            f"rename the folder, or index its shards again with --dataset {name} if that is right"
        )


def note_other_stores(url: str, manifest: Manifest) -> None:
    """Log which hosts or buckets, besides the manifest's own, will receive requests."""
    if others := manifest.other_stores(url):
        more = f" and {len(others) - STORES_SHOWN} more" if len(others) > STORES_SHOWN else ""
        own = any(urls.place(shard.name) not in others for shard in manifest.shards)
        log.info(
            f"shards of {manifest.dataset} ({url}) are read from "
            f"{', '.join(others[:STORES_SHOWN])}{more}{' as well' if own else ''}",
            extra=ASIDE,
        )


def warn_of_one_class(url: str, groups: Sequence[Sequence[int]]) -> None:
    """Warn of a packed set that scores a single class: every model has an accuracy of 100."""
    if len(groups) == 1:
        log.warning(f"{url} scores a single class, so every prediction counts as correct")


def group_faults(groups: Sequence[Sequence[int]], classes: int) -> Iterator[str]:
    """Yield the faults of groups as a scoring rule over a number of classes.

    There must be at least one group, none may be empty, and each class id must be in range and in
    at most one group.
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
            # a class in two groups would make a prediction correct for both
            elif class_id in group_of:
                yield f"{here}: class {class_id} is already in groups[{group_of[class_id]}]"
            else:
                group_of[class_id] = number
