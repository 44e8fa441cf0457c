"""Remote data: under any fault, a batch equals that of a local copy, or is an error.

The servers are real and on loopback; see tests.servers. Tests with faults assert that they
occurred.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import tiny_world
from benchmarks.servers.faults import Fault, Proxy, every_third, faulty, first
from benchmarks.servers.ranges import range_server
from benchmarks.servers.tmpfs import small_disk
from benchmarks.waiting import SECONDS, until
from rft.loading.batches import EvaluationBatches, TrainingBatches
from rft.loading.dataset import Batch, PackedDataset
from rft.loading.order import Plan
from rft.loading.read import read_batches
from rft.packing.pack import Options, pack
from rft.shards import cache as caching
from rft.shards.cache import Cache
from rft.shards.index import Index
from rft.shards.label_space import LabelSpace
from rft.shards.manifest import Manifest, Shard
from rft.shards.ranges import Shards
from rft.storage import remote
from rft.storage.remote import Patience
from tests import tiny
from tests.servers.nginx import web_server
from tests.servers.s3 import ObjectStore, use_environment

pytestmark = pytest.mark.slow

SIZE, SAMPLES, BATCH = 64, 60, 12
LABELS = LabelSpace(ids=("n01", "n02"), names=("one", "two"), templates=("a {c}.",))
OPTIONS = Options(encoding="pixels", size=SIZE, shard_mb=0.11, workers=1)
TRAIN = "imagenet-train"
MIDDLE = 20_000  # bytes: within a sample, and in nearly every request
PATIENCE = Patience(tries=30, stall_seconds=0.2, bytes_per_second=2**22, longest_pause=0.02)
LITTLE_PATIENCE = Patience(tries=2, stall_seconds=1.0, longest_pause=0.01)
# for requests that must succeed at the first try: no timeout on a slow machine
ONE_TRY = Patience(tries=1, stall_seconds=SECONDS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images in ImageNet's layout, different ones in train and val."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n in range(SAMPLES):
        wnid = LABELS.ids[n % 2]
        for name in (f"train/{wnid}/{wnid}_{n}.PNG", f"val/{wnid}/ILSVRC2012_val_{n:08d}.PNG"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name, compress_level=0)
    return root


@pytest.fixture(scope="module")
def local(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with both sets, packed; their shards have equal names."""
    out = tmp_path_factory.mktemp("local")
    for dataset in (TRAIN, "imagenet-val"):
        assert pack(dataset, str(images), str(out), LABELS, OPTIONS)
    return out


@pytest.fixture(scope="module")
def expected(local: Path) -> list[str]:
    """Return the digests of two epochs' batches, read from the local copy."""
    return digests(PackedDataset(str(local / TRAIN)))


@pytest.fixture(scope="module")
def web(local: Path) -> Iterator[str]:
    with range_server(local) as url:
        yield url


