"""Encodes one image file as one payload: its own bytes, or the square that CLIP sees.

Every packed image was decoded once, so a reader's error means later damage, not a bad source.
`identify` reads only the header, for third-party shards, whose payloads exist already.
"""

import contextlib
import io
from typing import Any, NamedTuple, assert_never

import numpy as np
from PIL import Image

from rft.config import MAX_PIXELS
from rft.shards.image_files import END_OF_IMAGE, FILL, START_OF_IMAGE, START_OF_SCAN, pillow_errors
from rft.shards.images import (
    SUBSAMPLING,
    Header,
    Kind,
    Treated,
    Treatment,
    as_photo,
    channels_first,
    clip_square,
    decode,
    exif_orientation,
    npy_header,
    open_checked,
    source_treatment,
    to_npy,
)

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> member
# JPEG markers that exclude a file from the skeleton check (`jpeg_skeleton`)
RESTARTS = range(0xD0, 0xD8)
DEFINE_RESTART_INTERVAL = 0xDD
NOT_IN_SKELETON = frozenset({0x00, 0x01, *RESTARTS, START_OF_IMAGE, FILL, DEFINE_RESTART_INTERVAL})
# most positions that may end a scan; each takes eight bytes while they are examined
FILLS = 2**24
# by the byte after 0xFF: a stuffed byte, a restart and a fill byte do not end a scan
ENDS_SCAN = ~np.isin(np.arange(256), [0x00, *RESTARTS, FILL])
SWAPS_SIDES = range(5, 9)  # EXIF orientations that exchange width and height


class Encoded(NamedTuple):
    """One encoded image: the member's bytes and suffix, and the source image's properties."""

    payload: bytes
    suffix: str
    header: Header
    treated: Treated = Treated()


def encode(
    data: bytes, name: str, encoding: dict[str, Any], max_pixels: float = MAX_PIXELS
) -> Encoded:
    """Encode the image file `data`; `name` is for messages.

    Raises:
        ValueError: if the image cannot be decoded, starting with `name`.
    """
    kind: Kind = encoding["kind"]
    treatment = source_treatment(encoding)
    if kind == "original":
        header, treated = _header_of_whole(data, name, treatment, max_pixels)
        return Encoded(data, SUFFIXES[header.format], header, treated)
    image, header = open_checked(data, name, treatment.border, max_pixels)
    with pillow_errors(name):
        rgb, treated = decode(image, data, treatment)
        square = clip_square(rgb, encoding["size"], treatment.border)
    header = _upright(header, treated)
    match kind:
        case "jpeg":
            return Encoded(to_jpeg(square, encoding["quality"]), "jpg", header, treated)
        case "pixels":
            return Encoded(to_npy(channels_first(square)), "npy", header, treated)
        case _:
            assert_never(kind)


def identify(
    data: bytes, name: str, border: int, max_pixels: float = MAX_PIXELS
) -> tuple[Header, Treated]:
    """Read format, mode and size of an image file that readers show as stored.

    Also returns the treatment it would get as a photo. Transparency is guessed from the header, so
    nothing is decoded.

    Raises:
        ValueError: if it is not a JPEG, PNG or WebP or its size is out of bounds, starting with
            `name`.
    """
    image, header = open_checked(data, name, border, max_pixels)
    may_be_transparent = "A" in image.mode or "transparency" in image.info
    with pillow_errors(name):
        return header, Treated(exif_orientation(image, data), may_be_transparent)


def expected_bytes(encoding: dict[str, Any], source_bytes: int) -> int:
    """Estimate the size of a payload in bytes before anything is decoded.

    Exact for `original` and `pixels`. A downsized photograph takes up to one byte per pixel as a
    JPEG of quality 95.
    """
    kind: Kind = encoding["kind"]
    match kind:
        case "original":
            return source_bytes
        case "jpeg":
            return encoding["size"] ** 2
        case "pixels":
            return len(npy_header(encoding["size"])) + 3 * encoding["size"] ** 2
        case _:
            assert_never(kind)


def to_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode an RGB image as a JPEG without metadata; equal pixels give equal bytes."""
    stream = io.BytesIO()
    # through an array, because Pillow would also save the comment of the original file
    bare = Image.fromarray(np.asarray(image))
    bare.save(stream, "JPEG", quality=quality, subsampling=SUBSAMPLING)
    return stream.getvalue()


def _upright(header: Header, treated: Treated) -> Header:
    """Swap width and height if the image was turned by 90 degrees."""
    if treated.orientation in SWAPS_SIDES:
        return header._replace(width=header.height, height=header.width)
    return header


def _header_of_whole(
    data: bytes, name: str, treatment: Treatment, max_pixels: float
) -> tuple[Header, Treated]:
    """Check that an image file can be decoded; return its header and its treatment as a photo.

    Decoding a JPEG only as a check costs ten times as much as copying it. Nearly all of that time
    goes into the entropy-coded data, where libjpeg accepts any damage with a warning. It refuses
    only damaged marker segments, which `jpeg_skeleton` keeps, and data that ends before the image
    does, which cannot happen if an end marker follows the scans. So a skeleton that decodes is
    sufficient proof. A file without a skeleton, or with one that fails, is decoded completely.
    """
    skeleton = jpeg_skeleton(data)
    if skeleton is not None:
        # if it fails, the complete file decides, and its error is the one to show
        with contextlib.suppress(ValueError):
            return _decode_coarsely(skeleton, name, treatment, max_pixels)
    return _decode_coarsely(data, name, treatment, max_pixels)


def _decode_coarsely(
    data: bytes, name: str, treatment: Treatment, max_pixels: float
) -> tuple[Header, Treated]:
    """Decode an image, a JPEG at an eighth of its size (which still reads all of its data)."""
    image, header = open_checked(data, name, treatment.border, max_pixels)
    with pillow_errors(name):
        # small grey output is libjpeg's cheapest mode; PNG and WebP ignore it
        image.draft("L", (1, 1))
        image.load()
        treated = as_photo(image, data)[1] if treatment.photo else Treated()
    return _upright(header, treated), treated


def jpeg_skeleton(data: bytes) -> bytes | None:
    """Strip a JPEG of its entropy-coded data: markers and segments up to the end marker remain.

    None if `data` is not a JPEG with contiguous segments up to its end marker, or has restart
    markers: while searching for the next of these, libjpeg can run past the end marker.
    """
    if not data.startswith(bytes((FILL, START_OF_IMAGE))):
        return None
    # searched with numpy: a Python loop over the file would cost as much as decoding it
    array = np.frombuffer(data, dtype=np.uint8)
    # without the last byte, which no byte follows
    may_end = array[:-1] == FILL
    if np.count_nonzero(may_end) > FILLS:
        return None
    fills = np.flatnonzero(may_end)
    scan_ends = fills[ENDS_SCAN[array[fills + 1]]]
    segments, position = [data[:2]], 2
    while len(data) - position >= 2 and data[position] == FILL:
        marker = data[position + 1]
        if marker == END_OF_IMAGE:
            segments.append(data[position : position + 2])
            return b"".join(segments)
        length = int.from_bytes(data[position + 2 : position + 4])
        end = position + 2 + length
        # a length counts its own two bytes
        if marker in NOT_IN_SKELETON or length < 2 or end > len(data):
            return None
        segments.append(data[position:end])
        position = end
        # the scan's data follows its header, up to a marker that ends it
        if marker == START_OF_SCAN:
            following = int(np.searchsorted(scan_ends, position))
            if following == len(scan_ends):
                return None
            position = int(scan_ends[following])
    return None
