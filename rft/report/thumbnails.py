"""Small pictures of samples, read from the packed sets that runs were evaluated on."""

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
QUALITY = 70  # of WebP: some two kilobytes for a photo

Place = tuple[str, int]
"""A packed set, and the number of a sample in it."""

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
        counts: of the sets of these samples, which name their data.
        max_pixels: millions of pixels that an image may have.

    Returns:
        The pictures without those that are broken, which are warned of, and the names of sets that
        the data root lacks, likewise.

    Raises:
        ValueError: if it has none of the sets, or one is not the set that was evaluated or cannot
            be read.
    """
    names = list(dict.fromkeys(name for name, _ in wanted))
    missing = [name for name in names if not files.exists(files.join(data, name, MANIFEST))]
    if missing and missing == names:
        # which raises, with a hint
        Manifest.load(files.join(data, names[0]))
    if missing:
        log.warning(
            f"{data} has no packed set {', '.join(missing)}, so none of its images is shown"
        )
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
            f"{count.manifest_sha256[:12]} ({count.total:,}); give --data of their evaluation"
        )
    return packed


def _pictures(packed: PackedSet, samples: Mapping[int, str]) -> Iterator[tuple[int, bytes]]:
    """Yield each sample's picture; those that are broken are counted in one warning."""
    broken: list[str] = []
    for sample, key in samples.items():
        if packed.key(sample) != key:
            raise ValueError(
                f"sample {sample} of {packed.url} is {packed.key(sample)!r}, predictions of the "
                f"same data have {key!a}; evaluate the runs again"
            )
    numbers = np.array(sorted(samples))
    # ObjectNet's images may be published with their red frame only, which packing cuts off
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
        log.warning(f"an image is not shown: {broken[0]}{more}")
    packed.shards.close()


def _payloads(packed: PackedSet, samples_M: np.ndarray) -> Sequence[bytes | ValueError]:
    """Return the stored bytes of samples, or why one has none.

    Raises:
        ValueError: if a shard cannot be read at all, which no other of its samples will change.
    """
    try:
        return packed.payloads(samples_M)
    except ValueError as error:
        if isinstance(error.__cause__, RangeError | FileNotFoundError):
            raise
        if len(samples_M) == 1:
            return [error]
        # one by one, to know which
        return [one for sample in samples_M for one in _payloads(packed, np.array([sample]))]


def thumbnail(image: Image.Image, *, framed: bool = False, side: int = SIDE) -> bytes:
    """Return an RGB image as WebP, at most `side` pixels long, with a red line around it if asked.

    Equal images give equal bytes.
    """
    # not larger than it is: the page enlarges small ones
    image.thumbnail((side, side))
    if framed:
        image = ImageOps.expand(ImageOps.crop(image, 1), 1, "red")
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=QUALITY)
    return stream.getvalue()


def styles(name: str, pictures: Sequence[bytes]) -> str:
    """Return a style sheet in which class `name`-N has the WebP picture N as background."""
    return "\n".join(
        f".{name}-{number}{{background-image:url(data:image/webp;base64,"
        f"{base64.b64encode(picture).decode('ascii')})}}"
        for number, picture in enumerate(pictures)
    )
