"""The rule of a set of third-party shards: what its labels count, and how it is scored.

Label numbers may be class ids, or count the lines of a list of class names of the set's own
(`local` labels, as CLIP_benchmark writes for ImageNet-R, -A and ObjectNet). The rule is made once
for a set; `rft.packing.foreign.labels` reads each sample's label by it.
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
from rft.storage.documents import Megapixels, Positive, document

LIKE_POSITION = re.compile(r"-?[0-9]{1,18}")  # what a reader may take for one
LabelsAre = Literal["positions", "names"]
NAMES_BYTES = 2**22  # of a list of classes; that of ImageNet-21k has 1 MB
NUMBER_BYTES = 64  # of a file that says how many shards there are

log = logging.getLogger(__name__)


@document(name="--")
class Options:
    """How existing shards are understood."""

    dataset: str | None = None
    """Name of the set (imagenet-train, imagenet-r, ...); None is the last folder name of --out."""
    label_field: str | None = None
    """Field of each sample's .json that holds the label; None reads the .cls member."""
    labels_are: LabelsAre | None = None
    """What labels are that are numbers: positions in the label space (or in --local-classes), or
    the classes' ids or names. Needed only where a class has a number for its id or name and is at
    another position."""
    local_classes: str | None = None
    """File with one class name a line, which .cls counts; None looks for a classnames.txt beside
    the shards and takes it when it has another length than the label space."""
    skip_beside: bool = False
    """Look for no classnames.txt and nshards.txt beside the shards, for stores that do not say
    "not found" of files that do not exist."""
    mappings: str | None = None
    """The mappings/ folder of ObjectNet's archive (objectnet only)."""
    score: ClassScore = "top1"
    """The number that the set is known by: the share of images that are right, or the mean of that
    of each class. A benchmark's is top1."""
    ood: bool = False
    """Declare an out-of-distribution test set: it counts into the OOD average, and training refuses
    its images. The five benchmarks need no declaration."""
    crop_border: Side | None = None
    """Pixels to cut from each side before any resize; None is 2 for objectnet and 0 for others."""
    ignore: tuple[str, ...] = ()
    """Suffixes of members to pass over, such as seg.png."""
    allow_count: tuple[str, ...] = ()
    """SET=N: accept this copy of a benchmark, which has N images and not the published number."""
    max_pixels: Megapixels = MAX_PIXELS
    """Millions of pixels that an image may have; raise it for panoramas."""
    workers: Positive | None = None
    """Processes that read shards; None is one for each core this process may use."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a sample is read and scored.

    `local` translates label numbers (None: they are class ids); `groups` is the manifest's scoring
    rule (None: one group for each class that occurs).
    """

    labels: Classes
    groups: tuple[tuple[int, ...], ...] | None
    local: tuple[int, ...] | None = None
    label_field: str | None = None
    labels_are: LabelsAre | None = None
    ignore: frozenset[str] = frozenset()
    crop_border: int = 0
    max_pixels: float = MAX_PIXELS

    @property
    def label_suffix(self) -> str:
        """Suffix of the member that holds a sample's label."""
        return "cls" if self.label_field is None else "json"

    @cached_property
    def scored(self) -> frozenset[int]:
        """Class ids that a label may be."""
        if self.groups is None:
            return frozenset(range(len(self.labels)))
        return frozenset(chain(*self.groups))

    @cached_property
    def positions(self) -> Sequence[int]:
        """Class ids by the number that a label may be."""
        return range(len(self.labels)) if self.local is None else self.local

    @cached_property
    def class_of_id(self) -> dict[str, int]:
        """Class ids by the classes' ids; empty for an older set, whose manifest has none."""
        return {name: class_id for class_id, name in enumerate(self.labels.ids)}

    @cached_property
    def classes_of_name(self) -> dict[str, list[int]]:
        """Class ids by the classes' names, of which some are two classes'."""
        found: dict[str, list[int]] = {}
        for class_id, name in enumerate(self.labels.names):
            found.setdefault(name.strip(), []).append(class_id)
        return found

    @cached_property
    def misplaced(self) -> str:
        """A class's id or name that is a number and not the class's position; empty if none is."""
        texts = (*enumerate(self.labels.ids), *enumerate(self.labels.names))
        # class by class
        for class_id, text in sorted(texts, key=lambda entry: entry[0]):
            if LIKE_POSITION.fullmatch(text):
                number = int(text)
                if number not in range(len(self.positions)) or self.positions[number] != class_id:
                    return text
        return ""


def make_rule(dataset: str, urls: Sequence[str], labels: LabelSpace, options: Options) -> Rule:
    """Return how labels are read and the set is scored; see Options.

    Raises:
        ValueError: if local class names do not map onto the label space.
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
        # users write .JSON too; suffixes of members are in lower case and without the dot
        ignore=frozenset(suffix.lower().lstrip(".") for suffix in options.ignore),
        crop_border=border,
        max_pixels=options.max_pixels,
    )


def local_labels(
    names: Sequence[str], source: str, labels: LabelSpace, subset: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the class id of each local class, found by its folder name or class name.

    A name that no class has as it is written may differ from one's in `loose_form`'s ways.

    ImageNet has two classes called "missile" and two called "sunglasses": such a name means the one
    in `subset`, the classes the set is published for, and is refused where that does not decide.

    Raises:
        ValueError: if a name is no class, several, or another name's class.
    """
    known = names_of(labels)
    found: dict[int, str] = {}
    for name in names:
        candidates = known.find(name)
        if not candidates:
            raise ValueError(
                f"{source}: {name!r} is no class of the label space; "
                f"name the right one with --classes"
            )
        example = labels.ids[candidates[0]]
        if subset is not None and len(candidates) > 1:
            candidates = [class_id for class_id in candidates if class_id in subset]
        if len(candidates) != 1:
            hint = (
                f"write the folder name of the one that is meant (such as {example}) in its place"
            )
            if composed(name) in labels.ids:
                hint = "it is the folder name of one; give the other another name with --classes"
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
                f"the local classes of {dataset} are not the {len(subset)} it is published for "
                f"({example} is in only one of the two)"
            )
        return tuple((class_id,) for class_id in subset)
    if local is not None:
        return tuple((class_id,) for class_id in sorted(local))
    # in another label space, a set of some classes has those that are there
    if dataset in BENCHMARKS and BENCHMARKS[dataset].class_list:
        return None
    return labels.groups


