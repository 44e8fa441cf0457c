"""A data set on disk, before packing: the list of its images, and how each is read."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

from fsspec.implementations.local import LocalFileSystem

from rft.classes import composed
from rft.packing.names import is_below
from rft.sets import Score
from rft.shards.keys import make_keys
from rft.storage import files, local


class Found(NamedTuple):
    """An image found by a listing; an `Item` adds a key and a label."""

    path: str
    bytes: int
    inside: str | None = None
    offset: int = 0
    domain: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image to pack.

    `path` is class folder and file name with a forward slash; `key` names the sample in its tar;
    `bytes` is the size of the image when it was listed. The image is the file `path` below the
    source's root, or `bytes` bytes at `offset` of the file `inside` below the root. `domain`
    describes where or how it was taken, in a set with domains.
    """

    key: str
    path: str
    label: int
    bytes: int
    inside: str | None = None
    offset: int = 0
    domain: str = ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set on disk: its items, and how predictions on it are scored.

    `groups` is the manifest's scoring rule (see `rft.shards.manifest.Manifest`); `crop_border` is
    the number of pixels to cut from each side before any resize. `photos` marks the user's own
    photos, which, unlike benchmarks, are turned upright and composed on white
    (`rft.shards.images.PHOTOS`). `layout` describes the detected layout, `links` the links that
    lead out of the source, if any. `score` and `ood` are declared for the manifest.
    """

    dataset: str
    root: Path
    items: tuple[Item, ...]
    groups: tuple[tuple[int, ...], ...]
    crop_border: int = 0
    photos: bool = False
    layout: str = ""
    links: str = ""
    score: Score = "top1"
    ood: bool = False

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Names of the images' domains, sorted; empty for a set without domains."""
        return tuple(sorted({item.domain for item in self.items} - {""}))


def make_items(
    classes: Mapping[str, Iterable[Found]], class_of: Mapping[str, int]
) -> tuple[Item, ...]:
    """Turn the images of all classes into items, sorted by class folder and path.

    `class_of` maps folder names, in Unicode's composed form, to class ids.
    """
    found = [
        (image, class_of[composed(name)])
        for name in sorted(classes)
        for image in sorted(classes[name])
    ]
    keys = make_keys([image.path for image, _ in found])
    return tuple(
        Item(key=key, label=label, **image._asdict())
        for key, (image, label) in zip(keys, found, strict=True)
    )


def read_item(root: Path, item: Item) -> bytes:
    """Read the bytes of an image.

    Raises:
        ValueError: if the file has changed in size since it was listed.
    """
    # one extra byte reveals a file that has grown; offset 0 means a file of its own, because an
    # archive starts with a header
    wanted = item.bytes + (item.offset == 0)
    # unbuffered: a buffer would read ahead into the archive's next image
    with os.fdopen(local.open_regular(root / (item.inside or item.path)), "rb", 0) as stream:
        stream.seek(item.offset)
        data = stream.read(wanted)
    if len(data) != item.bytes:
        raise ValueError(
            f"{where(root, item)} has {'more' if len(data) > item.bytes else len(data)} bytes, "
            f"{item.bytes} when it was listed; pack again when nothing writes to the source"
        )
    return data


def require_apart(folders: Iterable[Path], out: str, datasets: Iterable[str]) -> None:
    """Check that no output folder is inside an input folder, or contains one.

    Raises:
        ValueError: naming both folders.
    """
    fs, path = files.open_store(out)
    # images are local files, so a remote set cannot lie among them
    if not isinstance(fs, LocalFileSystem):
        return
    targets = [Path(path) / dataset for dataset in datasets]
    for folder, target in product(folders, targets):
        if is_below(target, folder) or is_below(folder, target):
            raise ValueError(
                f"--out {out} would write shards into {target}, but the images are read from "
                f"{folder}; choose an --out beside it"
            )


def where(root: Path, item: Item) -> str:
    """Name an image for a message."""
    return str(root / item.path) if item.inside is None else f"{root / item.inside}: {item.path}"
