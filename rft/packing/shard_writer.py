"""Writes shards with webdataset's own writer, through a stream that counts and hashes."""

import contextlib
import hashlib
from collections.abc import Mapping
from typing import IO, Self

from rft import packages
from rft.shards.tar import padded


class ShardWriter:
    """A tar of samples, whose bytes depend only on names and contents.

    `size` and `sha256` cover the bytes written so far; after closing, the entire tar.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.size, self._sha256 = 0, hashlib.sha256()
        self._stream = stream
        # the same owner and time on any machine; members are bytes already
        options = {"user": "root", "group": "root", "mtime": 0, "encoder": False}
        # PAX adds a header for names of more than 100 letters, which USTAR would refuse; webdataset
        # 1.0.2 writes PAX whatever the argument
        self._tar = packages.part("webdataset", "writer").TarWriter(
            self, format="PAX_FORMAT", **options
        )

    def write(self, data: bytes) -> int:
        """Receive bytes from webdataset's writer, which uses this object as its file."""
        self._stream.write(data)
        self._sha256.update(data)
        self.size += len(data)
        return len(data)

    def add(self, key: str, described: Mapping[str, bytes], suffix: str, payload: bytes) -> int:
        """Append a sample, its payload last, and return the payload's offset in the tar.

        Members are named `key.suffix`; `described` has the content of the others by suffix.
        """
        # in two calls, because the writer sorts the members of one call by suffix
        self._tar.write({"__key__": key, **described})
        self._tar.write({"__key__": key, suffix: payload})
        # not the stream's position, which lags behind by the writer's buffer
        return self._tar.tarstream.offset - padded(len(payload))

    @property
    def sha256(self) -> str:
        """Hash in hex."""
        return self._sha256.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # also after an error, or the writer's destructor would write to a closed file; errors of
        # closing are then suppressed in favour of the first one
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._tar.close()
