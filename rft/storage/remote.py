"""Read requests to remote stores: retries, deadlines, and the meaning of answers.

Only a store's own "not found" (HTTP 404) means that a file is absent. Every other failure is
retried if a retry can help, and otherwise raised with its reason. This module alone implements that
rule; `rft.storage.files` and `rft.shards.ranges` word the errors. Uploads, renames and deletions go
through fsspec's own clients (`rft.storage.files`).

For HTTP, fsspec's own look-ups are not used: for any error of the server, its `exists` returns
False and its `info` raises FileNotFoundError.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

REQUEST_BYTES = 8 * 2**20  # longest request: the most that a dropped connection can cost
BLOCKS_AT_ONCE = 4  # concurrent requests for one file; their answers are held in memory
CLIENT_ERRORS = range(400, 500)  # HTTP answers that a retry does not change ...
BUSY = (408, 429)  # ... except for these
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")  # below 2**63
OK, PARTIAL, NOT_FOUND, RANGE_NOT_SATISFIABLE = 200, 206, 404, 416
NO_PERMISSION = (
    "no permission, or no such file in a store that may not be listed; check the address and the "
    "credentials (docs/storage.md#credentials)"
)
LATER = "run the same command again later"
HINTS = {
    401: "login required (docs/storage.md#credentials)",
    403: NO_PERMISSION,
    416: "the file is shorter than it should be",
    429: LATER,
}
OTHER_BYTES = "the server sent different bytes than requested"
NO_RANGES = "the server does not support range requests; copy the files, or use one that does"
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a request may take, and how often it is tried.

    A request times out if its answer does not begin within `stall_seconds`, or if after n bytes it
    has taken `stall_seconds` + n / `bytes_per_second`. Requests are short (REQUEST_BYTES), so a
    stalled connection does not block for long. Between tries there is a random pause of at most
    0.1, 0.2, 0.4 ... seconds, up to `longest_pause`, which is reached before the last of 8 tries.
    So a store that refuses immediately fails within 13 seconds, a silent one after two minutes.
    """

    tries: int = 8
    stall_seconds: float = 15.0
    bytes_per_second: float = 2**18
    longest_pause: float = 6.4

    def seconds(self, count: int) -> float:
        """Return the deadline for an answer of `count` bytes, from the start of its request."""
        return self.stall_seconds + count / self.bytes_per_second


PATIENCE = Patience()  # for all requests


class Failure(Exception):  # noqa: N818 - `Error` would be less specific
    """A request that failed permanently after `tries` tries; the cause is the last try's error."""

    def __init__(self, tries: int) -> None:
        super().__init__(tries)
        self.tries = tries


def is_transient(error: BaseException) -> bool:
    """Whether a request that failed with this error may succeed on a retry."""
    if not isinstance(error, Exception):  # tenacity passes a cancelled task's error too
        return False
    status = status_of(error)
    if status in CLIENT_ERRORS and status not in BUSY:
        return False
    # "Credential": the clients for S3, GCS and Azure; "Redirect": aiohttp, on leaving HTTP
    if any(word in type(error).__name__ for word in ("Credential", "Redirect")):
        return False
    permanent = (
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
        NotImplementedError,
        TypeError,
        ValueError,
    )
    return not isinstance(error, permanent)


def status_of(error: BaseException) -> int:
    """Find the HTTP status that an error carries, or 0."""
    found = (getattr(error, name, None) for name in ("status", "code"))  # aiohttp's, gcsfs'
    return next((status for status in found if isinstance(status, int)), 0)


