"""Where each benchmark keeps its images: the official layouts, read into one list of items.

The layout on disk is detected. ImageNet may be class folders or the archives as they
are downloaded: the same images in another form give the same items, and so the same shards. A
source is complete or refused: an absent, empty or unknown class and a file that is no image are
errors, because a benchmark with a hole in it still gives a number. Only files beside the class
folders (README.txt) are passed over, and folders there that a system made (`rft.packing.names`),
which no archive holds; the latter are counted in `layout`. Nothing is decoded here.
"""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rft import cli
from rft.classes import composed
from rft.packing.archives import DEVKIT, find_devkit, tar_members, validation_classes
from rft.packing.expected import published_classes
from rft.packing.names import (
    Links,
    has_image_suffix,
    passed_over,
    regular_size,
    require_distinct,
    require_utf8,
)
from rft.packing.objectnet import objectnet_groups
from rft.packing.source import Item, Source
from rft.sets import BENCHMARKS, ID_SET, PARENTS, TRAIN_SET, ImageSet
from rft.shards import tar
from rft.shards.keys import make_keys
from rft.shards.label_space import LabelSpace
from rft.text import printable

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
LISTING_THREADS = 16  # listing is latency-bound on network file systems


class Found(NamedTuple):
    """An image of a class: its file name, its size, and where its bytes are (see Item)."""

    name: str
    bytes: int
    inside: str | None = None
    offset: int = 0


class Listing(NamedTuple):
    """The images of each class below `root`, and the layout they were found in, in words."""

    root: Path
    images: dict[str, list[Found]]
    layout: str


def read_source(dataset: str, source: Path, labels: LabelSpace) -> Source:
    """List the images of `dataset` below `source`, which is its own folder or the one above.

    Raises:
        ValueError: if a class is missing, empty or unknown, a file is no image, or an archive is
            damaged.
    """
    known = _described(dataset)
    if source.is_file():
        raise ValueError(f"{source} is a file; give the folder that holds it")
    if not source.is_dir():
        raise ValueError(f"no such folder: {source}")
    if known.archive is not None:
        return _imagenet(known, source, labels)
    links = Links(source)
    root = _locate(known, source)
    class_of = labels.class_of
    groups = labels.groups
    match dataset:
        case "objectnet":
            groups_of = objectnet_groups(root / "mappings", len(labels))
            root = root / "images"
            # A member of the group is as good a label as any: scoring only asks for the group.
            class_of = {folder: members[0] for folder, members in groups_of.items()}
            present = [name for name in _class_folders(root) if name in class_of]
            _require_all(root, present, list(class_of))
            groups = tuple(groups_of.values())
        case _ if known.class_list is not None:  # published for some of the classes
            present = _class_folders(root)
            published = published_classes(dataset, labels)
            if published is not None:
                class_of = {name: class_of[name] for name in published}
                _require_all(root, present, published)
            _require_known(root, present, class_of)
            groups = tuple(sorted((class_of[composed(name)],) for name in present))
        case _:
            # folders are class ids; sorted as text they would be wrong
            if dataset == "imagenet-v2":
                class_of = {str(class_id): class_id for class_id in range(len(labels))}
            present = _class_folders(root)
            _require_known(root, present, class_of)
            _require_all(root, present, list(class_of))
    return Source(
        dataset=dataset,
        root=root,
        items=_items(_list_folders(root, present, links), class_of),
        groups=groups,
        crop_border=known.border,
        layout=f"{len(present):,} class folders of {root}{_said(root)}",
        links=links.said(),
    )


def folders_read(dataset: str, source: Path) -> list[Path]:
    """Name the folders below `source` whose class folders `read_source` would look for.

    Raises:
        ValueError: if there is no such set, or no folder of it.
    """
    known = _described(dataset)
    if known.archive is None:
        root = _locate(known, source)
        return [root / "images" if dataset == "objectnet" else root]
    return [source / name for name in known.folders if (source / name).is_dir()]


def _described(dataset: str) -> ImageSet:
    if dataset not in BENCHMARKS:
        raise cli.unknown("data set", dataset, sorted(BENCHMARKS))
    return BENCHMARKS[dataset]


def _locate(known: ImageSet, source: Path) -> Path:
    for name in known.folders:
        if (source / name).is_dir():
            return source / name
    tried = ", ".join(known.folders)
    raise ValueError(f"no folder of {known.name} in {source}; looked for: {tried}")


