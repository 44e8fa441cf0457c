"""The official layouts of the benchmarks, read into one list of items.

The layout on disk is detected. ImageNet may be class folders or the archives as downloaded; both
give the same items, and so the same shards. A source is complete or refused: an absent, empty or
unknown class and a file that is not an image are errors, because an incomplete benchmark still
gives a number. Only files beside the class folders (README.txt) are skipped, and folders there that
the operating system creates (`rft.packing.names`) and no archive contains; the latter are counted
in `layout`. Nothing is decoded here.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

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
from rft.packing.source import Found, Source, make_items
from rft.sets import BENCHMARKS, PARENTS, TRAIN_SET, ImageSet
from rft.shards import tar
from rft.shards.label_space import LabelSpace
from rft.text import printable

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG")
# downloaded archives, which may lie beside the tars of classes
DOWNLOAD = re.compile("ILSVRC|imagenet|objectnet", re.IGNORECASE)
Place = TypeVar("Place")
SUBSET = "; for a subset of classes, name it with --classes FILE"
LISTING_THREADS = 16  # listing is latency-bound on network file systems


class Listing(NamedTuple):
    """The images of each class below `root`, and a description of the detected layout."""

    root: Path
    images: dict[str, list[Found]]
    layout: str


def read_source(dataset: str, source: Path, labels: LabelSpace) -> Source:
    """List the images of `dataset` below `source`, its own folder or the folder above.

    Raises:
        ValueError: if a class is missing, empty or unknown, a file is not an image, or an archive
            is damaged.
    """
    known = _described(dataset)
    if source.is_file():
        raise ValueError(f"{source} is a file; name the folder that holds it")
    if not source.is_dir():
        raise ValueError(f"no such folder: {source}")
    links = Links(source)
    class_of, groups = labels.class_of, labels.groups
    if known.archive is not None:
        listing = _imagenet(known, source, class_of, links)
    else:
        places = _places(known, source)
        if not places:
            raise _no_folder(known, source)
        root = places[0]
        if dataset == "objectnet":
            if root == source and not (root / "images").is_dir():
                raise _no_folder(known, source)
            groups_of = objectnet_groups(root / "mappings", len(labels))
            root = root / "images"
            # any member of the group may be the label: scoring only uses the group
            class_of = {folder: members[0] for folder, members in groups_of.items()}
            present = [name for name in class_folders(root) if name in class_of]
            # its mappings are of all classes, so --classes cannot name a subset
            _require_all(root, present, list(class_of), subset="")
            groups = tuple(groups_of.values())
        elif known.class_list is not None:  # published for some of the classes
            present = _present(known, root, source, class_of)
            published = published_classes(dataset, labels)
            if published is not None:
                class_of = {name: class_of[name] for name in published}
                _require_all(root, present, published)
            _require_known(root, present, class_of)
            groups = tuple(sorted((class_of[composed(name)],) for name in present))
        else:
            # folders are class ids; sorted as text, 10 would come before 2
            if dataset == "imagenet-v2":
                class_of = {str(class_id): class_id for class_id in range(len(labels))}
            present = _present(known, root, source, class_of)
            _require_same(root, present, class_of)
        listing = _list_folders(root, present, links, "class folders")
    return Source(
        dataset=dataset,
        root=listing.root,
        items=make_items(listing.images, class_of),
        groups=groups,
        crop_border=known.border,
        layout=listing.layout,
        links=links.said(),
    )


def folders_read(dataset: str, source: Path) -> list[Path]:
    """List the folders below `source` in which `read_source` would look for class folders.

    Raises:
        ValueError: if no such set is known.
    """
    known = _described(dataset)
    found = _places(known, source)
    # ImageNet's folders may hold different layouts, so each of them may be read
    if known.archive is None:
        found = found[:1]
    return [place / "images" if dataset == "objectnet" else place for place in found]


def _described(dataset: str) -> ImageSet:
    if dataset not in BENCHMARKS:
        raise cli.unknown("data set", dataset, sorted(BENCHMARKS))
    return BENCHMARKS[dataset]


def _places(known: ImageSet, source: Path) -> list[Path]:
    return [source / name for name in known.folders if (source / name).is_dir()]


def _present(known: ImageSet, root: Path, source: Path, class_of: Mapping[str, int]) -> list[str]:
    """List the class folders of a benchmark.

    Raises:
        ValueError: also if they would be in the source itself and none has a class's name; the
            folders there are then other data sets.
    """
    present = class_folders(root)
    if root == source and not any(composed(name) in class_of for name in present):
        raise _no_folder(known, source)
    return present


def _no_folder(known: ImageSet, source: Path) -> ValueError:
    return ValueError(
        f"no folder of {known.name} in {source}; looked for: {', '.join(known.folders)} "
        "(docs/data.md#from-the-official-archives)"
    )


def _imagenet(known: ImageSet, source: Path, class_of: Mapping[str, int], links: Links) -> Listing:
    """List ImageNet's training or validation images in whichever layout is present.

    Class folders take precedence: an archive is often kept beside the extracted folders.
    """
    candidates = _places(known, source)
    archives = [source / parent / str(known.archive) for parent in PARENTS]
    archives = [path for path in archives if path.is_file()]
    is_train = known.name == TRAIN_SET
    in_files = _class_tars_in if is_train else _flat_files_in
    # tried in order until a layout fits; tars and flat files may also lie directly in the source
    attempts = chain(
        (_class_folders_in(root, class_of, links) for root in candidates),
        (in_files(root, source, class_of, links) for root in (*candidates, source)),
    )
    listing = next(filter(None, attempts), None)
    if listing is not None:
        ignored = f"; {archives[0]} is not read" if archives else ""
        return listing._replace(layout=listing.layout + ignored)
    if not archives:
        raise ValueError(
            f"no images of {known.name} in {source}; looked for classes in "
            f"{', '.join(known.folders)}, and for {known.archive} "
            f"(docs/data.md#from-the-official-archives)"
        )
    links.look(archives[0])
    read = _training_archive if is_train else _validation_archive
    return read(archives[0], source, class_of)


def _class_folders_in(root: Path, class_of: Mapping[str, int], links: Links) -> Listing | None:
    with os.scandir(root) as entries:
        if not any(entry.is_dir() and not passed_over(entry.name) for entry in entries):
            return None
    present = class_folders(root)
    _require_same(root, present, class_of)
    return _list_folders(root, present, links, "folders")


def _class_tars_in(
    root: Path, _source: Path, class_of: Mapping[str, int], links: Links
) -> Listing | None:
    with os.scandir(root) as entries:
        found = [e for e in entries if e.name.endswith(".tar") and not e.is_dir()]
    # tars with unknown names count as classes, so that a misspelt class is refused; only system
    # files and downloaded archives do not
    present = {
        name: entry
        for entry in sorted(found, key=lambda entry: entry.name)
        if (name := entry.name.removesuffix(".tar")) in class_of
        or not (passed_over(entry.name) or DOWNLOAD.match(name))
    }
    if not any(composed(name) in class_of for name in present):
        return None
    _require_same(root, list(present), class_of)
    links.look(root)
    for entry in present.values():
        regular_size(entry, links)
    images = in_threads(lambda name: _tarred_images(root / f"{name}.tar", f"{name}/"), present)
    return Listing(root, images, f"{len(present):,} tars of {root}")


def _training_archive(path: Path, _source: Path, class_of: Mapping[str, int]) -> Listing:
    """List the images in the tars inside the official tar, without extracting them."""
    parts = {member.name.removesuffix(".tar"): member for member in tar_members(path)}
    _require_same(path, list(parts), class_of)
    images = in_threads(lambda name: _tarred_images(path, f"{name}/", parts[name]), parts)
    layout = f"{len(parts):,} tars in {path}, which is not extracted"
    return Listing(path.parent, images, layout)


def _flat_files_in(
    root: Path, source: Path, class_of: Mapping[str, int], links: Links
) -> Listing | None:
    with os.scandir(root) as entries:
        files_here = [e for e in entries if has_image_suffix(e.name) and not e.is_dir()]
    # one published name suffices; `_by_truth` then refuses any file with a different name
    if not any(VALIDATION_NAME.fullmatch(entry.name) for entry in files_here):
        return None
    links.look(root)
    images = []
    for entry in files_here:
        require_utf8(entry.path)
        # the name twice: `_by_truth` prefixes the first with the class, the second is the file
        images.append(Found(entry.name, regular_size(entry, links), entry.name))
    by_class, devkit = _by_truth(root, images, [root, root.parent, source], class_of)
    return Listing(root, by_class, f"flat files of {root} with the classes of {devkit}")


def _validation_archive(path: Path, source: Path, class_of: Mapping[str, int]) -> Listing:
    images = _tarred_images(path)
    by_class, devkit = _by_truth(path, images, [path.parent, source], class_of)
    layout = f"{path}, which is not extracted, with the classes of {devkit}"
    return Listing(path.parent, by_class, layout)


def _tarred_images(path: Path, folder: str = "", part: tar.Member | None = None) -> list[Found]:
    """List the images in a tar, or in the tar that is its member, as if they were in a folder."""
    name = f"{path}: {part.name}" if part else str(path)
    members = tar_members(path, part)
    if not members:
        raise ValueError(f"{name} is empty")
    for member in members:
        require_utf8(f"{name}/{member.name}")
        if "/" in member.name or not has_image_suffix(member.name):
            raise ValueError(f"not an image: {member.name} in {name}; a tar may hold only images")
    return [Found(folder + one.name, one.size, path.name, one.offset) for one in members]


def _by_truth(
    where: Path, images: Sequence[Found], places: Sequence[Path], class_of: Mapping[str, int]
) -> tuple[dict[str, list[Found]], Path]:
    """Group the validation images by class, with the devkit found in one of `places`."""
    devkit = find_devkit(places)
    if devkit is None:
        raise ValueError(
            f"the validation images of {where} are not in class folders; put {DEVKIT}.tar.gz, "
            f"which has their classes, beside them (docs/data.md#from-the-official-archives)"
        )
    wnids = validation_classes(devkit)
    by_class: dict[str, list[Found]] = {}
    for image in images:
        # the number in a file's name is its line in the devkit's ground truth
        match = VALIDATION_NAME.fullmatch(image.path)
        if match is None or not 1 <= int(match[1]) <= len(wnids):
            raise ValueError(
                f"{image.path} of {where} is not one of the {len(wnids):,} in {devkit}"
            )
        wnid = wnids[int(match[1]) - 1]
        by_class.setdefault(wnid, []).append(image._replace(path=f"{wnid}/{image.path}"))
    _require_same(where, list(by_class), class_of)
    return by_class, devkit


def class_folders(root: Path) -> list[str]:
    """List the names of the folders in `root`, sorted; at least one must exist."""
    if not root.is_dir():
        raise ValueError(f"no such folder: {root}")
    names = []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir():
                if not passed_over(entry.name):
                    names.append(entry.name)
            elif has_image_suffix(entry.name):
                raise ValueError(
                    f"{entry.path} is not in a class folder; move the images into one per class"
                )
            elif entry.is_symlink() and not passed_over(entry.name):
                regular_size(entry)  # a broken link may be a class that is missing
    if not names:
        raise ValueError(f"{root} holds no class folders")
    require_distinct(root, sorted(names))
    return sorted(names)


def _require_same(root: Path, present: Sequence[str], class_of: Mapping[str, int]) -> None:
    _require_known(root, present, class_of)
    _require_all(root, present, list(class_of))


def _require_known(root: Path, present: Sequence[str], class_of: Mapping[str, int]) -> None:
    for name in present:
        if composed(name) not in class_of:
            known = list(class_of)
            raise ValueError(
                f"unknown class: {name!r} in {root} is not one of the {len(known)} classes "
                f"({known[0]} ... {known[-1]}); remove it, or pass its label space with --classes"
            )


def _require_all(
    root: Path, present: Sequence[str], expected: Sequence[str], subset: str = SUBSET
) -> None:
    missing = sorted(set(expected) - set(map(composed, present)))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(expected)} classes are missing in {root} "
            f"(first: {missing[0]}); download or extract the archive again{subset}"
        )


def _list_folders(root: Path, names: Sequence[str], links: Links, kind: str) -> Listing:
    """List the images in folders of `root`; system folders beside them are counted."""
    links.look(root)
    images = in_threads(lambda name: list_images(root / name, links), names)
    with os.scandir(root) as entries:
        others = sorted(entry.name for entry in entries if entry.is_dir())
    system = [printable(name) for name in others if passed_over(name)]
    count = f"{len(system)} system folder{'s' if system[1:] else ''}"
    said = f" ({count} skipped: {', '.join(system)})" if system else ""
    return Listing(root, images, f"{len(names):,} {kind} of {root}{said}")


def in_threads(
    list_class: Callable[[Place], list[Found]], places: Collection[Place]
) -> dict[Place, list[Found]]:
    """List the images of each class in threads; `places` identify the classes."""
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        return dict(zip(places, pool.map(list_class, places), strict=True))


def list_images(folder: Path, links: Links) -> list[Found]:
    """List the images in one class folder."""
    images = []
    if folder.is_symlink():
        links.look(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() or not has_image_suffix(entry.name):
                raise ValueError(f"not an image: {entry.path}; class folders may hold only images")
            require_utf8(entry.path)
            images.append(Found(f"{folder.name}/{entry.name}", regular_size(entry, links)))
    if not images:
        raise ValueError(f"class folder {folder} is empty")
    return images
