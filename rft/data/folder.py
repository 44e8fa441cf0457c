"""Anyone's own images: a tree whose folders are the classes, as sources to pack.

Two layouts are recognised. `DIR/<class>/...` has no test set: a share of each class is held out,
chosen by a hash of seed and path, so an image stays on its side when others come or go.
`DIR/train/<class>/...` with `DIR/test` (or `val`) has one. Folders inside a class folder belong to
the class. A hidden file or folder is passed over and counted; any other file that is no image is an
error, because nobody would notice what it left out.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rft import files
from rft.data.labels import LabelSpace
from rft.data.sources import IMAGE_SUFFIXES, Item, Source, make_keys

TRAIN = "train"
TESTS = ("test", "val", "valid", "validation")  # the first one there is packed as `test`


class Image(NamedTuple):
    """An image file: its path below the root with forward slashes, and its size."""

    path: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The images of each class folder below `root`, both sorted; `hidden` entries were left out."""

    root: Path
    classes: dict[str, list[Image]]
    hidden: int


def read_folder(
    source: Path, labels: LabelSpace | None, test_share: float, split_seed: int
) -> tuple[list[Source], LabelSpace]:
    """List the images below `source` as sources called train and test (and val, if both are there).

    Without a label space the class folders' names are the classes' names; see `name_classes`.

    Raises:
        ValueError: if a class is missing, empty or unknown, a file is no image, or a class has too
            few images to hold some out.
    """
    if not 0 <= test_share < 1:
        raise ValueError(f"--test-share must be from 0 to below 1, not {test_share}")
    if not source.is_dir():
        raise ValueError(f"no such folder: {source}")
    trees = find_splits(source)
    if not trees:
        tree = read_tree(source)
        labels = labels or name_classes(tree.classes)
        require_classes(tree, labels)
        return hold_out(tree, labels, test_share, split_seed), labels
    labels = labels or name_classes(trees[TRAIN].classes)
    sources = []
    for name, tree in trees.items():
        require_classes(tree, labels)
        layout = f"{tree.root}, one folder for each of {len(labels)} classes{_said(tree)}"
        images = [image for name in sorted(tree.classes) for image in tree.classes[name]]
        keys = make_keys([image.path for image in images])
        sources.append(_source(name, tree.root, zip(keys, images, strict=True), labels, layout))
    return sources, labels


def find_splits(source: Path) -> dict[str, Tree]:
    """Return the trees of `source` by set name; none if its folders are classes themselves."""
    tests = [name for name in TESTS if (source / name).is_dir()]
    if not (source / TRAIN).is_dir() or not tests:
        return {}
    trees = {TRAIN: read_tree(source / TRAIN), "test": read_tree(source / tests[0])}
    if tests[0] == "test" and len(tests) > 1:
        trees["val"] = read_tree(source / tests[1])
    return trees


def read_tree(root: Path) -> Tree:
    """List the images of every class folder in `root`.

    Raises:
        ValueError: if there is no class folder, one holds no images, or a file is no image.
    """
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    for entry in entries:
        if not entry.is_dir() and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"{entry.path} lies in no class folder; sort the images by class")
    folders = [entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name)]
    if not folders:
        raise ValueError(f"{root} holds no class folders")
    hidden = sum(_is_hidden(entry.name) for entry in entries)
    classes = {}
    for name in folders:
        classes[name], passed_over = _read_class(root, name)
        hidden += passed_over
    return Tree(root=root, classes=classes, hidden=hidden)


def name_classes(folders: Iterable[str]) -> LabelSpace:
    """Return a label space in sorted order, with underscores as spaces and OpenAI's prompts."""
    ids = tuple(sorted(folders))
    names = tuple(name.replace("_", " ") for name in ids)
    return LabelSpace(ids=ids, names=names, templates=LabelSpace.imagenet().templates)


def require_classes(tree: Tree, labels: LabelSpace) -> None:
    """Hold the class folders against the label space.

    Raises:
        ValueError: naming a folder that is no class, or a class that has no folder.
    """
    unknown = sorted(tree.classes.keys() - set(labels.ids))
    if unknown:
        raise ValueError(
            f"unknown class: folder {unknown[0]!r} in {tree.root} is none of the {len(labels)} "
            f"classes; remove it or add it to --classes"
        )
    missing = [name for name in labels.ids if name not in tree.classes]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(labels)} class folders are missing in {tree.root} "
            f"(first: {missing[0]})"
        )


