"""How one image becomes one payload: its own bytes, or what CLIP sees of it.

`original` keeps the file. `pixels` is the exact uint8 tensor that CLIP's evaluation transform gives
before normalisation, so nothing is decoded while training; `jpeg` is the same square as a JPEG, a
fifth of its size. The arithmetic is torchvision's `Resize` and `CenterCrop` on a PIL image, written
out because importing torchvision costs seconds; a test holds the two equal bit for bit. The type of
an image is what its bytes say, never its file name, and every image is RGB before it is resized,
whatever it was (grey, CMYK, palette), as torchvision's image folders have it. OpenAI's and
open_clip's transforms convert after the crop, which is the same for RGB and grey alone. Both reduce
16-bit grey to two levels, so that one conversion is our own: the high byte.

Benchmarks and third-party shards are read as those loaders read them: EXIF orientation is ignored
and the colours under transparent pixels are shown. The user's own photos are turned upright and
composed on white first; the encoding says so (`PHOTOS`), so readers of `original` do it too.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

import numpy as np
import PIL
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from pydantic import Field, GetPydanticSchema
from typing_extensions import TypedDict  # typing's lacks what pydantic needs below Python 3.12

from rft.config import MAX_PIXELS
from rft.storage.documents import Name

Kind = Literal["original", "jpeg", "pixels"]

BYTES_PER_PIXEL = 4  # of a file: more than any format takes for what is decoded to 8 bits
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> member
FORMATS = ("JPEG", "PNG", "WEBP")  # MPO is a JPEG with further pictures behind the first
LONGEST_SIDE = 2**16 - 1  # the index keeps width and height as uint16
Side = Annotated[int, Field(ge=0, le=LONGEST_SIDE)]
Square = Annotated[int, Field(ge=1, le=2048)]  # four times what open_clip's largest tower sees
Quality = Annotated[int, Field(ge=1, le=100)]
# Resizing the shorter side to the square's allocates as many squares as the image is longer than
# wide. Cropping first would be cheaper, but Pillow rounds the offset of a crop to 32 bits, so its
# result differs from torchvision's.
MOST_ELONGATED = 100
SUBSAMPLING: Literal["4:4:4"] = "4:4:4"  # halving the colour channels would show: patches are small
# JPEG markers: a second byte behind 0xFF (ISO/IEC 10918-1, table B.1)
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN, FILL = 0xD8, 0xD9, 0xDA, 0xFF
RESTARTS = range(0xD0, 0xD8)
STARTS_OR_ENDS = (START_OF_SCAN, END_OF_IMAGE)
DEFINE_RESTART_INTERVAL = 0xDD
NOT_IN_SKELETON = frozenset({0x00, 0x01, *RESTARTS, START_OF_IMAGE, FILL, DEFINE_RESTART_INTERVAL})
# what does not end entropy-coded data: a stuffed 0xFF, a restart, and a fill byte before a marker
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
SCANS = 20  # of a JPEG with as many pixels as may be, more of a smaller one; encoders write 10
SEGMENTS = 10_000  # of a JPEG; a depth map beside it takes some hundred
PARSED_BYTES = 2**24  # of what Pillow parses or copies: 256 times what one segment can hold
FILL_BYTES = 2**16  # between the segments of a JPEG
PARSED = (b"Exif\0\0", b"Photoshop 3.0\0")
FILLS = (
    2**24
)  # places that may end a scan, each of which takes eight bytes while they are looked at
CHUNKS = 300_000  # of a PNG; the largest one has 55,000 of the size that libpng writes
PROFILES = 10  # of a PNG, which may have one
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_FRAME = 12  # bytes of a chunk around its content
ENDS_SCAN = ~np.isin(np.arange(256), [0x00, *RESTARTS, FILL])
# Pillow registers a format when its plugin is imported
assert all((JpegImagePlugin, PngImagePlugin, WebPImagePlugin))
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
SWAPS_SIDES = range(5, 9)
# what a PNG with an orientation holds somewhere: EXIF as its own chunk or as text, or XMP
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
GREY_16_BIT = frozenset({"I", "I;16", "I;16B", "I;16L"})  # Pillow's names have changed over time
GREY_STEP = {1: 255, 2: 85, 4: 17}  # from one level to the next of a PNG with fewer bits
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


class Encoded(NamedTuple):
    """One encoded image: the member's bytes and suffix, and what the source image was."""

    payload: bytes
    suffix: str
    header: Header
    treated: Treated = Treated()


