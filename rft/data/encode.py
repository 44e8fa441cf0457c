"""How one image becomes one payload: its own bytes, or what CLIP sees of it.

`original` keeps the file. `pixels` is the exact uint8 tensor that CLIP's evaluation transform gives
before normalisation, so nothing is decoded while training; `jpeg` is the same square as a JPEG, a
fifth of its size. The arithmetic is torchvision's `Resize` and `CenterCrop` on a PIL image, written
out because importing torchvision costs seconds; a test holds the two equal bit for bit. The type of
an image is what its bytes say, never its file name, and every image is RGB before it is resized,
whatever it was (grey, CMYK, palette, 16 bit), as torchvision's image folders have it. OpenAI's and
open_clip's transforms convert after the crop, which is the same for RGB and grey alone.
"""

import contextlib
import io
import struct
import zlib
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
from PIL import Image

Kind = Literal["original", "jpeg", "pixels"]

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> member
FORMATS = ("JPEG", "PNG", "WEBP")  # MPO is a JPEG with further pictures behind the first
LONGEST_SIDE = 2**16 - 1  # the index keeps width and height as uint16
SUBSAMPLING = "4:4:4"  # halving the colour channels would show: patches are small
# JPEG markers: a second byte behind 0xFF (ISO/IEC 10918-1, table B.1)
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN, FILL = 0xD8, 0xD9, 0xDA, 0xFF
RESTARTS = range(0xD0, 0xD8)
DEFINE_RESTART_INTERVAL = 0xDD
NOT_IN_SKELETON = frozenset({0x00, 0x01, *RESTARTS, START_OF_IMAGE, FILL, DEFINE_RESTART_INTERVAL})
# what does not end entropy-coded data: a stuffed 0xFF, a restart, and a fill byte before a marker
ENDS_SCAN = ~np.isin(np.arange(256), [0x00, *RESTARTS, FILL])
# What Pillow raises on damaged files, beyond its own UnidentifiedImageError (an OSError).
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Header(NamedTuple):
    """What an image file says about itself; sizes in pixels."""

    format: str
    mode: str
    width: int
    height: int


class Encoded(NamedTuple):
    """One encoded image: the member's bytes and suffix, and what the source image was."""

    payload: bytes
    suffix: str
    header: Header


def encoding_parameters(
    kind: Kind, size: int, crop_border: int, quality: int = 95
) -> dict[str, Any]:
    """Return the manifest's description of an encoding: all that decides the payload's bytes.

    With `original` the border stays in the payload and the reader crops it. The library and its
    version belong to the others because decoders and resampling may change by a grey level.
    """
    if kind == "original":
        return {"kind": "original", "crop_border": crop_border}
    square = {
        "kind": kind,
        "size": size,
        "resample": "bicubic",
        # Pillow-SIMD calls itself PIL too; only its version tells, by its suffix
        "library": "Pillow-SIMD" if ".post" in PIL.__version__ else "Pillow",
        "version": PIL.__version__,
        "crop_border": crop_border,
    }
    if kind == "jpeg":
        square |= {"quality": quality, "subsampling": SUBSAMPLING}
    return square


def load_image(data: bytes, name: str = "image") -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        ValueError: if it is no readable JPEG, PNG or WebP; the message starts with `name`.
    """
    return _to_rgb(_open(data, name), name)


def clip_pixels(image: Image.Image, size: int, border: int = 0) -> np.ndarray:
    """Return CLIP's input before normalisation, uint8 (3, size, size), from an RGB image.

    See `clip_square`.
    """
    return _channels_first(clip_square(image, size, border))


def clip_square(
    image: Image.Image,
    size: int,
    border: int = 0,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Return what CLIP's evaluation transform leaves of an image, size x size pixels.

    `border` pixels are cut from each side, the shorter side is resized to `size` (the longer one
    rounded down), and the centre is cropped. Images are resized bicubically; an object mask goes
    the same way with NEAREST, and stays on its object.

    Raises:
        ValueError: if nothing is left inside the border.
    """
    if border:
        if min(image.size) <= 2 * border:
            raise ValueError(f"an image of {image.size} pixels is all border ({border} a side)")
        image = image.crop((border, border, image.width - border, image.height - border))
    short, long = sorted(image.size)
    longer = int(size * long / short)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    # round() takes halves to the even neighbour, and so does torchvision
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def encode(data: bytes, name: str, encoding: dict[str, Any]) -> Encoded:
    """Encode the image file `data`; `name` is for messages.

    Raises:
        ValueError: if the image cannot be decoded, starting with `name`.
    """
    kind, border = encoding["kind"], encoding["crop_border"]
    if kind == "original":
        header = _header_of_whole(data, name)
        _require_size(header, border, name)
        return Encoded(data, SUFFIXES[header.format], header)
    image = _open(data, name)
    header = _header(image)
    _require_size(header, border, name)
    square = clip_square(_to_rgb(image, name), encoding["size"], border)
    if kind == "jpeg":
        return Encoded(to_jpeg(square, encoding["quality"]), "jpg", header)
    assert kind == "pixels"
    return Encoded(to_npy(_channels_first(square)), "npy", header)


