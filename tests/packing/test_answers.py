"""Whatever a server answers, the result is correct or an error with URL, reason and advice."""

import re
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.servers.loopback import ADDRESS
from benchmarks.servers.ranges import odd_server
from rft.loading.dataset import PackedDataset
from rft.packing.foreign.index import index_shards
from rft.packing.verify import verify
from rft.shards.images import clip_pixels, load_image
from rft.shards.manifest import Manifest
from rft.storage import files, remote
from rft.storage.remote import Patience
from tests.packing.test_foreign import LABELS, Options, picture, plain, run_tool, write_tar
from tests.servers.s3 import ObjectStore, use_environment

pytestmark = pytest.mark.slow  # together

LATER = "run the same command again later"
NO_RANGES = "the server does not support range requests"
NO_PERMISSION = "no permission, or no such file in a store that may not be listed"
HTML = "the server sent a web page instead of the file"
FAILS = {
    "401": r"401 Unauthorized: login required",
    "403": rf"403 Forbidden: {NO_PERMISSION}",
    "410": r"410 Gone",
    "429": rf"429 Too Many Requests: {LATER} \(3 tries\)",
    "500": rf"500 Internal Server Error: {LATER} \(3 tries\)",
    "503": rf"503 Service Unavailable: {LATER} \(3 tries\)",
    "html": HTML,
    "203": "the server answered 203 Non-Authoritative Information without a file",
    "300": "the server answered 300 Multiple Choices without a file",
    "302": "the server answered 302 Found without a file",
    "silent": rf"request timed out; {LATER} \(3 tries\)",
    **dict.fromkeys(
        ("shifted", "endless", "longer"), "the server sent different bytes than requested"
    ),
}
SHARD_FAILS = {
    **FAILS,
    **dict.fromkeys(("norange", "gzip", "chunked", "unsized"), NO_RANGES),
}
FILE_FAILS = {
    **FAILS,
    "unsized": "the server does not report the file's size, so it may be truncated",
}
WORKS = ("plain", "redirect", "nohead", "503 x1", "503 x2", "429 x2")
WHOLE_WORKS = (*WORKS, "norange", "gzip", "chunked")


