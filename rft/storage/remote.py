"""Requests that read from remote stores: how often, for how long, and what answers mean.

Only a store's own "not found" (HTTP 404) means that a file is absent. Everything else that fails is
repeated where another try can help, and is an error with its reason where none does. This module is
the only owner of that rule; `rft.storage.files` and `rft.shards.ranges` word the errors. Uploads,
renames and deletions go through fsspec's own clients (`rft.storage.files`).

fsspec's own look-ups are not used for HTTP: its `exists` is False and its `info` raises
FileNotFoundError whatever the server answered.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

REQUEST_BYTES = 8 * 2**20  # longest request: what a dropped connection can cost
BLOCKS_AT_ONCE = 4  # requests for one file under way at a time; their answers are in memory
CLIENT_ERRORS = range(400, 500)  # HTTP answers that another try will not change ...
BUSY = (408, 429)  # ... but for these
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")  # below 2**63
OK, PARTIAL, NOT_FOUND, RANGE_NOT_SATISFIABLE = 200, 206, 404, 416
NO_PERMISSION = (
    "no permission, or no such file in a store that may not be listed; check the address and the "
    "credentials"
)
LATER = "run the same command again later"
HINTS = {
    401: "it needs a login, see docs/storage.md#credentials",
    403: NO_PERMISSION,
    416: "the file is shorter than it should be",
    429: LATER,
}
OTHER_BYTES = "the server sends other bytes than were requested"
NO_RANGES = "the server does not serve ranges of it; copy the files, or serve them with ranges"
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a request may take, and how often it is made.

    A request is given up when its answer does not begin within `stall_seconds`, and when after n
    bytes it has taken `stall_seconds` + n / `bytes_per_second`; requests are short (REQUEST_BYTES),
    so a stalled connection blocks nothing for long. Between tries is a random pause of at most 0.1,
    0.2, 0.4 ... seconds up to `longest_pause`, which is that before the last of 8 tries. So a store
    that refuses at once is given up within 13 seconds, a silent one after two minutes.
    """

    tries: int = 8
    stall_seconds: float = 15.0
    bytes_per_second: float = 2**18
    longest_pause: float = 6.4

    def seconds(self, count: int) -> float:
        """Give the deadline for an answer of `count` bytes, from the start of its request."""
        return self.stall_seconds + count / self.bytes_per_second


PATIENCE = Patience()  # of all requests


class Failure(Exception):  # noqa: N818 - `Error` would say less
    """A request that failed for good after so many tries; the cause is the last try's error."""

    def __init__(self, tries: int) -> None:
        super().__init__(tries)
        self.tries = tries


def is_transient(error: BaseException) -> bool:
    """Whether a request that failed so may succeed when it is repeated."""
    if not isinstance(error, Exception):  # tenacity asks about a cancelled task as well
        return False
    status = status_of(error)
    if status in CLIENT_ERRORS and status not in BUSY:
        return False
    # of the clients for S3, GCS and Azure; of aiohttp, which follows redirects within the web alone
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
    """Return the HTTP status that an error carries, or 0."""
    found = (getattr(error, name, None) for name in ("status", "code"))  # aiohttp's, gcsfs'
    return next((status for status in found if isinstance(status, int)), 0)


def explain(error: BaseException) -> str:
    """Word an error for its message: what a request failed with and what can be done about it."""
    if isinstance(error, Failure):
        assert error.__cause__ is not None
        tries = f" ({error.tries} tries)" if error.tries > 1 else ""
        return explain(error.__cause__) + tries
    if isinstance(error, PermissionError):
        # a store's error names no file, one of this machine's disk does
        return NO_PERMISSION if error.filename is None else "no permission"
    if "NonHttpUrlRedirect" in type(error).__name__:
        return f"the server redirects to {error}, which is not followed"
    status = status_of(error)
    if not status:
        in_time = f"no answer in time; {LATER}" if isinstance(error, TimeoutError) else ""
        return str(error) or in_time or type(error).__name__
    # aiohttp's own text repeats the URL
    text = f"{status} {error.message}" if hasattr(error, "message") else str(error)
    hint = HINTS.get(status, LATER if status >= CLIENT_ERRORS.stop else "")
    return f"{text}: {hint}" if hint else text


