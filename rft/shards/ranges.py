"""Byte ranges of shards: from local files by descriptor, from remote ones by request.

The length of a remote range is known, so a dropped or stalled connection is noticed and the missing
bytes are requested again. A node-local cache may hold complete shards. It is filled in the
background and no process waits for it: a sample whose shard is not cached yet is read by its own
range request. So the cache affects the speed of a batch, never its content, and any cached file may
be deleted at any time.
"""

import asyncio
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from fsspec.asyn import get_loop, sync
from fsspec.implementations.local import LocalFileSystem

from rft.shards.cache import Cache
from rft.shards.manifest import Shard
from rft.storage import files, local, remote
from rft.storage.remote import REQUEST_BYTES

# descriptors that a process keeps open on shards: half the system's limit (without a limit, -1,
# which no count reaches)
OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
GAP_BYTES = 2**16  # ranges this close share a request: the gap costs less than a round trip
REQUESTS = 16  # concurrent requests of one process
Store = tuple[Any, str]  # a fsspec file system and a path in it
PAUSE = 1.0  # seconds until a shard that a different process is filling is checked again


@dataclass(kw_only=True)
class Counters:
    """Reading statistics of this process so far; each counts samples unless noted otherwise."""

    bytes: int = 0  # payload bytes
    requests: int = 0  # range requests that were answered
    range_retries: int = 0  # range requests that were retried
    cache_hits: int = 0
    cache_misses: int = 0
    cache_repairs: int = 0  # damaged or truncated in the cache, read again from the source
    cache_refusals: int = 0  # shards that the disk had no space for, or failed to store


class RangeError(ValueError):
    """A remote range that cannot be read; `place` is its index in the list of requests."""

    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place


