"""Opens image files, with bounds on the time and memory that a hostile file can take.

Pillow reads some parts of a file one by one in Python, and makes as many passes over the pixels as
the file specifies. So these parts are counted first, and nothing is decoded before the header's
size has been compared with the limit. Every image file that rft reads goes through `open_image`.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence

from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from rft.config import MAX_PIXELS

BYTES_PER_PIXEL = 4  # of a file: more than any format needs for pixels of 8 bits per channel
FORMATS = ("JPEG", "PNG", "WEBP")  # MPO is a JPEG followed by further pictures
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})  # of file and member names
# JPEG markers: the byte after 0xFF (ISO/IEC 10918-1, table B.1)
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN = 0xD8, 0xD9, 0xDA
START_OF_MARKER = FILL = 0xFF  # the byte that begins a marker may be repeated
STARTS_OR_ENDS = (START_OF_SCAN, END_OF_IMAGE)
# excludes bytes that do not end entropy-coded data: a stuffed 0xFF, a restart, a fill byte
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
SCANS = 20  # of a JPEG with the most pixels allowed; a smaller one may have more. Encoders write 10
SEGMENTS = 10_000  # of a JPEG; an embedded depth map takes some hundred
PARSED_BYTES = 2**24  # that Pillow parses or copies: 256 times the capacity of one segment
FILL_BYTES = 2**16  # between the segments of a JPEG
# first bytes of segments that Pillow joins (EXIF) or parses block by block (Photoshop)
PARSED = (b"Exif\0\0", b"Photoshop 3.0\0")
CHUNKS = 300_000  # of a PNG; the largest allowed one has 55,000 of the size that libpng writes
PROFILES = 10  # of a PNG, which may legally have one
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_FRAME = 12  # bytes of a chunk around its content
# Pillow registers a format when its plugin is imported
assert all((JpegImagePlugin, PngImagePlugin, WebPImagePlugin))


def open_image(
    data: bytes, name: str, max_pixels: float = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Read the header of an image file, and refuse one with too many pixels before decoding.

    `Image.open` hides why a file cannot be read ("cannot handle 12-bit layers"), and its pixel
    limit is process-wide. `name` is for messages, `max_pixels` counts millions, and `formats` are
    Pillow's names of the allowed formats.

    Raises:
        ValueError: if it cannot be read, or has too many bytes or pixels.
    """
    require_affordable(len(data), name, max_pixels)
    for known in formats:
        factory, accept = Image.OPEN[known]
        # 16 bytes, as in Image.open; a Pillow without WebP returns a message instead of True
        if accept is None or accept(data[:16]) is not True:
            continue
        if known == "JPEG":
            _require_few_segments(data, name)
        elif known == "PNG":
            _require_few_chunks(data, name)
        with pillow_errors(name, "read"):
            image = factory(io.BytesIO(data), "")
        # never zero: Pillow's plugins refuse images without pixels
        millions = image.width * image.height / 1e6
        if millions > max_pixels:
            raise ValueError(
                f"{name} is {image.width} x {image.height} pixels, {millions:,.1f} million; "
                f"--max-pixels allows {max_pixels:g} million; raise it for images that you trust"
            )
        if known == "JPEG":
            _require_few_scans(data, name, int(SCANS * max_pixels / millions))
        return image
    *others, last = (known.replace("WEBP", "WebP") for known in formats)
    raise ValueError(
        f"{name} is not a readable {', '.join(others)}{' or ' * bool(others)}{last} image"
    )


def _require_few_segments(data: bytes, name: str) -> None:
    """Refuse a JPEG whose segments and metadata would be too expensive to read.

    Pillow reads each segment, and each byte between two of them, in Python; for every further EXIF
    segment it copies the EXIF data read so far.
    """
    segments = parsed = between = 0
    position = 2  # behind START_OF_IMAGE
    while (found := NEXT_MARKER.search(data, position)) and found[0][1] not in STARTS_OR_ENDS:
        # a segment: its marker, then a length that counts its own two bytes and the content
        start, length = found.end(), int.from_bytes(data[found.end() : found.end() + 2])
        segments += 1
        between += found.start() - position
        parsed += length if data.startswith(PARSED, start + 2) else 0
        _require_few(segments, SEGMENTS, "segments", name)
        _require_few(parsed, PARSED_BYTES, "bytes of EXIF and Photoshop's blocks", name)
        position = min(start + length, len(data))
    between += (found.start() if found else len(data)) - position
    _require_few(between, FILL_BYTES, "bytes between its segments", name)


def _require_few_scans(data: bytes, name: str, allowed: int) -> None:
    """Refuse a progressive JPEG with too many scans.

    Each scan is a pass over all pixels, for a few bytes of the file.
    """
    # counting markers, thumbnails' included, is fast and nearly always enough
    if data.count(bytes((START_OF_MARKER, START_OF_SCAN))) <= allowed:
        return
    segments = scans = 0
    position = 2  # behind START_OF_IMAGE
    while (found := NEXT_MARKER.search(data, position)) and found[0][1] != END_OF_IMAGE:
        segments += 1
        scans += found[0][1] == START_OF_SCAN
        _require_few(segments, SEGMENTS, "segments", name)
        _require_few(scans, allowed, "scans, too many for its pixels", name)
        # the search skips the compressed data after a scan's header
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2])


def _require_few(count: int, most: int, what: str, name: str) -> None:
    if count > most:
        raise ValueError(
            f"{name} has more than {most:,} {what}; open it in an image editor and save it again"
        )


def _require_few_chunks(data: bytes, name: str) -> None:
    """Refuse a PNG with too many chunks or colour profiles.

    Pillow reads each chunk in Python, and unpacks each colour profile to up to a megabyte.
    """
    chunks = profiles = 0
    position = len(PNG_START)
    # a chunk: 4 bytes of length, 4 of type, content, 4 of checksum; Pillow stops at IEND
    while position < len(data) and data[position + 4 : position + 8] != b"IEND":
        profiles += data[position + 4 : position + 8] == b"iCCP"
        position += PNG_FRAME + int.from_bytes(data[position : position + 4])
        chunks += 1
        _require_few(chunks, CHUNKS, "chunks", name)
        _require_few(profiles, PROFILES, "colour profiles", name)


def require_affordable(count: int, name: str, max_pixels: float = MAX_PIXELS) -> None:
    """Check the size of an image file before it is read into memory.

    Raises:
        ValueError: if it has more bytes than `max_pixels` million pixels need.
    """
    if count > BYTES_PER_PIXEL * max_pixels * 1e6:
        raise ValueError(
            f"{name} has {count:,} bytes, more than {BYTES_PER_PIXEL} for each of the "
            f"{max_pixels:g} million pixels that --max-pixels allows"
        )


@contextlib.contextmanager
def pillow_errors(name: str, verb: str = "decoded") -> Iterator[None]:
    """Convert any error of Pillow into one that names the file.

    Raises:
        ValueError: if the file is damaged.
        OSError: if memory runs out.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata, which is not used
            yield
    except MemoryError as error:
        # the file is within the limits, so the machine is too small: not a reason to skip an image
        raise OSError(f"{name}: not enough memory to decode it; use fewer workers") from error
    except Exception as error:  # parsers fail in many ways on malformed fields
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be {verb}: {what}") from error