def encoding_parameters(
    kind: Kind, size: int, crop_border: int, quality: int = 95, *, photos: bool = False
) -> dict[str, Any]:
    """Describe an encoding for plan and manifest: all that decides the payload's bytes.

    With `original` the border stays in the payload and the reader crops it; `photos` (see `PHOTOS`)
    are likewise turned and composed by the reader. The library and its version belong to the others
    because decoders and resampling may change by a grey level.
    """
    own = {"photos": PHOTOS} if photos else {}
    if kind == "original":
        return {"kind": "original", "crop_border": crop_border, **own}
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
    if kind == "jpeg":
        square |= {"quality": quality, "subsampling": SUBSAMPLING}
    return square


def source_treatment(encoding: dict[str, Any]) -> Treatment:
    """Look up what is done to the source files of a set before the resize."""
    return Treatment("photos" in encoding, encoding["crop_border"])


def payload_treatment(encoding: dict[str, Any]) -> Treatment:
    """Look up what readers do to the payloads: nothing to a JPEG, which was treated before."""
    return AS_STORED if encoding["kind"] == "jpeg" else source_treatment(encoding)


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
    image, _ = _open(data, name, treatment.border, max_pixels)
    with named(name):
        return _decode(image, data, treatment)[0]


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
        ValueError: if nothing is left inside the border, or one side is over MOST_ELONGATED times
            the other.
    """
    if border:
        if min(image.size) <= 2 * border:
            raise ValueError(f"an image of {image.size} pixels is all border ({border} a side)")
        image = image.crop((border, border, image.width - border, image.height - border))
    short, long = sorted(image.size)
    if long > MOST_ELONGATED * short:
        raise ValueError(f"an image of {image.size} pixels: {_too_elongated()}")
    longer = int(size * long / short)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    # round() takes halves to the even neighbour, and so does torchvision
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def encode(
    data: bytes, name: str, encoding: dict[str, Any], max_pixels: float = MAX_PIXELS
) -> Encoded:
    """Encode the image file `data`; `name` is for messages.

    Raises:
        ValueError: if the image cannot be decoded, starting with `name`.
    """
    kind, treatment = encoding["kind"], source_treatment(encoding)
    if kind == "original":
        header, treated = _header_of_whole(data, name, treatment, max_pixels)
        return Encoded(data, SUFFIXES[header.format], header, treated)
    image, header = _open(data, name, treatment.border, max_pixels)
    with named(name):
        rgb, treated = _decode(image, data, treatment)
        square = clip_square(rgb, encoding["size"], treatment.border)
    header = _upright(header, treated)
    if kind == "jpeg":
        return Encoded(to_jpeg(square, encoding["quality"]), "jpg", header, treated)
    assert kind == "pixels"
    return Encoded(to_npy(_channels_first(square)), "npy", header, treated)


def identify(
    data: bytes, name: str, border: int, max_pixels: float = MAX_PIXELS
) -> tuple[Header, Treated]:
    """Read format, mode and size of an image file that will be shown as it is stored.

    Beside it stands what would be done to it as a photo: whether it is composed is guessed from the
    header, so nothing is decoded.

    Raises:
        ValueError: if it is no JPEG, PNG or WebP or its size is out of bounds, starting with
            `name`.
    """
    image, header = _open(data, name, border, max_pixels)
    may_be_transparent = "A" in image.mode or "transparency" in image.info
    with named(name):
        return header, Treated(_orientation(image, data), may_be_transparent)


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
    size = encoding["size"]
    return len(npy_header(size)) + 3 * size**2


@lru_cache
def npy_header(size: int) -> bytes:
    """Return what comes before the pixels in the `.npy` payload of a square."""
    return to_npy(np.zeros((3, size, size), dtype=np.uint8))[: -3 * size**2]


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


def open_image(
    data: bytes, name: str, max_pixels: float = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Read the header of an image file, and refuse one of too many pixels before it is decoded.

    `Image.open` would keep to itself why a file is not read ("cannot handle 12-bit layers"), and
    has a limit of its own, for the whole process.

    Args:
        data: the file.
        name: for messages.
        max_pixels: how many it may have, in millions.
        formats: Pillow's names of the formats that it may have.

    Raises:
        ValueError: if it cannot be read, or has too many bytes or pixels.
    """
    require_affordable(len(data), name, max_pixels)
    for known in formats:
        factory, accept = Image.OPEN[known]
        if accept is None or accept(data[:16]) is not True:
            continue
        if known == "JPEG":
            _require_few_segments(data, name)
        elif known == "PNG":
            _require_few_chunks(data, name)
        with named(name, "read"):
            image = factory(io.BytesIO(data), "")
        millions = image.width * image.height / 1e6
        if millions > max_pixels:
            raise ValueError(
                f"{name} is {image.width} x {image.height} pixels, {millions:,.1f} million; "
                f"--max-pixels allows {max_pixels:g} million: raise it for your own pictures"
            )
        if known == "JPEG":
            _require_few_scans(data, name, int(SCANS * max_pixels / millions))
        return image
    *others, last = (known.replace("WEBP", "WebP") for known in formats)
    raise ValueError(
        f"{name} is no readable {', '.join(others)}{' or ' * bool(others)}{last} image"
    )


