"""A web server in the standard library with range requests, for machines without nginx."""

import contextlib
import gzip
import re
import sys
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.servers.loopback import ADDRESS


@contextlib.contextmanager
def range_server(folder: Path, user: str = "") -> Iterator[str]:
    """Serve `folder` at the yielded URL; with a user ("name:password"), only to that user."""
    with serving(partial(RangeHandler, user, directory=str(folder))) as port:
        yield f"http://{ADDRESS}:{port}"


@dataclass
class Oddity:
    """Behaviour of a server for requests whose path ends in `name`, and counts.

    `mode` is a status to answer ("503 x2" only for a path's first two requests), silent (never an
    answer), html (a login page), norange (always the complete file), gzip (although not requested),
    chunked or unsized (complete, without a length), nohead (only GET), shifted (other bytes than
    were requested), endless (a size of 5,000 digits), longer (more bytes than the announced size),
    redirect (all paths), or plain.
    """

    mode: str
    name: str
    url: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    closing: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def odd_server(folder: Path, mode: str, name: str = ".tar") -> Iterator[Oddity]:
    """Serve `folder` with an oddity."""
    oddity = Oddity(mode, name)
    with serving(partial(OddHandler, oddity, directory=str(folder))) as port:
        oddity.url = f"http://{ADDRESS}:{port}"
        try:
            yield oddity
        finally:
            oddity.closing.set()


@contextlib.contextmanager
def serving(handler: partial) -> Iterator[int]:
    """Answer requests at the yielded port."""
    with Server((ADDRESS, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class Server(ThreadingHTTPServer):
    """Ignores clients that leave early, which the tests do on purpose."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class RangeHandler(SimpleHTTPRequestHandler):
    """Adds `Range: bytes=first-last` and one user's password to the standard file handler."""

    protocol_version = "HTTP/1.1"

    def __init__(self, user: str, *arguments: Any, **options: str) -> None:
        self.authorization = f"Basic {b64encode(user.encode()).decode()}" if user else None
        super().__init__(*arguments, **options)

    def send_head(self) -> BinaryIO | None:
        self.remaining = -1  # one handler serves all requests of a connection
        if self.authorization and self.headers.get("Authorization") != self.authorization:
            self.send_error(401)
            return None
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            return super().send_head()
        size, first = path.stat().st_size, int(wanted[1])
        last = min(int(wanted[2]), size - 1) if wanted[2] else size - 1
        if first >= size:
            self.send_error(416)
            return None
        self.send_response(206)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        stream = path.open("rb")
        stream.seek(first)
        self.remaining = last + 1 - first
        return stream

    def copyfile(self, source: Any, outputfile: Any) -> None:
        outputfile.write(source.read(self.remaining))

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class OddHandler(RangeHandler):
    """Implements an oddity."""

    def __init__(self, oddity: Oddity, *arguments: Any, **options: str) -> None:
        self.oddity = oddity
        super().__init__("", *arguments, **options)

    def send_head(self) -> BinaryIO | None:
        self.remaining = -1
        mode = self.oddity.mode
        if mode == "redirect":
            if not self.path.startswith("/real/"):
                return self.say(302, Location=f"/real{self.path}")
            self.path = self.path.removeprefix("/real")
        elif self.path.endswith(self.oddity.name):
            self.oddity.requests[self.path] += 1
            status, _, times = mode.partition(" x")
            if status.isdecimal() and (not times or self.oddity.requests[self.path] <= int(times)):
                return self.say(int(status))
            if mode == "html":
                return self.say(200, b"<html>please log in</html>" * 99, Content_Type="text/html")
            if Path(self.translate_path(self.path)).is_file() and hasattr(self, f"odd_{mode}"):
                return getattr(self, f"odd_{mode}")(Path(self.translate_path(self.path)))
        return super().send_head()

    def say(self, status: int, content: bytes = b"", **headers: str) -> None:
        """Send a complete answer, with its length unless the headers define its end."""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if not {"Transfer_Encoding", "Connection"} & headers.keys():
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def odd_silent(self, _: Path) -> None:
        self.oddity.closing.wait()
        self.close_connection = True

    def odd_norange(self, path: Path) -> None:
        self.say(200, path.read_bytes())

    def odd_gzip(self, path: Path) -> None:
        self.say(200, gzip.compress(path.read_bytes()), Content_Encoding="gzip")

    def odd_chunked(self, path: Path) -> None:
        content = path.read_bytes()
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
        self.say(200, body, Transfer_Encoding="chunked")

    def odd_unsized(self, path: Path) -> None:
        self.say(200, path.read_bytes(), Connection="close")

    def odd_shifted(self, path: Path) -> None:
        content = path.read_bytes()
        size = len(content)
        self.say(206, content[1:], Content_Range=f"bytes 1-{size - 1}/{size}")

    def odd_endless(self, path: Path) -> None:
        self.say(206, path.read_bytes()[:1], Content_Range=f"bytes 0-0/{'9' * 5000}")

    def odd_longer(self, path: Path) -> None:
        self.say(206, path.read_bytes()[:1], Content_Range="bytes 0-0/0")

    def do_HEAD(self) -> None:
        if self.oddity.mode == "nohead":
            self.send_error(405)
        else:
            super().do_HEAD()
