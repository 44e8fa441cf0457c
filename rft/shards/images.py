"""The preprocessing of CLIP, and the encodings that store its result.

`pixels` is the exact uint8 tensor of CLIP's evaluation transform before normalisation, so training
decodes nothing. `jpeg` is the same square as a JPEG, a fifth of its size. `original` keeps the
file. The arithmetic is torchvision's `Resize` and `CenterCrop` on a PIL image, reimplemented
because importing torchvision takes seconds; a test checks that both agree bit for bit. The bytes,
never the file name, determine an image's type. Every image is converted to RGB before resizing
(from grey, CMYK, palette), as in torchvision's image folders. OpenAI's and open_clip's transforms
convert after the crop, which is equivalent only for RGB and grey. Both reduce 16-bit grey to two
levels; rft takes the high byte instead.

Benchmarks and third-party shards are read as those loaders read them: EXIF orientation is ignored
and the colours under transparent pixels are shown. The user's own photos are first turned upright
and composed on white. The encoding records this (`PHOTOS`), so readers of `original` do the same.
"""

import io
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, assert_never

import numpy as np
import PIL
from PIL import Image
from pydantic import Field, GetPydanticSchema
from typing_extensions import TypedDict  # pydantic needs it below Python 3.12

from rft.config import MAX_PIXELS
from rft.shards.image_files import open_image, pillow_errors
from rft.storage.documents import Name

