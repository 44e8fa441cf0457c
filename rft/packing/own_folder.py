"""Own photos: a tree whose folders are the classes, as sources to pack.

Two layouts are recognised. `DIR/<class>/...` has no test set: a share of each class is held out,
chosen by a hash of seed and path, so an image stays on its side when others come or go.
`DIR/train/<class>/...` with `DIR/test` (or `val`) has one; `rft.packing.own_splits` decides which.
Folders inside a class folder belong to the class, unless they hold thumbnails. These, what a system
left behind and what `--ignore` names are passed over and counted. Any other file that is no image
is an error: it could be a photo that was meant to be packed.
"""

import glob
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rft.classes import composed
from rft.config import MAX_PIXELS
from rft.packing.names import (
    Links,
    has_image_suffix,
    passed_over,
    regular_size,
    require_distinct,
    require_utf8,
    thumbnails,
)
from rft.packing.own_splits import (
    DEPTH,
    doubtful_folders,
    find_splits,
    not_read,
    read_levels,
    require_classes_here,
    splits_beside,
)
from rft.packing.source import Found, Source, make_items
from rft.shards.image_files import IMAGE_SUFFIXES, require_affordable
from rft.shards.images import open_checked
from rft.shards.label_space import LabelSpace, doubts
from rft.storage import files, local
from rft.text import printable, shown