def _imagenet(known: ImageSet, source: Path, labels: LabelSpace) -> Source:
    """List ImageNet's training or validation images in the form they are there.

    Class folders go first: an archive is often kept beside what was extracted.
    """
    class_of = labels.class_of
    candidates = [source / name for name in known.folders if (source / name).is_dir()]
    archives = [source / parent / str(known.archive) for parent in PARENTS]
    archives = [path for path in archives if path.is_file()]
    links = Links(source)
    listing = _class_folders_in(candidates, class_of, links)
    if listing is None and known.name == TRAIN_SET:
        listing = _class_tars_in([*candidates, source], class_of, links)
    if listing is None and known.name == ID_SET:
        listing = _flat_files_in([*candidates, source], source, class_of, links)
    if listing is not None and archives:
        listing = listing._replace(layout=f"{listing.layout}; {archives[0]} is not read")
    if listing is None and archives:
        read = _training_archive if known.name == TRAIN_SET else _validation_archive
        listing = read(archives[0], source, class_of)
        links.look(archives[0])
    if listing is None:
        raise ValueError(
            f"no images of {known.name} in {source}; looked for classes in "
            f"{', '.join(known.folders)}, and for {known.archive}"
        )
    return Source(
        dataset=known.name,
        root=listing.root,
        items=_items(listing.images, class_of),
        groups=labels.groups,
        layout=listing.layout,
        links=links.said(),
    )


def _class_folders_in(
    candidates: Sequence[Path], class_of: Mapping[str, int], links: Links
) -> Listing | None:
    for root in candidates:
        with os.scandir(root) as entries:
            if not any(entry.is_dir() and not passed_over(entry.name) for entry in entries):
                continue
        present = _class_folders(root)
        _require_same(root, present, class_of)
        layout = f"{len(present):,} folders of {root}{_said(root)}"
        return Listing(root, _list_folders(root, present, links), layout)
    return None


def _class_tars_in(
    candidates: Sequence[Path], class_of: Mapping[str, int], links: Links
) -> Listing | None:
    for root in candidates:
        present = {name: root / f"{name}.tar" for name in class_of}
        present = {name: path for name, path in present.items() if path.is_file()}
        if not present:
            continue
        _require_same(root, list(present), class_of)

        links.look(root)

        def list_tar(path: Path) -> list[Found]:
            if path.is_symlink():
                links.look(path)
            return _tarred_images(path, str(path), tar_members(path))

        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            listed = list(pool.map(list_tar, present.values()))
        images = dict(zip(present, listed, strict=True))
        return Listing(root, images, f"{len(present):,} tars of {root}")
    return None


def _training_archive(path: Path, source: Path, class_of: Mapping[str, int]) -> Listing:
    """List the images in the tars of the official tar; nothing is extracted."""
    parts = {member.name.removesuffix(".tar"): member for member in tar_members(path)}
    _require_same(path, list(parts), class_of)

    def list_part(part: tar.Member) -> list[Found]:
        return _tarred_images(path, f"{path}: {part.name}", tar_members(path, part))

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        listed = list(pool.map(list_part, parts.values()))
    images = dict(zip(parts, listed, strict=True))
    return Listing(path.parent, images, f"{len(parts):,} tars in {path}, which is not extracted")


def _flat_files_in(
    candidates: Sequence[Path], source: Path, class_of: Mapping[str, int], links: Links
) -> Listing | None:
    for root in candidates:
        with os.scandir(root) as entries:
            files_here = [e for e in entries if e.is_file() and has_image_suffix(e.name)]
        images = [Found(entry.name, entry.stat().st_size, entry.name) for entry in files_here]
        # with one that is none of the published names, the listing is refused
        if any(VALIDATION_NAME.fullmatch(image.name) for image in images):
            by_class, devkit = _by_truth(root, images, [root, root.parent, source], class_of)
            for path in (root, *(entry for entry in files_here if entry.is_symlink())):
                links.look(path)
            return Listing(root, by_class, f"flat files of {root} with the classes of {devkit}")
    return None


def _validation_archive(path: Path, source: Path, class_of: Mapping[str, int]) -> Listing:
    images = _tarred_images(path, str(path), tar_members(path))
    by_class, devkit = _by_truth(path, images, [path.parent, source], class_of)
    layout = f"{path}, which is not extracted, with the classes of {devkit}"
    return Listing(path.parent, by_class, layout)


