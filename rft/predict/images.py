"""Finds, reads and decodes new images ahead of the model's forward passes.

Each image is treated like an own photo at packing: turned upright by its EXIF orientation, composed
on white, 16-bit grey reduced to its high byte (rft/shards/images.py).

Decoding uses threads, unlike training, which uses loader processes: Pillow releases Python's lock
while it decodes and resizes, and a script that imports rft needs no `if __name__ == "__main__"`.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rft import cpus
from rft.packing.names import has_image_suffix, passed_over, thumbnails
from rft.shards.image_files import IMAGE_SUFFIXES, require_affordable
from rft.shards.images import Treatment, clip_pixels, load_image, photo_of
from rft.storage import local

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 2  # batches that are decoded or in progress while the model computes

Picture = Image.Image | str | os.PathLike[str]
"""An image, or the path of a file that holds one."""


class Squares(NamedTuple):
    """Some images as the model sees them."""

    numbers: list[int]
    """Their positions among the given images."""
    images_BCHW: Tensor
    """uint8, on the CPU."""


class Found(NamedTuple):
    """Files that may be images, and other files found beside them."""

    paths: list[Path]
    refused: dict[Path, str]
    """Unreadable folders; each reason starts with the path."""
    others: dict[str, list[Path]]
    """Files without an image's suffix, by the pattern that skips them."""
    passed: Counter[str]
    """Counts of skipped files and folders, by the name or pattern that they matched."""


def find_images(named: Sequence[Path], ignore: Sequence[str] = ()) -> Found:
    """List the given files, and the files in the given folders, at any depth.

    A file counts once. In folders, the names that packing skips are skipped, and those that match
    one of the patterns `ignore`. A file there without an image's suffix counts as unread, because
    it could be a photo in a different format. Files that are named directly are identified by their
    bytes.
    """
    found = Found([], {}, {}, Counter())
    for path in named:
        if path.is_dir():
            _list_folder(path, ignore, found)
        else:
            found.paths.append(path)
    # folders of the command line may overlap
    return found._replace(
        paths=list(dict.fromkeys(found.paths)),
        others={pattern: list(dict.fromkeys(paths)) for pattern, paths in found.others.items()},
    )


def _list_folder(folder: Path, ignore: Sequence[str], found: Found) -> None:
    def refuse(error: OSError) -> None:  # by default os.walk skips folders that it cannot read
        path = Path(error.filename)
        found.refused[path] = f"{path} cannot be read: {error.strerror}"

    images, seen = [], set()
    for place, below, names in os.walk(folder, followlinks=True, onerror=refuse):
        # links may form a loop
        if (real := os.path.realpath(place)) in seen:
            below.clear()
            continue
        seen.add(real)
        left_out = {name: passed_over(name, ignore) for name in (*below, *names)}
        left_out |= {name: left_out[name] or thumbnails(name) for name in below}
        found.passed.update(filter(None, left_out.values()))
        # in place: os.walk descends into the folders that remain in the list
        below[:] = [name for name in below if not left_out[name]]
        for path in (Path(place) / name for name in names if not left_out[name]):
            if has_image_suffix(path.name):
                images.append(path)
            else:
                pattern = f"*{path.suffix.lower()}" if path.suffix else path.name
                found.others.setdefault(pattern, []).append(path)
    found.paths.extend(sorted(images))


def no_images(pattern: str, paths: Sequence[Path]) -> str:
    """Describe files without an image's suffix that one pattern skips."""
    known = ", ".join(sorted(f".{suffix}" for suffix in IMAGE_SUFFIXES))
    first = min(paths)
    if not paths[1:]:
        what, them = f"{first} does", "it"
    else:
        what, them = f"{first} and {len(paths) - 1:,} more like {pattern} do", "them"
    return (
        f"{what} not have an image's suffix ({known}); convert {them}, or skip {them} with "
        f"--ignore '{pattern}'"
    )


def _raise(_: int, error: ValueError) -> NoReturn:
    raise error


def read_squares(
    images: Iterable[Picture],
    size: int,
    together: int,
    *,
    max_pixels: float,
    refuse: Callable[[int, ValueError], None] = _raise,
) -> Generator[Squares, None, None]:
    """Yield images in order, `together` at a time, as squares with sides of `size` pixels.

    `refuse` receives the number of each unreadable image, and the error; later images move up.

    Raises:
        ValueError: for the first unreadable image, unless `refuse` handles it.
        OSError: if memory runs out.
    """
    locks: dict[int, Lock] = {}

    def decode(job: tuple[int, Picture]) -> np.ndarray | ValueError:
        number, image = job
        try:
            # an open image that is given twice must not be decoded by two threads at once
            with locks.setdefault(id(image), Lock()):
                return read_square(image, size, f"image {number}", max_pixels)
        except ValueError as error:
            return error

    numbers: list[int] = []
    squares: list[np.ndarray] = []
    with closing(_ahead(decode, enumerate(images), AHEAD * together)) as decoded:
        for number, square_CHW in enumerate(decoded):
            if isinstance(square_CHW, ValueError):
                refuse(number, square_CHW)
                continue
            numbers.append(number)
            squares.append(square_CHW)
            if len(squares) == together:
                yield Squares(numbers, torch.from_numpy(np.stack(squares)))
                numbers, squares = [], []
    if squares:
        yield Squares(numbers, torch.from_numpy(np.stack(squares)))


def read_square(image: Picture, size: int, name: str, max_pixels: float) -> np.ndarray:
    """Read an image as the model sees it, uint8 (3, size, size).

    `name` identifies an image without a path in messages.

    Raises:
        ValueError: naming it, if it cannot be read.
        OSError: if memory runs out.
    """
    if isinstance(image, Image.Image):
        return clip_pixels(photo_of(image, name), size)
    if not isinstance(image, str | os.PathLike):
        hint = "; for an array: PIL.Image.fromarray(array)" if hasattr(image, "shape") else ""
        raise ValueError(f"{name} is {_kind(image)}; it must be a path or a PIL image{hint}")
    path = os.fspath(image)
    data = _read_file(path, max_pixels)
    return clip_pixels(load_image(data, path, Treatment(photo=True), max_pixels), size)


def require_several(images: object) -> None:
    """Check that `images` is not a single image, whose letters, rows or pixels would be iterated.

    Raises:
        ValueError: if it is.
    """
    if isinstance(images, str | os.PathLike):
        raise ValueError(f"{os.fspath(images)!r} is one image; pass a list of images or paths")
    # an array of paths is as good as a list
    is_pixels = isinstance(images, np.ndarray) and images.dtype.kind in "biuf"
    if is_pixels or isinstance(images, Image.Image | Tensor):
        raise ValueError(f"this is {_kind(images)}; pass a list of PIL images or paths")


def _kind(value: object) -> str:
    kind = type(value)
    return f"a PIL image ({kind.__name__})" if isinstance(value, Image.Image) else f"{_full(kind)}"


def _full(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _read_file(path: str, max_pixels: float) -> bytes:
    try:
        with local.reader(path) as stream:
            # checked before it takes memory: a folder may contain anything
            require_affordable(os.fstat(stream.fileno()).st_size, path, max_pixels)
            return stream.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _ahead(
    work: Callable[[Job], Result], jobs: Iterable[Job], most: int
) -> Generator[Result, None, None]:
    """Yield `work(job)` of each job in order, with at most `most` results started but not taken."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(cpus.available()) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) == most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # if the caller stops early, jobs that have not started are cancelled
            pool.shutdown(cancel_futures=True)