def _require_few_segments(data: bytes, name: str) -> None:
    """Refuse a JPEG of more segments or metadata, before its pixels, than reading it may cost.

    Pillow reads each segment, and each byte between two of them, in Python; it copies the EXIF that
    it has for each further segment of it.
    """
    segments = parsed = between = 0
    position = 2
    while (found := NEXT_MARKER.search(data, position)) and found[0][1] not in STARTS_OR_ENDS:
        start, length = found.end(), int.from_bytes(data[found.end() : found.end() + 2])
        segments += 1
        between += found.start() - position
        parsed += length if data.startswith(PARSED, start + 2) else 0
        _require_few(segments, SEGMENTS, "segments", name)
        _require_few(parsed, PARSED_BYTES, "bytes of EXIF and Photoshop's blocks", name)
        position = start + length
    between += (found.start() if found else len(data)) - position
    _require_few(between, FILL_BYTES, "bytes between its segments", name)


def _require_few_scans(data: bytes, name: str, allowed: int) -> None:
    """Refuse a progressive JPEG of more scans than decoding it may cost.

    Each of them passes over all pixels, for a few bytes of the file.
    """
    # counting markers, thumbnails' among them, is fast and nearly always enough
    if data.count(bytes((FILL, START_OF_SCAN))) <= allowed:
        return
    segments = scans = 0
    position = 2
    while (found := NEXT_MARKER.search(data, position)) and found[0][1] != END_OF_IMAGE:
        segments += 1
        scans += found[0][1] == START_OF_SCAN
        _require_few(segments, SEGMENTS, "segments", name)
        _require_few(scans, allowed, "scans, too many for its pixels", name)
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2])


def _require_few(count: int, most: int, what: str, name: str) -> None:
    if count > most:
        raise ValueError(
            f"{name} has more than {most:,} {what}; open it in a program and save it anew"
        )


def _require_few_chunks(data: bytes, name: str) -> None:
    """Refuse a PNG of more chunks than reading it may cost.

    Pillow reads each of them in Python, and unpacks each colour profile to up to a megabyte.
    """
    chunks = profiles = 0
    position = len(PNG_START)
    while position < len(data) and data[position + 4 : position + 8] != b"IEND":
        profiles += data[position + 4 : position + 8] == b"iCCP"
        position += PNG_FRAME + int.from_bytes(data[position : position + 4])
        chunks += 1
        _require_few(chunks, CHUNKS, "chunks", name)
        _require_few(profiles, PROFILES, "colour profiles", name)


def require_affordable(count: int, name: str, max_pixels: float = MAX_PIXELS) -> None:
    """Check the size of an image file before it is read into memory.

    Raises:
        ValueError: if it has more bytes than so many million pixels need.
    """
    if count > BYTES_PER_PIXEL * max_pixels * 1e6:
        raise ValueError(
            f"{name} has {count:,} bytes, more than {BYTES_PER_PIXEL} for each of the "
            f"{max_pixels:g} million pixels that --max-pixels allows"
        )


def _open(data: bytes, name: str, border: int, max_pixels: float) -> tuple[Image.Image, Header]:
    """Read an image's header, and refuse what it announces before any of it is decoded."""
    image = open_image(data, name, max_pixels)
    header = Header(str(image.format), image.mode, *image.size)
    _require_usual(header, border, name)
    return image, header


@contextlib.contextmanager
def named(name: str, verb: str = "decoded") -> Iterator[None]:
    """Turn any error of Pillow into one that names the file.

    Raises:
        ValueError: if the file is damaged.
        OSError: if there is not enough memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, which decide nothing
            yield
    except MemoryError as error:
        # the file is within its limits, so this says something of the machine: it is not left out
        raise OSError(f"{name}: not enough memory to decode it; use fewer workers") from error
    except Exception as error:  # parsers slip in many ways on fields that are not as they should be
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be {verb}: {what}") from error


def _decode(image: Image.Image, data: bytes, treatment: Treatment) -> tuple[Image.Image, Treated]:
    """Decode an image that `_open` opened to RGB."""
    image.load()
    if image.format == "WEBP":
        # its decoder keeps two more pictures for as long as the image is there
        vars(image).pop("_decoder", None)
    return _as_photo(image, data) if treatment.photo else (_to_rgb(image), Treated())


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert as torchvision's loader does, but 16-bit grey to its high byte."""
    if image.mode in GREY_16_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _as_photo(image: Image.Image, data: bytes) -> tuple[Image.Image, Treated]:
    """Compose a decoded image on white and turn it upright."""
    orientation = _orientation(image, data)
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