TRAIN = "train"
NAMED = 6  # files and folders that are not read and named
LISTED = 20  # unusable files and classes that are named
HEADER = 2**16  # bytes at the start of an image file: enough for nearly all headers
TAIL = 4096  # bytes at the end of an image file: enough to tell nearly all of one size apart


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The images of each class folder below `root`, both sorted.

    `passed` counts what was left out, by the name or pattern that it matched; `foreign` are the
    files in class folders that are no images, `beside` those beside the class folders, which are
    not read.
    """

    root: Path
    classes: dict[str, list[Found]]
    passed: Counter[str]
    foreign: tuple[Path, ...]
    beside: tuple[str, ...]


class Photos(NamedTuple):
    """What a photo folder holds: sources to pack, their label space, and what to print of it."""

    sources: list[Source]
    labels: LabelSpace
    notes: list[str]
    warnings: list[str]


class UnusableError(ValueError):
    """What a photo folder holds that cannot be used, all of it; its notes name each.

    Args:
        faults: of each kind, a text for the line of the error.
        found: a line for each file or class.
        ignore: patterns for --ignore that pass over what can be passed over.
        damaged: number of files that only --max-bad leaves out.
        holds_out: whether a class has an image that could be packed without a test set.
    """

    def __init__(
        self,
        faults: Sequence[str],
        found: Sequence[str],
        *,
        ignore: Sequence[str],
        damaged: int,
        holds_out: bool,
    ) -> None:
        super().__init__("; ".join(faults))
        self.ignore, self.damaged, self.holds_out = tuple(ignore), damaged, holds_out
        # a single one is in the line itself
        if len(found) > 1:
            for line in found[:LISTED]:
                self.add_note(line)
        if len(found) > LISTED:
            self.add_note(f"... and {len(found) - LISTED:,} more")


class SameBytes(NamedTuple):
    """Pairs of paths of equal image files, each with the first that it is equal to."""

    between_classes: list[tuple[str, str]]
    between_sets: list[tuple[str, str]]  # of one class


def read_folder(
    source: Path,
    labels: LabelSpace | None,
    test_share: float,
    split_seed: int,
    ignore: Sequence[str] = (),
    max_bad: int | None = None,
) -> Photos:
    """List the images below `source` as sources called train and test (and val, if both exist).

    Without a label space the class folders' names are the classes' names; see `name_classes`.
    Files and folders whose name matches one of the patterns `ignore` are left out. With `max_bad`
    the header of each image is read: more damaged ones are an error, fewer are warned of.

    Raises:
        UnusableError: naming all files that are no images or are damaged, and all classes that have
            too few images to hold some out.
        ValueError: if a class is missing, empty or unknown, or classes and splits cannot be told
            apart.
    """
    if source.is_file():
        raise ValueError(f"{source} is a file; name the folder that holds the class folders")
    if not source.is_dir():
        raise ValueError(f"no such folder: {source}")
    for pattern in ignore:
        if "/" in pattern or not pattern:
            raise ValueError(f"--ignore takes names such as '*.mov', without folders: {pattern!r}")
    ids = labels.ids if labels else ()
    links = Links(source)
    level, shapes = read_levels(source, ignore)
    splits = find_splits(source, shapes, ids)
    folders = {name: source / folder for name, folder in splits.items()} or {TRAIN: source}
    # the training folder first: without --classes its folders are the label space of all
    train = _read_tree(folders.pop(TRAIN), ids, ignore, links, is_split=bool(splits))
    trees = {TRAIN: train}
    given, labels = labels is not None, labels or name_classes(train.classes)
    for name, folder in folders.items():
        trees[name] = _read_tree(folder, labels.ids, ignore, links, is_split=True)
    for tree in trees.values():
        _require_classes(tree, labels)
    damaged = [] if max_bad is None else [one for tree in trees.values() for one in _damaged(tree)]
    enough = 1 if splits or test_share == 0 else 2  # images of a class, of which one is held out
    _require_usable(
        foreign=[path for tree in trees.values() for path in tree.foreign],
        damaged=damaged if len(damaged) > (max_bad or 0) else [],
        small={
            tree.root / name: len(images)
            for tree in trees.values()
            for name, images in tree.classes.items()
            if len(images) < enough
        },
    )
    # after the check: it takes folders that hold images
    warnings = [] if given else doubtful_folders(train.root, train.classes)
    if splits:
        sources = [_source(name, tree, labels) for name, tree in trees.items()]
    else:
        sources = _hold_out(train, labels, test_share, split_seed)
    # without splits the source is the only tree's root, and `_read_tree` has counted it
    passed = Counter(level.passed if splits else ())
    unread = not_read(level, splits.values(), ignore) if splits else []
    for tree in trees.values():
        passed.update(tree.passed)
        unread += [f"{tree.root.name}/{name}" for name in tree.beside]
    warnings += doubts(labels)
    warnings += [f"{fault}; it is left out (--max-bad)" for fault in damaged]
    warnings += [
        f"{shown(name)} beside {source} is not read; give the folder "
        f"{source.resolve().parent} to test on it"
        for name in (() if splits else splits_beside(source))
    ]
    warnings += [f"--ignore {name!r} matches nothing" for name in ignore if name not in passed]
    notes = [*_notes(passed, ignore, unread), *filter(None, [links.said()])]
    return Photos(sources, labels, notes, warnings)


def _read_tree(
    root: Path,
    ids: Collection[str],
    ignore: Sequence[str],
    links: Links,
    *,
    is_split: bool = False,
) -> Tree:
    """List the images of every class folder in `root`, a photo folder or a split of one.

    `ids` are the classes where they are known; `links` counts those that lead out of the source.
    """
    links.look(root)
    level, shapes = read_levels(root, ignore)
    if level.images:
        above = f", or, if {root.name} is a class itself, give the folder above it"
        raise ValueError(
            f"{root / level.images[0]} lies in no class folder; sort the images by class"
            f"{'' if is_split else above}"
        )
    if not level.folders:
        raise ValueError(f"{root} holds no class folders")
    require_distinct(root, level.folders)
    require_classes_here(root, shapes, ids, ignore, is_split=is_split)
    passed = Counter(level.passed)
    foreign: list[Path] = []
    classes = {
        name: _read_class(root, name, ignore, passed, foreign, links) for name in level.folders
    }
    for shape in shapes:
        # the files that are no images are named with all others of their kind
        if not classes[shape.name] and not any(path.is_relative_to(shape.path) for path in foreign):
            only = "" if not any(map(thumbnails, shape.folders)) else " but thumbnails"
            raise ValueError(f"class folder {root / shape.name} holds no images{only}")
    return Tree(
        root=root, classes=classes, passed=passed, foreign=tuple(foreign), beside=level.files
    )


def name_classes(folders: Iterable[str]) -> LabelSpace:
    """Make a label space in sorted order, with underscores as spaces and OpenAI's prompts."""
    ids = tuple(sorted(map(composed, folders)))
    names = tuple(name.replace("_", " ") for name in ids)
    return LabelSpace(ids=ids, names=names, templates=LabelSpace.imagenet().templates)


def _require_classes(tree: Tree, labels: LabelSpace) -> None:
    """Hold the class folders against the label space."""
    present = {composed(name): name for name in tree.classes}
    unknown = sorted(present.keys() - set(labels.ids))
    if unknown:
        raise ValueError(
            f"unknown class: folder {shown(unknown[0])} in {tree.root} is none of the "
            f"{len(labels)} classes; remove it or add it to --classes"
        )
    missing = [name for name in labels.ids if name not in present]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(labels)} class folders are missing in {tree.root} "
            f"(first: {missing[0]})"
        )


