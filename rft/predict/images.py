"""New images as a model sees them: found, read and decoded ahead of its forwards.

Each is treated as a photo of one's own is when it is packed: turned upright by its EXIF
orientation, composed on white, 16-bit grey to its high byte (rft/shards/images.py).

Threads decode, where training has loader processes: Pillow lets go of Python's lock while it
decodes and resizes, and a script that imports rft needs no `if __name__ == "__main__"`.
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
AHEAD = 2  # batches that are decoded, or under way, while a model computes

Picture = Image.Image | str | os.PathLike[str]
"""An image, or the path of a file that holds one."""


class Squares(NamedTuple):
    """Some images as the model sees them."""

    numbers: list[int]
    """Their places among the images that were given."""
    images_BCHW: Tensor
    """uint8, on the CPU."""


class Found(NamedTuple):
    """Files that may be images, and what was found beside them."""

    paths: list[Path]
    refused: dict[Path, str]
    """What is no image or cannot be listed, with the reason, which begins with the path."""
    passed: Counter[str]
    """What was left out by its name, by the name or pattern that it matched."""


def find_images(named: Sequence[Path], ignore: Sequence[str] = ()) -> Found:
    """List the files that are named, and those in folders that are named, at any depth.

    A file counts once. In folders, names that packing passes over are passed over, and those that
    match one of the patterns `ignore`; a file whose name is not that of an image is refused there,
    because it could be a photo in another format. What a named file is, its bytes decide.
    """
    found = Found([], {}, Counter())
    for path in named:
        if path.is_dir():
            _list_folder(path, ignore, found)
        else:
            found.paths.append(path)
    return found._replace(paths=list(dict.fromkeys(found.paths)))


def _list_folder(folder: Path, ignore: Sequence[str], found: Found) -> None:
    def refuse(error: OSError) -> None:  # os.walk would pass over what it cannot read
        path = Path(error.filename)
        found.refused[path] = f"{path} cannot be read: {error.strerror}"

    images, seen = [], set()
    for place, below, names in os.walk(folder, followlinks=True, onerror=refuse):
        # links may lead round in a circle
        if (real := os.path.realpath(place)) in seen:
            below.clear()
            continue
        seen.add(real)
        left_out = {name: passed_over(name, ignore) for name in (*below, *names)}
        left_out |= {name: left_out[name] or thumbnails(name) for name in below}
        found.passed.update(filter(None, left_out.values()))
        # in place: os.walk descends into what is left of the list
        below[:] = [name for name in below if not left_out[name]]
        for path in (Path(place) / name for name in names if not left_out[name]):
            if has_image_suffix(path.name):
                images.append(path)
            else:
                found.refused[path] = _no_image(path)
    found.paths.extend(sorted(images))


def _no_image(path: Path) -> str:
    known = ", ".join(sorted(f".{suffix}" for suffix in IMAGE_SUFFIXES))
    pattern = f"*{path.suffix.lower()}" if path.suffix else path.name
    return (
        f"{path} is no image by its name ({known}); convert it, or pass it over with --ignore "
        f"'{pattern}'"
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
    """Yield images in their order, `together` at a time, as squares of `size` pixels a side.

    `refuse` gets the number of each image that cannot be read, and the error; the images after it
    move up.

    Raises:
        ValueError: for the first image that cannot be read, unless `refuse` keeps it.
        OSError: if there is not enough memory.
    """
    locks: dict[int, Lock] = {}

    def decode(job: tuple[int, Picture]) -> np.ndarray | ValueError:
        number, image = job
        try:
            # an opened image that is given twice is decoded once, and not by two threads
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
    """Return an image as the model sees it, uint8 (3, size, size).

    `name` stands for an image without a path in messages.

    Raises:
        ValueError: naming it, if it cannot be read.
        OSError: if there is not enough memory.
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
    """Check that images are not one image, whose letters, rows or pixels would be taken for them.

    Raises:
        ValueError: if they are.
    """
    if isinstance(images, str | os.PathLike):
        raise ValueError(f"{os.fspath(images)!r} is one image; give a list of images or paths")
    # an array of paths is as good as a list
    is_pixels = isinstance(images, np.ndarray) and images.dtype.kind in "biuf"
    if is_pixels or isinstance(images, Image.Image | Tensor):
        raise ValueError(f"this is {_kind(images)}; give a list of PIL images or paths")


def _kind(value: object) -> str:
    kind = type(value)
    return f"a PIL image ({kind.__name__})" if isinstance(value, Image.Image) else f"{_full(kind)}"


def _full(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _read_file(path: str, max_pixels: float) -> bytes:
    try:
        with local.reader(path) as stream:
            # before it takes memory: anything may lie in a folder
            require_affordable(os.fstat(stream.fileno()).st_size, path, max_pixels)
            return stream.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _ahead(
    work: Callable[[Job], Result], jobs: Iterable[Job], most: int
) -> Generator[Result, None, None]:
    """Yield `work(job)` of each job in order, at most so many of them begun and not yet taken."""
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
            # where the caller stops early, what has not begun is not waited for
            pool.shutdown(cancel_futures=True)