class Shards:
    """The shards of one packed set, read by number.

    Clients, descriptors and the filling thread are created on first use in each process, because
    none of them survives a fork; pickling keeps only the arguments to create them again.
    """

    def __init__(self, url: str, shards: Sequence[Shard], *, cache: Cache | None = None) -> None:
        self.url = url
        self.shards = tuple(shards)
        self.cache = cache
        self.counters = Counters()
        # no process yet: `_enter_process` creates the state of one
        self._process = -1

    def __getstate__(self) -> dict:
        return {name: vars(self)[name] for name in ("url", "shards", "cache")}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def location(self, number: int) -> str:
        """Return the URL of a shard."""
        return files.resolve(self.url, self.shards[number].name)

    def descriptor(self, number: int) -> int | None:
        """Return an open descriptor of a local or cached shard, or None for a remote one.

        Raises:
            FileNotFoundError: if a local shard is absent.
        """
        self._enter_process()
        if number in self._descriptors:
            self._descriptors.move_to_end(number)
            return self._descriptors[number]
        fs, path = self._store(number)
        if isinstance(fs, LocalFileSystem):
            descriptor = local.open_regular(path)
        elif self.cache is None or (descriptor := self.cache.open(self.shards[number])) is None:
            return None
        # closes the least recently used one: `move_to_end` above keeps the order
        if len(self._descriptors) == OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[number] = descriptor
        return descriptor

    def is_local(self, number: int) -> bool:
        """Whether the shard itself, not a cached copy, is in the local file system."""
        self._enter_process()
        if number not in self._local:
            self._local[number] = isinstance(self._store(number)[0], LocalFileSystem)
        return self._local[number]

    def ranges(self, requests: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Read the bytes of (shard number, offset, length) triples of remote shards.

        Neighbouring ranges share a request. A result is shorter than requested only at a shard's
        end.

        Raises:
            RangeError: naming the shard, if all tries fail.
            ValueError: if a shard that the cache fetched does not match the manifest.
        """
        self._enter_process()
        if self._filler is not None and self._filler.failure is not None:
            raise self._filler.failure
        merged = merge(requests)
        fetches = [
            partial(self._fetch, self._store(number), number, start, stop, members[0])
            for number, start, stop, members in merged
        ]
        # fsspec's clients belong to its event loop, which runs in a separate thread
        answers: Any = sync(get_loop(), remote.together, fetches, REQUESTS)
        self.counters.requests += len(merged)
        found = [b""] * len(requests)
        for (_, start, _, members), data in zip(merged, answers, strict=True):
            for member in members:
                _, offset, length = requests[member]
                found[member] = data[offset - start : offset - start + length]
        return found

    def look_ahead(self, numbers: Sequence[int]) -> None:
        """Announce the shards that are needed next, most urgent first, for the cache to fetch."""
        if self.cache is None or not self.shards:
            return
        self._enter_process()
        wanted = set(numbers)
        # an evicted file occupies the disk for as long as it is open
        for number in [n for n in self._descriptors if n not in wanted and not self.is_local(n)]:
            os.close(self._descriptors.pop(number))
        if self._filler is None:
            self._filler = _Filler(self, self.cache)
        self._filler.lists.put(tuple(numbers))

    def repair(self, number: int) -> None:
        """Delete the cached copy of a shard, because its bytes are damaged."""
        assert self.cache is not None
        os.close(self._descriptors.pop(number))
        self.cache.drop(self.shards[number])
        self.counters.cache_repairs += 1

    def close(self) -> None:
        """Stop the filling thread and close the descriptors; both are recreated on next use."""
        filler = self._let_go()
        if filler is not None:
            filler.thread.join()

    def _let_go(self) -> "_Filler | None":
        """Close the descriptors of this process; stop its filler and return it."""
        if self._process != os.getpid():  # nothing was read yet, or they belong to the parent
            return None
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        filler, self._filler = self._filler, None
        if filler is not None:
            filler.stop()
        return filler

    def __del__(self) -> None:
        # without waiting: objects may be collected in any thread, even that of fsspec's loop,
        # which the filler needs in order to end
        self._let_go()

    def _enter_process(self) -> None:
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._stores: dict[str, Any] = {}
        self._local: dict[int, bool] = {}
        self._filler: _Filler | None = None

    def _store(self, number: int) -> Store:
        """Find the file system of a shard and its path in it."""
        url = self.location(number)
        host = "/".join(url.split("/")[:3]) if "://" in url else ""
        if host not in self._stores:
            self._stores[host] = remote.client(files.open_store(url)[0])
        fs = self._stores[host]
        # the path that url_to_fs returns, without a look-up of the client for each sample
        return fs, str(fs._strip_protocol(url))

    async def _fetch(
        self, store: Store, number: int, start: int, stop: int, place: int = 0
    ) -> bytes:
        """Read one range; retries request only its missing part."""
        # never beyond the shard: a store may refuse a range past its end
        stop = min(stop, self.shards[number].bytes)
        try:
            return await remote.read_range(*store, start, stop, self._count_retry)
        except FileNotFoundError as error:
            raise RangeError(
                f"missing shard: {self.location(number)}; copy or pack it again", place
            ) from error
        except remote.Failure as error:
            raise RangeError(
                f"cannot read {self.location(number)}, bytes {start} to {stop}: "
                f"{files.reason(error)}",
                place,
            ) from error

    def _count_retry(self) -> None:
        self.counters.range_retries += 1


class _Filler:
    """A thread that fetches the wanted shards into the cache, until it is stopped.

    It reads through its own `Shards`. With the ones it serves it shares counters and clients, but
    it keeps no reference to them: they stop it when they are closed or collected.
    """

    def __init__(self, served: Shards, cache: Cache) -> None:
        self.failure: ValueError | None = None  # ended the thread; the next batch raises it
        self._cache = cache
        self._shards = Shards(served.url, served.shards, cache=cache)
        # first: it creates an empty _stores, which is then replaced by the shared one
        self._shards._enter_process()
        self._shards.counters, self._shards._stores = served.counters, served._stores
        self._known = {shard.sha256 for shard in served.shards}
        # SimpleQueue is reentrant, so a destructor may use it from anywhere
        self.lists: SimpleQueue[Sequence[int]] = SimpleQueue()
        self._stopped = False
        self._refused: set[int] = set()  # shards already counted in `cache_refusals`
        self._transfer: asyncio.Task | None = None
        # daemon: a process that exits does not wait for a shard
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Make the thread end soon, even in the middle of a shard."""
        self._stopped = True
        # wakes the thread if it is waiting for a list
        self.lists.put(())
        if self._transfer is not None:
            get_loop().call_soon_threadsafe(self._transfer.cancel)

    def _run(self) -> None:
        wanted: Sequence[int] = ()
        skipped: set[int] = set()
        idle = True
        try:
            with suppress(OSError):  # the first shard hits it again, and is counted as refused
                self._cache.trim(self._known)
            while not self._stopped:
                wanted = self._newest(wanted, wait=idle)
                todo = [n for n in wanted if n not in skipped and self._is_missing(n)]
                idle = not todo
                if idle:  # after a pause the skipped ones may be filled, or may fit
                    skipped.clear()
                elif not self._fill(todo[0], wanted):
                    skipped.add(todo[0])
        except CancelledError:  # from `stop`; not asyncio's class, but the one result() raises
            return
        except ValueError as error:
            self.failure = error

    def _newest(self, wanted: Sequence[int], *, wait: bool) -> Sequence[int]:
        """Take the newest list from the queue; if `wait`, wait up to PAUSE for a new one."""
        with suppress(Empty):
            if wait:
                wanted = self.lists.get(timeout=PAUSE)
            while True:
                wanted = self.lists.get_nowait()
        return wanted

    def _is_missing(self, number: int) -> bool:
        shard = self._shards.shards[number]
        return not self._shards.is_local(number) and not self._cache.has(shard)

    def _fill(self, number: int, wanted: Sequence[int]) -> bool:
        """Fetch a shard into the cache; False if it does not fit, or another process fills it."""
        shards = self._shards.shards
        keep = {shards[n].sha256 for n in wanted}
        try:
            part = self._cache.begin(shards[number], keep=keep, known=self._known)
            if part is None:
                return False
            with closing(part):
                transfer = self._transfer_to(part.descriptor, number)
                asyncio.run_coroutine_threadsafe(transfer, get_loop()).result()
                found = part.sha256()
                if found != shards[number].sha256:
                    raise ValueError(
                        f"{self._shards.location(number)} has sha256 {found[:12]}..., its manifest "
                        f"says {shards[number].sha256[:12]}...; the shard was damaged or replaced: "
                        "pack it again"
                    )
                part.publish()
        except OSError:  # of the disk: reading works without the cache
            self._shards.counters.cache_refusals += number not in self._refused
            self._refused.add(number)
            return False
        return True

    async def _transfer_to(self, descriptor: int, number: int) -> None:
        self._transfer = asyncio.current_task()
        # not the future that other threads hold: cancelling ends it at once, but this task ends
        # only when nothing writes to the descriptor any more
        if self._stopped:  # before a task existed that `stop` could cancel
            raise asyncio.CancelledError
        shards = self._shards
        fetch = partial(shards._fetch, shards._store(number), number)
        await remote.fill(descriptor, shards.shards[number].bytes, fetch)


class Request(NamedTuple):
    """One range request: bytes `start` to `stop` of a shard, and the ranges that it answers."""

    number: int
    start: int
    stop: int
    members: tuple[int, ...]


def merge(ranges: Sequence[tuple[int, int, int]]) -> list[Request]:
    """Plan few requests that cover all (shard number, offset, length) ranges.

    Ranges of one shard with at most GAP_BYTES between them share a request of at most
    REQUEST_BYTES; a longer range has one of its own.
    """
    merged: list[Request] = []
    for member in sorted(range(len(ranges)), key=ranges.__getitem__):
        number, start, length = ranges[member]
        stop = start + length
        if merged:
            last = merged[-1]
            # the gap is negative where they overlap
            near = last.number == number and start - last.stop <= GAP_BYTES
            if near and max(stop, last.stop) - last.start <= REQUEST_BYTES:
                merged[-1] = last._replace(
                    stop=max(stop, last.stop), members=(*last.members, member)
                )
                continue
        merged.append(Request(number, start, stop, (member,)))
    return merged


def cut(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Cut a list into consecutive runs (start, stop) of at most `limit` bytes or one element."""
    bounds, start, filled = [], 0, 0
    for position, size in enumerate(sizes):
        if position > start and filled + size > limit:
            bounds.append((start, position))
            start, filled = position, 0
        filled += size
    if start < len(sizes):
        bounds.append((start, len(sizes)))
    return bounds
