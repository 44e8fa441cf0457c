"""Descriptors of shards: no more than permitted, and none kept of evicted files."""

from pathlib import Path

import pytest

from rft.shards import ranges as fetch
from rft.shards.cache import Cache
from rft.shards.manifest import Shard
from rft.shards.ranges import Shards

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux's /proc")


def shards(count: int) -> list[Shard]:
    return [Shard(name=f"{n}.tar", bytes=4, sha256=f"{n:064x}", samples=1) for n in range(count)]


def open_below(folder: Path) -> list[str]:
    """Names of the files in a folder that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            path = link.readlink()
        except OSError:  # the listing's own
            continue
        if path.parent == folder and path.suffix == ".tar":
            found.append(path.name)
    return sorted(found)


def test_local_shards_keep_the_newest_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "OPEN_FILES", 2)
    for shard in shards(4):
        (tmp_path / shard.name).write_bytes(b"data")
    reading = Shards(str(tmp_path), shards(4))
    for number in (0, 1, 0, 2):
        reading.descriptor(number)
    assert open_below(tmp_path) == ["0.tar", "2.tar"]  # 0 was requested more recently than 1
    reading.close()
    assert open_below(tmp_path) == []


def test_a_shard_that_is_not_wanted_any_more_is_closed(tmp_path, monkeypatch):
    cache = Cache(tmp_path / "cache", 1000)
    monkeypatch.setattr(cache, "begin", lambda *_, **__: None)  # nothing is filled here
    reading = Shards(f"memory://none-{tmp_path.name}", shards(3), cache=cache)
    for shard in shards(3):
        cache.path(shard).write_bytes(b"data")
    names = [cache.path(shard).name for shard in shards(3)]
    for number in range(3):
        reading.descriptor(number)
    assert open_below(tmp_path / "cache") == names
    reading.look_ahead([2, 0])
    assert open_below(tmp_path / "cache") == [names[0], names[2]]
    reading.repair(0)
    assert open_below(tmp_path / "cache") == [names[2]]
    assert not cache.path(shards(3)[0]).exists()
    assert reading.counters.cache_repairs == 1
    reading.close()
    assert open_below(tmp_path / "cache") == []