def client(shared: Any) -> Any:
    """Return a client like fsspec's `shared` one for our requests alone, one for each process.

    Repeating is done, and counted, here: not by s3fs or gcsfs, not by boto below s3fs. An HTTP
    server is asked not to compress, because there are no ranges in a compressed answer.
    """
    if not shared.async_impl:  # the hub's (hf), whose requests are made by its own library
        return shared
    # kept at the shared one: it goes with that when the process forks or the settings change
    found = vars(shared).get("rft_client")
    if found is not None:
        return found
    options = dict(shared.storage_options)
    if _is_http(shared):
        headers = options.get("headers", {})
        if not isinstance(headers, Mapping):  # they may hold a token, so they are not shown
            raise ValueError("headers in fsspec's settings (FSSPEC_HTTP) are not an object")
        options["headers"] = {**headers, "Accept-Encoding": "identity"}
    # skip_instance_cache: other users of fsspec must not get a client that never retries
    own: Any = type(shared)(*shared.storage_args, **options, skip_instance_cache=True)
    if hasattr(own, "retries"):
        own.retries = 1
    if hasattr(own, "config_kwargs"):
        # total: the first attempt counts too, as it does not in boto's max_attempts
        own.config_kwargs = {**own.config_kwargs, "retries": {"total_max_attempts": 1}}
    # threads may make one each; all of them get the same
    return vars(shared).setdefault("rft_client", own)


async def repeated(
    request: Callable[[], Coroutine[Any, Any, Result]],
    on_retry: Callable[[], None] = lambda: None,
) -> Result:
    """Make a request as often as `PATIENCE` allows, until it succeeds.

    Raises:
        FileNotFoundError, IsADirectoryError: as the store reports.
        Failure: if it does not succeed; its cause says why.
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
    except Exception as error:  # every client library has error classes of its own
        raise Failure(attempts.statistics.get("attempt_number", 1)) from error


async def read_range(
    fs: Any, path: str, start: int, stop: int, on_retry: Callable[[], None] = lambda: None
) -> bytes:
    """Return bytes `start` to `stop` of a file; missing ones are requested again.

    Raises:
        FileNotFoundError: if the store reports that no such file exists.
        Failure: if they cannot be had.
    """
    received = bytearray()

    async def missing() -> None:
        # from where the last try broke off
        await _range(fs, path, start + len(received), stop, received)
        if len(received) < stop - start:
            raise ConnectionError(f"{len(received)} of {stop - start} bytes came")

    if start < stop:  # HTTP has no empty ranges
        await repeated(missing, on_retry)
    return bytes(received)


async def read(fs: Any, path: str, *, limit: int) -> bytes:
    """Return the content of a file; a long one comes in ranges, where the store has them.

    Raises:
        FileNotFoundError, IsADirectoryError: as the store reports.
        Failure: if it cannot be had, or has more than `limit` bytes.
    """
    content = bytearray()

    async def beginning() -> int:
        content.clear()  # of a try that broke off
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
    """Measure a file that is to be read in ranges, in bytes.

    Raises:
        FileNotFoundError, IsADirectoryError: as the store reports.
        Failure: if the store does not answer or gives no size, or the server has no ranges.
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
    """Return fsspec's entries (`name`, `size`, `type`) of a folder, as the store sees it now.

    Raises:
        FileNotFoundError: if no such folder exists.
        Failure: if the store does not answer.
    """
    # a listing comes in pages, each of them an answer of its own
    seconds = PATIENCE.seconds(REQUEST_BYTES)
    return await repeated(partial(_call, fs, "ls", seconds, path, detail=True))


