"""How large a zip archive's directory is, known before zipfile makes objects of it; no torch.

zipfile reads the whole directory when it opens an archive, and takes about ten times its bytes: a
file of strangers that is nothing but a directory would take ten times itself in memory.
"""

import struct
from typing import BinaryIO

END = struct.Struct("<4s4H2LH")  # the last record, where no comment follows
LOCATOR = struct.Struct("<4sLQL")  # before it, in an archive that may be a large one (zip64)
LARGE_END = struct.Struct("<4sQ2H2L4Q")  # before that


def require_small_directory(stream: BinaryIO, limit: int) -> None:
    """Check that the directory of a zip archive has at most `limit` bytes.

    The stream is at its start afterwards.

    Raises:
        ValueError: if it has more, or does not end as an archive does.
    """
    size = stream.seek(0, 2)
    # all three records, or the whole of a file that is shorter
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
        # versions of zipfile look for it at either place
        if not large.startswith(b"PK\6\6") or place != size - length:
            raise ValueError("its directory is not where its end says")
        # zipfile takes this size wherever a locator exists, whatever the last record says
        directory = LARGE_END.unpack(large)[8]
    if directory > limit:
        raise ValueError(f"its directory has {directory:,} bytes; it may have {limit:,} at most")