@pytest.fixture(scope="module")
def nginx(local: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with web_server(local, tmp_path_factory.mktemp("nginx")) as url:
        yield url


@pytest.fixture
def s3_copy(bucket: str, local: Path) -> str:
    """Return the URL of a bucket with a copy of the training set."""
    fs = fsspec.filesystem("s3")
    fs.put(str(local / TRAIN), f"{bucket}/{TRAIN}", recursive=True)
    return bucket


Through = Callable[..., contextlib.AbstractContextManager[tuple[Proxy, str]]]


@pytest.fixture(params=["http", "nginx", "s3"])
def through_faults(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Through:
    """Return a context manager (fault, schedule) -> (proxy, URL of the data behind it)."""

    @contextlib.contextmanager
    def through(fault: Fault, schedule: Callable[[int], bool]) -> Iterator[tuple[Proxy, str]]:
        if request.param == "s3":
            store: ObjectStore = request.getfixturevalue("store")
            url = request.getfixturevalue("s3_copy")
            with faulty(store.port, fault, schedule) as proxy:
                use_environment(monkeypatch, store.environment(proxy.port))
                yield proxy, f"{url}/{TRAIN}"
        else:
            name = {"http": "web", "nginx": "nginx"}[request.param]
            with faulty(request.getfixturevalue(name), fault, schedule) as proxy:
                yield proxy, f"{proxy.url}/{TRAIN}"

    return through


def training_batches(packed: PackedDataset) -> TrainingBatches:
    plan = Plan(
        shard_sizes=tuple(shard.samples for shard in packed.manifest.shards),
        batch_size=BATCH,
        seed=3,
        streams=2,
        block_shards=2,
    )
    return TrainingBatches(
        packed, np.arange(len(packed)), plan, image_size=SIZE, rank=0, world_size=1
    )


def digest(batch: Batch) -> str:
    """Return the hash of everything in a batch: sample numbers, labels, pixels."""
    tensors = (batch.samples_B, batch.labels_B, batch.images_BCHW)
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def digests(packed: PackedDataset, workers: int = 0) -> list[str]:
    """Read two epochs; return the hash of each batch."""
    batches = training_batches(packed)
    steps = range(2 * batches.plan.steps_per_epoch)
    return [digest(b) for b in read_batches(batches, steps, workers=workers, device=CPU)]


def fill(packed: PackedDataset, numbers: list[int]) -> None:
    """Request shards until the cache has them."""
    cache = packed.shards.cache
    assert cache is not None
    packed.shards.look_ahead(numbers)
    until(lambda: all(cache.has(packed.manifest.shards[number]) for number in numbers))


def is_sound(folder: Path) -> bool:
    """Whether every file of a cache has the sha256 in its name."""
    files = list(folder.glob("*.tar"))
    assert files
    return all(hashlib.sha256(path.read_bytes()).hexdigest() == path.stem for path in files)


# --- a bad network ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fin", "rst", "stall", "503"])
def test_t7_broken_connections(
    through_faults: Through, expected: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are truncated, reset, stalled or refused: the same ids and pixels arrive."""
    # each stall takes as long as our patience
    schedule = first(6) if kind == "stall" else every_third
    with through_faults(Fault(kind=kind, after=MIDDLE), schedule) as (proxy, url):
        packed = PackedDataset(url)
        monkeypatch.setattr(remote, "PATIENCE", PATIENCE)
        assert digests(packed) == expected
    assert proxy.fired[kind] > 0
    # more if this machine was too slow for our patience; fewer if a client retried silently
    assert packed.shards.counters.range_retries >= proxy.fired[kind]


def test_t7_random_refusals(
    nginx: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = PackedDataset(f"{nginx}/{TRAIN}")
    packed.shards = Shards(f"{nginx}/flaky/{TRAIN}", packed.manifest.shards)
    monkeypatch.setattr(remote, "PATIENCE", PATIENCE)
    assert digests(packed) == expected
    assert packed.shards.counters.range_retries > 0


@pytest.mark.parametrize(
    "fault",
    [Fault(kind="throttle", bytes_per_second=2**20), Fault(kind="latency", seconds=0.05)],
    ids=lambda fault: fault.kind,
)
def test_slow_connections(
    through_faults: Through, expected: list[str], fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow connection is not a dead one."""
    monkeypatch.setattr(remote, "PATIENCE", ONE_TRY)
    with through_faults(fault, every_third) as (proxy, url):
        assert digests(PackedDataset(url)) == expected
    assert proxy.fired[fault.kind] > 0


def test_slow_server(nginx: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", ONE_TRY)
    assert digests(PackedDataset(f"{nginx}/slow/{TRAIN}")) == expected


def sample_named(packed: PackedDataset, error: ValueError) -> str:
    """Return the shard, the offset and the key of sample 0, all of which the error must name."""
    shard, offset = packed.manifest.shards[0].name, packed.index.offset[0]
    message = str(error)
    assert "\n" not in message
    for part in (f"{packed.url}/{shard}", repr(packed.key(0)), f"offset {offset}"):
        assert part in message
    return message


@pytest.mark.parametrize("kind", ["fin", "stall", "503"])
def test_patience_ends(through_faults: Through, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with through_faults(Fault(kind=kind, after=5000), lambda n: n > 0) as (proxy, url):
        packed = PackedDataset(url)
        packed.payload(SAMPLES - 1)  # starting a client takes longer than our patience
        patience = LITTLE_PATIENCE
        if kind != "stall":  # only the fault ends a try, on any machine
            patience = dataclasses.replace(LITTLE_PATIENCE, stall_seconds=SECONDS)
        monkeypatch.setattr(remote, "PATIENCE", patience)
        with pytest.raises(ValueError, match="2 tries") as caught:
            packed.payload(0)
        until(lambda: proxy.fired[kind] == 2, "two faults")
    sample_named(packed, caught.value)


def test_too_slow_is_an_error(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty(web, Fault(kind="throttle", bytes_per_second=1000), first(10**6)) as proxy:
        packed = PackedDataset(f"{proxy.url}/{TRAIN}")
        monkeypatch.setattr(remote, "PATIENCE", LITTLE_PATIENCE)
        with pytest.raises(ValueError, match="2 tries") as caught:
            packed.payload(0)
    sample_named(packed, caught.value)


def test_server_without_ranges(nginx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server sends complete files instead of ranges: never the wrong bytes."""
    monkeypatch.setattr(remote, "PATIENCE", ONE_TRY)
    packed = PackedDataset(f"{nginx}/norange/{TRAIN}")
    for sample in range(len(packed)):
        with pytest.raises(ValueError, match="does not support range requests") as caught:
            packed.payload(sample)
        assert f"{packed.url}/{packed.manifest.shards[packed.shard_of(sample)].name}" in str(
            caught.value
        )


def test_server_that_compresses(
    nginx: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that may compress is asked not to: compressed answers have no ranges."""
    monkeypatch.setattr(remote, "PATIENCE", ONE_TRY)
    assert digests(PackedDataset(f"{nginx}/gzip/{TRAIN}")) == expected


@pytest.mark.parametrize("store_kind", ["http", "s3"])
def test_missing_shard(
    request: pytest.FixtureRequest, local: Path, tmp_path: Path, store_kind: str
) -> None:
    if store_kind == "s3":
        bucket = request.getfixturevalue("s3_copy")
        fsspec.filesystem("s3").rm_file(f"{bucket}/{TRAIN}/000000.tar")
        check_missing_shard(f"{bucket}/{TRAIN}")
    else:
        for path in (local / TRAIN).iterdir():
            if path.is_file() and path.name != "000000.tar":
                (tmp_path / path.name).symlink_to(path)
        with range_server(tmp_path) as url:
            check_missing_shard(url)


def check_missing_shard(url: str) -> None:
    packed = PackedDataset(url)
    assert packed.payload(len(packed) - 1)
    with pytest.raises(ValueError, match="missing shard") as caught:
        packed.payload(0)
    sample_named(packed, caught.value)
    assert packed.shards.counters.range_retries == 0


def test_wrong_secret(store: ObjectStore, s3_copy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{s3_copy}/{TRAIN}"
    packed = PackedDataset(url)
    use_environment(monkeypatch, store.environment(secret="wrong"))
    with pytest.raises(ValueError, match=f"^cannot read {url}/manifest.json: no permission"):
        PackedDataset(url)
    packed.shards = Shards(url, packed.manifest.shards)
    with pytest.raises(ValueError, match="no permission") as caught:
        packed.payload(0)
    sample_named(packed, caught.value)
    assert packed.shards.counters.range_retries == 0


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens: one line with the address, not a stack of client errors."""
    monkeypatch.setattr(remote, "PATIENCE", LITTLE_PATIENCE)
    with pytest.raises(ValueError, match=r"^cannot read http://127\.0\.0\.1:9/set/manifest\.json"):
        PackedDataset("http://127.0.0.1:9/set")


def test_manifest_and_index_over_http(nginx: str, local: Path) -> None:
    remote, copy = f"{nginx}/{TRAIN}", str(local / TRAIN)
    manifest = Manifest.load(remote)
    assert manifest == Manifest.load(copy)
    assert manifest == Manifest.load(f"{nginx}/norange/{TRAIN}")
    assert Index.load(remote, manifest).to_bytes() == Index.load(copy, manifest).to_bytes()
    with pytest.raises(ValueError, match=r"no packed dataset at .*: manifest\.json is missing"):
        Manifest.load(f"{nginx}/absent")


def test_changed_shard(local: Path, tmp_path: Path) -> None:
    """Bytes changed at the source are an error with their position, with or without a cache."""
    for path in (local / TRAIN).iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    index = Index.load(str(tmp_path), Manifest.load(str(tmp_path)))
    shard = bytearray((tmp_path / "000000.tar").read_bytes())
    shard[int(index.offset[0]) + 200] ^= 1
    (tmp_path / "000000.tar").write_bytes(shard)
    with range_server(tmp_path) as url:
        packed = PackedDataset(url)
        with pytest.raises(ValueError, match="crc32") as caught:
            packed.payload(0)
        sample_named(packed, caught.value)
        assert packed.payload(1)
        cached = PackedDataset(url, cache=Cache(tmp_path / "cache", 2**30))
        cached.shards.look_ahead([0])
        with pytest.raises(ValueError, match=f"{url}/000000.tar has sha256"):
            until(lambda: not cached.payload(1))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


# --- the cache ----------------------------------------------------------------------------------


def test_second_epoch_needs_no_server(web: str, tmp_path: Path, expected: list[str]) -> None:
    with faulty(web, Fault(kind="latency"), first(10**6)) as proxy:
        packed = PackedDataset(f"{proxy.url}/{TRAIN}", cache=Cache(tmp_path, 2**30))
        fill(packed, list(range(len(packed.manifest.shards))))
        requests = proxy.requests
        assert digests(packed) == expected
        assert proxy.requests == requests
    counters = packed.shards.counters
    assert (counters.cache_misses, counters.requests, counters.cache_repairs) == (0, 0, 0)
    assert counters.cache_hits == len(expected) * BATCH
    assert is_sound(tmp_path)


def test_cache_is_filled_through_faults(
    through_faults: Through, tmp_path: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with through_faults(Fault(kind="fin", after=MIDDLE), every_third) as (proxy, url):
        packed = PackedDataset(url, cache=Cache(tmp_path, 2**30))
        monkeypatch.setattr(remote, "PATIENCE", PATIENCE)
        fill(packed, list(range(len(packed.manifest.shards))))
        assert digests(packed) == expected
    assert proxy.fired["fin"] > 0
    assert packed.shards.counters.range_retries >= proxy.fired["fin"]
    assert is_sound(tmp_path)


def test_t8_equal_names_never_collide(web: str, local: Path, tmp_path: Path) -> None:
    """Shards of train and val have the same base names and share a cache."""
    names = (TRAIN, "imagenet-val")
    sets = [PackedDataset(f"{web}/{name}", cache=Cache(tmp_path, 2**30)) for name in names]
    shard_names = [[shard.name for shard in packed.manifest.shards] for packed in sets]
    assert shard_names[0] == shard_names[1]
    for packed in sets:
        fill(packed, list(range(len(packed.manifest.shards))))
    for name, packed in zip(names, sets, strict=True):
        copy, everything = PackedDataset(str(local / name)), np.arange(SAMPLES)
        assert digest(packed.batch(everything, SIZE)) == digest(copy.batch(everything, SIZE))
        assert packed.shards.counters.cache_hits == SAMPLES
    assert len(list(tmp_path.glob("*.tar"))) == 2 * len(shard_names[0])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flipped", "cut", "deleted"])
@pytest.mark.parametrize("when", ["before opening", "while open"])
def test_damaged_cache(
    web: str, tmp_path: Path, expected: list[str], damage: Callable[[Path], None], when: str
) -> None:
    """A cached file is damaged: its contents come from the source again."""
    cache = Cache(tmp_path, 2**30)
    packed = PackedDataset(f"{web}/{TRAIN}", cache=cache)
    everything = list(range(len(packed.manifest.shards)))
    fill(packed, everything)
    if when == "while open":
        assert digests(packed) == expected
    damage(cache.path(packed.manifest.shards[1]))
    assert digests(packed) == expected
    fill(packed, everything)
    assert digests(packed) == expected
    assert is_sound(tmp_path)
    if damage is flip:
        assert packed.shards.counters.cache_repairs > 0


def test_full_disk(web: str, tmp_path: Path, expected: list[str], local: Path) -> None:
    """A disk that holds two and a half shards: the others are read by ranges."""
    shard_bytes = Manifest.load(str(local / TRAIN)).shards[0].bytes
    with small_disk(tmp_path, int(2.5 * shard_bytes)) as disk:
        packed = PackedDataset(f"{web}/{TRAIN}", cache=Cache(disk / "cache", 2**30))
        fill(packed, [0, 1])
        assert digests(packed) == expected
        counters = packed.shards.counters
        packed.shards.look_ahead([2, 3])
        until(lambda: counters.cache_refusals > 0)
        assert digests(packed) == expected
        assert counters.cache_hits > 0
        assert counters.cache_misses > 0
        assert is_sound(disk / "cache")
        packed.shards.close()


def test_cache_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot make the cache folder"):
        Cache(tmp_path / "file" / "cache", 2**30)


def removed(folder: Path) -> bool:
    """Remove a folder; return whether it is gone: a filling thread may still write a file."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def test_emptied_cache(web: str, tmp_path: Path, expected: list[str]) -> None:
    """The folder is deleted while it is in use: it is recreated and refilled."""
    packed = PackedDataset(f"{web}/{TRAIN}", cache=Cache(tmp_path / "cache", 2**30))
    everything = list(range(len(packed.manifest.shards)))
    for _ in range(3):
        fill(packed, everything)
        assert digests(packed) == expected
        until(lambda: removed(tmp_path / "cache"))
        assert digests(packed) == expected
    fill(packed, everything)
    assert is_sound(tmp_path / "cache")


def test_disk_errors_do_not_end_the_filling(
    web: str, tmp_path: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, 2**30)
    begin, errors = cache.begin, [OSError(errno.EIO, "I/O error"), OSError(errno.EROFS, "")]

    def begin_later(*arguments, **options) -> caching.Part | None:
        if errors:
            raise errors.pop()
        return begin(*arguments, **options)

    monkeypatch.setattr(cache, "begin", begin_later)
    packed = PackedDataset(f"{web}/{TRAIN}", cache=cache)
    fill(packed, [0, 1])
    assert packed.shards.counters.cache_refusals == 2
    assert digests(packed) == expected


@pytest.fixture(params=["amid a shard", "idle"])
def filling(
    request: pytest.FixtureRequest, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Shards]]:
    """Return the only reference to shards whose cache is being filled, or is full, in a list."""
    stalled = request.param != "idle"
    with faulty(web, Fault(kind="stall", after=MIDDLE), lambda _: stalled) as proxy:
        packed = PackedDataset(f"{proxy.url}/{TRAIN}", cache=Cache(tmp_path, 2**30))
        monkeypatch.setattr(remote, "PATIENCE", Patience(stall_seconds=1000))
        if stalled:
            packed.shards.look_ahead([0])
            until(lambda: proxy.fired["stall"])
        else:
            fill(packed, [0])
        only = [packed.shards]
        del packed
        yield only


def filler_of(shards: Shards) -> threading.Thread:
    assert shards._filler is not None
    assert shards._filler.thread.is_alive()
    return shards._filler.thread


def test_closing_ends_the_filling_thread(filling: list[Shards], tmp_path: Path) -> None:
    thread = filler_of(filling[0])
    for _ in range(2):
        filling[0].close()
        assert not thread.is_alive()
        assert not list(tmp_path.glob(".*.part"))
        filling[0].look_ahead([1])  # its resources may be used again after it is closed
        thread = filler_of(filling[0])


def test_nobody_has_to_close(filling: list[Shards], tmp_path: Path) -> None:
    """Shards are freed with their last reference, and so is the thread, which holds none."""
    thread, collected = filler_of(filling[0]), weakref.ref(filling[0])
    filling.clear()
    assert collected() is None
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert not list(tmp_path.glob(".*.part"))


class FirstAgain(EvaluationBatches):
    """The first shard's samples repeatedly, while the cache fetches the last one."""

    def samples_of(self, number: int) -> np.ndarray:
        self.packed.shards.look_ahead([len(self.packed.manifest.shards) - 1])
        return np.arange(self.largest)


def test_a_loader_process_that_ends_takes_its_part_along(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # seconds after which torch would end the process differently; this machine may be busy
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", SECONDS)
    last = Manifest.load(f"{web}/{TRAIN}").shards[-1].name
    stall = Fault(kind="stall", after=MIDDLE)
    with faulty(web, stall, lambda _: True, matching=rf"^GET \S+{last}") as proxy:
        url, cache = f"{proxy.url}/{TRAIN}", Cache(tmp_path, 2**30)
        packed = PackedDataset(url, cache=cache)
        batches = FirstAgain(packed, np.arange(SAMPLES), image_size=SIZE, batch_size=4)
        stream = read_batches(batches, range(1000), workers=1, device=CPU)
        next(stream)
        until(lambda: proxy.fired["stall"])
        assert list(tmp_path.glob(".*.part"))
        stream.close()
        assert not list(tmp_path.glob(".*.part"))


def test_new_part_is_not_taken_for_an_abandoned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening a dead process's partial file and locking it, a living one replaces it."""
    part = tmp_path / f".{64 * '0'}.part"
    part.write_bytes(b"old")
    lock = caching._lock

    def lock_late(descriptor: int) -> bool:
        part.unlink()
        part.write_bytes(b"new")
        return lock(descriptor)

    monkeypatch.setattr(caching, "_lock", lock_late)
    folder = caching.Folder(tmp_path)
    assert not caching._delete_abandoned(folder, part.name)
    folder.close()
    assert part.read_bytes() == b"new"


def test_shard_that_is_published_meanwhile_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial file gets its final name while another process sums up the cache's size."""
    one, other = (Shard(name="x.tar", bytes=1000, sha256=64 * name, samples=1) for name in "ab")
    cache, threads = Cache(tmp_path, 1500), []
    part = cache.begin(one, keep=set(), known=set())
    assert part is not None
    delete_abandoned = caching._delete_abandoned

    def publish_meanwhile(folder: caching.Folder, name: str) -> bool:
        threads.append(threading.Thread(target=part.publish))
        threads[-1].start()
        # it waits for the lock held here; without one it would publish meanwhile
        threads[-1].join(0.3)
        return delete_abandoned(folder, name)

    monkeypatch.setattr(caching, "_delete_abandoned", publish_meanwhile)
    assert cache.begin(other, keep={one.sha256}, known=set()) is None
    (thread,) = threads
    thread.join()
    assert cache.has(one)
    part.close()


def test_end_amid_a_deletion_leaves_no_empty_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filling thread stops at any point when the training ends."""

    def end_after(function: Callable) -> Callable:
        def wrapper(*arguments) -> None:
            function(*arguments)
            raise KeyboardInterrupt

        return wrapper

    shard, cache = Shard(name="x.tar", bytes=3, sha256=64 * "a", samples=1), Cache(tmp_path, 9)
    cache.path(shard).write_bytes(b"abc")
    for name in ("truncate", "ftruncate"):
        monkeypatch.setattr(os, name, end_after(getattr(os, name)))
    with pytest.raises(KeyboardInterrupt):
        cache.drop(shard)
    assert not cache.has(shard)


READER = """
    import json, sys, time
    from pathlib import Path
    from rft.shards.cache import Cache
    from rft.storage import remote
    from rft.loading.dataset import PackedDataset
    from tests.loading.test_remote import digests

    url, folder, limit, go, stop = sys.argv[1:]
    remote.PATIENCE = remote.Patience(tries=30)
    packed = PackedDataset(url, cache=Cache(Path(folder), int(limit)))
    print("ready", flush=True)
    while not Path(go).exists():
        time.sleep(0.01)
    found = digests(packed)
    while not Path(stop).exists():
        assert digests(packed) == found
    print(json.dumps([found, packed.shards.counters.cache_hits]), flush=True)
"""

STUCK = """
    import signal, sys
    from pathlib import Path
    from rft.shards.cache import Cache
    from rft.shards.ranges import Shards
    from rft.shards.manifest import Manifest
    from rft.storage import remote

    url, folder, limit = sys.argv[1:]
    remote.PATIENCE = remote.Patience(stall_seconds=1000)
    shards = Shards(url, Manifest.load(url).shards, cache=Cache(Path(folder), int(limit)))
    shards.look_ahead([0])
    signal.pause()
"""

PROCESSES = """
    import json, sys
    from rft.loading.dataset import PackedDataset
    from tests.loading.test_remote import digests

    print(json.dumps(digests(PackedDataset(sys.argv[1]), workers=2)))
"""


@contextlib.contextmanager
def started(program: str, *arguments: str | Path | int) -> Iterator[subprocess.Popen]:
    """Run a program in its own process, which ends with the body."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    with subprocess.Popen(
        command, env=tiny_world.environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Yield a list of repeated measurements of the bytes in a cache."""
    sizes: list[int] = []
    over = threading.Event()

    def measure() -> int:
        # locked: otherwise a file could be evicted for another between looking at the two
        with (folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            total = 0
            for path in list(folder.iterdir()):
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size
            return total

    def watch() -> None:
        while not over.wait(0.001):
            sizes.append(measure())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()


def inode(path: Path) -> int | None:
    """Return the file that a path names now; None if there is none, because it may be evicted."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def test_processes_share_a_cache_and_one_is_killed(
    web: str, local: Path, tmp_path: Path, expected: list[str]
) -> None:
    """Space for three and a half shards, three processes; one is killed while it fills a shard."""
    shards = Manifest.load(str(local / TRAIN)).shards
    limit = int(3.5 * max(shard.bytes for shard in shards))
    cache, go, stop = tmp_path / "cache", tmp_path / "go", tmp_path / "stop"
    with faulty(web, Fault(kind="stall", after=MIDDLE), first(1)) as proxy:
        url = f"{proxy.url}/{TRAIN}"
        part = cache / f".{shards[0].sha256}.part"
        reader = (READER, url, cache, limit, go, stop)
        with (
            started(STUCK, url, cache, limit) as victim,
            started(*reader) as one,
            started(*reader) as other,
        ):
            until(lambda: proxy.fired["stall"])
            abandoned = inode(part)
            assert abandoned is not None
            with watched(cache) as sizes:
                assert [process.stdout.readline() for process in (one, other)] == 2 * ["ready\n"]
                go.touch()
                until(lambda: list(cache.glob("*.tar")))
                assert inode(part) == abandoned  # it belongs to the victim while that process lives
                victim.kill()
                victim.wait()
                until(lambda: inode(part) != abandoned)
                stop.touch()
                found = [json.loads(process.stdout.read()) for process in (one, other)]
    for batches, hits in found:
        assert batches == expected
        assert hits > 0
    assert is_sound(cache)
    assert 2 * shards[0].bytes < max(sizes) <= limit


# --- object stores ------------------------------------------------------------------------------


def test_loader_processes_read_from_s3(
    store: ObjectStore, s3_copy: str, monkeypatch: pytest.MonkeyPatch, expected: list[str]
) -> None:
    """Two loader processes, each with its own client, through a proxy that drops connections."""
    with faulty(store.port, Fault(kind="rst", after=MIDDLE), every_third) as proxy:
        use_environment(monkeypatch, store.environment(proxy.port))
        with started(PROCESSES, f"{s3_copy}/{TRAIN}") as process:
            assert json.loads(process.stdout.read()) == expected
    assert proxy.fired["rst"] > 0


PACK = """
    import json, sys
    from rft.storage import documents
    from rft.shards.label_space import LabelSpace
    from rft.packing.pack import Options, pack

    dataset, source, out, labels, options = sys.argv[1:]
    space = documents.decode(labels.encode(), LabelSpace, "labels")
    pack(dataset, source, out, space, Options(**json.loads(options)))
"""


def same_files(bucket: str, local: Path) -> bool:
    """Whether a bucket has the local set's files, equal in bytes except for records of the work."""
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    prefix = f"{bucket.removeprefix('s3://')}/"
    found = {name.removeprefix(prefix): fs.cat_file(name) for name in fs.find(bucket)}
    files = (path for path in (local / TRAIN).rglob("*") if path.is_file())
    expected = {str(path.relative_to(local)): path.read_bytes() for path in files}
    return found.keys() == expected.keys() and all(
        data == expected[name] for name, data in found.items() if "/commit/" not in name
    )


@pytest.mark.parametrize("name", ["000003.tar", "commit/000003.json", "manifest.json"])
def test_packing_to_s3_is_killed_and_repeated(
    store: ObjectStore,
    bucket: str,
    images: Path,
    local: Path,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
) -> None:
    """The upload of one object hangs, and the packer is killed; a rerun completes the set."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    hang = Fault(kind="latency", seconds=1000)
    setting = [json.dumps(dataclasses.asdict(document)) for document in (LABELS, OPTIONS)]
    command = [sys.executable, "-c", textwrap.dedent(PACK), TRAIN, str(images), bucket, *setting]
    with faulty(store.port, hang, first(1), matching=rf"^PUT \S+/{re.escape(name)}") as proxy:
        use_environment(monkeypatch, store.environment(proxy.port))
        tiny.kill_when(command, lambda: proxy.fired["latency"] > 0)
    use_environment(monkeypatch, store.environment())
    assert not fsspec.filesystem("s3").exists(f"{bucket}/{TRAIN}/{name}")
    with pytest.raises(ValueError, match="no packed dataset"):
        PackedDataset(f"{bucket}/{TRAIN}")
    assert pack(TRAIN, str(images), bucket, LABELS, OPTIONS)
    assert same_files(bucket, local)
    assert digests(PackedDataset(f"{bucket}/{TRAIN}")) == expected


@pytest.mark.parametrize("kind", ["503", "latency"])
def test_packing_to_s3_through_faults(
    store: ObjectStore,
    bucket: str,
    images: Path,
    local: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    fault = Fault(kind=kind, seconds=0.05)
    with faulty(store.port, fault, first(2), matching="^PUT ") as proxy:
        use_environment(monkeypatch, store.environment(proxy.port))
        assert pack(TRAIN, str(images), bucket, LABELS, OPTIONS)
    assert proxy.fired[kind] == 2
    use_environment(monkeypatch, store.environment())
    assert same_files(bucket, local)