def _tarred_images(path: Path, name: str, members: Sequence[tar.Member]) -> list[Found]:
    if not members:
        raise ValueError(f"{name} is empty")
    for member in members:
        if "/" in member.name or not has_image_suffix(member.name):
            raise ValueError(f"not an image: {member.name} in {name}; a tar holds only images")
    return [Found(member.name, member.size, path.name, member.offset) for member in members]


def _by_truth(
    where: Path, images: Sequence[Found], places: Sequence[Path], class_of: Mapping[str, int]
) -> tuple[dict[str, list[Found]], Path]:
    """Sort the validation images into classes by the devkit found in one of `places`."""
    devkit = find_devkit(places)
    if devkit is None:
        raise ValueError(
            f"the validation images of {where} lie in no class folders; put {DEVKIT}.tar.gz "
            f"beside them, which has their classes"
        )
    wnids = validation_classes(devkit)
    by_class: dict[str, list[Found]] = {}
    for image in images:
        match = VALIDATION_NAME.fullmatch(image.name)
        if match is None or not 1 <= int(match[1]) <= len(wnids):
            raise ValueError(f"{image.name} of {where} is none of the {len(wnids):,} in {devkit}")
        by_class.setdefault(wnids[int(match[1]) - 1], []).append(image)
    _require_same(where, list(by_class), class_of)
    return by_class, devkit


def _class_folders(root: Path) -> list[str]:
    """Return the sorted names of the folders in `root`, of which there is at least one."""
    if not root.is_dir():
        raise ValueError(f"no such folder: {root}")
    names = []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir():
                if not passed_over(entry.name):
                    names.append(entry.name)
            elif has_image_suffix(entry.name):
                raise ValueError(f"{entry.path} lies in no class folder; sort the images by class")
    if not names:
        raise ValueError(f"{root} holds no class folders")
    require_distinct(root, sorted(names))
    return sorted(names)


def _said(root: Path) -> str:
    """Count the folders beside the class folders that a system made, in words."""
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    system = [printable(name) for name in names if passed_over(name)]
    count = f"{len(system)} system folder{'s' if system[1:] else ''}"
    return f" ({count} passed over: {', '.join(system)})" if system else ""


def _require_same(root: Path, present: Sequence[str], class_of: Mapping[str, int]) -> None:
    _require_known(root, present, class_of)
    _require_all(root, present, list(class_of))


def _require_known(root: Path, present: Sequence[str], class_of: Mapping[str, int]) -> None:
    for name in present:
        if composed(name) not in class_of:
            known = list(class_of)
            raise ValueError(
                f"unknown class: {name!r} in {root} is none of the {len(known)} classes "
                f"({known[0]} ... {known[-1]}); remove it, or name its label space with --classes"
            )


def _require_all(root: Path, present: Sequence[str], expected: Sequence[str]) -> None:
    missing = sorted(set(expected) - set(map(composed, present)))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(expected)} classes are missing in {root} "
            f"(first: {missing[0]}); get the archive again, or extract it again"
        )


def _list_folders(root: Path, names: Sequence[str], links: Links) -> dict[str, list[Found]]:
    links.look(root)

    def list_images(name: str) -> list[Found]:
        return _list_images(root / name, links)

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        return dict(zip(names, pool.map(list_images, names), strict=True))


def _items(images: Mapping[str, Sequence[Found]], class_of: Mapping[str, int]) -> tuple[Item, ...]:
    """Return the images of all classes as items, sorted by path."""
    rows = [
        (f"{name}/{found.name}", name, found)
        for name in sorted(images)
        for found in sorted(images[name])
    ]
    keys = make_keys([path for path, _, _ in rows])
    return tuple(
        Item(
            key=key,
            path=path,
            label=class_of[composed(name)],
            bytes=found.bytes,
            inside=found.inside,
            offset=found.offset,
        )
        for key, (path, name, found) in zip(keys, rows, strict=True)
    )


def _list_images(folder: Path, links: Links) -> list[Found]:
    """Return the images in one class folder."""
    images = []
    if folder.is_symlink():
        links.look(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() or not has_image_suffix(entry.name):
                raise ValueError(f"not an image: {entry.path}; class folders hold only images")
            require_utf8(entry.path)
            images.append(Found(entry.name, regular_size(entry, links)))
    if not images:
        raise ValueError(f"class folder {folder} is empty")
    return images
