"""Where each benchmark keeps its images: the official folder layouts, read into one list of items.

A source is complete or refused: an absent, empty or unknown class folder and a file that is no
image are errors, because a benchmark with a hole in it still gives a number. Only files beside the
class folders (README.txt) are passed over. Nothing is decoded here.
"""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rft import cli, files
from rft.data.labels import LabelSpace, objectnet_groups

# Folder names in use for each set, relative to --source; "." is the folder given itself. A
# foldered copy of the validation images has the name its maker gave it, so it goes before `val`,
# which in the official archive is flat.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "imagenet-train": ("train", "imagenet/train", "ILSVRC2012/train"),
    "imagenet-val": tuple(
        f"{parent}{name}"
        for parent in ("", "imagenet/", "ILSVRC2012/")
        for name in ("val_in_folder", "val_dirs", "val")
    ),
    "imagenet-v2": (
        "imagenetv2-matched-frequency-format-val",
        "imagenetv2-matched-frequency",
        "ImageNetV2-matched-frequency",
        ".",
    ),
    "imagenet-r": ("imagenet-r", "."),
    "imagenet-sketch": ("sketch", "imagenet-sketch", "."),
    "objectnet": ("objectnet-1.0", "objectnet", "."),
    "imagenet-a": ("imagenet-a", "."),
}
OBJECTNET_BORDER = 2  # pixels of red frame on each side, cropped before any resize
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
UNSAFE_IN_KEY = re.compile(r"[^A-Za-z0-9_-]")
LISTING_THREADS = 16  # listing is latency-bound on network file systems


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image to pack.

    `path` is relative to the source's root with forward slashes; `key` names the sample in its
    tar; `bytes` is the size of the file when it was listed.
    """

    key: str
    path: str
    label: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set found on disk: its items, and how predictions on it are scored.

    `groups` is the manifest's scoring rule (see `rft.data.manifest.Manifest`); `crop_border` is the
    number of pixels to cut from each side before any resize.
    """

    dataset: str
    root: Path
    items: tuple[Item, ...]
    groups: tuple[tuple[int, ...], ...]
    crop_border: int = 0


def read_source(dataset: str, source: Path, labels: LabelSpace) -> Source:
    """List the images of `dataset` below `source`, which is its own folder or the one above.

    Raises:
        ValueError: if a folder is missing, empty or of an unknown class, or a file is no image.
    """
    if dataset not in LAYOUTS:
        raise cli.unknown("data set", dataset, sorted(LAYOUTS))
    root = _locate(dataset, source)
    class_of = {name: class_id for class_id, name in enumerate(labels.ids)}
    groups = tuple((class_id,) for class_id in range(len(labels)))
    crop_border = 0
    match dataset:
        case "objectnet":
            groups_of = objectnet_groups(root / "mappings", len(labels))
            root = root / "images"
            # A member of the group is as good a label as any: scoring only asks for the group.
            class_of = {folder: members[0] for folder, members in groups_of.items()}
            present = [name for name in _class_folders(root) if name in class_of]
            _require_all(root, present, list(class_of))
            groups, crop_border = tuple(groups_of.values()), OBJECTNET_BORDER
        case "imagenet-r" | "imagenet-a":  # published for 200 of the classes
            present = _class_folders(root)
            _require_known(root, present, class_of)
            groups = tuple(sorted((class_of[name],) for name in present))
        case "imagenet-v2":  # folders are class ids; sorted as text they would be wrong
            class_of = {str(class_id): class_id for class_id in range(len(labels))}
            present = _class_folders(root)
            _require_known(root, present, class_of)
            _require_all(root, present, list(class_of))
        case _:
            present = _class_folders(root)
            _require_known(root, present, class_of)
            _require_all(root, present, list(class_of))
    items = _items(root, {name: class_of[name] for name in present})
    return Source(dataset=dataset, root=root, items=items, groups=groups, crop_border=crop_border)


def make_keys(paths: Sequence[str]) -> list[str]:
    """Return a sample key for each `class folder/file name`, all distinct.

    webdataset cuts a member's name at the first dot, so keys keep only ASCII letters, digits, "_"
    and "-". The whole set uses the first naming under which no two keys are equal: the file's stem,
    then folder and stem, then folder, stem and a hash of the path.
    """
    parts = [path.rsplit("/", 1) for path in paths]
    stems = [_safe(PurePosixPath(name).stem) for _, name in parts]
    if len(set(stems)) == len(stems):
        return stems
    long = [f"{_safe(folder)}_{stem}" for (folder, _), stem in zip(parts, stems, strict=True)]
    if len(set(long)) == len(long):
        return long
    hashed = [
        f"{stem}-{files.sha256_json(path)[:16]}" for stem, path in zip(long, paths, strict=True)
    ]
    assert len(set(hashed)) == len(set(paths))
    return hashed


def _safe(name: str) -> str:
    return UNSAFE_IN_KEY.sub("_", name)


def _locate(dataset: str, source: Path) -> Path:
    if not source.is_dir():
        raise ValueError(f"no such folder: {source}")
    for name in LAYOUTS[dataset]:
        if (source / name).is_dir():
            return source / name
    tried = ", ".join(LAYOUTS[dataset])
    raise ValueError(f"no folder of {dataset} in {source}; looked for: {tried}")


def _class_folders(root: Path) -> list[str]:
    """Return the sorted names of the folders in `root`."""
    if not root.is_dir():
        raise ValueError(f"no such folder: {root}")
    names = []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir():
                names.append(entry.name)
            elif _has_image_suffix(entry.name):
                raise ValueError(f"{entry.path} lies in no class folder; sort the images by class")
    if not names:
        raise ValueError(f"{root} holds no class folders")
    return sorted(names)


def _require_known(root: Path, present: Sequence[str], class_of: Mapping[str, int]) -> None:
    for name in present:
        if name not in class_of:
            known = list(class_of)
            raise ValueError(
                f"unknown class: folder {name!r} in {root} is none of the {len(known)} classes "
                f"({known[0]} ... {known[-1]}); remove it, or name its label space with --classes"
            )


def _require_all(root: Path, present: Sequence[str], expected: Sequence[str]) -> None:
    missing = sorted(set(expected) - set(present))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(expected)} class folders are missing in {root} "
            f"(first: {missing[0]}); extract the archive again"
        )


def _items(root: Path, class_of: Mapping[str, int]) -> tuple[Item, ...]:
    """List the images of the given class folders, sorted by path."""
    names = sorted(class_of)
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        listings = list(pool.map(lambda name: _list_images(root / name), names))
    paths, labels, sizes = [], [], []
    for name, listing in zip(names, listings, strict=True):
        for file_name, size in listing:
            paths.append(f"{name}/{file_name}")
            labels.append(class_of[name])
            sizes.append(size)
    rows = zip(make_keys(paths), paths, labels, sizes, strict=True)
    return tuple(Item(key=k, path=p, label=c, bytes=n) for k, p, c, n in rows)


def _list_images(folder: Path) -> list[tuple[str, int]]:
    """Return the sorted (name, bytes) of the images in one class folder."""
    images = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.is_file() and _has_image_suffix(entry.name)):
                raise ValueError(f"not an image: {entry.path}; class folders hold only images")
            images.append((entry.name, entry.stat().st_size))
    if not images:
        raise ValueError(f"class folder {folder} is empty")
    return sorted(images)


def _has_image_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
