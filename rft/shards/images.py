"""What CLIP sees of an image, and which encoding keeps how much of it.

`pixels` is the exact uint8 tensor that CLIP's evaluation transform gives before normalisation, so
nothing is decoded while training; `jpeg` is the same square as a JPEG, a fifth of its size;
`original` keeps the file. The arithmetic is torchvision's `Resize` and `CenterCrop` on a PIL image,
written out because importing torchvision costs seconds; a test holds the two equal bit for bit. The
type of an image is what its bytes say, never its file name, and every image is RGB before it is
resized, whatever it was (grey, CMYK, palette), as torchvision's image folders have it. OpenAI's and
open_clip's transforms convert after the crop, which is the same for RGB and grey alone. Both reduce
16-bit grey to two levels, so that one conversion is our own: the high byte.

Benchmarks and third-party shards are read as those loaders read them: EXIF orientation is ignored
and the colours under transparent pixels are shown. The user's own photos are turned upright and
composed on white first; the encoding says so (`PHOTOS`), so readers of `original` do it too.
"""

import io
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, assert_never

import numpy as np
import PIL
from PIL import Image
from pydantic import Field, GetPydanticSchema
from typing_extensions import TypedDict  # typing's lacks what pydantic needs below Python 3.12

from rft.config import MAX_PIXELS
from rft.shards.image_files import open_image, pillow_errors
from rft.storage.documents import Name

