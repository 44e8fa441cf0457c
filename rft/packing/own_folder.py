"""Own photos: a tree whose folders are the classes, as sources to pack.

Two layouts are recognised. `DIR/<class>/...` has no test set: a share of each class is held out,
chosen by a hash of seed and path, so adding or removing images does not move the others to the
other side. `DIR/train/<class>/...` with `DIR/test` (or `val`) has a test set;
`rft.packing.own_splits` distinguishes the two. Folders inside a class folder belong to the class,
unless they hold thumbnails. Thumbnails, system files and the names of `--ignore` are skipped and
counted. Any other file that is not an image is an error: it could be a photo that should be packed.
"""

import glob
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from rft.classes import composed
from rft.config import MAX_PIXELS
from rft.packing.names import (
    Links,
    has_image_suffix,
    named,
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
NAMED = 6  # files and folders that a note lists as not read
LISTED = 20  # unusable files and classes that an error lists
HEADER = 2**16  # bytes at the start of an image file: enough for nearly all headers
TAIL = 4096  # bytes at the end of an image file: distinguishes nearly all files of equal size


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The images of each class folder below `root`, both sorted.

    `passed` counts skipped files and folders, by the name or pattern that they matched; `foreign`
    lists the files in class folders that are not images, `beside` those beside the class folders,
    which are not read.
    """

    root: Path
    classes: dict[str, list[Found]]
    passed: Counter[str]
    foreign: tuple[Path, ...]
    beside: tuple[str, ...]


class Photos(NamedTuple):
    """The content of a photo folder: sources to pack, their label space, and lines to print."""

    sources: list[Source]
    labels: LabelSpace
    notes: list[str]
    warnings: list[str]
    damaged: frozenset[Path] = frozenset()
    """Images of the sources that are left out, because their header cannot be read."""


class UnusableError(ValueError):
    """All unusable files and classes of a photo folder; the notes list each of them.

    Args:
        line: the line of the error; it counts several faults, and describes a single one.
        found: one line for each file or class.
        ignore: patterns for --ignore that skip those that can be skipped.
        damaged: number of files that only --max-bad leaves out.
        holds_out: whether a class has a single image, which can be packed without a test set.
    """

    def __init__(
        self,
        line: str,
        found: Sequence[str],
        *,
        ignore: Sequence[str],
        damaged: int,
        holds_out: bool,
    ) -> None:
        super().__init__(line)
        self.ignore, self.damaged, self.holds_out = tuple(ignore), damaged, holds_out
        # a single one is already in the error's line
        self.several = len(found) > 1
        if self.several:
            for line in found[:LISTED]:
                self.add_note(line)
        if len(found) > LISTED:
            self.add_note(f"... and {len(found) - LISTED:,} more")


class SameBytes(NamedTuple):
    """Pairs of paths of equal image files, each with the first file that it equals."""

    between_classes: list[tuple[str, str]]
    between_sets: list[tuple[str, str]]  # of one class
    between_both: list[tuple[str, str]]  # of two classes, in two sets


def read_folder(
    source: Path,
    labels: LabelSpace | None,
    test_share: float,
    split_seed: int,
    ignore: Sequence[str] = (),
    max_bad: int | None = None,
) -> Photos:
    """List the images below `source` as sources named train and test (and val, if both exist).

    Without a label space the class folders' names are the classes' names; see `name_classes`.
    Files and folders whose name matches one of the patterns `ignore` are skipped. With `max_bad`
    the header of each image is read: more damaged ones are an error, fewer give a warning.

    Raises:
        UnusableError: naming all files that are damaged or not images, and all classes with too few
            images to hold some out.
        ValueError: if a class is missing, empty or unknown, or the folders may be either classes or
            splits.
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
    # the training folder first: without --classes its folders are the label space of all sets
    train = _read_tree(folders.pop(TRAIN), ids, ignore, links, is_split=bool(splits))
    trees = {TRAIN: train}
    given, labels = labels is not None, labels or name_classes(train.classes)
    for name, folder in folders.items():
        trees[name] = _read_tree(folder, labels.ids, ignore, links, is_split=True)
    for tree in trees.values():
        _require_classes(tree, labels)
    damaged: dict[Path, str] = {}
    for tree in () if max_bad is None else trees.values():
        damaged |= _damaged(tree)
    enough = 1 if splits or test_share == 0 else 2  # images per class: one of two is held out
    _require_usable(
        foreign=[path for tree in trees.values() for path in tree.foreign],
        damaged=[*damaged.values()] if len(damaged) > (max_bad or 0) else [],
        small={
            tree.root / name: len(images)
            for tree in trees.values()
            for name, images in tree.classes.items()
            if len(images) < enough
        },
    )
    # after the check above, because it needs folders with images
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
    warnings += [f"{fault}; it is left out (--max-bad)" for fault in damaged.values()]
    warnings += [
        f"{shown(name)} beside {source} is not read; name the folder "
        f"{source.resolve().parent} to test on it"
        for name in (() if splits else splits_beside(source))
    ]
    warnings += [f"--ignore {name!r} matches nothing" for name in ignore if name not in passed]
    notes = [*_notes(passed, ignore, unread), *filter(None, [links.said()])]
    return Photos(sources, labels, notes, warnings, frozenset(damaged))


def _read_tree(
    root: Path,
    ids: Collection[str],
    ignore: Sequence[str],
    links: Links,
    *,
    is_split: bool = False,
) -> Tree:
    """List the images of every class folder in `root`, a photo folder or a split of one.

    `ids` are the classes, if known; `links` records links that lead out of the source.
    """
    links.look(root)
    level, shapes = read_levels(root, ignore)
    if level.images:
        above = f", or, if {root.name} is a class itself, name the folder above it"
        raise ValueError(
            f"{root / level.images[0]} is not in a class folder; move the images into one per class"
            f"{'' if is_split else above} (docs/photos.md#the-folder)"
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
        # a folder with other files only is reported later, with all files that are not images
        if not classes[shape.name] and not any(path.is_relative_to(shape.path) for path in foreign):
            only = "" if not any(map(thumbnails, shape.folders)) else " but thumbnails"
            raise ValueError(f"class folder {root / shape.name} holds no images{only}")
    return Tree(
        root=root, classes=classes, passed=passed, foreign=tuple(foreign), beside=level.files
    )


def name_classes(folders: Iterable[str]) -> LabelSpace:
    """Make a label space from sorted folder names: underscores as spaces, OpenAI's prompts."""
    ids = tuple(sorted(map(composed, folders)))
    names = tuple(name.replace("_", " ") for name in ids)
    return LabelSpace(ids=ids, names=names, templates=LabelSpace.imagenet().templates)


def _require_classes(tree: Tree, labels: LabelSpace) -> None:
    """Check the class folders against the label space."""
    present = {composed(name): name for name in tree.classes}
    # unknown before missing: a misspelt folder is both, and its name is the better hint
    unknown = sorted(present.keys() - set(labels.ids))
    missing = [name for name in labels.ids if name not in present]
    if unknown:
        close = get_close_matches(unknown[0], missing, n=1)
        what = "remove it or add it to --classes"
        if close:
            what = f"did you mean {shown(close[0])}, which has no folder? Rename one of the two"
        raise ValueError(
            f"unknown class: folder {shown(unknown[0])} in {tree.root} is not one of the "
            f"{len(labels)} classes; {what}"
        )
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(labels)} class folders are missing in {tree.root} "
            f"(first: {missing[0]})"
        )


