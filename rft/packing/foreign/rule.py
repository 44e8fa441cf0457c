"""The rule of a set of third-party shards: the meaning of its labels, and how it is scored.

Label numbers may be class ids, or line numbers in the set's own list of class names (`local`
labels, as CLIP_benchmark writes for ImageNet-R, -A and ObjectNet). The rule is built once per set;
`rft.packing.foreign.labels` applies it to each sample's label.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

from rft.classes import Classes, composed
from rft.config import MAX_PIXELS
from rft.packing.expected import published_classes
from rft.packing.foreign.class_names import Names, names_of
from rft.packing.foreign.samples import parent
from rft.packing.objectnet import folder_labels, objectnet_groups
from rft.sets import BENCHMARKS, ClassScore
from rft.shards.images import Side
from rft.shards.label_space import LabelSpace
from rft.storage import files
from rft.storage.documents import Megapixels, Positive, Whole, document

LIKE_POSITION = re.compile(r"-?[0-9]{1,18}")  # texts that could be mistaken for a position
LabelsAre = Literal["positions", "names"]
NAMES_BYTES = 2**22  # of a list of classes; ImageNet-21k's has 1 MB
NUMBER_BYTES = 64  # of nshards.txt, which holds one number

log = logging.getLogger(__name__)


@document(name="--")
class Options:
    """How to read existing shards."""

    dataset: str | None = None
    """Name of the set (imagenet-train, imagenet-r, ...); None is the last folder name of --out."""
    label_field: str | None = None
    """Field of each sample's .json that holds the label; None reads the .cls member."""
    labels_are: LabelsAre | None = None
    """Meaning of numeric labels: positions in the label space (or in --local-classes), or ids or
    names of classes. Needed only if a class has a number as its id or name that differs from its
    position."""
    local_classes: str | None = None
    """File with one class name per line, indexed by .cls; None looks for a classnames.txt beside
    the shards and uses it if its length differs from the label space's."""
    skip_beside: bool = False
    """Do not look for classnames.txt and nshards.txt beside the shards, for stores that do not
    report "not found" for absent files."""
    mappings: str | None = None
    """The mappings/ folder of ObjectNet's archive (objectnet only)."""
    score: ClassScore = "top1"
    """Headline metric of the set: the share of correct images, or its mean over classes. Benchmarks
    have top1."""
    ood: bool = False
    """Declare an out-of-distribution test set: it counts in the OOD average, and training refuses
    its images. The five benchmarks need no declaration."""
    crop_border: Side | None = None
    """Pixels to cut from each side before any resize; None is 2 for objectnet and 0 otherwise."""
    ignore: tuple[str, ...] = ()
    """Suffixes of members to skip, such as seg.png."""
    allow_count: tuple[str, ...] = ()
    """SET=N: accept an incomplete copy of a benchmark with exactly N images."""
    max_bad: Whole = 0
    """How many samples of the set may be left out because they lack an image or a label, or the
    image cannot be decoded; each is listed with its reason in quarantine.jsonl. Above 0, every
    image is decoded, which takes longer."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that an image may have; raise it for panoramas."""
    workers: Positive | None = None
    """Processes that read shards; None is one per core that this process may use."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How samples of a set are read and scored.

    `local` maps label numbers to class ids (None: they are class ids); `groups` is the manifest's
    scoring rule (None: one group for each class that occurs).
    """

    labels: Classes
    groups: tuple[tuple[int, ...], ...] | None
    local: tuple[int, ...] | None = None
    label_field: str | None = None
    labels_are: LabelsAre | None = None
    ignore: frozenset[str] = frozenset()
    crop_border: int = 0
    max_bad: int = 0
    max_pixels: float = MAX_PIXELS

    @property
    def label_suffix(self) -> str:
        """Suffix of the member that holds a sample's label."""
        return "cls" if self.label_field is None else "json"

    @cached_property
    def scored(self) -> frozenset[int]:
        """Class ids that a label may have."""
        if self.groups is None:
            return frozenset(range(len(self.labels)))
        return frozenset(chain(*self.groups))

    @cached_property
    def positions(self) -> Sequence[int]:
        """Class ids by label number."""
        return range(len(self.labels)) if self.local is None else self.local

    @cached_property
    def class_of_id(self) -> dict[str, int]:
        """Map the classes' ids to class ids; empty for older sets, whose manifests have none."""
        return {name: class_id for class_id, name in enumerate(self.labels.ids)}

    @cached_property
    def classes_of_name(self) -> dict[str, list[int]]:
        """Map the classes' names to class ids; two classes may share a name."""
        found: dict[str, list[int]] = {}
        for class_id, name in enumerate(self.labels.names):
            found.setdefault(name.strip(), []).append(class_id)
        return found

    @cached_property
    def misplaced(self) -> str:
        """The first numeric id or name of a class that is not its position; empty if none."""
        texts = (*enumerate(self.labels.ids), *enumerate(self.labels.names))
        # in the order of the classes
        for class_id, text in sorted(texts, key=lambda entry: entry[0]):
            if LIKE_POSITION.fullmatch(text):
                number = int(text)
                if number not in range(len(self.positions)) or self.positions[number] != class_id:
                    return text
        return ""


