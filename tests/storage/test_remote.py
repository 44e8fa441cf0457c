"""Reading requests to simulated stores: retries, limits and refusals."""

import asyncio
import os
import random
from pathlib import Path

import pytest

from rft.storage import files, remote


class Store:
    """A synchronous fsspec client with one entry, which counts the bytes that it returns."""

    protocol, async_impl = "x", False

    def __init__(self, kind: str = "file", size: int | None = None, content: bytes = b"") -> None:
        self.entry, self.content, self.sent = {"type": kind, "size": size}, content, 0

    def invalidate_cache(self, path: str) -> None:
        pass

    def info(self, path: str) -> dict:
        return self.entry

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        data = self.content[start:end]
        self.sent += len(data)
        return data


def test_a_short_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(remote.os, "pwrite", lambda file, data, at: write(file, data[:7], at))
    monkeypatch.setattr(remote, "REQUEST_BYTES", 100)
    content = bytes(range(250))

    async def fetch(start: int, stop: int) -> bytes:
        return content[start:stop]

    with (tmp_path / "x").open("wb") as stream:
        asyncio.run(remote.fill(stream.fileno(), len(content), fetch))
    assert (tmp_path / "x").read_bytes() == content


def test_a_remote_folder_is_no_absent_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for question in (remote.size, lambda *names: remote.read(*names, limit=10)):
        with pytest.raises(IsADirectoryError, match="a/b is a folder"):
            asyncio.run(question(Store("directory"), "a/b"))
    monkeypatch.setattr(files, "open_store", lambda _: (Store("directory"), "a/b"))
    with pytest.raises(ValueError, match="cannot read s3://a/b: it is a folder"):
        files.find_bytes("s3://a/b")


def test_a_file_of_unknown_size_is_read_up_to_its_limit() -> None:
    for size in (0, 9, 10):
        assert asyncio.run(remote.read(Store(content=bytes(size)), "x", limit=10)) == bytes(size)
    store = Store(content=bytes(1000))
    with pytest.raises(remote.Failure) as raised:
        asyncio.run(remote.read(store, "x", limit=10))
    assert "it has more than 10 bytes" in remote.explain(raised.value)
    assert store.sent == 11


def test_the_longest_pause_is_that_of_the_last_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda _, most: most)
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def refuse() -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(remote.Failure):
        asyncio.run(remote.repeated(refuse))
    assert len(pauses) == remote.PATIENCE.tries - 1
    assert pauses[0] == 0.1
    assert pauses[-1] == max(pauses) == remote.PATIENCE.longest_pause