def explain(error: BaseException) -> str:
    """Describe an error for a message: the cause of the failure and the remedy."""
    if isinstance(error, Failure):
        assert error.__cause__ is not None
        tries = f" ({error.tries} tries)" if error.tries > 1 else ""
        return explain(error.__cause__) + tries
    if isinstance(error, PermissionError):
        # a store's error names no file, a local one does
        return NO_PERMISSION if error.filename is None else "no permission"
    if "NonHttpUrlRedirect" in type(error).__name__:
        return f"the server redirects to {error}, which rft does not follow"
    status = status_of(error)
    if not status:
        in_time = f"request timed out; {LATER}" if isinstance(error, TimeoutError) else ""
        return str(error) or in_time or type(error).__name__
    # aiohttp's own text repeats the URL
    text = f"{status} {error.message}" if hasattr(error, "message") else str(error)
    hint = HINTS.get(status, LATER if status >= CLIENT_ERRORS.stop else "")
    return f"{text}: {hint}" if hint else text


def client(shared: Any) -> Any:
    """Make a client like fsspec's `shared` one for this module's requests; one per process.

    Retries are made and counted here, not by s3fs, gcsfs or the boto client below s3fs. HTTP
    servers are asked not to compress, because a compressed answer has no ranges.
    """
    if not shared.async_impl:  # the hub's (hf), whose own library makes the requests
        return shared
    # kept on the shared client: dropped with it when the process forks or the settings change
    found = vars(shared).get("rft_client")
    if found is not None:
        return found
    options = dict(shared.storage_options)
    if _is_http(shared):
        headers = options.get("headers", {})
        if not isinstance(headers, Mapping):  # not shown: they may hold a token
            raise ValueError("headers in fsspec's settings (FSSPEC_HTTP) must be an object")
        options["headers"] = {**headers, "Accept-Encoding": "identity"}
    # skip_instance_cache: other code that uses fsspec must not get a client that never retries
    own: Any = type(shared)(*shared.storage_args, **options, skip_instance_cache=True)
    if hasattr(own, "retries"):
        own.retries = 1
    if hasattr(own, "config_kwargs"):
        # the total includes the first attempt; boto's max_attempts does not
        own.config_kwargs = {**own.config_kwargs, "retries": {"total_max_attempts": 1}}
    # several threads may get here; all receive the same client
    return vars(shared).setdefault("rft_client", own)


async def repeated(
    request: Callable[[], Coroutine[Any, Any, Result]],
    on_retry: Callable[[], None] = lambda: None,
) -> Result:
    """Make a request, retrying as often as `PATIENCE` allows.

    Raises:
        FileNotFoundError, IsADirectoryError: as the store reports.
        Failure: if it does not succeed; its cause is the last error.
    """
    attempts = AsyncRetrying(
        stop=stop_after_attempt(PATIENCE.tries),
        wait=wait_random_exponential(multiplier=0.1, max=PATIENCE.longest_pause),
        retry=retry_if_exception(is_transient),
        before_sleep=lambda _: on_retry(),
        reraise=True,
    )
    try:
        return await attempts(request)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except Exception as error:  # every client library has its own error classes
        raise Failure(attempts.statistics.get("attempt_number", 1)) from error


async def read_range(
    fs: Any, path: str, start: int, stop: int, on_retry: Callable[[], None] = lambda: None
) -> bytes:
    """Read bytes `start` to `stop` of a file; a retry requests only the missing ones.

    Raises:
        FileNotFoundError: if the store reports that no such file exists.
        Failure: if they cannot be read.
    """
    received = bytearray()

    async def missing() -> None:
        # from where the last try ended
        await _range(fs, path, start + len(received), stop, received)
        if len(received) < stop - start:
            raise ConnectionError(f"received {len(received)} of {stop - start} bytes")

    if start < stop:  # HTTP has no empty ranges
        await repeated(missing, on_retry)
    return bytes(received)


async def read(fs: Any, path: str, *, limit: int) -> bytes:
    """Read all of a file; a long one in ranges, if the store supports them.

    Raises:
        FileNotFoundError, IsADirectoryError: as the store reports.
        Failure: if it cannot be read, or has more than `limit` bytes.
    """
    content = bytearray()

    async def beginning() -> int:
        content.clear()  # discards the part of a failed try
        size = await _beginning(fs, path, content, limit)
        if size > limit:
            raise ValueError(too_large(limit))
        return size

    size = await repeated(beginning)
    while len(content) < size:
        stop = min(len(content) + REQUEST_BYTES, size)
        content += await read_range(fs, path, len(content), stop)
    return bytes(content)


