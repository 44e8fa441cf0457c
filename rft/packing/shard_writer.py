"""Shards are written by webdataset's own writer, over a stream that counts and hashes."""

import contextlib
import hashlib
from collections.abc import Mapping
from typing import IO, Self

from rft import packages
from rft.shards.tar import padded


class ShardWriter:
    """A tar of samples: its bytes depend on names and contents alone.

    `size` and `sha256` are those of the bytes so far; of the tar when it is closed.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.size, self._sha256 = 0, hashlib.sha256()
        self._stream = stream
        # the same owner and time on any machine; members are bytes already
        options = {"user": "root", "group": "root", "mtime": 0, "encoder": False}
        # a header in front of each name of more than 100 letters, which USTAR would refuse;
        # webdataset 1.0.2 writes PAX whatever it is given
        self._tar = packages.part("webdataset", "writer").TarWriter(
            self, format="PAX_FORMAT", **options
        )

    def write(self, data: bytes) -> int:
        """Take bytes from webdataset's writer, for which this is the file."""
        self._stream.write(data)
        self._sha256.update(data)
        self.size += len(data)
        return len(data)

    def add(self, key: str, described: Mapping[str, bytes], suffix: str, payload: bytes) -> int:
        """Append a sample, its payload last, and return the payload's offset in the tar.

        Members are called `key.suffix`; `described` has the other ones' content by suffix.
        """
        # in two calls, because the writer sorts the members of one call by suffix
        self._tar.write({"__key__": key, **described})
        self._tar.write({"__key__": key, suffix: payload})
        # the stream is behind by what the writer buffers
        return self._tar.tarstream.offset - padded(len(payload))

    @property
    def sha256(self) -> str:
        """Hex hash."""
        return self._sha256.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # also after an error, or the writer would end the tar when it is deleted, in a closed file;
        # then that error is the one to show
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._tar.close()
