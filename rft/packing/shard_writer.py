"""Shards are written by webdataset's own writer, over a stream that counts and hashes."""

import contextlib
import hashlib
from collections.abc import Mapping
from typing import IO, Self

from rft import packages
from rft.shards.tar import padded


class ShardWriter:
    """A tar of samples: its bytes depend on names and contents alone, its hash is known at once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = _Hashing(stream)
        # the same owner and time on any machine; members are bytes already
        options = {"user": "root", "group": "root", "mtime": 0, "encoder": False}
        self._tar = packages.part("webdataset", "writer").TarWriter(self._stream, **options)

    @property
    def size(self) -> int:
        """Bytes of the tar; all of it when it is closed."""
        return self._stream.size

    def add(self, key: str, described: Mapping[str, bytes], suffix: str, payload: bytes) -> int:
        """Append a sample, its payload last, and return the payload's offset in the tar.

        Args:
            key: of the sample; a member is called `key.suffix`.
            described: suffix -> content of the other members, which the writer sorts.
            suffix: of the payload.
            payload: the image.
        """
        self._tar.write({"__key__": key, **described})
        self._tar.write({"__key__": key, suffix: payload})
        # the stream is behind by what the writer buffers
        return self._tar.tarstream.offset - padded(len(payload))

    @property
    def sha256(self) -> str:
        """Hex hash of the tar; of all of it when it is closed."""
        return self._stream.sha256.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # also after an error, or the writer would end the tar when it is deleted, in a closed file;
        # then that error is the one to show
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._tar.close()


class _Hashing:
    """What the writer needs of a file, and what a manifest needs of its bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.size, self.sha256 = 0, hashlib.sha256()
        self._stream = stream

    def write(self, data: bytes) -> int:
        self._stream.write(data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)