def make_rule(dataset: str, urls: Sequence[str], labels: LabelSpace, options: Options) -> Rule:
    """Build the rule of a set from its options and the files beside its shards.

    Raises:
        ValueError: if local class names do not map to the label space.
    """
    # each folder once, in the order of the shards; None for the top of a store
    places = [] if options.skip_beside else list(dict.fromkeys(map(parent, urls)))
    _require_nshards(urls, [folder for folder in places if folder])
    names, source = _local_names(places, labels, options.local_classes)
    if dataset == "objectnet":
        if options.mappings is None:
            raise ValueError("objectnet needs --mappings, the mappings/ folder of its archive")
        members = objectnet_groups(Path(options.mappings), len(labels))
        groups = tuple(members.values())
        local = None
        if names is not None:
            local = _objectnet_labels(names, source, members, Path(options.mappings))
    else:
        published = published_classes(dataset, labels)
        subset = None if published is None else tuple(sorted(map(labels.ids.index, published)))
        local = None if names is None else local_labels(names, source, labels, subset)
        groups = _groups(dataset, labels, subset, local)
    border = options.crop_border
    if border is None:
        border = BENCHMARKS[dataset].border if dataset in BENCHMARKS else 0
    return Rule(
        labels=labels.classes,
        groups=groups,
        local=local,
        label_field=options.label_field,
        labels_are=options.labels_are,
        # users may write .JSON; suffixes of members are in lower case and without the dot
        ignore=frozenset(suffix.lower().lstrip(".") for suffix in options.ignore),
        crop_border=border,
        max_bad=options.max_bad,
        max_pixels=options.max_pixels,
    )


def local_labels(
    names: Sequence[str], source: str, labels: LabelSpace, subset: Sequence[int] | None
) -> tuple[int, ...]:
    """Find the class id of each local class by its folder name or class name.

    A name without an exact match may match in `loose_form`.

    ImageNet has two classes called "missile" and two called "sunglasses". Such a name means the one
    in `subset`, the classes that the set is published for; if both or neither are in it, the name
    is refused.

    Raises:
        ValueError: if a name matches no class, several, or the same class as a different name.
    """
    known = names_of(labels)
    found: dict[int, str] = {}
    for name in names:
        candidates = known.find(name)
        if not candidates:
            raise ValueError(
                f"{source}: {name!r} is not a class of the label space; "
                f"pass the right label space with --classes"
            )
        example = labels.ids[candidates[0]]
        # the subset only resolves ambiguous names: a clear name outside it is reported by `_groups`
        if subset is not None and len(candidates) > 1:
            candidates = [class_id for class_id in candidates if class_id in subset]
        if len(candidates) != 1:
            hint = f"replace it by the folder name of the intended one (such as {example})"
            if composed(name) in labels.ids:
                hint = "it is the folder name of one; rename the other with --classes"
            raise ValueError(f"{source}: {name!r} is the name of several classes; {hint}")
        if candidates[0] in found:
            raise ValueError(f"{source}: {name!r} and {found[candidates[0]]!r} are the same class")
        found[candidates[0]] = name
    return tuple(found)


def _groups(
    dataset: str,
    labels: LabelSpace,
    subset: tuple[int, ...] | None,
    local: tuple[int, ...] | None,
) -> tuple[tuple[int, ...], ...] | None:
    if subset is not None:
        if local is not None and set(local) != set(subset):
            missing = sorted(set(subset) - set(local))
            example = labels.ids[(missing or sorted(set(local) - set(subset)))[0]]
            raise ValueError(
                f"the local classes of {dataset} differ from the {len(subset)} it is published for "
                f"({example} is in only one of the two lists)"
            )
        return tuple((class_id,) for class_id in subset)
    if local is not None:
        return tuple((class_id,) for class_id in sorted(local))
    # in any other label space, a subset benchmark is scored on the classes that occur
    if dataset in BENCHMARKS and BENCHMARKS[dataset].class_list:
        return None
    return labels.groups


def _objectnet_labels(
    names: Sequence[str], source: str, groups: dict[str, tuple[int, ...]], mappings: Path
) -> tuple[int, ...]:
    """Find a class id for each of ObjectNet's class names; any member of its group will do."""
    label_of_folder = folder_labels(mappings)
    folders = list(groups)
    known = Names(
        (text, n) for n, name in enumerate(folders) for text in (name, label_of_folder[name])
    )
    found: dict[str, int] = {}
    for name in names:
        candidates = [folders[number] for number in known.find(name)]
        folder = candidates[0] if len(candidates) == 1 else None
        if folder is None or folder in found:
            what = "is a second name of one of" if folder else "is not one of"
            what = "matches several of" if len(candidates) > 1 else what
            raise ValueError(f"{source}: {name!r} {what} ObjectNet's {len(groups)} classes")
        found[folder] = groups[folder][0]
    if len(found) != len(groups):
        missing = next(name for name in groups if name not in found)
        raise ValueError(
            f"{source} lists {len(found)} of ObjectNet's {len(groups)} classes (not {missing!r})"
        )
    # in the order of `names`, which labels index
    return tuple(found.values())


