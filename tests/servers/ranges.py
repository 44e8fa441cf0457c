"""A web server in the standard library that understands ranges, for where nginx is absent."""

import contextlib
import re
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

from tests.servers.loopback import ADDRESS


@contextlib.contextmanager
def range_server(folder: Path, user: str = "") -> Iterator[str]:
    """Serve `folder` at the yielded URL; where a user ("name:password") is given, to them alone."""
    handler = partial(RangeHandler, user, directory=str(folder))
    with Server((ADDRESS, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://{user}{'@' if user else ''}{ADDRESS}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Server(ThreadingHTTPServer):
    """Says nothing of clients that leave early: that is what the tests are about."""

    def handle_error(self, *_: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


class RangeHandler(SimpleHTTPRequestHandler):
    """Adds `Range: bytes=first-last` and one user's password to the standard file handler."""

    protocol_version = "HTTP/1.1"

    def __init__(self, user: str, *arguments: object, **options: str) -> None:
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

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:
        outputfile.write(source.read(self.remaining))

    def log_message(self, *_: object) -> None:
        """Say nothing."""