def _orientation(image: Image.Image, data: bytes) -> int:
    """Read the EXIF orientation as Pillow's `exif_transpose` does; 1 if there is no readable one.

    `exif_transpose` itself rewrites the other tags, and fails on damaged ones.
    """
    if image.format == "PNG" and not any(mark in data for mark in PNG_ORIENTATION):
        return 1  # without the marks Pillow would decode it to look behind the pixels
    try:
        found = image.getexif().get(ORIENTATION)
        return int(found) if found in TURNS else 1
    except MemoryError:
        raise
    except Exception:  # as above: a damaged tag is no reason to leave out an image
        return 1


def _alpha(image: Image.Image, data: bytes) -> Image.Image | None:
    """Return the opacity of each pixel, mode L; None if the image is opaque."""
    if "A" in image.mode:
        alpha = image.getchannel("A")
    elif "transparency" in image.info:
        alpha = _alpha_of_key(image, data)
    else:
        return None
    return None if alpha.getextrema() == (255, 255) else alpha


def _alpha_of_key(image: Image.Image, data: bytes) -> Image.Image:
    """Return the opacity of a PNG in which one colour is transparent.

    Pillow leaves the colour as the file has it, in levels of the file's depth, and scales the
    pixels.
    """
    depth = data[data.index(b"IHDR") + 12]
    key, pixels = np.array(image.info["transparency"]), np.asarray(image)
    if image.mode == "RGB":
        if depth == 16:
            raise ValueError("its transparent colour has 16 bits; save it with an alpha channel")
        clear_HW = (pixels == key).all(axis=2)
    elif image.mode == "1":
        clear_HW = pixels == (key > 0)
    else:
        clear_HW = pixels == key * GREY_STEP.get(depth, 1)
    return Image.fromarray(np.where(clear_HW, np.uint8(0), np.uint8(255)))


def _upright(header: Header, treated: Treated) -> Header:
    """Exchange width and height if the image was turned by a quarter."""
    if treated.orientation in SWAPS_SIDES:
        return header._replace(width=header.height, height=header.width)
    return header


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _require_usual(header: Header, border: int, name: str) -> None:
    """Refuse an image that is too small, large or elongated, or of a kind that is not known."""
    if header.mode not in MODES:
        raise ValueError(f"{name} cannot be read: its pixels are of mode {header.mode}")
    is_ = f"{name} is {header.width} x {header.height} pixels"
    short, long = sorted((header.width, header.height))
    if long > LONGEST_SIDE or short <= 2 * border:
        raise ValueError(
            f"{is_}; a side must have more than {2 * border} and at most {LONGEST_SIDE}"
        )
    if long - 2 * border > MOST_ELONGATED * (short - 2 * border):
        raise ValueError(f"{is_}; {_too_elongated()}")


def _too_elongated() -> str:
    return f"the longer side may have at most {MOST_ELONGATED} times the shorter one: crop it"


def _header_of_whole(
    data: bytes, name: str, treatment: Treatment, max_pixels: float
) -> tuple[Header, Treated]:
    """Read the header of an image file of which all can be decoded, and what is done to a photo.

    Decoding a JPEG only to learn that it can be costs ten times as much as copying it. Nearly all
    of that is spent on its entropy-coded data, in which libjpeg takes any damage with a warning.
    What it refuses lies elsewhere: in a marker segment, which `jpeg_skeleton` keeps, or in data
    that ends before the image does, and a file with an end marker behind its scans cannot. So a
    skeleton that decodes proves the file; whatever has none, or one that fails, is decoded whole.
    """
    skeleton = jpeg_skeleton(data)
    if skeleton is not None:
        # when it fails the whole file decides, and its error is the one to show
        with contextlib.suppress(ValueError):
            return _decode_coarsely(skeleton, name, treatment, max_pixels)
    return _decode_coarsely(data, name, treatment, max_pixels)


def _decode_coarsely(
    data: bytes, name: str, treatment: Treatment, max_pixels: float
) -> tuple[Header, Treated]:
    """Decode an image, a JPEG at an eighth of its size (it still reads all of it)."""
    image, header = _open(data, name, treatment.border, max_pixels)
    with named(name):
        image.draft("L", (1, 1))
        image.load()
        treated = _as_photo(image, data)[1] if treatment.photo else Treated()
    return _upright(header, treated), treated


def jpeg_skeleton(data: bytes) -> bytes | None:
    """Return a JPEG without its entropy-coded data: markers and segments up to the end marker.

    None if `data` is no JPEG that goes on from segment to segment to its end marker, or one with
    restart markers: looking for the next of these, libjpeg can run past the end marker.
    """
    if not data.startswith(bytes((FILL, START_OF_IMAGE))):
        return None
    # found at once by numpy: a loop over the file costs as much as decoding it
    array = np.frombuffer(data, dtype=np.uint8)
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
