"""The size of a zip archive's directory, checked before zipfile parses it; no torch.

zipfile reads the entire directory when it opens an archive, and needs about ten times its size in
memory. An untrusted file may be nothing but a directory.
"""

import struct
from typing import BinaryIO

END = struct.Struct("<4s4H2LH")  # the last record, where no comment follows
LOCATOR = struct.Struct("<4sLQL")  # before it, in a zip64 archive
LARGE_END = struct.Struct("<4sQ2H2L4Q")  # before that


def require_small_directory(stream: BinaryIO, limit: int) -> None:
    """Check that the directory of a zip archive has at most `limit` bytes.

    The stream is at its start afterwards.

    Raises:
        ValueError: if it is larger, or the file does not end as an archive does.
    """
    size = stream.seek(0, 2)
    # all three records, or all of a shorter file
    length = min(size, LARGE_END.size + LOCATOR.size + END.size)
    stream.seek(size - length)
    tail = stream.read(length)
    stream.seek(0)
    end = tail[-END.size :]
    if len(end) < END.size or not end.startswith(b"PK\5\6"):
        raise ValueError("it does not end as a zip archive does")
    *_, directory, _, comment = END.unpack(end)
    if comment:
        raise ValueError("it ends with a comment, which no archive of tensors or arrays has")
    locator = tail[-END.size - LOCATOR.size : -END.size]
    if locator.startswith(b"PK\6\7"):
        large = tail[: LARGE_END.size]
        place = LOCATOR.unpack(locator)[2]
        # some versions of zipfile look at one of these offsets, some at the other
        if not large.startswith(b"PK\6\6") or place != size - length:
            raise ValueError("its directory is not where its last record points")
        # zipfile uses this size if a locator exists, and ignores the last record's
        directory = LARGE_END.unpack(large)[8]
    if directory > limit:
        raise ValueError(f"its directory has {directory:,} bytes; at most {limit:,} are allowed")
