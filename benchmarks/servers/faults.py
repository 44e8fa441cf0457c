"""A proxy that breaks connections, in front of any HTTP server on loopback.

Faults are drawn per request, so the proxy closes every connection after one answer: clients keep
connections alive, and a fault drawn per connection might never occur. It counts the faults that
occurred, so a test that asserts on the counts cannot pass without them.
"""

import contextlib
import re
import socket
import socketserver
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.servers.loopback import ADDRESS

Kind = Literal["fin", "rst", "stall", "503", "latency", "throttle"]
CHUNK = 16 * 1024
GO_AHEAD = b"HTTP/1.1 100"  # the answer to `Expect: 100-continue`, before an upload
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a request."""

    kind: Kind
    after: int = 0
    """Bytes of the answer's body that arrive before fin, rst or stall."""
    seconds: float = 0.0
    """Delay before the answer (latency)."""
    bytes_per_second: float = 2.0**20
    """Rate of the body (throttle)."""


def first(count: int) -> Callable[[int], bool]:
    """Return the schedule that hits the first `count` matching requests."""
    return lambda number: number < count


def every_third(number: int) -> bool:
    """Hit one of three matching requests, the first among them."""
    return number % 3 == 0


@dataclass
class Proxy:
    """A running proxy: its faults, the requests they apply to, and counts."""

    upstream: int
    fault: Fault
    schedule: Callable[[int], bool]
    matching: str
    port: int = 0
    requests: int = 0
    """Requests that matched."""
    fired: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.port}"

    def draw(self, request_line: str) -> Fault | None:
        """Return the fault of this request."""
        if re.search(self.matching, request_line) is None:
            return None
        with self.lock:
            number, self.requests = self.requests, self.requests + 1
        return self.fault if self.schedule(number) else None

    def count(self, fault: Fault) -> None:
        with self.lock:
            self.fired[fault.kind] += 1


@contextlib.contextmanager
def faulty(
    upstream: int | str,
    fault: Fault,
    schedule: Callable[[int], bool] = every_third,
    matching: str = r"^GET \S+\.tar",
) -> Iterator[Proxy]:
    """Run a proxy to a server on loopback, given by its port or URL.

    `matching` is searched in the request line; other requests pass untouched.
    """
    port = upstream if isinstance(upstream, int) else int(upstream.rsplit(":", 1)[1])
    proxy = Proxy(port, fault, schedule, matching)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            # either side may close at any time: that is the purpose
            with contextlib.suppress(OSError):
                relay(proxy, self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server((ADDRESS, 0), Handler) as server:
        proxy.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            server.shutdown()
            thread.join()


def relay(proxy: Proxy, client: socket.socket) -> None:
    """Serve one request of a client."""
    head, rest = read_head(client)
    if not head:
        return
    fault = proxy.draw(head.split(b"\r\n", 1)[0].decode("latin-1"))
    if fault is not None and fault.kind == "503":
        proxy.count(fault)
        client.sendall(REFUSAL)
        client.shutdown(socket.SHUT_WR)
        while client.recv(CHUNK):  # closing over unread bytes would reset the connection
            pass
        return
    if fault is not None and fault.kind == "latency":
        proxy.count(fault)
        proxy.closing.wait(fault.seconds)
    with socket.create_connection((ADDRESS, proxy.upstream)) as server:
        server.sendall(head + rest)
        upload = threading.Thread(target=pump, args=(client, server), daemon=True)
        upload.start()
        try:
            answer(proxy, fault, server, client, upload)
        finally:
            for side in (server, client):
                with contextlib.suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)
            upload.join()


def pump(client: socket.socket, server: socket.socket) -> None:
    """Forward the request's body; if the client leaves, close the upstream connection."""
    with contextlib.suppress(OSError):
        while data := client.recv(CHUNK):
            server.sendall(data)
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)


def answer(
    proxy: Proxy,
    fault: Fault | None,
    server: socket.socket,
    client: socket.socket,
    upload: threading.Thread,
) -> None:
    """Forward the answer, with the fault."""
    head, body = read_head(server)
    while head.startswith(GO_AHEAD):
        client.sendall(head)
        head, body = read_head(server, body)
    client.sendall(head)
    if fault is not None and fault.kind == "throttle":
        proxy.count(fault)
    sent = 0
    while body or (body := server.recv(CHUNK)):
        breaks = fault is not None and fault.kind in ("fin", "rst", "stall")
        if fault is not None and breaks and sent + len(body) > fault.after:
            client.sendall(body[: fault.after - sent])
            proxy.count(fault)
            break_off(proxy, fault.kind, client, upload)
            return
        if fault is not None and fault.kind == "throttle":
            proxy.closing.wait(len(body) / fault.bytes_per_second)
        client.sendall(body)
        sent += len(body)
        body = b""


def break_off(proxy: Proxy, kind: Kind, client: socket.socket, upload: threading.Thread) -> None:
    """End an answer half way: with a reset, or not at all until the client leaves.

    An orderly end (fin) is what the caller does anyway.
    """
    if kind == "rst":
        # the system keeps a socket open while a different thread reads it
        client.shutdown(socket.SHUT_RD)
        upload.join()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    while kind == "stall" and upload.is_alive() and not proxy.closing.is_set():
        upload.join(0.05)


def read_head(stream: socket.socket, data: bytes = b"") -> tuple[bytes, bytes]:
    """Read a request's or answer's head, rewritten to close the connection, and the rest.

    Both are empty if the other side closes first.
    """
    while b"\r\n\r\n" not in data:
        more = stream.recv(CHUNK)
        if not more:
            return b"", b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    if head.startswith(GO_AHEAD):  # the actual answer follows
        return head + b"\r\n\r\n", rest
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"Connection: close", b"", b""]), rest
