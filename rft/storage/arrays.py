"""Untrusted archives of arrays (.npz), read at a cost that is known in advance.

numpy's own reader allocates the memory that headers announce: a member of a few kilobytes may
unpack to terabytes, or claim an array of 2^40 rows. Here the directory, the sizes and the headers
must be consistent and within a limit before anything is unpacked. No code runs: only numbers and
texts are read.
"""

import io
import math
import re
import struct
import zipfile
import zlib

import numpy as np

from rft.storage.zips import require_small_directory

MEMBERS = 64  # arrays of one archive
DIRECTORY_BYTES = 2**16  # of a zip's directory, which is read before it can be checked
MAGIC = b"\x93NUMPY"
# numpy's header of little-endian numbers and texts: objects, records and dates do not match
HEADER = re.compile(
    rb"\{'descr': '([<|][biufSU]\d{1,9})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, ?)*\d{0,18})\), \} *\n"
)
# what zipfile and zlib raise on damaged archives
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    LookupError,
    RuntimeError,  # encrypted, or a method of compression that is not known
    UnicodeError,
)


def read_npz(data: bytes, limit: int) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz, by name. They are read-only.

    Together, headers included, they may have `limit` bytes.

    Raises:
        ValueError: if it is not such an archive, or exceeds the limit.
    """
    packed = io.BytesIO(data)
    try:
        require_small_directory(packed, DIRECTORY_BYTES)
    except ValueError as error:
        raise ValueError(f"not a readable .npz: {error}") from error
    try:
        with zipfile.ZipFile(packed) as archive:
            members = archive.infolist()
            _require_affordable(members, limit)
            arrays = {}
            for member in members:
                with archive.open(member) as stream:
                    # with a size: without one, zipfile unpacks everything and then truncates it
                    data = stream.read(member.file_size)
                name = member.filename.removesuffix(".npy")
                arrays[name] = _to_array(data, name)
            return arrays
    except UNREADABLE as error:
        raise ValueError(f"not a readable .npz: {error}") from error


def _require_affordable(members: list[zipfile.ZipInfo], limit: int) -> None:
    if len(members) > MEMBERS:
        raise ValueError(f"it holds {len(members)} arrays, more than {MEMBERS}")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("it holds two arrays with the same name")
    for member in members:
        if not member.filename.endswith(".npy"):
            raise ValueError(f"{member.filename!a} is not an array")
        # the only methods that np.savez and np.savez_compressed use
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename!a} uses an unknown compression method")
    if (size := sum(member.file_size for member in members)) > limit:
        raise ValueError(f"its arrays have {size:,} bytes, more than the limit of {limit:,}")


def _to_array(data: bytes, name: str) -> np.ndarray:
    """View the bytes of a .npy file as its array, without a copy."""
    # version 1 stores the header's length in 2 bytes, version 2 in 4; 3 is for records with
    # Unicode names
    version, prefix = data[6:8], {b"\1\0": 2, b"\2\0": 4}.get(data[6:8], 0)
    if not data.startswith(MAGIC) or not prefix:
        raise ValueError(f"{name!a} is not an array of a known version ({version.hex()})")
    start = 8 + prefix
    stop = start + int.from_bytes(data[8:start], "little")
    header = HEADER.fullmatch(data[start:stop]) if stop <= len(data) else None
    if header is None:
        raise ValueError(f"{name!a} has no header of an array of numbers or texts")
    try:
        kind = np.dtype(header[1].decode())
    except TypeError as error:
        raise ValueError(f"{name!a} has elements of an unknown type") from error
    shape = tuple(map(int, re.findall(rb"\d+", header[3])))
    # empty texts take no bytes, so any shape would fit; Python's integers cannot overflow
    if not kind.itemsize or math.prod(shape) * kind.itemsize != len(data) - stop:
        found = f"{len(data) - stop:,} bytes"
        raise ValueError(f"{name!a} has {found}, which does not match {kind} {shape}")
    array = np.frombuffer(data, kind, offset=stop)
    return array.reshape(shape, order="F" if header[2] == b"True" else "C")