Kind = Literal["original", "jpeg", "pixels"]
LONGEST_SIDE = 2**16 - 1  # the index keeps width and height as uint16
Side = Annotated[int, Field(ge=0, le=LONGEST_SIDE)]
Square = Annotated[int, Field(ge=1, le=2048)]  # four times what open_clip's largest tower sees
Quality = Annotated[int, Field(ge=1, le=100)]
# Resizing the shorter side to the square's allocates as many squares as the image is longer than
# wide. Cropping first would be cheaper, but Pillow rounds the offset of a crop to 32 bits, so its
# result differs from torchvision's.
MOST_ELONGATED = 100
TOO_ELONGATED = f"the longer side may have at most {MOST_ELONGATED} times the shorter one: crop it"
SUBSAMPLING: Literal["4:4:4"] = "4:4:4"  # halving the colour channels would show: patches are small
# The part of an encoding that marks own photos, and what is done to them before the resize.
PHOTOS: "Photos" = {"orientation": "exif", "alpha": "white"}
ORIENTATION = 0x0112  # the EXIF tag; its values (EXIF 2.32, 4.6.4 A) as what turns the image back
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# what a PNG with an orientation holds somewhere: EXIF as its own chunk or as text, or XMP
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
GREY_16_BIT = frozenset({"I", "I;16", "I;16B", "I;16L"})  # Pillow's names have changed over time
GREY_STEP = {2: 85, 4: 17}  # from one level to the next of a PNG with so few bits
MODES = GREY_16_BIT | {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"}  # others are refused


class Photos(TypedDict):
    """What was done, or has to be done, to own photos before the resize."""

    orientation: Literal["exif"]
    alpha: Literal["white"]


class Original(TypedDict):
    """Payloads are the files' own bytes; readers crop the border and treat photos."""

    kind: Literal["original"]
    crop_border: Side
    photos: NotRequired[Photos]


class Pixels(TypedDict):
    """Payloads are what CLIP sees of an image."""

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
# checked as what it describes, used as the JSON object that it is
Encoding = Annotated[dict[str, Any], GetPydanticSchema(lambda _, make: make(Described))]
"""All that decides a payload's bytes."""


class Header(NamedTuple):
    """What an image file says about itself; sizes in pixels, of a photo after it is turned."""

    format: str
    mode: str
    width: int
    height: int


class Treatment(NamedTuple):
    """What is done to a decoded file before the resize: see `PHOTOS`, and the border to cut."""

    photo: bool = False
    border: int = 0


class Treated(NamedTuple):
    """What was done to one photo: the EXIF orientation undone (1 is none), composed on white."""

    orientation: int = 1
    composed: bool = False


AS_STORED = Treatment()


class Payload(NamedTuple):
    """What the payloads of a set are, and what readers do to them after decoding."""

    is_source: bool = False  # the file of the source itself, of any size
    is_array: bool = False  # decoded pixels (.npy), no image file
    treatment: Treatment = AS_STORED


def encoding_parameters(
    kind: Kind, size: int, crop_border: int, quality: int = 95, *, photos: bool = False
) -> dict[str, Any]:
    """Describe an encoding for plan and manifest: all that decides the payload's bytes.

    With `original` the border stays in the payload and the reader crops it; `photos` (see `PHOTOS`)
    are likewise turned and composed by the reader. The library and its version belong to the others
    because decoders and resampling may change by a grey level.
    """
    own: dict[str, Any] = {"photos": PHOTOS} if photos else {}
    square = {
        "kind": kind,
        "size": size,
        "resample": "bicubic",
        # Pillow-SIMD calls itself PIL too; only its version tells, by its suffix
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
    """Look up what is done to the source files of a set before the resize."""
    return Treatment("photos" in encoding, encoding["crop_border"])


def payload_of(encoding: dict[str, Any]) -> Payload:
    """Look up what the payloads of a set are."""
    kind: Kind = encoding["kind"]
    match kind:
        case "original":
            return Payload(is_source=True, treatment=source_treatment(encoding))
        case "jpeg":
            return Payload()  # treated before it was made
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
    """Decode an image file to RGB, as it is stored or upright on white; the border is kept.

    Raises:
        ValueError: if it is no readable JPEG, PNG or WebP, or its size is out of bounds; the
            message starts with `name`.
        OSError: if there is not enough memory, which is not the file's fault.
    """
    image, _ = open_checked(data, name, treatment.border, max_pixels)
    with pillow_errors(name):
        return decode(image, data, treatment)[0]


def clip_pixels(image: Image.Image, size: int, border: int = 0) -> np.ndarray:
    """Return CLIP's input before normalisation, uint8 (3, size, size), from an RGB image.

    See `clip_square`.
    """
    return channels_first(clip_square(image, size, border))


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
        ValueError: if nothing is left inside the border, or one side is over MOST_ELONGATED times
            the other.
    """
    image = cut_border(image, border)
    short, long = sorted(image.size)
    if long > MOST_ELONGATED * short:
        raise ValueError(f"an image of {image.size} pixels: {TOO_ELONGATED}")
    # torchvision's own expression
    longer = int(size * long / short)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    # round() takes halves to the even neighbour, and so does torchvision
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
        raise ValueError(f"an image of {image.size} pixels is all border ({border} a side)")
    return image.crop((border, border, image.width - border, image.height - border))


@lru_cache
def npy_header(size: int) -> bytes:
    """Return what comes before the pixels in the `.npy` payload of a square."""
    return to_npy(np.zeros((3, size, size), dtype=np.uint8))[: -3 * size**2]


def to_npy(array: np.ndarray) -> bytes:
    """Return `array` as the content of a `.npy` file; equal shapes give equal sizes."""
    stream = io.BytesIO()
    # version pinned: readers compare a sample's header with `npy_header` byte by byte
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def open_checked(
    data: bytes, name: str, border: int, max_pixels: float
) -> tuple[Image.Image, Header]:
    """Read an image's header, and refuse what it announces before any of it is decoded.

    Raises:
        ValueError: if the image is too small, large or elongated, or of a kind that is not known.
    """
    image = open_image(data, name, max_pixels)
    _require_known(image, name, border)
    return image, Header(str(image.format), image.mode, *image.size)


def photo_of(image: Image.Image, name: str = "image") -> Image.Image:
    """Treat an image that the caller opened or made as one of the user's own photos, to RGB.

    The result is that of `load_image` for the file it was opened from. `name` is for messages.

    Raises:
        ValueError: if it cannot be decoded, or is of a kind or size that is not read from files.
        OSError: if there is not enough memory.
    """
    _require_known(image, name, 0)
    with pillow_errors(name):
        image.load()
        return as_photo(image, None)[0]


def _require_known(image: Image.Image, name: str, border: int) -> None:
    """Refuse an image by its header: too small, large or elongated, or of an unknown kind."""
    if image.mode not in MODES:
        raise ValueError(f"{name} cannot be read: its pixels are of mode {image.mode}")
    is_ = f"{name} is {image.width} x {image.height} pixels"
    short, long = sorted(image.size)
    if long > LONGEST_SIDE or short <= 2 * border:
        raise ValueError(
            f"{is_}; a side must have more than {2 * border} and at most {LONGEST_SIDE}"
        )
    if long - 2 * border > MOST_ELONGATED * (short - 2 * border):
        raise ValueError(f"{is_}; {TOO_ELONGATED}")


def decode(image: Image.Image, data: bytes, treatment: Treatment) -> tuple[Image.Image, Treated]:
    """Decode an image that `open_checked` opened to RGB, and treat it as a photo if it is one."""
    image.load()
    if image.format == "WEBP":
        # its decoder keeps two more pictures for as long as the image is there
        vars(image).pop("_decoder", None)
    return as_photo(image, data) if treatment.photo else (_to_rgb(image), Treated())


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert as torchvision's loader does, but 16-bit grey to its high byte."""
    if image.mode in GREY_16_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def as_photo(image: Image.Image, data: bytes | None) -> tuple[Image.Image, Treated]:
    """Compose a decoded image on white and turn it upright; `data` is its file, where known."""
    # before the conversions: a converted image has no format, and PNGs are treated apart
    orientation = exif_orientation(image, data)
    # a palette may give each colour an opacity of its own, which the conversion resolves
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
    """Read the EXIF orientation as Pillow's `exif_transpose` does; 1 if there is no readable one.

    `exif_transpose` itself rewrites the other tags, and fails on damaged ones.
    """
    is_png = image.format == "PNG" and data is not None
    if is_png and not any(mark in data for mark in PNG_ORIENTATION):
        return 1  # without the marks Pillow would decode it to look behind the pixels
    try:
        found = image.getexif().get(ORIENTATION)
        return int(found) if found in TURNS else 1
    except MemoryError:  # the machine's fault: `pillow_errors` makes an OSError of it
        raise
    except Exception:  # parsers slip in many ways; a damaged tag is no reason to leave out an image
        return 1


def _alpha(image: Image.Image, data: bytes | None) -> Image.Image | None:
    """Return the opacity of each pixel, mode L; None if the image is opaque."""
    if "A" in image.mode:
        alpha = image.getchannel("A")
    elif "transparency" in image.info:
        if data is None:  # the depth of the file's levels is not kept
            raise ValueError("one colour of it is transparent; give the path of its file")
        alpha = _alpha_of_key(image, data)
    else:
        return None
    return None if alpha.getextrema() == (255, 255) else alpha


def _alpha_of_key(image: Image.Image, data: bytes) -> Image.Image:
    """Return the opacity of a PNG in which one colour is transparent.

    Pillow leaves the colour as the file has it, in levels of the file's depth, and scales the
    pixels.
    """
    # behind the chunk's type, and 4 bytes each of width and height
    depth = data[data.index(b"IHDR") + 12]
    key, pixels = np.array(image.info["transparency"]), np.asarray(image)
    if image.mode == "RGB":
        if depth == 16:  # Pillow keeps the high bytes alone: other colours would match the key too
            raise ValueError("its transparent colour has 16 bits; save it with an alpha channel")
        clear_HW = (pixels == key).all(axis=2)
    elif image.mode == "1":
        clear_HW = pixels == (key > 0)
    else:
        clear_HW = pixels == key * GREY_STEP.get(depth, 1)
    return Image.fromarray(np.where(clear_HW, np.uint8(0), np.uint8(255)))


def channels_first(image: Image.Image) -> np.ndarray:
    """Return the pixels of an RGB image as tensors have them, (3, height, width)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