async def download(fs: Any, path: str, descriptor: int) -> None:
    """Write the content of a file to an open one.

    Raises:
        FileNotFoundError: if the store reports that no such file exists.
        Failure: if it cannot be had.
    """
    await fill(descriptor, await size(fs, path), partial(read_range, fs, path))


async def fill(descriptor: int, size: int, fetch: Callable[[int, int], Awaitable[bytes]]) -> None:
    """Write `size` bytes to an open file; `fetch` returns those from a start to a stop."""

    async def block(start: int) -> None:
        data = memoryview(await fetch(start, min(start + REQUEST_BYTES, size)))
        while data:  # a nearly full disk takes a part; the next write raises its error
            written = os.pwrite(descriptor, data, start)
            data, start = data[written:], start + written

    blocks = [partial(block, start) for start in range(0, size, REQUEST_BYTES)]
    await together(blocks, BLOCKS_AT_ONCE)


async def together(jobs: Iterable[Callable[[], Awaitable[Any]]], at_once: int) -> list[Any]:
    """Run jobs side by side, so many at once; when one fails, no other is left running."""
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
    """Word the refusal of a file of more than so many bytes."""
    return f"it has more than {limit:,} bytes, too many for such a file"


async def _beginning(fs: Any, path: str, content: bytearray, limit: int) -> int:
    """Return the size of a file; what its store sends along, up to all of it, goes to `content`."""
    if _is_http(fs):
        return await _http(fs, path, 0, REQUEST_BYTES, content, limit=limit)
    if (size := await _size(fs, path)) is not None:
        return size
    # one byte more shows a file that is too large
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
    """Call a file system's method; only asynchronous clients can be given a deadline."""
    fs.invalidate_cache(path)  # others write there too
    if fs.async_impl:
        return await asyncio.wait_for(getattr(fs, f"_{name}")(path, **options), seconds)
    return await asyncio.to_thread(getattr(fs, name), path, **options)


async def _range(fs: Any, path: str, start: int, stop: int, received: bytearray) -> None:
    """Append bytes `start` to `stop` of a file, or as many as come, to `received`."""
    if _is_http(fs):
        await _http(fs, path, start, stop, received, limit=None)
        return
    data = await _call(fs, "cat_file", PATIENCE.seconds(stop - start), path, start=start, end=stop)
    if len(data) > stop - start:
        raise ValueError(f"{len(data)} bytes came where {stop - start} were requested: {NO_RANGES}")
    received += data


def _is_http(fs: Any) -> bool:
    return "https" in fs.protocol


async def _http(
    fs: Any, url: str, start: int, stop: int, received: bytearray, *, limit: int | None
) -> int:
    """Append bytes `start` to `stop` of a URL, or as many as come, to `received`.

    Returns the size of the file. A server without ranges is refused, unless there is a `limit`:
    then the whole file is appended if it has no more bytes; a limit of 0 looks at the header alone.
    """
    from aiohttp import ClientTimeout  # its import takes as long as the rest of rft.storage.files

    headers = {**fs.kwargs.get("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
    # aiohttp's own five minutes for an answer are replaced by the deadline below
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
            if limit == 0:  # leaving the block closes the connection: the body is never received
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
        raise ValueError(f"the server sends {answer.status} {answer.reason}, which is no file")
    # a login page or a proxy may answer so, with status 200, for any address
    if answer.content_type == "text/html":
        raise ValueError(
            "the server sends a web page in its place: check the address and the login"
        )


def _size_of(answer: Any, start: int, stop: int, read_all: bool) -> int | None:
    """Return the size of the file whose range an answer is; None if it is the whole file.

    Raises:
        ValueError: if its body is not what was requested, or may end early without a sign.
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
    # the body ends where the connection does, on purpose or not
    if answer.content_length is None and "Transfer-Encoding" not in answer.headers:
        raise ValueError("the server does not tell its size, so it may be cut off")
    return None