Kind = Literal["original", "jpeg", "pixels"]
LONGEST_SIDE = 2**16 - 1  # the index keeps width and height as uint16
Side = Annotated[int, Field(ge=0, le=LONGEST_SIDE)]
Square = Annotated[int, Field(ge=1, le=2048)]  # four times what open_clip's largest tower sees
Quality = Annotated[int, Field(ge=1, le=100)]
# Resizing the shorter side allocates one square for each multiple of the aspect ratio. Cropping
# first would be cheaper, but Pillow rounds a crop's offset to 32 bits, so the result would differ
# from torchvision's.
MOST_ELONGATED = 100
TOO_ELONGATED = f"the longer side may be at most {MOST_ELONGATED} times the shorter one: crop it"
# halved colour channels would be visible: patches are small
SUBSAMPLING: Literal["4:4:4"] = "4:4:4"
# The part of an encoding that marks own photos and their treatment before the resize.
PHOTOS: "Photos" = {"orientation": "exif", "alpha": "white"}
ORIENTATION = 0x0112  # the EXIF tag; below, its values (EXIF 2.32, 4.6.4 A) and what undoes them
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# a PNG with an orientation contains one of these: EXIF in its own chunk or as text, or XMP
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
GREY_16_BIT = frozenset({"I", "I;16", "I;16B", "I;16L"})  # Pillow's names have changed over time
GREY_STEP = {2: 85, 4: 17}  # bits per level of a PNG -> 8-bit distance between two levels
MODES = GREY_16_BIT | {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"}  # others are refused


class Photos(TypedDict):
    """The treatment of own photos before the resize, by packer or reader."""

    orientation: Literal["exif"]
    alpha: Literal["white"]


class Original(TypedDict):
    """Payloads are the files' own bytes; readers crop the border and treat photos."""

    kind: Literal["original"]
    crop_border: Side
    photos: NotRequired[Photos]


class Pixels(TypedDict):
    """Payloads are the square that CLIP sees, as pixels."""

    kind: Literal["pixels"]
    crop_border: Side
    size: Square
    resample: Literal["bicubic"]
    library: Name
    version: Name
    photos: NotRequired[Photos]


class Jpeg(Pixels):
    """Payloads are the same square as a JPEG."""

    kind: Literal["jpeg"]  # pyrefly: ignore
    quality: Quality
    subsampling: Literal["4:4:4"]


Described = Annotated[Original | Pixels | Jpeg, Field(discriminator="kind")]
# validated as one of the above, used as a plain JSON object
Encoding = Annotated[dict[str, Any], GetPydanticSchema(lambda _, make: make(Described))]
"""Everything that determines a payload's bytes."""


class Header(NamedTuple):
    """An image file's header; sizes in pixels, for photos after turning."""

    format: str
    mode: str
    width: int
    height: int


class Treatment(NamedTuple):
    """Steps between decoding and resize: those of `PHOTOS`, and the border to cut."""

    photo: bool = False
    border: int = 0


class Treated(NamedTuple):
    """The treatment of one photo: the EXIF orientation undone (1: none), composed on white."""

    orientation: int = 1
    composed: bool = False


AS_STORED = Treatment()


class Payload(NamedTuple):
    """The kind of a set's payloads, and their treatment by readers after decoding."""

    is_source: bool = False  # the source file itself, of any size
    is_array: bool = False  # decoded pixels (.npy), not an image file
    treatment: Treatment = AS_STORED


def encoding_parameters(
    kind: Kind, size: int, crop_border: int, quality: int = 95, *, photos: bool = False
) -> dict[str, Any]:
    """Describe an encoding for plan and manifest: everything that determines a payload's bytes.

    With `original` the border stays in the payload and the reader crops it; `photos` (see `PHOTOS`)
    are likewise turned and composed by the reader. The other kinds include the library and its
    version, because its decoders and resampling may change by a grey level.
    """
    own: dict[str, Any] = {"photos": PHOTOS} if photos else {}
    square = {
        "kind": kind,
        "size": size,
        "resample": "bicubic",
        # Pillow-SIMD calls itself PIL too; only the suffix of its version distinguishes it
        "library": "Pillow-SIMD" if ".post" in PIL.__version__ else "Pillow",
        "version": PIL.__version__,
        "crop_border": crop_border,
        **own,
    }
    match kind:
        case "original":
            return {"kind": "original", "crop_border": crop_border, **own}
        case "jpeg":
            return square | {"quality": quality, "subsampling": SUBSAMPLING}
        case "pixels":
            return square
        case _:
            assert_never(kind)


def source_treatment(encoding: dict[str, Any]) -> Treatment:
    """Look up the treatment of a set's source files before the resize."""
    return Treatment("photos" in encoding, encoding["crop_border"])


def payload_of(encoding: dict[str, Any]) -> Payload:
    """Look up the kind of a set's payloads."""
    kind: Kind = encoding["kind"]
    match kind:
        case "original":
            return Payload(is_source=True, treatment=source_treatment(encoding))
        case "jpeg":
            return Payload()  # treated by the packer
        case "pixels":
            return Payload(is_array=True)
        case _:
            assert_never(kind)


def load_image(
    data: bytes,
    name: str = "image",
    treatment: Treatment = AS_STORED,
    max_pixels: float = MAX_PIXELS,
) -> Image.Image:
    """Decode an image file to RGB, as stored or upright on white; the border is kept.

    Raises:
        ValueError: if it is not a readable JPEG, PNG or WebP, or its size is out of bounds; the
            message starts with `name`.
        OSError: if memory runs out, which is not the file's fault.
    """
    image, _ = open_checked(data, name, treatment.border, max_pixels)
    with pillow_errors(name):
        return decode(image, data, treatment)[0]


def clip_pixels(image: Image.Image, size: int, border: int = 0) -> np.ndarray:
    """Turn an RGB image into CLIP's input before normalisation, uint8 (3, size, size).

    See `clip_square`.
    """
    return channels_first(clip_square(image, size, border))


def clip_square(
    image: Image.Image,
    size: int,
    border: int = 0,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Apply CLIP's evaluation transform to an image: size x size pixels.

    `border` pixels are cut from each side, the shorter side is resized to `size` (the longer one
    rounded down), and the centre is cropped. Images are resized bicubically. With NEAREST the same
    transform keeps an object mask aligned with its image.

    Raises:
        ValueError: if nothing is left inside the border, or the longer side exceeds MOST_ELONGATED
            times the shorter one.
    """
    image = cut_border(image, border)
    short, long = sorted(image.size)
    if long > MOST_ELONGATED * short:
        raise ValueError(f"an image of {image.size} pixels: {TOO_ELONGATED}")
    # the same expression as torchvision's, for equal rounding
    longer = int(size * long / short)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    # round() rounds halves to even, as torchvision does
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def cut_border(image: Image.Image, border: int) -> Image.Image:
    """Cut `border` pixels from each side of an image.

    Raises:
        ValueError: if nothing is left inside.
    """
    if not border:
        return image
    if min(image.size) <= 2 * border:
        raise ValueError(f"an image of {image.size} pixels is all border ({border} on each side)")
    return image.crop((border, border, image.width - border, image.height - border))


@lru_cache
def npy_header(size: int) -> bytes:
    """Return the bytes before the pixels in the `.npy` payload of a square."""
    return to_npy(np.zeros((3, size, size), dtype=np.uint8))[: -3 * size**2]


def to_npy(array: np.ndarray) -> bytes:
    """Encode an array as the content of a `.npy` file; equal shapes give equal sizes."""
    stream = io.BytesIO()
    # version pinned: readers compare a sample's header with `npy_header` byte by byte
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def open_checked(
    data: bytes, name: str, border: int, max_pixels: float
) -> tuple[Image.Image, Header]:
    """Read an image's header, and check it before anything is decoded.

    Raises:
        ValueError: if the image is too small, large or elongated, or of an unknown kind.
    """
    image = open_image(data, name, max_pixels)
    _require_known(image, name, border)
    return image, Header(str(image.format), image.mode, *image.size)


def photo_of(image: Image.Image, name: str = "image") -> Image.Image:
    """Convert an image that the caller opened or made to RGB, as one of the user's own photos.

    The result equals that of `load_image` for the image's file. `name` is for messages.

    Raises:
        ValueError: if it cannot be decoded, or a file of its kind or size would be refused.
        OSError: if memory runs out.
    """
    _require_known(image, name, 0)
    with pillow_errors(name):
        image.load()
        return as_photo(image, None)[0]


def _require_known(image: Image.Image, name: str, border: int) -> None:
    """Refuse an image by its header: too small, large or elongated, or of an unknown kind."""
    if image.mode not in MODES:
        raise ValueError(f"{name} cannot be read: unsupported pixel mode {image.mode}")
    is_ = f"{name} is {image.width} x {image.height} pixels"
    short, long = sorted(image.size)
    if long > LONGEST_SIDE or short <= 2 * border:
        raise ValueError(
            f"{is_}; each side must have more than {2 * border} and at most {LONGEST_SIDE}"
        )
    if long - 2 * border > MOST_ELONGATED * (short - 2 * border):
        raise ValueError(f"{is_}; {TOO_ELONGATED}")


def decode(image: Image.Image, data: bytes, treatment: Treatment) -> tuple[Image.Image, Treated]:
    """Decode an image from `open_checked` to RGB, treated as a photo if the treatment says so."""
    image.load()
    if image.format == "WEBP":
        # its decoder holds two more pictures for the lifetime of the image
        vars(image).pop("_decoder", None)
    return as_photo(image, data) if treatment.photo else (_to_rgb(image), Treated())


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as torchvision's loader does, except 16-bit grey: its high byte."""
    if image.mode in GREY_16_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() always copies


def as_photo(image: Image.Image, data: bytes | None) -> tuple[Image.Image, Treated]:
    """Compose a decoded image on white and turn it upright; `data` is its file, if known."""
    # before the conversions: a converted image has no format, and PNGs need special treatment
    orientation = exif_orientation(image, data)
    # a palette may give each colour its own opacity, which the conversion resolves
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    alpha, rgb = _alpha(image, data), _to_rgb(image)
    if alpha is not None:
        white = Image.new("RGB", rgb.size, "white")
        white.paste(rgb, mask=alpha)
        rgb = white
    if orientation in TURNS:
        rgb = rgb.transpose(TURNS[orientation])
    return rgb, Treated(orientation, alpha is not None)


def exif_orientation(image: Image.Image, data: bytes | None) -> int:
    """Read the EXIF orientation as Pillow's `exif_transpose` does; 1 if none is readable.

    `exif_transpose` itself also rewrites the other tags, and fails on damaged ones.
    """
    is_png = image.format == "PNG" and data is not None
    if is_png and not any(mark in data for mark in PNG_ORIENTATION):
        return 1  # otherwise Pillow would decode the image to look for EXIF after the pixels
    try:
        found = image.getexif().get(ORIENTATION)
        return int(found) if found in TURNS else 1
    except MemoryError:  # the machine's fault: `pillow_errors` turns it into an OSError
        raise
    except Exception:  # parsers fail in many ways; an image is not refused for a damaged tag
        return 1


def _alpha(image: Image.Image, data: bytes | None) -> Image.Image | None:
    """Extract the opacity of each pixel, mode L; None if the image is opaque."""
    if "A" in image.mode:
        alpha = image.getchannel("A")
    elif "transparency" in image.info:
        if data is None:  # an opened image does not keep the file's bit depth
            raise ValueError("one of its colours is transparent; pass the path of its file instead")
        alpha = _alpha_of_key(image, data)
    else:
        return None
    return None if alpha.getextrema() == (255, 255) else alpha


def _alpha_of_key(image: Image.Image, data: bytes) -> Image.Image:
    """Compute the opacity of a PNG in which one colour is transparent.

    Pillow scales the pixels to 8 bits, but keeps the colour in levels of the file's bit depth.
    """
    # follows the chunk's type, and 4 bytes each for width and height
    depth = data[data.index(b"IHDR") + 12]
    key, pixels = np.array(image.info["transparency"]), np.asarray(image)
    if image.mode == "RGB":
        if depth == 16:  # Pillow keeps only the high bytes: other colours would match the key too
            raise ValueError("its transparent colour has 16 bits; save it with an alpha channel")
        clear_HW = (pixels == key).all(axis=2)
    elif image.mode == "1":
        clear_HW = pixels == (key > 0)
    else:
        clear_HW = pixels == key * GREY_STEP.get(depth, 1)
    return Image.fromarray(np.where(clear_HW, np.uint8(0), np.uint8(255)))


def channels_first(image: Image.Image) -> np.ndarray:
    """Reorder the pixels of an RGB image as in tensors: (3, height, width)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
