"""A run leaks nothing: no secret, no permission beyond the umask, no open port."""

import json
import os
import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import fsspec
import pytest

from benchmarks.servers.ranges import range_server
from benchmarks.tiny_world import children, environment
from benchmarks.waiting import until
from rft.dist import RANKS_HERE
from rft.evaluate import command as evaluate_command
from rft.merge import command as merge_command
from rft.runs.filenames import LAST
from rft.train import command as train_command
from tests import tiny
from tests.tiny import call, torchrun_command

FROM_NETRC = {"client_kwargs": {"trust_env": True}}
RECIPE = "object-mask-single-fill"
# everything that a run folder may contain
OFTEN = ("--log.image-steps", 4, "--log.checkpoint-steps", 4)


def evaluate(data: str | Path, *runs: Path) -> None:
    sets = ("imagenet-val", "imagenet-r")
    call(evaluate_command, *runs, "--data", data, "--sets", *sets, "--workers", 0)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_no_secret_is_recorded_or_shown(
    tmp_path, tiny_data, tiny_clip, monkeypatch, capsys, refused
):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "canary-of-the-environment")
    run = tmp_path / "home" / "run"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password canary-of-the-server\n")
    monkeypatch.setenv("NETRC", str(netrc))
    # loader processes read the variable, as this process did when it imported fsspec; so did
    # their fork server, if an earlier test has started it
    forkserver._forkserver._stop()
    monkeypatch.setenv("FSSPEC_HTTP", json.dumps(FROM_NETRC))
    monkeypatch.setitem(fsspec.config.conf, "http", FROM_NETRC)
    shown = []
    with range_server(tiny_data, "user:canary-of-the-server") as url:
        tiny.train(RECIPE, url, tiny_clip, run, *OFTEN, "--loader.workers", 1)
        (run / "training.json").unlink()
        tiny.train(RECIPE, url, tiny_clip, run, *OFTEN)
        call(merge_command, "wise", run / LAST, run, "--out", run.parent / "wise")
        evaluate(url, run, run.parent / "wise")
        shown += capsys.readouterr()
        shown += [refused(train_command, "vanilla", "--data", f"{url}/no", "--run-dir", run)]
        before = {path: path.read_bytes() for path in files_below(run.parent)}
        for secret in (url.replace("//", "//user:canary@"), f"{url}?sig=canary"):
            line = refused(train_command, "vanilla", "--data", secret, "--run-dir", run)
            assert "which would be printed and recorded; leave it out" in line
            shown += [line]
        assert {path: path.read_bytes() for path in files_below(run.parent)} == before
    assert f'"data": "{url}"' in (run / "config.json").read_text()
    assert "canary" not in "".join(shown)
    found = files_below(run.parent)
    assert {"results.json", "metrics.jsonl", "best.safetensors"} <= {path.name for path in found}
    assert [path for path in found if b"canary" in path.read_bytes()] == []


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002], ids=oct)
def test_a_run_folder_has_the_permissions_of_the_umask(tmp_path, tiny_data, tiny_clip, mask):
    """No more, so that it is private if the user wants that, and no less, for their group."""
    with umask(mask):
        tiny.train(RECIPE, tiny_data, tiny_clip, tmp_path / "run", *OFTEN)
        evaluate(tiny_data, tmp_path / "run")
    run = tmp_path / "run"
    made = {path.name for path in run.rglob("*")}
    assert {"config.json", "gallery.npz", "results.json", "tensorboard", "training.json"} <= made
    assert {"best.safetensors", "step-00000011.pt"} <= made
    for path in (run, *run.rglob("*")):
        mode = path.stat().st_mode & 0o777
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, (path, oct(mode))


def listeners(pid: int) -> set[tuple[int, str, int]]:
    """Process, address and port of every TCP socket on which a process or its children listen."""
    # read first: a socket that appears in between is seen the next time
    owner = {inode: each for each in (pid, *children(pid)) for inode in sockets(each)}
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            inode = rest[5]
            if state == "0A" and inode in owner:
                address, port = local.split(":")
                words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
                packed = b"".join(struct.pack("=I", word) for word in words)
                found.add((owner[inode], socket.inet_ntop(family, packed), int(port, 16)))
    return found


def sockets(pid: int) -> list[str]:
    """Inodes of the sockets that a process has open; none if it is gone."""
    try:
        links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]  # noqa: PTH115
    except OSError:
        return []
    return [match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))]


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, RANKS_HERE], ids=["standalone", "loopback only"])
def test_ranks_on_one_machine_listen_on_loopback(tmp_path, variables):
    """torchrun's own two stores listen on all addresses; docs/cluster.md shows how to avoid that.

    torch binds a TCPStore to every address, whatever its endpoint says. When that changes, this
    test says so.
    """
    over, met = tmp_path / "over", [tmp_path / f"met-{rank}" for rank in range(2)]
    command = torchrun_command(2, "tests.meeting", str(over))
    if variables:
        command.remove("--standalone")
    with subprocess.Popen(command, env=environment(**variables)) as process:
        until(lambda: process.poll() is not None or all(path.exists() for path in met))
        found = listeners(process.pid)
        over.touch()
    assert process.returncode == 0
    assert [path.read_text() for path in met] == 2 * ["[0, 1]"]
    local = ("127.0.0.1", "::1")
    ranks = {pid for pid, address, _ in found if address in local}
    assert len(ranks) == 2
    assert process.pid not in ranks
    elsewhere = [(pid, address) for pid, address, _ in found if address not in local]
    assert elsewhere == ([] if variables else 2 * [(process.pid, "::")])
