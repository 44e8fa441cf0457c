"""A hostile web server; the files that it serves are in the row's working folder."""

import contextlib
import gzip
import itertools
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from benchmarks.servers.loopback import ADDRESS
from benchmarks.servers.ranges import RangeHandler, serving

MOST = 6 * 2**30  # bytes of an endless answer: more than any row may take


@contextlib.contextmanager
def hostile_server(folder: Path, way: str) -> Iterator[str]:
    """Serve `folder`; `way` is "HOW NAME": HOW to answer requests whose path ends in NAME."""
    how, _, name = way.partition(" ")
    closing = threading.Event()
    handler = partial(Handler, how, name, closing, directory=str(folder))
    with serving(handler) as port:
        try:
            yield f"http://{ADDRESS}:{port}"
        finally:
            closing.set()


class Handler(RangeHandler):
    """Answers according to the row."""

    def __init__(
        self, how: str, name: str, closing: threading.Event, *arguments: object, **options: str
    ) -> None:
        self.how, self.name, self.closing = how, name, closing
        super().__init__("", *arguments, **options)

    def send_head(self) -> BinaryIO | None:
        self.remaining = -1
        if self.name and self.path.endswith(self.name):
            self.close_connection = True
            with contextlib.suppress(OSError):  # the client has seen enough
                getattr(self, f"answer_{self.how}")()
            return None
        return super().send_head()

    def begin(self, status: int = 200, reason: str | None = None, **headers: object) -> None:
        self.send_response(status, reason)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def answer_endless(self) -> None:
        """A list without an end."""
        self.begin(Transfer_Encoding="chunked")
        chunk = b"[" + b"0," * 2**18
        for sent in itertools.count(0, len(chunk)):
            if self.closing.is_set() or sent > MOST:
                return
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            chunk = b"0," * 2**18

    def answer_bomb(self) -> None:
        """A megabyte that becomes a gigabyte."""
        content = gzip.compress(bytes(2**30), 9)
        self.begin(Content_Encoding="gzip", Content_Length=len(content))
        self.wfile.write(content)

    def answer_loop(self) -> None:
        self.begin(302, Location=self.path, Content_Length=0)

    def answer_file(self) -> None:
        """Redirects the reader to a file of its own."""
        precious = Path(self.directory).parent / "outside" / "precious.txt"
        self.begin(302, Location=f"file://{precious}", Content_Length=0)

    def answer_short(self) -> None:
        self.begin(Content_Length=10**6)
        self.wfile.write(b"{")

    def answer_claims(self) -> None:
        """Announces a file of a terabyte, and keeps serving it."""
        first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        headers = {"Content_Range": f"bytes {first}-{last}/{10**12}"}
        self.begin(206, Content_Length=last + 1 - first, **headers)
        self.wfile.write(b"[" * (last + 1 - first))

    def answer_escape(self) -> None:
        self.begin(403, "\x1b[2J\x1b]0;owned\x07Forbidden", Content_Length=0)

    def answer_silence(self) -> None:
        self.closing.wait(30)

    def answer_trickle(self) -> None:
        self.begin(Content_Length=10**9)
        while not self.closing.is_set():
            self.wfile.write(b" ")
            time.sleep(0.05)

    def answer_garbage(self) -> None:
        self.wfile.write(b"\x00\x01\x02 this is no HTTP \r\n\r\n" * 100)

    def answer_headers(self) -> None:
        """A header without an end."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        for _ in range(2**10):
            self.wfile.write(b"a" * 2**16)
