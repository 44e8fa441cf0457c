"""Files that other users may have created: nothing hangs, and links are never followed."""

import dataclasses
import fcntl
import os
import socket
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import tiny_world
from rft import recipes
from rft.dist import World
from rft.packing.pack import Options, pack
from rft.runs import derived
from rft.runs.filenames import WRITTEN_THROUGH
from rft.runs.folder import require_no_links
from rft.shards.cache import Cache, Folder
from rft.shards.manifest import Shard
from rft.shards.ranges import Shards
from rft.storage import files, local
from rft.train.run import RunFolder
from rft.train.stop import StopRequest


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    # a socket's path must be short, relative to the folder it is
    before = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(before)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = {"a FIFO": fifo, "a socket": listening, "a device": device}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "read", [files.read_bytes, files.size, lambda url: files.sha256_file(Path(url))]
)
def test_what_has_no_end_is_refused(tmp_path, kind: str, read: Callable[[str], object]):
    path = tmp_path / "manifest.json"
    KINDS[kind](path)
    # it may belong to the shell, as in `--classes <(cat classes.json)`: do not remove /dev/fd/63
    advice = "remove it" if kind == "a socket" else "copy its content to a regular file"
    with pytest.raises(ValueError, match=f"{path} is {kind}, not a regular file; {advice}$"):
        read(str(path))


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a folder"])
@pytest.mark.parametrize(
    "write", [lambda url: files.write_bytes(url, b"new"), files.require_writable]
)
def test_only_files_and_links_are_replaced(tmp_path, kind: str, write: Callable[[str], object]):
    path = tmp_path / "report.json"
    {**KINDS, "a folder": Path.mkdir}[kind](path)
    before = path.lstat()
    with pytest.raises(ValueError, match=f"{path} is {kind} and cannot be replaced; "):
        write(str(path))
    assert path.lstat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_what_it_leads_to_is_not(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "report.json"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    files.write_bytes(str(link), b"new")
    assert link.is_file()
    assert not link.is_symlink()
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


@pytest.mark.parametrize("name", ["full", "null", "stdout", "fd", "no-such-name"])
def test_nothing_in_dev_is_replaced(name: str):
    # only checked: as root, a file that is not refused would be lost for the whole machine
    with pytest.raises(ValueError, match=f"/dev/{name} is in /dev, where rft does not write"):
        local.require_replaceable(Path("/dev", name))
    with pytest.raises(ValueError, match="where rft does not write"):
        files.require_writable(f"/tmp/../dev/{name}")


@pytest.mark.parametrize("kind", KINDS)
def test_so_is_what_others_open_by_its_path(tmp_path, kind: str):
    path = tmp_path / "weights.pt"
    KINDS[kind](path)
    with pytest.raises(ValueError, match="not a regular file"), files.local_copy(str(path)):
        pass
    with pytest.raises(ValueError, match="not a regular file"):
        local.open_regular(path, os.O_WRONLY)


def test_a_shard_that_is_a_fifo_does_not_hold_up_a_batch(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    shards = Shards(str(tmp_path), [Shard(name="0.tar", bytes=9, sha256=64 * "0", samples=1)])
    with pytest.raises(ValueError, match=r"0\.tar is a FIFO"):
        shards.descriptor(0)


def test_a_file_and_a_link_to_it_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    for name in "ab":
        assert files.read_bytes(str(tmp_path / name)) == b"abc"
        assert files.size(str(tmp_path / name)) == 3
    with pytest.raises(IsADirectoryError):
        local.open_regular(tmp_path)
    with pytest.raises(ValueError, match="it is a folder"):
        files.read_bytes(str(tmp_path))


def test_temporary_files_are_new_and_as_private_as_their_files(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        with files.publish(str(tmp_path / "here")) as here:
            assert stat.S_IMODE(here.stat().st_mode) == 0o640
            assert here.parent == tmp_path
        with files.publish("memory://there/file", scratch=tmp_path) as there:
            assert stat.S_IMODE(there.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    (tmp_path / "victim").write_bytes(b"mine")
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    temporary = tmp_path / f".new.{32 * '0'}.tmp"
    for make in (Path.symlink_to, Path.hardlink_to):
        make(temporary, tmp_path / "victim")
        with pytest.raises(FileExistsError), files.publish(str(tmp_path / "new")):
            pytest.fail("somebody else's file is written")
        temporary.unlink(missing_ok=True)
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_nothing_is_written_through_a_link_that_took_the_place_of_a_file(tmp_path):
    """As if a different user changed the folder between the file's creation and its writing."""
    (tmp_path / "victim").write_bytes(b"mine")
    with files.publish(str(tmp_path / "results.json")) as path:
        path.unlink()
        path.symlink_to("victim")
        with pytest.raises(ValueError, match="is a link"):
            local.writer(path)
        path.unlink()
        path.touch()
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_publishing_replaces_a_link_and_not_what_it_names(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "results.json").symlink_to("victim")
    files.write_json(str(tmp_path / "results.json"), {})
    assert not (tmp_path / "results.json").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_only_what_writers_leave_is_swept(tmp_path):
    left = f".config.json.{32 * 'a'}.tmp"
    others = {".notes.tmp", "x.tmp", f".config.json.{31 * 'a'}.tmp", "config.json"}
    for name in (left, *others):
        (tmp_path / name).write_bytes(b"")
    files.sweep(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == others


SHARD = Shard(name="a.tar", bytes=8, sha256=64 * "a", samples=1)


@pytest.fixture
def victim(tmp_path) -> Path:
    path = tmp_path / "mine"
    path.write_bytes(b"precious")
    return path


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", 100)


def begin(cache: Cache, sha256: str = SHARD.sha256, size: int = 8):
    shard = Shard(name="a.tar", bytes=size, sha256=sha256, samples=1)
    return cache.begin(shard, keep=set(), known=set())


@pytest.mark.parametrize("name", [f".{SHARD.sha256}.part", ".lock"])
@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to], ids=["link", "second name"])
def test_the_cache_fills_nothing_behind_a_link(cache, victim, name, make):
    make(cache.folder / name, victim)
    if name == ".lock" and make is Path.hardlink_to:
        part = begin(cache)  # it is locked, never written
        assert part is not None
        part.close()
    else:
        with pytest.raises(ValueError, match=f"{name} (is a link|has a second name)"):
            begin(cache)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to], ids=["link", "second name"])
def test_the_cache_empties_no_file_of_others(cache, victim, make):
    """Dropped files are also truncated, for readers to notice; a link could lead to any file."""
    path = cache.path(SHARD)
    make(path, victim)
    full = begin(cache, 64 * "b", 100)  # the complete cache: all others are evicted
    if full is not None:
        full.close()
    if make is Path.symlink_to:
        for act in (cache.open, cache.drop):
            with pytest.raises(ValueError, match=f"{path.name} is a link, not a regular file"):
                act(SHARD)
    else:
        cache.drop(SHARD)
        assert not path.exists()
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_waits_for_nothing(cache, kind):
    KINDS[kind](cache.path(SHARD))
    with pytest.raises(ValueError, match="not a regular file"):
        cache.open(SHARD)
    part = begin(cache, 64 * "b")
    assert part is not None
    part.close()


def test_the_cache_drops_its_own_files_alone(tmp_path):
    """The user's data folder is given as the cache, and exceeds the limit."""
    names = ["000000.tar", "imagenet.tar", "x.part", f"{64 * 'A'}.tar", f"{65 * 'a'}.tar"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(50))
    cache = Cache(tmp_path, 100)
    cache.path(SHARD).write_bytes(bytes(101))
    cache.trim(set())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == sorted(names)
    assert all((tmp_path / name).stat().st_size == 50 for name in names)


@pytest.mark.parametrize("sha256", ["../../mine", "", 64 * "A", "mine", 64 * "g", f"{64 * 'a'}\n"])
def test_the_cache_names_files_by_hashes_alone(cache, victim, sha256):
    shard = Shard(name="a.tar", bytes=8, sha256="0" * 64, samples=1)
    object.__setattr__(shard, "sha256", sha256)  # past the check of the manifest
    victim.rename(victim.with_name("mine.tar"))
    for act in (
        cache.has,
        cache.open,
        cache.drop,
        lambda s: cache.begin(s, keep=set(), known=set()),
    ):
        with pytest.raises(ValueError, match=r"shard a\.tar: its sha256 is .*, not 64 hex digits"):
            act(shard)
    assert victim.with_name("mine.tar").read_bytes() == b"precious"


def test_a_cached_file_of_another_user_is_not_read(cache, monkeypatch):
    shard = Shard(name="a.tar", bytes=8, sha256=SHARD.sha256, samples=1)
    cache.path(shard).write_bytes(b"8 bytes.")
    descriptor = cache.open(shard)
    assert os.read(descriptor, 9) == b"8 bytes."
    os.close(descriptor)
    status = os.fstat
    other = os.geteuid() + 1000

    def of_another(descriptor: int) -> os.stat_result:
        values = list(status(descriptor))
        values[4] = other
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", of_another)
    assert cache.open(shard) is None


def test_the_cache_folder_may_be_a_link_of_ones_own_alone(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to("disk")
    assert Cache(tmp_path / "cache", 100).folder == tmp_path / "disk"
    owner = (tmp_path / "cache").lstat().st_uid
    if owner == 0:
        os.lchown(tmp_path / "cache", 4321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ValueError, match=r"cache is a link that belongs to a different user"):
        Cache(tmp_path / "cache", 100)


def test_a_cache_folder_that_becomes_a_link_is_left(tmp_path, cache, victim):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / f"{64 * 'b'}.tar").write_bytes(b"precious")
    cache.folder.rmdir()
    cache.folder.symlink_to(tmp_path / "theirs")
    for act in (cache.open, lambda _: begin(cache, size=100), lambda _: cache.trim(set())):
        with pytest.raises(ValueError, match="was replaced by a link or a file"):
            act(SHARD)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == [f"{64 * 'b'}.tar"]


def test_a_cache_folder_stays_the_one_that_was_opened(tmp_path, victim):
    """Its owner replaces it by a link while a file is deleted."""
    (tmp_path / "cache").mkdir()
    folder = Folder(tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "before")
    (tmp_path / "cache").symlink_to(tmp_path)
    folder.delete("mine")
    folder.close()
    assert victim.read_bytes() == b"precious"


def take(folder: Path, checkpoints: str = "") -> None:
    config = recipes.build("vanilla", data="data", run=str(folder))
    log = dataclasses.replace(config.log, checkpoints=checkpoints)
    folder_of_run = RunFolder(dataclasses.replace(config, log=log))
    with folder_of_run.taken(World(rank=0, size=1, local_rank=0), StopRequest("")):
        folder_of_run.write_records()


@pytest.mark.parametrize("name", [*WRITTEN_THROUGH, "tensorboard/events.out.tfevents.1"])
def test_a_run_writes_through_no_link_in_its_folder(tmp_path, name):
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_bytes(b"mine")
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(theirs)
    hint = ", or keep them there with --log.checkpoints" if name == "checkpoints" else ""
    message = f"{run / name} is a link; rft never writes or deletes through links: remove it"
    with pytest.raises(ValueError, match=f"^{message}{hint}$"):
        take(run)
    if "/" not in name:
        with pytest.raises(ValueError, match=f"^{message}{hint}$"):
            derived.is_complete(run, {"merged_from": []})
    assert sorted(run.rglob("*")) == sorted(
        {run / name, *(run / name).parents} - {*run.parents, run}
    )
    assert [path.name for path in theirs.iterdir()] == ["precious"]


def test_checkpoints_kept_elsewhere_lie_behind_no_link(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "run").symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match="kept/run is a link"):
        take(tmp_path / "run", checkpoints=str(tmp_path / "kept"))


