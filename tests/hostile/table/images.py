"""Images that make Pillow fail, that are larger than they look, or are something else (C5)."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from tests.hostile.rows import Answer, Row
from tests.hostile.world import INDEX, LOCALISE, PACK, PREDICT, Place
from tests.packing.test_foreign import write_tar

NEW = tuple("packed" if word == "shards" else word for word in PACK)
FOREIGN = (*INDEX[:3], "new/test", *INDEX[4:])
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes = b"", crc: int | None = None) -> bytes:
    """A PNG chunk with a correct or wrong checksum."""
    found = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", found)


def head(width: int = 8, height: int = 8, depth: int = 8, colour: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def png(*chunks: bytes, header: bytes | None = None, data: bytes | None = None) -> bytes:
    """A PNG of 8 x 8 pixels with chunks before its data."""
    rows = zlib.compress(b"".join(b"\0" + bytes(range(24)) for _ in range(8)))
    body = chunk(b"IDAT", rows if data is None else data)
    return SIGNATURE + (header or head()) + b"".join(chunks) + body + chunk(b"IEND")


def saved(kind: str, size: tuple[int, int] = (20, 20), mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind, **options)
    return stream.getvalue()


def exif_loop() -> bytes:
    """EXIF whose directory refers to itself."""
    directory = struct.pack("<HHHII", 1, 0x8769, 4, 1, 8) + struct.pack("<I", 8)
    return saved("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + directory)


def jpeg_with(marker: int, data: bytes) -> bytes:
    """A JPEG with a segment after its start."""
    plain = saved("JPEG")
    return plain[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + plain[2:]


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def webp(width: int, height: int) -> bytes:
    """A lossless WebP that announces this size."""
    bits = 0x2F | (width - 1) << 8 | (height - 1) << 22
    body = b"VP8L" + struct.pack("<I", 16) + bits.to_bytes(5, "little") + bytes(11)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def text_bomb() -> bytes:
    return png(chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**28), 9)))


def profile_bomb() -> bytes:
    return png(chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**28), 9)))


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile\nshowpage\n"


BROKEN: dict[str, Callable[[], bytes]] = {
    "an iCCP chunk without its end (C5)": lambda: png(chunk(b"iCCP", b"x" * 20)),
    "an iCCP chunk of nothing (C5)": lambda: png(chunk(b"iCCP")),
    "an iCCP chunk of an unknown method (C5)": lambda: png(chunk(b"iCCP", b"x\0\x09zz")),
    "an iCCP chunk that is a bomb (C7)": profile_bomb,
    "a text that is a bomb (C7)": text_bomb,
    "an eXIf chunk that is no EXIF": lambda: png(chunk(b"eXIf", b"nothing")),
    "a pHYs chunk that is too short (C5)": lambda: png(chunk(b"pHYs", b"\0")),
    "a gAMA chunk of nothing (C5)": lambda: png(chunk(b"gAMA")),
    "a cHRM chunk of nothing (C5)": lambda: png(chunk(b"cHRM", b"\0" * 3)),
    "a sRGB chunk of nothing (C5)": lambda: png(chunk(b"sRGB")),
    "a tRNS chunk of nothing (C5)": lambda: png(chunk(b"tRNS")),
    "an iTXt chunk without its parts (C5)": lambda: png(chunk(b"iTXt", b"x")),
    "a zTXt chunk of nothing (C5)": lambda: png(chunk(b"zTXt")),
    "an acTL chunk of nothing (C5)": lambda: png(chunk(b"acTL")),
    "an fcTL chunk of nothing (C5)": lambda: png(chunk(b"fcTL")),
    "an unknown chunk that must be known": lambda: png(chunk(b"ABCD", b"x")),
    "a chunk of four gigabytes": lambda: png()[:33] + b"\xff\xff\xff\xffIDAT" + b"x" * 99,
    "a wrong checksum": lambda: png(chunk(b"tEXt", b"a\0b", crc=1), header=head(depth=8)),
    "a header of nothing": lambda: SIGNATURE + chunk(b"IHDR") + chunk(b"IEND"),
    "no header": lambda: SIGNATURE + chunk(b"IEND"),
    "no pixels": lambda: SIGNATURE + head() + chunk(b"IEND"),
    "pixels that are no zlib": lambda: png(data=b"no zlib at all"),
    "too few pixels": lambda: png(data=zlib.compress(b"\0" * 9)),
    "an unknown colour type": lambda: png(header=head(colour=5)),
    "an unknown depth": lambda: png(header=head(depth=7)),
    "a palette that is missing": lambda: png(header=head(colour=3)),
    "a PNG of no width": lambda: png(header=head(width=0)),
    "a PNG of 2^31 pixels a side (C7)": lambda: png(header=head(2**31 - 1, 2**31 - 1)),
    "a PNG of 60,000 pixels a side (C7)": lambda: png(header=head(60_000, 60_000)),
    "a PNG of 70,000 x 8": lambda: png(header=head(70_000, 8)),
    "a PNG that is cut off": lambda: cut(saved("PNG", (99, 99)), 0.6),
    "a WebP of 164 megapixels (C7)": lambda: webp(16_383, 10_010),
    "a WebP of 16,384 pixels a side (C7)": lambda: webp(16_384, 16_384),
    "a WebP that is cut off": lambda: cut(saved("WEBP", (99, 99), lossless=True), 0.5),
    "a WebP that holds no picture": lambda: b"RIFF\x04\0\0\0WEBP",
    "a JPEG that is cut off": lambda: cut(saved("JPEG", (99, 99)), 0.6),
    "a JPEG that ends behind its header": lambda: cut(saved("JPEG", (99, 99)), 0.3),
    "a JPEG of two bytes": lambda: b"\xff\xd8",
    "a JPEG of fill bytes": lambda: b"\xff\xd8" + b"\xff" * 10**6,
    "a JPEG segment that is too short": lambda: b"\xff\xd8\xff\xe0\0\x01" + b"x" * 99,
    "a BMP": lambda: saved("BMP"),
    "a GIF": lambda: saved("GIF"),
    "a TIFF": lambda: saved("TIFF"),
    "PostScript": eps,
    "a text": lambda: b"this is no image",
    "nothing": lambda: b"",
    "a page with a script": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>",
    "a line of 6000 x 1 pixels (A9)": lambda: saved("PNG", (6000, 1)),
    "a line of 1 x 60,000 pixels (A9)": lambda: saved("PNG", (1, 60_000)),
}
# odd, but read as in other programs
FINE: dict[str, Callable[[], bytes]] = {
    "EXIF that leads in a circle": exif_loop,
    "EXIF that is nothing": lambda: saved("JPEG", exif=b"Exif\0\0"),
    "an APP2 segment that is no profile": lambda: jpeg_with(0xE2, b"ICC_PROFILE\0\x09\x01x"),
    "an APP1 segment that is no EXIF": lambda: jpeg_with(0xE1, b"Exif\0\0II"),
    "a comment of 60,000 letters": lambda: jpeg_with(0xFE, b"x" * 60_000),
    "an Adobe segment that is cut off": lambda: jpeg_with(0xEE, b"Adobe"),
}
CONTROLS: dict[str, Callable[[], bytes]] = {
    "a plain PNG": png,
    "a plain JPEG": lambda: saved("JPEG"),
    "a plain WebP": lambda: saved("WEBP"),
    "a grey PNG": lambda: saved("PNG", mode="L"),
    "a PNG with a comment": lambda: png(chunk(b"tEXt", b"a\0b")),
}


def photo(make: Callable[[], bytes]) -> Callable[[Place], object]:
    return lambda place: (place / "photos/red/odd.png").write_bytes(make())


def in_tar(make: Callable[[], bytes]) -> Callable[[Place], object]:
    return lambda place: write_tar(
        place / "foreign/0.tar", [("odd.png", make()), ("odd.cls", b"0")]
    )


def row(
    what: str,
    words: Sequence[str],
    damage: Callable[[Place], object],
    *says: str,
    answer: Answer,
    slow: bool = False,
) -> Row:
    return Row(
        kind="image",
        what=what,
        words=words,
        damage=damage,
        says=says,
        answer=answer,
        writes=["packed", "packed/*"],
        slow=slow,
    )


def of_mask(make: Callable[[], bytes]) -> Callable[[Place], object]:
    return lambda place: (place / "masks/red3.png").write_bytes(make())


def rows() -> Iterator[Row]:
    """Yield the rows of this kind."""
    either = {**FINE}
    for name, make in BROKEN.items():
        # harmless if the pixels do not need the chunk
        spare = "chunk" in name or "checksum" in name or name.startswith("a text that")
        answer: Answer = "either" if spare else "refused"
        slow = "C7" in name or "million" in name
        yield row(f"{name}, packed", NEW, photo(make), r"odd\.png", answer=answer, slow=slow)
    for name, make in either.items():
        yield row(f"{name}, packed", NEW, photo(make), r"odd\.png", answer="either")
    for name, make in CONTROLS.items():
        yield row(f"{name}, packed", NEW, photo(make), answer="accepted")
    for name in (
        "an iCCP chunk without its end (C5)",
        "an iCCP chunk that is a bomb (C7)",
        "a PNG of 2^31 pixels a side (C7)",
        "a WebP of 164 megapixels (C7)",
        "a text",
        "a chunk of four gigabytes",
        "a header of nothing",
    ):
        spare = "iCCP" in name or "chunk" in name
        answer = "either" if spare else "refused"
        yield row(
            f"{name}, indexed", FOREIGN, in_tar(BROKEN[name]), r"0\.tar", "odd", answer=answer
        )
        yield row(
            f"{name}, predicted",
            (*PREDICT[:2], "photos/red/odd.png", *PREDICT[3:]),
            photo(BROKEN[name]),
            r"odd\.png",
            answer=answer,
            slow=True,
        )
        yield row(
            f"{name}, as a mask",
            LOCALISE,
            of_mask(BROKEN[name]),
            r"red3\.png",
            answer=answer,
            slow=True,
        )
    # with --max-bad, a damaged image is omitted, whatever Pillow raises
    for name in (
        "an iCCP chunk without its end (C5)",
        "a PNG that is cut off",
        "a text",
        "nothing",
        "a WebP of 164 megapixels (C7)",
    ):
        yield row(
            f"{name}, with --max-bad",
            (*NEW, "--max-bad", "1"),
            photo(BROKEN[name]),
            answer="accepted",
            slow="C7" in name,
        )