def hold_out(tree: Tree, labels: LabelSpace, share: float, seed: int) -> list[Source]:
    """Return the sources train and test of a tree; only train if the share is 0.

    Raises:
        ValueError: if a class has a single image and some are to be held out.
    """
    images = [image for name in sorted(tree.classes) for image in tree.classes[name]]
    key_of = dict(zip(images, make_keys([image.path for image in images]), strict=True))
    parts: dict[str, list[Image]] = {TRAIN: [], "test": []}
    for name, members in sorted(tree.classes.items()):
        held = choose_test([image.path for image in members], share, seed, name)
        for image in members:
            parts["test" if image.path in held else TRAIN].append(image)
    layout = f"{tree.root}, one folder for each of {len(labels)} classes{_said(tree)}"
    if share == 0:
        del parts["test"]
    return [
        _source(name, tree.root, ((key_of[image], image) for image in part), labels, layout)
        for name, part in parts.items()
    ]


def choose_test(paths: Sequence[str], share: float, seed: int, name: str) -> frozenset[str]:
    """Return the paths of one class that are held out: the nearest number to the share, above 0.

    Raises:
        ValueError: if nothing would be left to train on.
    """
    if share == 0:
        return frozenset()
    if len(paths) < 2:
        raise ValueError(
            f"class folder {name!r} has one image, too few to hold some out; add images or set "
            f"--test-share 0"
        )
    salt = hashlib.blake2b(f"rft.data.folder {seed}".encode()).digest()

    def position(path: str) -> tuple[bytes, str]:
        return hashlib.blake2b(os.fsencode(path), key=salt, digest_size=16).digest(), path

    count = min(max(round(share * len(paths)), 1), len(paths) - 1)
    return frozenset(sorted(paths, key=position)[:count])


def shared_images(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """Return pairs of image files in different sources that hold the same bytes."""
    by_size: dict[int, list[tuple[str, Path]]] = defaultdict(list)
    for source in sources:
        for item in source.items:
            by_size[item.bytes].append((source.dataset, source.root / item.path))
    pairs = []
    for _, places in sorted(by_size.items()):
        if len({dataset for dataset, _ in places}) < 2:
            continue  # nothing of this size is on another side
        first: dict[str, tuple[str, Path]] = {}
        for dataset, path in places:
            other, other_path = first.setdefault(files.sha256_file(path), (dataset, path))
            if other != dataset:
                pairs.append((str(other_path), str(path)))
    return pairs


def class_counts(sources: Sequence[Source], labels: LabelSpace) -> Mapping[str, list[int]]:
    """Return the number of images of each class in each source."""
    counts = {name: [0] * len(sources) for name in labels.ids}
    for place, source in enumerate(sources):
        for item in source.items:
            counts[labels.ids[item.label]][place] += 1
    return counts


def _read_class(root: Path, name: str) -> tuple[list[Image], int]:
    """Return the sorted images in and below a class folder, and how many entries are hidden."""
    images, foreign, hidden = [], [], 0
    seen: set[str] = set()
    for folder, below, names in os.walk(root / name, followlinks=True, onerror=_raise):
        place = os.path.realpath(folder)
        if place in seen:
            raise ValueError(f"{folder} leads to a folder that was read already; remove the link")
        seen.add(place)
        hidden += sum(_is_hidden(entry) for entry in [*below, *names])
        below[:] = sorted(entry for entry in below if not _is_hidden(entry))
        for file_name in names:
            path = Path(folder) / file_name
            if _is_hidden(file_name):
                continue
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                foreign.append(path)
                continue
            images.append(Image(path.relative_to(root).as_posix(), path.stat().st_size))
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"not an image: {min(foreign)}{more}; class folders hold only {known}")
    if not images:
        raise ValueError(f"class folder {root / name} holds no images")
    return sorted(images), hidden


def _raise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder it cannot read


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini")


def _said(tree: Tree) -> str:
    return f" ({tree.hidden} hidden files or folders passed over)" if tree.hidden else ""


def _source(
    dataset: str,
    root: Path,
    images: Iterable[tuple[str, Image]],
    labels: LabelSpace,
    layout: str,
) -> Source:
    class_of = {name: class_id for class_id, name in enumerate(labels.ids)}
    items = tuple(
        Item(key=key, path=image.path, label=class_of[image.path.split("/")[0]], bytes=image.bytes)
        for key, image in images
    )
    groups = tuple((class_id,) for class_id in range(len(labels)))
    return Source(
        dataset=dataset, root=root, items=items, groups=groups, photos=True, layout=layout
    )
