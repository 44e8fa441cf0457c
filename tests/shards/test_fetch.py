"""Requests and the cache, without a network: requested ranges, and eviction."""

import errno
import os
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rft.shards import ranges as fetch
from rft.shards.cache import Cache, Part
from rft.shards.manifest import Shard
from rft.shards.ranges import Shards, merge
from rft.storage.remote import is_transient

RANGES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 10**8), st.integers(1, 10**7)), max_size=40
)


@given(RANGES)
def test_requests_cover_every_range_and_stay_short(ranges):
    requests = merge(ranges)
    answered = [member for request in requests for member in request.members]
    assert sorted(answered) == list(range(len(ranges)))
    for request in requests:
        for member in request.members:
            number, offset, length = ranges[member]
            assert number == request.number
            assert request.start <= offset
            assert offset + length <= request.stop
        alone = len(request.members) == 1
        assert alone or request.stop - request.start <= fetch.REQUEST_BYTES
        asked_for = sum(ranges[member][2] for member in request.members)
        gaps = fetch.GAP_BYTES * (len(request.members) - 1)
        assert request.stop - request.start <= asked_for + gaps


def test_neighbours_share_a_request():
    assert [r[:3] for r in merge([(0, 5000, 10), (0, 0, 10), (1, 20, 10)])] == [
        (0, 0, 5010),
        (1, 20, 30),
    ]


class Answer(Exception):  # noqa: N818 - stands for an HTTP client's
    def __init__(self, status: int) -> None:
        self.status = status


class NoCredentialsError(Exception):  # as botocore calls it
    pass


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (Answer(503), True),
        (Answer(500), True),
        (Answer(408), True),
        (Answer(429), True),
        (Answer(403), False),
        (Answer(401), False),
        (NoCredentialsError(), False),
        (IsADirectoryError(), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError(), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_is_tried_again(error, again):
    assert is_transient(error) is again


def shards(names: str, size: int = 100) -> list[Shard]:
    return [Shard(name=name, bytes=size, sha256=name * 64, samples=1) for name in names]


def fill(cache: Cache, shard: Shard, keep: str = "", known: str = "abcdef01") -> bool:
    part = cache.begin(shard, keep={k * 64 for k in keep}, known={k * 64 for k in known})
    if part is None:
        return False
    assert os.fstat(part.descriptor).st_size == shard.bytes
    part.publish()
    part.close()
    return True


def used(cache: Cache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def kept(cache: Cache) -> str:
    return "".join(sorted(path.stem[0] for path in cache.folder.glob("*.tar")))


def test_the_cache_never_holds_more_than_its_limit(tmp_path):
    cache = Cache(tmp_path, 350)
    for shard in shards("abcdef01"):
        fill(cache, shard)
        assert used(cache) <= 350
    assert len(kept(cache)) == 3


def test_what_is_asked_for_stays_and_other_sets_go_first(tmp_path):
    cache = Cache(tmp_path, 300)
    a, b, c, d, x = shards("abcd9")
    for shard in (x, a, b):
        assert fill(cache, shard)
    assert fill(cache, c)  # x belongs to a different set
    assert kept(cache) == "abc"
    assert fill(cache, d, keep="bc")
    assert kept(cache) == "bcd"
    assert not fill(cache, a, keep="bcd")
    assert kept(cache) == "bcd"


def test_a_lower_limit_is_kept_at_the_next_start(tmp_path):
    for shard in shards("abc"):
        fill(Cache(tmp_path, 300), shard)
    Cache(tmp_path, 150).trim({k * 64 for k in "abc"})
    assert kept(Cache(tmp_path, 150)) == "a"


@pytest.mark.parametrize("call", ["open", "unlink"])
@pytest.mark.parametrize("name", ["{}.tar", ".{}.part"])
def test_a_file_that_may_not_be_deleted_is_passed_over(tmp_path, monkeypatch, name, call):
    """In a shared folder a different user's file counts, and only our own are evicted."""
    theirs = tmp_path / name.format("9" * 64)
    theirs.write_bytes(bytes(100))
    real = getattr(os, call)

    def refuse(path, *arguments, **options):
        written = call == "unlink" or arguments[0] & (os.O_WRONLY | os.O_RDWR)
        if path == theirs.name and written:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, refuse)
    cache = Cache(tmp_path, 300)
    for shard in shards("abc"):
        assert fill(cache, shard)
    assert used(cache) == 300
    assert theirs.stat().st_size == 100
    assert "c" in kept(cache)


def test_a_shard_that_the_disk_refuses_again_and_again_counts_once(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "PAUSE", 0.001)
    cache, tries, enough = Cache(tmp_path, 1000), [], threading.Event()

    def refuse(shard, **_):
        tries.append(shard.name)
        if tries.count("b") == 3:
            enough.set()
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(cache, "begin", refuse)
    reading = Shards("memory://none", shards("ab"), cache=cache)
    reading.look_ahead([0, 1])
    assert enough.wait(60)
    reading.close()
    assert reading.counters.cache_refusals == 2


def test_one_process_fills_a_shard_and_a_dead_ones_part_is_taken_over(tmp_path):
    cache = Cache(tmp_path, 250)
    a, b, c = shards("abc")
    part = cache.begin(a, keep=set(), known=set())
    assert isinstance(part, Part)
    assert cache.begin(a, keep=set(), known=set()) is None  # it is being filled
    assert fill(cache, b)
    assert not fill(cache, c, keep="b")  # a file that is being filled counts
    part.let_go()  # as a killed process would
    assert fill(cache, c, keep="b")
    assert kept(cache) == "bc"
    assert used(cache) == 200


def test_a_dropped_file_is_no_shard_for_those_who_have_it_open(tmp_path):
    cache = Cache(tmp_path, 1000)
    (shard,) = shards("a")
    fill(cache, shard)
    descriptor = cache.open(shard)
    assert descriptor is not None
    cache.drop(shard)
    assert os.pread(descriptor, 100, 0) == b""
    os.close(descriptor)
    assert cache.open(shard) is None
    assert not cache.has(shard)


def test_half_a_cache_serves_about_half_of_a_shuffled_epoch(tmp_path):
    """With least-recently-used eviction, almost nothing would be found again."""
    names = [f"{n:02x}" for n in range(40)]
    known = {name * 32 for name in names}
    by_name = {n: Shard(name=n, bytes=10, sha256=n * 32, samples=1) for n in names}
    cache = Cache(tmp_path, 200)
    recent: list[str] = []  # the same with least-recently-used eviction
    hits = lru_hits = 0
    for epoch in range(6):
        order = random.Random(epoch).sample(names, len(names))
        for name in order:
            found, lru_found = cache.has(by_name[name]), name in recent
            if not found:
                part = cache.begin(by_name[name], keep={name * 32}, known=known)
                assert part is not None
                part.publish()
                part.close()
            if lru_found:
                recent.remove(name)
            recent = [*recent[-19:], name]
            if epoch:
                hits, lru_hits = hits + found, lru_hits + lru_found
    assert hits / 200 >= 0.45
    assert hits > 1.5 * lru_hits
