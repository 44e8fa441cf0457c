"""Image files that Pillow cannot write: PNGs of any depth, with any chunks."""

import struct
import zlib
from collections.abc import Sequence

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's colour types
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_row(samples: Sequence[int], depth: int, colour: int, *chunks: bytes, after=b"") -> bytes:
    """A PNG of one row, from its samples in file order; `chunks` lie before the pixels."""
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    bits += "0" * (-len(bits) % 8)
    row = bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", len(samples) // CHANNELS[colour], 1, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(b"\0" + row))]
    return b"".join([SIGNATURE, *parts, after, chunk(b"IEND", b"")])


def empty_png(width: int, height: int) -> bytes:
    """A PNG that announces a size and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, RGB, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