async def size(fs: Any, path: str) -> int:
    """Return the size in bytes of a file that will be read in ranges.

    Raises:
        FileNotFoundError, IsADirectoryError: as the store reports.
        Failure: if the store does not answer, reports no size, or serves no ranges.
    """

    async def ask() -> int:
        if _is_http(fs):
            return await _http(fs, path, 0, 1, bytearray(), limit=None)
        if (found := await _size(fs, path)) is None:
            raise ValueError("the store does not report its size")
        return found

    return await repeated(ask)


async def exists(fs: Any, path: str) -> bool:
    """Whether a file or folder exists.

    Raises:
        Failure: if the store does not answer.
    """
    try:
        if _is_http(fs):
            http = partial(_http, fs, path, 0, 1, bytearray(), limit=0)
            await repeated(http)
        else:
            await repeated(partial(_info, fs, path))
    except FileNotFoundError:
        return False
    return True


async def listing(fs: Any, path: str) -> list[dict[str, Any]]:
    """List fsspec's entries (`name`, `size`, `type`) of a folder, never from a cache.

    Raises:
        FileNotFoundError: if no such folder exists.
        Failure: if the store does not answer.
    """
    # a listing is paged, and each page is a separate answer
    seconds = PATIENCE.seconds(REQUEST_BYTES)
    return await repeated(partial(_call, fs, "ls", seconds, path, detail=True))


async def download(fs: Any, path: str, descriptor: int) -> None:
    """Copy a remote file into an open local one.

    Raises:
        FileNotFoundError: if the store reports that no such file exists.
        Failure: if it cannot be read.
    """
    await fill(descriptor, await size(fs, path), partial(read_range, fs, path))


async def fill(descriptor: int, size: int, fetch: Callable[[int, int], Awaitable[bytes]]) -> None:
    """Fill an open file with `size` bytes; `fetch` returns those from a start to a stop."""

    async def block(start: int) -> None:
        data = memoryview(await fetch(start, min(start + REQUEST_BYTES, size)))
        while data:  # a nearly full disk accepts only a part; the next write raises the error
            written = os.pwrite(descriptor, data, start)
            data, start = data[written:], start + written

    blocks = [partial(block, start) for start in range(0, size, REQUEST_BYTES)]
    await together(blocks, BLOCKS_AT_ONCE)