def quick_and_slow(*modes: str) -> list:
    """The server's modes as parameters, a third of them quick; a silent one is waited for."""
    return [
        pytest.param(mode, marks=[pytest.mark.slow] if number % 3 or mode == "silent" else [])
        for number, mode in enumerate(modes)
    ]


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # a busy machine may be slow; a silent server is not waited for
    silent = "silent" in request.node.name
    monkeypatch.setattr(
        remote,
        "PATIENCE",
        Patience(tries=3, stall_seconds=0.1 if silent else 30, longest_pause=0.001),
    )


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A folder with two shards and no other file."""
    folder = tmp_path / "served"
    for shard in range(2):
        members = [m for n in range(3) for m in plain(f"k{shard}{n}", n, 3 * shard + n)]
        write_tar(folder / "test" / f"{shard}.tar", members)
    return folder


def index(url: str, out: Path, **options) -> Manifest:
    return index_shards([f"{url}/test/{{0..1}}.tar"], str(out), LABELS, Options(**options))


def rejects(url: str, reason: str, call: Callable[[], object]) -> None:
    """Check that a call fails with one line that names URL and reason."""
    with pytest.raises(ValueError, match=reason) as caught:
        call()
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def labels(out: Path) -> list[int]:
    data = PackedDataset(str(out))
    for n in range(6):
        assert np.array_equal(data.image(n, 16), clip_pixels(load_image(picture(n)), 16))
    return data.index.label.tolist()


# --- shards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", WORKS)
def test_shards_are_read(served: Path, tmp_path: Path, mode: str) -> None:
    for number, look in enumerate(
        (
            lambda out: verify(str(out), deep=False, workers=1).problems == [],
            lambda out: verify(str(out), deep=True, workers=1).problems == [],
            lambda out: labels(out) == 2 * [0, 1, 2],
        )
    ):
        with odd_server(served, mode) as server:
            out = tmp_path / str(number)
            index(server.url, out)
            server.requests.clear()
            assert look(out)
        if " x" in mode:
            assert max(server.requests.values()) > int(mode[-1])


@pytest.mark.parametrize("mode", SHARD_FAILS)
def test_shards_are_refused(served: Path, tmp_path: Path, mode: str) -> None:
    with odd_server(served, "plain") as server:
        index(server.url, tmp_path / "out")
        first = f"{server.url}/test/0.tar"
        server.mode = mode
        rejects(first, SHARD_FAILS[mode], lambda: index(server.url, tmp_path / "other"))
        assert not (tmp_path / "other").exists()
        rejects(first, SHARD_FAILS[mode], lambda: PackedDataset(str(tmp_path / "out")).payload(1))
        for deep in (False, True):
            problems = verify(str(tmp_path / "out"), deep=deep, workers=1).problems
            assert len(problems) == 2
            assert all(re.search(SHARD_FAILS[mode], str(problem)) for problem in problems)


def test_nothing_listens(tmp_path: Path) -> None:
    with socket.create_server((ADDRESS, 0)) as listener:
        url = f"http://{ADDRESS}:{listener.getsockname()[1]}"
    reason = r"Cannot connect to host .* \(3 tries\)"
    rejects(f"{url}/test/0.tar", reason, lambda: index(url, tmp_path, skip_beside=True))
    rejects(f"{url}/manifest.json", reason, lambda: Manifest.load(url))


# --- files beside shards ------------------------------------------------------------------------

BESIDE = {"classnames.txt": "n03\nn02\n", "test/nshards.txt": "2\n"}


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("classnames.txt", "sloth bear\nred fox\ntoad\n", "'sloth bear' at index 0"),
        ("test/nshards.txt", "3\n", "says 3 shards, but 2 of that folder are named"),
    ],
)
@pytest.mark.parametrize("mode", WHOLE_WORKS)
def test_files_beside_are_read(
    served: Path, tmp_path: Path, mode: str, name: str, content: str, what: str
) -> None:
    (served / name).write_text(content)
    with odd_server(served, mode, name) as server:
        rejects(f"{server.url}/{name}", what, lambda: index(server.url, tmp_path / "out"))


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("mode", quick_and_slow(*FILE_FAILS))
def test_only_not_found_means_absent(served: Path, tmp_path: Path, mode: str, name: str) -> None:
    """No other answer counts as "no such file"; an option skips the file."""
    (served / name).write_text(BESIDE[name])
    with odd_server(served, mode, name) as server:
        # not an answer about this file: the server is busy
        busy = mode in ("429", "500", "503", "silent")
        hint = "$" if busy else ".*; if no such file exists, pass --skip-beside"
        reason = FILE_FAILS[mode] + hint
        rejects(
            server.url, f"{Path(name).name}: {reason}", lambda: index(server.url, tmp_path / "out")
        )
        assert not (tmp_path / "out").exists()
        index(server.url, tmp_path / "out", skip_beside=True)
        assert labels(tmp_path / "out") == 2 * [0, 1, 2]


# --- manifest and index -------------------------------------------------------------------------


@pytest.fixture
def indexed(served: Path) -> Path:
    index_shards([str(served / "test" / "{0..1}.tar")], str(served), LABELS, Options())
    return served


@pytest.mark.parametrize("name", ["manifest.json", "index.npz"])
@pytest.mark.parametrize("mode", quick_and_slow(*WHOLE_WORKS, *FILE_FAILS))
def test_manifest_and_index(indexed: Path, mode: str, name: str) -> None:
    with odd_server(indexed, mode, name) as server:
        if mode in WHOLE_WORKS:
            assert PackedDataset(server.url).payload(4) == picture(4)
        else:
            reason = f"cannot read {server.url}/{name}: {FILE_FAILS[mode]}"
            rejects(server.url, reason, lambda: PackedDataset(server.url))
            (problem,) = verify(server.url, deep=False, workers=1).problems
            assert re.search(FILE_FAILS[mode], str(problem))


def test_what_is_not_there(indexed: Path) -> None:
    with odd_server(indexed, "plain") as server:
        rejects(server.url, "manifest.json is missing", lambda: Manifest.load(f"{server.url}/x"))
        assert not files.exists(f"{server.url}/x/manifest.json")
        assert files.exists(f"{server.url}/manifest.json")
        assert files.find_bytes(f"{server.url}/x") is None
        with pytest.raises(FileNotFoundError):
            files.size(f"{server.url}/x")
    with odd_server(indexed, "503", "manifest.json") as server:
        url = f"{server.url}/manifest.json"
        rejects(url, "cannot look for .*503", lambda: files.exists(url))
        with pytest.raises(OSError, match=r"cannot list .*503"):
            files.names(url)


def test_a_long_file_comes_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "REQUEST_BYTES", 1000)
    for size in (0, 1, 999, 1000, 1001, 5500):
        content = bytes(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))
        (tmp_path / "a.bin").write_bytes(content)
        for mode in ("plain", "503 x1", "norange"):
            with odd_server(tmp_path, mode, ".bin") as server:
                assert files.read_bytes(f"{server.url}/a.bin") == content
                expected = 1 if mode == "norange" else max(1, -(-size // 1000)) + len(mode) // 6
                assert server.requests["/a.bin"] == expected
                if mode != "norange":
                    assert files.size(f"{server.url}/a.bin") == size
                    with files.local_copy(f"{server.url}/a.bin") as path:
                        assert path.read_bytes() == content


def test_folders_that_may_not_be_entered(tmp_path: Path, monkeypatch) -> None:
    """The local file system also has errors that do not mean "absent"."""

    def stat(self: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    assert not files.exists(str(tmp_path / "absent"))
    (tmp_path / "file").write_bytes(b"")
    assert not files.exists(str(tmp_path / "file" / "below"))
    monkeypatch.setattr(Path, "stat", stat)
    rejects(
        str(tmp_path), "cannot look for .*: no permission$", lambda: files.exists(str(tmp_path))
    )


def test_s3_says_why(
    store: ObjectStore, bucket: str, indexed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing key is absent if the bucket may be listed; otherwise it looks like 403."""
    assert files.find_bytes(f"{bucket}/absent.txt") is None
    assert not files.exists(f"{bucket}/absent.txt")
    with files.publish(f"{bucket}/there.txt") as path:
        path.write_bytes(b"x" * 10)
    assert files.exists(f"{bucket}/there.txt")
    assert files.size(f"{bucket}/there.txt") == 10
    assert files.names(bucket) == ["there.txt"]
    use_environment(monkeypatch, store.environment(secret="wrong"))
    url = f"{bucket}/there.txt"
    for call in (files.exists, files.find_bytes, files.size):
        rejects(url, NO_PERMISSION, lambda call=call: call(url))
    rejects(f"{bucket}/test/0.tar", NO_PERMISSION, lambda: index(bucket, tmp_path))


def test_the_command_prints_one_line(served: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    with odd_server(served, "403") as server:
        arguments = (f"{server.url}/test/0.tar", "--out", str(tmp_path / "out"))
        assert run_tool(monkeypatch, "index_shards", *arguments) == 2
    expected = f"error: cannot read {arguments[0]}: 403 Forbidden: {remote.NO_PERMISSION}\n"
    assert capsys.readouterr().err == expected