def _local_names(
    folders: Sequence[str | None], labels: LabelSpace, given: str | None
) -> tuple[list[str] | None, str]:
    """Find the list that label numbers index, and its file; None if they are class ids.

    `folders` are those of the shards, None for shards without one; `given` is `--local-classes`.
    """
    if given is not None:
        return _lines(files.read_bytes(given, NAMES_BYTES), given), given
    beside = {}
    without = []
    for folder in folders:
        # CLIP_benchmark's list is one folder above its shards
        for place in filter(None, (folder, parent(folder) if folder else None)):
            path = files.join(place, "classnames.txt")
            data = _find_beside(path, NAMES_BYTES)
            if data is not None:
                beside[path] = _lines(data, path)
                break
        else:
            without.append(folder or "the top of the store")
    if not beside:
        return None, ""
    path, names = next(iter(beside.items()))
    if any(other != names for other in beside.values()):
        raise ValueError(f"{path} and {list(beside)[-1]} differ; name one with --local-classes")
    # a list of a different length is the set's own label space, which labels index
    if len(names) != len(labels):
        if without:
            raise ValueError(
                f"{path} lists the classes that labels index, but {without[0]} has no such file; "
                f"pass --local-classes {path} if all labels index its lines, or --skip-beside if "
                f"none do (docs/data.md#third-party-shards)"
            )
        return names, path
    _require_same_order(path, names, labels)
    # line numbers of a list in the label space's order are class ids
    return None, ""


def _require_same_order(path: str, names: Sequence[str], labels: LabelSpace) -> None:
    """Check that a list of equal length agrees with the label space, class by class.

    A name that the label space lacks may be a different word for the class at that position; this
    gives a warning. If most names are unknown, the equal length is a coincidence: an error.
    """
    known = names_of(labels)
    unknown = []
    for number, name in enumerate(names):
        found = known.find(name)
        if found and number not in found:
            raise ValueError(
                f"{path} has {name!r} at index {number}, the label space at index {found[0]}; "
                f"pass the file as --local-classes if the labels index its lines"
            )
        # two classes with exactly the same name (ImageNet's missiles) differ by position
        exact = composed(name) in known.exact
        if not exact and len({labels.names[place] for place in found}) > 1:
            either = " or ".join(labels.ids[place] for place in found)
            raise ValueError(
                f"{path} has {name!r} at index {number}, which may be class {either}; write it as "
                f"in the label space"
            )
        if not found:
            unknown.append(number)
    if not unknown:
        return
    first = unknown[0]
    what = (
        f"{len(unknown)} of the {len(names)} names in {path} are not classes of the label space "
        f"(first: {names[first]!r} at index {first}, which is {labels.names[first]!r} there)"
    )
    if 2 * len(unknown) > len(names):
        raise ValueError(f"{what}; pass the label space of these shards with --classes")
    log.warning(f"{what}: they are read as different words for the same classes")


def _require_nshards(urls: Sequence[str], folders: Sequence[str]) -> None:
    """Compare the number of shards with an `nshards.txt` beside them, if one exists."""
    for folder in folders:
        path = files.join(folder, "nshards.txt")
        data = _find_beside(path, NUMBER_BYTES)
        if data is None:
            continue
        text = data.decode("utf-8", "replace").strip()
        given = sum(parent(url) == folder for url in urls)
        if text != str(given):
            raise ValueError(f"{path} says {text} shards, but {given} of that folder are named")


def _find_beside(path: str, limit: int) -> bytes | None:
    """Read a file that may exist beside shards, None if it does not."""
    try:
        return files.find_bytes(path, limit)
    except ValueError as error:
        if not files.is_answered(error):
            raise
        # some stores do not report an absent file as such
        raise ValueError(f"{error}; if no such file exists, pass --skip-beside") from error


def _lines(data: bytes, path: str) -> list[str]:
    """Read a file with one name per line; labels index the lines, so none is dropped.

    Raises:
        ValueError: if it is not UTF-8, has a blank line between others, or no name.
    """
    try:
        # editors on Windows write a byte order mark first
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    # not splitlines(), which also splits at a form feed or U+0085 within a name
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise ValueError(f"{path} names no class")
    if "" in lines:
        number = lines.index("")
        raise ValueError(
            f"{path}: line {number + 1} is blank; labels index the lines, so remove it if the "
            f"labels skip it, or write the name of class {number} there"
        )
    return lines