def test_a_run_folder_may_be_a_link_itself(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to("scratch")
    take(tmp_path / "run")
    assert (tmp_path / "scratch" / "config.json").is_file()
    require_no_links(tmp_path / "run")


def test_packing_writes_through_no_link(tmp_path):
    tiny_world.write_images(tmp_path / "images", "imagenet-r", 1)
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    (out / "imagenet-r").mkdir(parents=True)
    theirs.mkdir()
    (theirs / f".000000.json.{32 * 'a'}.tmp").write_bytes(b"mine")
    (out / "imagenet-r" / "commit").symlink_to(theirs)
    with pytest.raises(ValueError, match=r"commit is a link; rft never writes"):
        pack(
            "imagenet-r", str(tmp_path / "images"), str(out), tiny_world.LABELS, Options(workers=1)
        )
    assert len([*theirs.iterdir()]) == 1
    assert [path.name for path in (out / "imagenet-r").iterdir()] == ["commit"]


def test_only_what_nobody_writes_is_removed(tmp_path):
    abandoned = tmp_path / f".index.npz.{'0' * 32}.tmp"
    own = tmp_path / ".hidden.tmp"  # the user's file: the name does not have our format
    folder = tmp_path / f".folder.{'1' * 32}.tmp"
    folder.mkdir()
    for path in (abandoned, own):
        path.write_bytes(b"x")
    with files.publish(str(tmp_path / "file")) as temporary:
        temporary.write_bytes(b"whole")
        files.remove_abandoned(tmp_path)
        assert not abandoned.exists()
        assert temporary.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"file", own.name, folder.name}


def test_a_file_removed_before_it_was_held_is_made_again(tmp_path, monkeypatch):
    real, removed = fcntl.flock, []

    def slow(descriptor: int, kind: int) -> None:
        if not removed:
            removed.append(True)
            files.remove_abandoned(tmp_path)
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", slow)
    files.write_bytes(str(tmp_path / "file"), b"whole")
    assert removed
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"