def _objectnet_labels(
    names: Sequence[str], source: str, groups: dict[str, tuple[int, ...]], mappings: Path
) -> tuple[int, ...]:
    """Return a class id for each of ObjectNet's own class names; any of its group is as good."""
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
            what = "is a second name of one of" if folder else "is none of"
            what = "may be several of" if len(candidates) > 1 else what
            raise ValueError(f"{source}: {name!r} {what} ObjectNet's {len(groups)} classes")
        found[folder] = groups[folder][0]
    if len(found) != len(groups):
        missing = next(name for name in groups if name not in found)
        raise ValueError(
            f"{source} names {len(found)} of ObjectNet's {len(groups)} classes (not {missing!r})"
        )
    # in the order of `names`, which labels count
    return tuple(found.values())


def _local_names(
    folders: Sequence[str | None], labels: LabelSpace, given: str | None
) -> tuple[list[str] | None, str]:
    """Return the names that label numbers count, if they count no class ids, and their file.

    `folders` are those of the shards, None for shards without one; `given` is `--local-classes`.
    """
    if given is not None:
        return _lines(files.read_bytes(given, NAMES_BYTES), given), given
    beside = {}
    without = []
    for folder in folders:
        # CLIP_benchmark's list lies one folder above its shards
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
    # a list of a different length is a label space of its own, which labels count
    if len(names) != len(labels):
        if without:
            raise ValueError(
                f"{path} lists the classes that labels count, and {without[0]} has no such file; "
                f"give --local-classes {path} if all labels count its lines, or --skip-beside if "
                f"none does"
            )
        return names, path
    _require_same_order(path, names, labels)
    # line numbers of a list in the label space's order are class ids
    return None, ""


def _require_same_order(path: str, names: Sequence[str], labels: LabelSpace) -> None:
    """Check that a list of as many names as classes is the label space's own, class by class.

    A name that the label space lacks may be a different word for the class in that place, which is
    warned of; where most are, equal length is a coincidence.
    """
    known = names_of(labels)
    unknown = []
    for number, name in enumerate(names):
        found = known.find(name)
        if found and number not in found:
            raise ValueError(
                f"{path} has {name!r} in place {number}, the label space in place {found[0]}; "
                f"give the file as --local-classes if the labels count its lines"
            )
        # two classes of the very same name, as ImageNet's missiles, are told apart by the position
        exact = composed(name) in known.exact
        if not exact and len({labels.names[place] for place in found}) > 1:
            either = " or ".join(labels.ids[place] for place in found)
            raise ValueError(
                f"{path} has {name!r} in place {number}, which may be class {either}; write it as "
                f"the label space does"
            )
        if not found:
            unknown.append(number)
    if not unknown:
        return
    first = unknown[0]
    what = (
        f"{len(unknown)} of the {len(names)} names in {path} are no class of the label space "
        f"(first: {names[first]!r} in place {first}, which is {labels.names[first]!r} there)"
    )
    if 2 * len(unknown) > len(names):
        raise ValueError(f"{what}; name the label space of these shards with --classes")
    log.warning(f"{what}: they are taken to be different words for the same classes")


def _require_nshards(urls: Sequence[str], folders: Sequence[str]) -> None:
    """Hold the number of shards against the `nshards.txt` that may lie beside them."""
    for folder in folders:
        path = files.join(folder, "nshards.txt")
        data = _find_beside(path, NUMBER_BYTES)
        if data is None:
            continue
        text = data.decode("utf-8", "replace").strip()
        given = sum(parent(url) == folder for url in urls)
        if text != str(given):
            raise ValueError(f"{path} says {text} shards, {given} of that folder are given")


def _find_beside(path: str, limit: int) -> bytes | None:
    """Return the content of a file that may lie beside shards, None if it does not."""
    try:
        return files.find_bytes(path, limit)
    except ValueError as error:
        raise ValueError(f"{error}; if there is none, pass --skip-beside") from error


def _lines(data: bytes, path: str) -> list[str]:
    """Return the names in a file that has one a line; labels count the lines, so none is dropped.

    Raises:
        ValueError: if it is not UTF-8, a line between others is blank, or there is no name.
    """
    try:
        # Windows' editors put a byte order mark in front
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    # not splitlines(), to which a form feed or U+0085 within a name is a line break too
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise ValueError(f"{path} names no class")
    if "" in lines:
        number = lines.index("")
        raise ValueError(
            f"{path}: line {number + 1} is blank; labels count the lines, so remove it if the "
            f"labels skip it, or write the name of class {number} there"
        )
    return lines
