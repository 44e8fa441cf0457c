"""The test servers behave as named: a fault that never occurs proves nothing."""

import http.client
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from benchmarks import tiny_world
from benchmarks.servers.faults import Fault, Proxy, every_third, faulty, first
from benchmarks.servers.ranges import range_server
from benchmarks.servers.tmpfs import small_disk
from benchmarks.waiting import SECONDS, until
from tests.servers.nginx import web_server
from tests.servers.s3 import ObjectStore, use_environment

DATA = bytes(range(256)) * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "a.tar").write_bytes(DATA)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[str]:
    with range_server(folder) as url:
        yield url


def get(url: str, start: int | None = None, stop: int = 0, timeout: float = SECONDS) -> bytes:
    headers = {} if start is None else {"Range": f"bytes={start}-{stop - 1}"}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read()


@pytest.fixture(scope="module", params=["nginx", "standard library"])
def server(request, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "nginx":
        with web_server(folder, tmp_path_factory.mktemp("nginx"), flaky=100) as url:
            yield url
    else:
        yield request.getfixturevalue("plain")


def test_ranges(server: str) -> None:
    url = f"{server}/a.tar"
    assert get(url) == DATA
    assert get(url, 0, 1) == DATA[:1]
    assert get(url, 1000, 5000) == DATA[1000:5000]
    assert get(url, len(DATA) - 10, len(DATA) + 10) == DATA[-10:]
    for path, start, status in [("a.tar", len(DATA), 416), ("absent.tar", 0, 404)]:
        with pytest.raises(urllib.error.HTTPError, match=str(status)):
            get(f"{server}/{path}", start, start + 10)


def test_one_connection_serves_many_requests(server: str) -> None:
    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    for headers, expected in [({"Range": "bytes=5-9"}, DATA[5:10]), ({}, DATA)]:
        connection.request("GET", "/a.tar", headers=headers)
        assert connection.getresponse().read() == expected
    connection.close()


def test_special_places_of_nginx(folder: Path, tmp_path: Path) -> None:
    with web_server(folder, tmp_path, flaky=100, slow=2**20) as url:
        assert get(f"{url}/norange/a.tar", 10, 20) == DATA
        assert get(f"{url}/slow/a.tar") == DATA
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(f"{url}/flaky/a.tar")


ERRORS = {
    "fin": http.client.IncompleteRead,
    "rst": ConnectionResetError,
    "503": urllib.error.HTTPError,
}


def require_stall(proxy: Proxy) -> None:
    """The data before the stall arrives, however late, and then nothing."""
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"))
    connection.request("GET", "/a.tar")
    stream = connection.sock
    with connection.getresponse() as answer:
        assert answer.read(10_000) == DATA[:10_000]
        until(lambda: proxy.fired["stall"], "the stall")
        stream.settimeout(0.1)
        with pytest.raises(TimeoutError):
            answer.read(1)


@pytest.mark.parametrize("kind", [*ERRORS, "stall"])
def test_broken_answers(plain: str, kind: str) -> None:
    with faulty(plain, Fault(kind=kind, after=10_000), first(1)) as proxy:
        url = f"{proxy.url}/a.tar"
        assert get(f"{proxy.url}/") != b""  # does not match, so it is not part of the schedule
        if kind == "stall":
            require_stall(proxy)
        else:
            with pytest.raises(ERRORS[kind]) as caught:
                get(url)
        assert get(url) == DATA
        assert get(url, 3, 7) == DATA[3:7]
    assert (proxy.requests, dict(proxy.fired)) == (3, {kind: 1})
    if kind == "fin":
        assert caught.value.partial == DATA[:10_000]


def test_answers_that_are_short_enough_do_not_count(plain: str) -> None:
    with faulty(plain, Fault(kind="fin", after=100), first(1)) as proxy:
        assert get(f"{proxy.url}/a.tar", 0, 100) == DATA[:100]
    assert (proxy.requests, dict(proxy.fired)) == (1, {})


SLOW = [Fault(kind="latency", seconds=30), Fault(kind="throttle", bytes_per_second=1000)]


@pytest.mark.slow
@pytest.mark.parametrize("fault", SLOW, ids=lambda fault: fault.kind)
def test_slow_answers(plain: str, fault: Fault) -> None:
    with faulty(plain, fault, every_third) as proxy:
        with pytest.raises(TimeoutError):  # no machine is too fast for it
            get(f"{proxy.url}/a.tar", timeout=0.3)
        until(lambda: proxy.fired[fault.kind], "the fault")
        assert get(f"{proxy.url}/a.tar") == DATA
    assert dict(proxy.fired) == {fault.kind: 1}


def test_slow_answers_are_whole(plain: str) -> None:
    with faulty(plain, Fault(kind="throttle", bytes_per_second=2**22), first(1)) as proxy:
        assert get(f"{proxy.url}/a.tar") == DATA
    assert dict(proxy.fired) == {"throttle": 1}


@pytest.mark.slow
def test_object_store(bucket: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads, writes and lists through a proxy; a wrong secret is refused."""
    with faulty(store.port, Fault(kind="latency"), first(100), matching="") as proxy:
        use_environment(monkeypatch, store.environment(proxy.port))
        fs = fsspec.filesystem("s3")
        fs.pipe_file(f"{bucket}/folder/a.tar", DATA)
        assert fs.cat_file(f"{bucket}/folder/a.tar") == DATA
        assert fs.cat_file(f"{bucket}/folder/a.tar", start=5, end=9) == DATA[5:9]
        assert fs.find(bucket) == [f"{bucket.removeprefix('s3://')}/folder/a.tar"]
    assert proxy.fired["latency"] == proxy.requests >= 4
    use_environment(monkeypatch, store.environment(secret="wrong"))
    with pytest.raises(PermissionError):
        fsspec.filesystem("s3").cat_file(f"{bucket}/folder/a.tar")


ABANDONED = """
    import signal, sys
    from pathlib import Path
    from tests.servers.nginx import web_server

    with web_server(Path(sys.argv[1]), Path(sys.argv[2])) as url:
        print(url, flush=True)
        signal.pause()
"""


@pytest.mark.slow
def test_no_server_outlives_killed_tests(folder: Path, tmp_path: Path) -> None:
    with web_server(folder, tmp_path):  # skipped if it cannot run
        pass
    command = [sys.executable, "-c", textwrap.dedent(ABANDONED), str(folder), str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=tiny_world.environment()
    ) as process:
        url = process.stdout.readline().strip()
        assert get(f"{url}/a.tar") == DATA
        process.kill()

    def is_gone() -> bool:
        try:
            get(f"{url}/a.tar")
        except OSError:
            return True
        return False

    until(is_gone, "the end of nginx")


def test_small_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path, 2**20) as disk:
        (disk / "half").write_bytes(bytes(2**19))
        with pytest.raises(OSError, match="No space left"):
            (disk / "too much").write_bytes(bytes(2**20))
    assert list(tmp_path.iterdir()) == []