async def together(jobs: Iterable[Callable[[], Awaitable[Any]]], at_once: int) -> list[Any]:
    """Run jobs concurrently, at most `at_once` of them; if one fails, the others are cancelled."""
    slots = asyncio.Semaphore(at_once)

    async def in_turn(job: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            return await job()

    tasks = [asyncio.ensure_future(in_turn(job)) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:  # gather leaves the others running when one fails
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def too_large(limit: int) -> str:
    """Describe the refusal of a file that exceeds a limit in bytes."""
    return f"it has more than {limit:,} bytes, too many for this file"


async def _beginning(fs: Any, path: str, content: bytearray, limit: int) -> int:
    """Return the size of a file; bytes that its store sends along are appended to `content`."""
    if _is_http(fs):
        return await _http(fs, path, 0, REQUEST_BYTES, content, limit=limit)
    if (size := await _size(fs, path)) is not None:
        return size
    # one extra byte reveals a file that is too large
    content += await _call(
        fs, "cat_file", PATIENCE.seconds(REQUEST_BYTES), path, start=0, end=limit + 1
    )
    return len(content)


async def _size(fs: Any, path: str) -> int | None:
    info = await _info(fs, path)
    if info["type"] == "directory":
        raise IsADirectoryError(f"{path} is a folder")
    return None if info["size"] is None else int(info["size"])


async def _info(fs: Any, path: str) -> dict[str, Any]:
    return await _call(fs, "info", PATIENCE.stall_seconds, path)


async def _call(fs: Any, name: str, seconds: float, path: str, **options: Any) -> Any:
    """Call a file system's method; a deadline works only with asynchronous clients."""
    fs.invalidate_cache(path)  # other processes write there too
    if fs.async_impl:
        return await asyncio.wait_for(getattr(fs, f"_{name}")(path, **options), seconds)
    return await asyncio.to_thread(getattr(fs, name), path, **options)


async def _range(fs: Any, path: str, start: int, stop: int, received: bytearray) -> None:
    """Append bytes `start` to `stop` of a file, or as many as arrive, to `received`."""
    if _is_http(fs):
        await _http(fs, path, start, stop, received, limit=None)
        return
    data = await _call(fs, "cat_file", PATIENCE.seconds(stop - start), path, start=start, end=stop)
    if len(data) > stop - start:
        raise ValueError(f"received {len(data)} bytes for {stop - start} requested: {NO_RANGES}")
    received += data


def _is_http(fs: Any) -> bool:
    return "https" in fs.protocol


async def _http(
    fs: Any, url: str, start: int, stop: int, received: bytearray, *, limit: int | None
) -> int:
    """Append bytes `start` to `stop` of a URL, or as many as arrive, to `received`.

    Returns the size of the file. A server without ranges is refused unless `limit` is set: then the
    complete file is appended if it is not larger. A limit of 0 reads only the header.
    """
    # imported here: it takes as long as the rest of rft.storage.files
    from aiohttp import ClientTimeout

    headers = {**fs.kwargs.get("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
    # the deadline below replaces aiohttp's default timeout of five minutes
    options = {"timeout": ClientTimeout(total=None), **fs.kwargs, "headers": headers}
    session = await fs.set_session()
    clock, before = asyncio.get_running_loop().time, len(received)
    began, count = clock(), 0
    async with asyncio.timeout(PATIENCE.stall_seconds) as deadline:
        async with session.get(fs.encode_url(url), **options) as answer:
            # an empty file has no first byte
            if answer.status == RANGE_NOT_SATISFIABLE and start == 0:
                return 0
            _require_success(answer, url)
            size = _size_of(answer, start, stop, limit is not None)
            if limit == 0:  # leaving the block closes the connection before the body arrives
                return 0
            async for chunk in answer.content.iter_any():
                received += chunk
                count = len(received) - before
                if size is not None and count > min(stop, size) - start:
                    raise ValueError(OTHER_BYTES)
                if limit is not None and count > limit:
                    raise ValueError(too_large(limit))
                deadline.reschedule(began + PATIENCE.seconds(count))
    return count if size is None else size


def _require_success(answer: Any, url: str) -> None:
    if answer.status == NOT_FOUND:
        raise FileNotFoundError(url)
    answer.raise_for_status()
    if answer.status not in (OK, PARTIAL):
        raise ValueError(f"the server answered {answer.status} {answer.reason} without a file")
    # login pages and proxies may send HTML with status 200 for any address
    if answer.content_type == "text/html":
        raise ValueError(
            "the server sent a web page instead of the file; check the address and the login"
        )


def _size_of(answer: Any, start: int, stop: int, read_all: bool) -> int | None:
    """Read from an answer's header the size of the file; None if the answer is the entire file.

    Raises:
        ValueError: if its body is not the requested range, or could end early unnoticed.
    """
    plain = answer.headers.get("Content-Encoding", "identity") == "identity"
    if answer.status == PARTIAL:
        found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start or not plain:
            raise ValueError(OTHER_BYTES)
        return int(found[2])
    # a server without ranges may still send exactly the file that was requested
    if not read_all and not (start == 0 and plain and answer.content_length == stop):
        raise ValueError(NO_RANGES)
    # such a body ends with the connection, complete or not
    if answer.content_length is None and "Transfer-Encoding" not in answer.headers:
        raise ValueError("the server does not report the file's size, so it may be truncated")
    return None
