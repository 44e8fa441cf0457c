"""Thumbnails of samples, read from the packed sets that runs were evaluated on."""

import base64
import io
import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps

from rft.runs import filenames
from rft.runs.records import SetCount
from rft.shards.folder import MANIFEST
from rft.shards.manifest import Manifest
from rft.shards.packed import PAYLOAD_BYTES, PackedSet
from rft.shards.ranges import RangeError, cut
from rft.storage import files

SIDE = 96  # pixels of the longer side
QUALITY = 70  # of WebP: about two kilobytes per photo

Place = tuple[str, int]
"""The name of a packed set, and the number of a sample in it."""

log = logging.getLogger(__name__)


def read_thumbnails(
    data: str,
    wanted: Mapping[Place, str],
    counts: Mapping[str, SetCount],
    max_pixels: float,
) -> tuple[dict[Place, bytes], list[str]]:
    """Read samples of packed sets as WebP.

    Args:
        data: URL of the data root.
        wanted: sample -> its key.
        counts: the counts on the sets of these samples, which identify their data.
        max_pixels: limit of an image, in millions of pixels.

    Returns:
        The pictures, and the names of the sets that the data root lacks. Broken images are left
        out. There is a warning of both.

    Raises:
        ValueError: if the data root has none of the sets, or a set is not the one that was
            evaluated or cannot be read.
    """
    names = list(dict.fromkeys(name for name, _ in wanted))
    missing = [name for name in names if not files.exists(files.join(data, name, MANIFEST))]
    if missing and missing == names:
        # raises an error with a hint
        Manifest.load(files.join(data, names[0]))
    if missing:
        log.warning(f"{data} has no packed set {', '.join(missing)}, so its images are not shown")
    found: dict[Place, bytes] = {}
    for name in names:
        if name not in missing:
            samples = {sample: key for (of, sample), key in wanted.items() if of == name}
            packed = _open(files.join(data, name), counts[name], max_pixels)
            found |= {(name, sample): picture for sample, picture in _pictures(packed, samples)}
    return found, missing


def _open(url: str, count: SetCount, max_pixels: float) -> PackedSet:
    packed = PackedSet(url, max_pixels=max_pixels)
    if (packed.manifest.sha256, len(packed)) != (count.manifest_sha256, count.total):
        raise ValueError(
            f"{url} is not the set that the runs were evaluated on: its manifest is "
            f"{packed.manifest.sha256[:12]} ({len(packed):,} images), {filenames.RESULTS} has "
            f"{count.manifest_sha256[:12]} ({count.total:,}); use the --data of their evaluation"
        )
    return packed


def _pictures(packed: PackedSet, samples: Mapping[int, str]) -> Iterator[tuple[int, bytes]]:
    """Yield each sample's picture; broken ones are counted in one warning."""
    broken: list[str] = []
    for sample, key in samples.items():
        if packed.key(sample) != key:
            raise ValueError(
                f"sample {sample} of {packed.url} is {packed.key(sample)!r}, predictions of the "
                f"same data have {key!a}; evaluate the runs again"
            )
    numbers = np.array(sorted(samples))
    # ObjectNet's images may be published only with their red border, which packing cuts off
    framed = packed.manifest.encoding["crop_border"] > 0
    for start, stop in cut(packed.index.length[numbers].tolist(), PAYLOAD_BYTES):
        part_M = numbers[start:stop]
        for sample, payload in zip(part_M.tolist(), _payloads(packed, part_M), strict=True):
            try:
                if isinstance(payload, ValueError):
                    raise payload
                yield sample, thumbnail(packed.picture(sample, payload), framed=framed)
            except ValueError as error:
                broken.append(str(error))
    if broken:
        more = f" (and {len(broken) - 1} more of this set)" if broken[1:] else ""
        log.warning(f"image not shown: {broken[0]}{more}")
    packed.shards.close()


def _payloads(packed: PackedSet, samples_M: np.ndarray) -> Sequence[bytes | ValueError]:
    """Read the stored bytes of samples; a sample that cannot be read gets its error instead.

    Raises:
        ValueError: if a shard cannot be read at all, so that all its samples would fail.
    """
    try:
        return packed.payloads(samples_M)
    except ValueError as error:
        if isinstance(error.__cause__, RangeError | FileNotFoundError):
            raise
        if len(samples_M) == 1:
            return [error]
        # read one by one, to find the broken sample
        return [one for sample in samples_M for one in _payloads(packed, np.array([sample]))]


def thumbnail(image: Image.Image, *, framed: bool = False, side: int = SIDE) -> bytes:
    """Encode an RGB image as WebP, at most `side` pixels long; `framed` adds a red border.

    Equal images give equal bytes.
    """
    # `Image.thumbnail` never enlarges; the page does that for small images
    image.thumbnail((side, side))
    if framed:
        image = ImageOps.expand(ImageOps.crop(image, 1), 1, "red")
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=QUALITY)
    return stream.getvalue()


def styles(name: str, pictures: Sequence[bytes]) -> str:
    """Make a style sheet in which class `name`-N has the WebP picture N as background."""
    return "\n".join(
        f".{name}-{number}{{background-image:url(data:image/webp;base64,"
        f"{base64.b64encode(picture).decode('ascii')})}}"
        for number, picture in enumerate(pictures)
    )