def _hold_out(tree: Tree, labels: LabelSpace, share: float, seed: int) -> list[Source]:
    """Return the sources train and test of a tree; only train if the share is 0."""
    held: set[str] = set()
    for images in tree.classes.values():
        held |= choose_test([image.path for image in images], share, seed)
    # keys are made for both together, so train and test share none
    whole = _source(TRAIN, tree, labels)
    train = tuple(item for item in whole.items if item.path not in held)
    test = tuple(item for item in whole.items if item.path in held)
    sources = [replace(whole, items=train), replace(whole, dataset="test", items=test)]
    return sources[: 1 if share == 0 else 2]


def choose_test(paths: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """Return the paths of one class that are held out: the nearest number to the share, above 0.

    At least two are needed, so that one is left to train on.
    """
    if share == 0:
        return frozenset()
    # not this module's name: a different text would hold out different images
    salt = hashlib.blake2b(f"rft.data.folder {seed}".encode()).digest()

    def position(path: str) -> tuple[bytes, str]:
        # in one Unicode form: an image keeps its side when the photos move from a Mac to Linux
        name = composed(path).encode()
        return hashlib.blake2b(name, key=salt, digest_size=16).digest(), path

    count = min(max(round(share * len(paths)), 1), len(paths) - 1)
    return frozenset(sorted(paths, key=position)[:count])


def same_bytes(sources: Sequence[Source]) -> SameBytes:
    """Find image files that hold the same bytes in two classes, or in one class of two sources."""
    by_size: dict[int, list[Place]] = defaultdict(list)
    for source in sources:
        for item in source.items:
            place = Place(source.dataset, item.label, source.root / item.path)
            by_size[item.bytes].append(place)
    found = SameBytes([], [])
    for _, places in sorted(by_size.items()):
        for group in _equal_files(places):
            # compared with the first of each set and class alone: all pairs would be many
            first: dict[tuple[str, int], Place] = {}
            for place in group:
                known = first.values()
                of_class = (p for p in known if p.label == place.label)
                other_set = next((p for p in of_class if p.dataset != place.dataset), None)
                other_class = next((p for p in known if p.label != place.label), None)
                if other_class:
                    found.between_classes.append((str(other_class.path), str(place.path)))
                if other_set:
                    found.between_sets.append((str(other_set.path), str(place.path)))
                first.setdefault((place.dataset, place.label), place)
    return found


class Place(NamedTuple):
    """Where an image lies, in which set and class."""

    dataset: str
    label: int
    path: Path


def _equal_files(places: Sequence[Place]) -> list[list[Place]]:
    """Group files of one size that hold the same bytes; only groups over several sets or classes.

    Most files of one size differ in their last bytes, so few are read in full.
    """
    groups = [list(places)]
    for content in (_tail, files.sha256_file):
        divided: dict[tuple[int, bytes | str], list[Place]] = defaultdict(list)
        for number, group in enumerate(groups):
            if len({(place.dataset, place.label) for place in group}) > 1:
                for place in group:
                    divided[number, content(place.path)].append(place)
        groups = list(divided.values())
    return groups


def _tail(path: Path) -> bytes:
    with local.reader(path) as stream:
        stream.seek(max(path.stat().st_size - TAIL, 0))
        return stream.read()


def _read_class(
    root: Path,
    name: str,
    ignore: Sequence[str],
    passed: Counter[str],
    foreign: list[Path],
    links: Links,
) -> list[Found]:
    """Return the sorted images in and below a class folder; add what is no image to `foreign`."""
    images = []
    seen: set[str] = set()
    for folder, below, names in os.walk(root / name, followlinks=True, onerror=_raise):
        # links may lead round in a circle, or two of them to one folder
        place = os.path.realpath(folder)
        if Path(folder).is_symlink():
            links.look(folder)
        if len(Path(folder).relative_to(root).parts) > DEPTH:
            raise ValueError(f"{folder} lies more than {DEPTH} folders deep; move its images up")
        if place in seen:
            raise ValueError(f"{folder} leads to a folder that was read already; remove the link")
        seen.add(place)
        patterns = {entry: passed_over(entry, ignore) for entry in (*below, *names)}
        patterns |= {entry: patterns[entry] or thumbnails(entry) for entry in below}
        passed.update(filter(None, patterns.values()))
        # in place: os.walk descends into what is left of the list
        below[:] = sorted(entry for entry in below if not patterns[entry])
        paths = [Path(folder) / entry for entry in names if not patterns[entry]]
        for path in (*(Path(folder) / entry for entry in below), *paths):
            require_utf8(path)
        for path in paths:
            size = regular_size(path, links)
            if has_image_suffix(path.name):
                images.append(Found(path.relative_to(root).as_posix(), size))
            else:
                # collected, so that one error names --ignore for every kind of file
                foreign.append(path)
    return sorted(images)


def _raise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder it cannot read


def _damaged(tree: Tree) -> Iterator[str]:
    """Yield why images cannot be read, by their headers alone: nothing is decoded."""
    for name in sorted(tree.classes):
        for image in tree.classes[name]:
            try:
                _require_header(tree.root / image.path, image.bytes)
            except ValueError as error:
                yield str(error)


def _require_header(path: Path, size: int) -> None:
    """Check the header of an image file as packing does, by its first bytes if these suffice."""
    if size == 0:
        raise ValueError(f"{path} is empty")
    require_affordable(size, str(path))
    with local.reader(path) as stream:
        start = stream.read(HEADER)
        try:
            open_checked(start, str(path), 0, MAX_PIXELS)
        except ValueError:
            if size <= HEADER:
                raise
            open_checked(start + stream.read(), str(path), 0, MAX_PIXELS)


def _require_usable(
    *, foreign: Sequence[Path], damaged: Sequence[str], small: Mapping[Path, int]
) -> None:
    """Raise one error for all that cannot be used; `small` counts images by class folder."""
    faults, ignore, found = [], [], []
    if foreign:
        known = ", ".join(sorted(f".{suffix}" for suffix in IMAGE_SUFFIXES))
        # a name may hold what a pattern gives a meaning
        kinds = {
            f"*{glob.escape(path.suffix.lower())}" if path.suffix else glob.escape(path.name)
            for path in foreign
        }
        ignore += sorted(kinds)
        faults.append(
            f"not an image: {min(foreign)}{_more(foreign)}; class folders hold only {known}. "
            f"Convert or remove the others, or pass them over with --ignore {_patterns(ignore)}"
        )
        found += [f"not an image: {path}" for path in sorted(foreign)]
    if damaged:
        faults.append(
            f"{damaged[0]}{_more(damaged)}; get it again, or leave it out with --max-bad "
            f"{len(damaged)}"
        )
        found += damaged
    if small:
        patterns = sorted({glob.escape(folder.name) for folder in small})
        ignore += patterns
        counts = ("no image", "one image")
        folder, count = next(iter(small.items()))
        faults.append(
            f"class folder {shown(folder.name)} has {counts[count]}{_more(small)}, too few to pack "
            f"or to hold some out; add images, or pass it over with --ignore {_patterns(patterns)}"
        )
        found += [f"{counts[count]}: {folder}" for folder, count in sorted(small.items())]
    if faults:
        raise UnusableError(
            faults, found, ignore=ignore, damaged=len(damaged), holds_out=1 in small.values()
        )


def _more(found: Sized) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _patterns(patterns: Sequence[str]) -> str:
    return " ".join(map(shown, patterns[:5]))


def _notes(passed: Counter[str], ignore: Sequence[str], unread: Sequence[str]) -> list[str]:
    """List the files that were not read, by reason, one line each."""
    notes = []
    if passed:
        counts = (
            f"{count:,} {printable(pattern)}{' (--ignore)' if pattern in ignore else ''}"
            for pattern, count in sorted(passed.items(), key=lambda entry: (-entry[1], entry[0]))
        )
        notes.append(f"passed over by name: {', '.join(counts)}")
    if unread:
        more = f" and {len(unread) - NAMED:,} more" if len(unread) > NAMED else ""
        notes.append(f"not read: {printable(', '.join(unread[:NAMED]))}{more}")
    return notes


def _source(dataset: str, tree: Tree, labels: LabelSpace) -> Source:
    """Return all images of a tree as one source."""
    return Source(
        dataset=dataset,
        root=tree.root,
        items=make_items(tree.classes, labels.class_of),
        groups=labels.groups,
        photos=True,
        layout=f"{tree.root}, one folder for each of {len(labels)} classes",
    )
