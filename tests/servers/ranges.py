"""A web server in the standard library that understands ranges, for where nginx is absent."""

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

from tests.servers.loopback import ADDRESS


@contextlib.contextmanager
def range_server(folder: Path) -> Iterator[str]:
    """Serve `folder` at the yielded URL."""
    handler = partial(RangeHandler, directory=str(folder))
    with Server((ADDRESS, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://{ADDRESS}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Server(ThreadingHTTPServer):
    """Says nothing of clients that leave early: that is what the tests are about."""

    def handle_error(self, *_: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


class RangeHandler(SimpleHTTPRequestHandler):
    """Adds `Range: bytes=first-last` to the standard file handler."""

    protocol_version = "HTTP/1.1"

    def send_head(self) -> BinaryIO | None:
        self.remaining = -1  # one handler serves all requests of a connection
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