def _hold_out(tree: Tree, labels: LabelSpace, share: float, seed: int) -> list[Source]:
    """Split a tree into the sources train and test; only train if the share is 0."""
    held: set[str] = set()
    for images in tree.classes.values():
        held |= choose_test([image.path for image in images], share, seed)
    # keys are made for both at once, so train and test share none
    whole = _source(TRAIN, tree, labels)
    train = tuple(item for item in whole.items if item.path not in held)
    test = tuple(item for item in whole.items if item.path in held)
    sources = [replace(whole, items=train), replace(whole, dataset="test", items=test)]
    return sources[: 1 if share == 0 else 2]


def choose_test(paths: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """Choose the held-out paths of one class: the number nearest to the share, but at least one.

    At least two paths are needed, so that one remains for training.
    """
    if share == 0:
        return frozenset()
    # not this module's name: a different text would hold out different images
    salt = hashlib.blake2b(f"rft.data.folder {seed}".encode()).digest()

    def position(path: str) -> tuple[bytes, str]:
        # in one Unicode form: an image stays on its side when photos move from a Mac to Linux
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
    found = SameBytes([], [], [])
    for _, places in sorted(by_size.items()):
        for group in _equal_files(places):
            # compared only with the first of each set and class: all pairs would be too many
            first: dict[tuple[str, int], Place] = {}
            for place in group:
                known = first.values()
                of_class = (p for p in known if p.label == place.label)
                other_set = next((p for p in of_class if p.dataset != place.dataset), None)
                other_class = next((p for p in known if p.label != place.label), None)
                if other_class:
                    same_set = other_class.dataset == place.dataset
                    pairs = found.between_classes if same_set else found.between_both
                    pairs.append((str(other_class.path), str(place.path)))
                if other_set:
                    found.between_sets.append((str(other_set.path), str(place.path)))
                first.setdefault((place.dataset, place.label), place)
    return found


class Place(NamedTuple):
    """The location of an image, and its set and class."""

    dataset: str
    label: int
    path: Path


def _equal_files(places: Sequence[Place]) -> list[list[Place]]:
    """Group files of equal size by content; only groups across several sets or classes matter.

    Most files of equal size differ in their last bytes, so few are read in full.
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
    """List the images in and below a class folder, sorted; other files are added to `foreign`."""
    images = []
    seen: set[str] = set()
    for folder, below, names in os.walk(root / name, followlinks=True, onerror=_raise):
        # links may form a loop, or two of them may lead to the same folder
        place = os.path.realpath(folder)
        if Path(folder).is_symlink():
            links.look(folder)
        if len(Path(folder).relative_to(root).parts) > DEPTH:
            raise ValueError(f"{folder} is more than {DEPTH} folders deep; move its images up")
        if place in seen:
            raise ValueError(f"{folder} leads to a folder that was already read; remove the link")
        seen.add(place)
        patterns = {entry: passed_over(entry, ignore) for entry in (*below, *names)}
        patterns |= {entry: patterns[entry] or thumbnails(entry) for entry in below}
        passed.update(filter(None, patterns.values()))
        # in place: os.walk descends into the folders that remain in the list
        below[:] = sorted(entry for entry in below if not patterns[entry])
        paths = [Path(folder) / entry for entry in names if not patterns[entry]]
        for path in (*(Path(folder) / entry for entry in below), *paths):
            require_utf8(path)
        for path in paths:
            size = regular_size(path, links)
            if has_image_suffix(path.name):
                images.append(Found(path.relative_to(root).as_posix(), size))
            else:
                # collected, so that one error suggests --ignore for every kind of file
                foreign.append(path)
    return sorted(images)


def _raise(error: OSError) -> None:
    raise error  # by default os.walk skips folders that it cannot read


def _damaged(tree: Tree) -> dict[Path, str]:
    """Find unreadable images and their faults, by their headers only: nothing is decoded."""
    found = {}
    for name in sorted(tree.classes):
        for image in tree.classes[name]:
            try:
                _require_header(tree.root / image.path, image.bytes)
            except ValueError as error:
                found[tree.root / image.path] = str(error)
    return found


def _require_header(path: Path, size: int) -> None:
    """Check the header of an image file as packing does, from its first bytes if they suffice."""
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
    """Raise one error for everything unusable; `small` counts images by class folder."""
    known = ", ".join(sorted(f".{suffix}" for suffix in IMAGE_SUFFIXES))
    # escaped, because a name may contain wildcards of patterns
    kinds = {
        f"*{glob.escape(path.suffix.lower())}" if path.suffix else glob.escape(path.name)
        for path in foreign
    }
    ignore = [*sorted(kinds), *sorted({glob.escape(folder.name) for folder in small})]
    counts = ("no image", "one image")
    found = [
        *(f"not a photo: {path}" for path in sorted(foreign)),
        *damaged,
        *(f"{counts[count]}: {folder}" for folder, count in sorted(small.items())),
    ]
    if not found:
        return
    if len(found) > 1:
        kinds_of = (
            (len(foreign), f"file is not a photo ({known})", f"files are not photos ({known})"),
            (len(damaged), "photo cannot be read", "photos cannot be read"),
            (len(small), "class folder has too few photos", "class folders have too few photos"),
        )
        line = "; ".join(
            f"{number:,} {one if number == 1 else more}" for number, one, more in kinds_of if number
        )
    elif foreign:
        line = (
            f"not a photo: {foreign[0]}; class folders may hold only {known}. Convert or remove "
            f"it, or skip it with --ignore {shown(ignore[0])}"
        )
    elif damaged:
        line = f"{damaged[0]}; replace it, or leave it out with --max-bad 1"
    else:
        ((folder, count),) = small.items()
        line = (
            f"class folder {shown(folder.name)} has {counts[count]}, too few to pack or to hold "
            f"some out; add images, or skip it with --ignore {shown(ignore[0])}"
        )
    raise UnusableError(
        line, found, ignore=ignore, damaged=len(damaged), holds_out=1 in small.values()
    )


def _notes(passed: Counter[str], ignore: Sequence[str], unread: Sequence[str]) -> list[str]:
    """Summarise the files that were not read, one line per reason."""
    notes = []
    if passed:
        counts = (
            f"{count:,} {named(pattern)}{' (--ignore)' if pattern in ignore else ''}"
            for pattern, count in sorted(passed.items(), key=lambda entry: (-entry[1], entry[0]))
        )
        notes.append(f"skipped by name: {', '.join(counts)}")
    if unread:
        more = f" and {len(unread) - NAMED:,} more" if len(unread) > NAMED else ""
        notes.append(f"not read: {printable(', '.join(unread[:NAMED]))}{more}")
    return notes


def _source(dataset: str, tree: Tree, labels: LabelSpace) -> Source:
    """Turn all images of a tree into one source."""
    return Source(
        dataset=dataset,
        root=tree.root,
        items=make_items(tree.classes, labels.class_of),
        groups=labels.groups,
        photos=True,
        layout=f"{tree.root}, one folder for each of {len(labels)} classes",
    )