def expected_bytes(encoding: dict[str, Any], source_bytes: int) -> int:
    """Return about how large a payload will be, known before anything is decoded.

    Exact for `original` and `pixels`. A JPEG of a photograph made small takes up to a byte a pixel
    at quality 95.
    """
    match encoding["kind"]:
        case "original":
            return source_bytes
        case "jpeg":
            return encoding["size"] ** 2
    return _npy_bytes(encoding["size"])


@lru_cache
def _npy_bytes(size: int) -> int:
    return len(to_npy(np.zeros((3, size, size), dtype=np.uint8)))


def to_jpeg(image: Image.Image, quality: int) -> bytes:
    """Return an RGB image as a JPEG without metadata; equal pixels give equal bytes."""
    stream = io.BytesIO()
    # through an array, because Pillow would save the comment of the file the image came from
    bare = Image.fromarray(np.asarray(image))
    bare.save(stream, "JPEG", quality=quality, subsampling=SUBSAMPLING)
    return stream.getvalue()


def to_npy(array: np.ndarray) -> bytes:
    """Return `array` as the content of a `.npy` file; equal shapes give equal sizes."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _open(data: bytes, name: str) -> Image.Image:
    """Read an image's header."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is no readable JPEG, PNG or WebP image") from error
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        return image.convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _header(image: Image.Image) -> Header:
    return Header(str(image.format), image.mode, *image.size)


def _require_size(header: Header, border: int, name: str) -> None:
    sides = (header.width, header.height)
    if max(sides) > LONGEST_SIDE or min(sides) <= 2 * border:
        raise ValueError(
            f"{name} is {header.width} x {header.height} pixels; a side must have more than "
            f"{2 * border} and at most {LONGEST_SIDE}"
        )


def _header_of_whole(data: bytes, name: str) -> Header:
    """Return format, mode and size of an image file of which all can be decoded.

    Decoding a JPEG only to learn that it can be costs ten times as much as copying it. Nearly all
    of that is spent on its entropy-coded data, in which libjpeg takes any damage with a warning.
    What it refuses lies elsewhere: in a marker segment, which `jpeg_skeleton` keeps, or in data
    that ends before the image does, and a file with an end marker behind its scans cannot. So a
    skeleton that decodes proves the file; whatever has none, or one that fails, is decoded whole.
    """
    skeleton = jpeg_skeleton(data)
    if skeleton is not None:
        # when it fails the whole file decides, and its error is the one to show
        with contextlib.suppress(*UNREADABLE):
            return _decode_coarsely(Image.open(io.BytesIO(skeleton), formats=FORMATS))
    image = _open(data, name)
    try:
        return _decode_coarsely(image)
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _decode_coarsely(image: Image.Image) -> Header:
    """Decode an image, a JPEG at an eighth of its size (it still reads all of it): its header."""
    header = _header(image)
    image.draft("L", (1, 1))
    image.load()
    return header


def jpeg_skeleton(data: bytes) -> bytes | None:
    """Return a JPEG without its entropy-coded data: markers and segments up to the end marker.

    None if `data` is no JPEG that goes on from segment to segment to its end marker, or one with
    restart markers: looking for the next of these, libjpeg can run past the end marker.
    """
    if not data.startswith(bytes((FILL, START_OF_IMAGE))):
        return None
    # found at once by numpy: a loop over the file costs as much as decoding it
    array = np.frombuffer(data, dtype=np.uint8)
    fills = np.flatnonzero(array[:-1] == FILL)
    scan_ends = fills[ENDS_SCAN[array[fills + 1]]]
    segments, position = [data[:2]], 2
    while len(data) - position >= 2 and data[position] == FILL:
        marker = data[position + 1]
        if marker == END_OF_IMAGE:
            segments.append(data[position : position + 2])
            return b"".join(segments)
        length = int.from_bytes(data[position + 2 : position + 4])
        end = position + 2 + length
        if marker in NOT_IN_SKELETON or length < 2 or end > len(data):
            return None
        segments.append(data[position:end])
        position = end
        if marker == START_OF_SCAN:
            following = int(np.searchsorted(scan_ends, position))
            if following == len(scan_ends):
                return None
            position = int(scan_ends[following])
    return None
