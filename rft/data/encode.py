"""How one image becomes one payload: its own bytes (`original`) or CLIP's input (`pixels`).

`pixels` is the exact uint8 tensor that CLIP's evaluation transform gives before normalisation, so
nothing is decoded while training. The arithmetic is torchvision's `Resize` and `CenterCrop` on a
PIL image, written out because importing torchvision costs seconds; a test holds the two equal bit
for bit. The type of an image is what its bytes say, never its file name.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL
from PIL import Image

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> member
FORMATS = ("JPEG", "PNG", "WEBP")  # MPO is a JPEG with further pictures behind the first
LONGEST_SIDE = 2**16 - 1  # the index keeps width and height as uint16
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


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One encoded image: the member's bytes and suffix, and what the source image was."""

    payload: bytes
    suffix: str
    format: str
    mode: str
    width: int
    height: int


def encoding_parameters(
    kind: Literal["original", "pixels"], size: int, crop_border: int
) -> dict[str, Any]:
    """Return the manifest's description of an encoding: all that decides the payload's bytes.

    With `original` the border stays in the payload and the reader crops it. Pillow's version
    belongs to `pixels` because its decoders and resampling may change by a grey level.
    """
    if kind == "original":
        return {"kind": "original", "crop_border": crop_border}
    return {
        "kind": "pixels",
        "size": size,
        "resample": "bicubic",
        "pillow": PIL.__version__,
        "crop_border": crop_border,
    }


def load_image(data: bytes, name: str = "image") -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        ValueError: if it is no readable JPEG, PNG or WebP; the message starts with `name`.
    """
    return _to_rgb(_open(data, name), name)


def clip_pixels(image: Image.Image, size: int, border: int = 0) -> np.ndarray:
    """Return CLIP's input before normalisation, uint8 (3, size, size), from an RGB image.

    `border` pixels are cut from each side, the shorter side is resized to `size` (bicubic, the
    longer one rounded down), and the centre is cropped.

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
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    # round() takes halves to the even neighbour, and so does torchvision
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def encode(data: bytes, name: str, encoding: dict[str, Any]) -> Encoded:
    """Encode the image file `data`; `name` is for messages.

    Raises:
        ValueError: if the image cannot be decoded, starting with `name`.
    """
    image = _open(data, name)
    format_name, mode, (width, height) = str(image.format), image.mode, image.size
    border = encoding["crop_border"]
    if max(width, height) > LONGEST_SIDE or min(width, height) <= 2 * border:
        raise ValueError(
            f"{name} is {width} x {height} pixels; a side must have more than {2 * border} "
            f"and at most {LONGEST_SIDE}"
        )
    if encoding["kind"] == "pixels":
        pixels = clip_pixels(_to_rgb(image, name), encoding["size"], border)
        payload, suffix = to_npy(pixels), "npy"
    else:
        _decode_fast(image, name)
        payload, suffix = data, SUFFIXES[format_name]
    return Encoded(
        payload=payload, suffix=suffix, format=format_name, mode=mode, width=width, height=height
    )


def payload_bytes(encoding: dict[str, Any]) -> int | None:
    """Return the size of every payload of this encoding, or None where it depends on the image."""
    if encoding["kind"] == "original":
        return None
    return len(to_npy(np.zeros((3, encoding["size"], encoding["size"]), dtype=np.uint8)))


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


def _decode_fast(image: Image.Image, name: str) -> None:
    """Decode an image only to learn that it can be.

    A JPEG is decoded at an eighth of its size, which still reads the whole stream and so finds a
    truncated one at a fraction of the cost.
    """
    try:
        image.draft("L", (1, 1))
        image.load()
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error
