"""rft runs through the peers' probes, and the pages show the recorded observations."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.peers import command as peers
from benchmarks.peers.experiments import tree
from benchmarks.peers.on_rft.peer import PEER
from benchmarks.peers.samples import photographs
from benchmarks.tiny_world import environment
from rft.packing import shard
from rft.storage import files


@pytest.mark.slow
def test_rft_answers_the_probes_of_the_peers(tmp_path):
    tests = ("T6", "T10", "T13")
    command = [sys.executable, "-m", "benchmarks.peers.on_rft", "--work", str(tmp_path / "work")]
    result = subprocess.run(
        [*command, "--tests", *tests], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    versions, *answers = map(json.loads, result.stdout.splitlines())
    assert "torch" in versions["versions"]
    assert {answer["test"]: answer["result"] for answer in answers} == dict.fromkeys(tests, "pass")
    seen = {answer["test"]: answer["seen"] for answer in answers}
    # by rft's own errors, not by the probe's
    assert "damaged bytes (crc32 mismatch) at 000002.tar" in seen["T6"]
    assert "data.seed: 1 -> 7" in seen["T13"]


@pytest.mark.slow
def test_two_packings_differ_in_the_times_of_their_records_alone(tmp_path, monkeypatch):
    for name, tick in (("one", 0.5), ("two", 1.25)):
        # a simulated clock: two real packings may take the same number of milliseconds
        clock = SimpleNamespace(monotonic=itertools.count(0, tick).__next__)
        monkeypatch.setattr(shard, "time", clock)
        PEER.pack(photographs(12), tmp_path / name)
    one, two = (tree(tmp_path / name, rb"(?!)") for name in ("one", "two"))
    different = {name for name, data in one.items() if two[name] != data}
    assert {Path(name).parent.name for name in different} == {"commit"}
    one, two = (tree(tmp_path / name, PEER.time_of_work) for name in ("one", "two"))
    assert one == two


def test_the_page_is_made_of_the_saved_answers():
    document = files.read_json(str(peers.RESULTS))
    assert peers.TABLE.read_text() == peers.table(document)
    assert peers.PAGE.read_text() == peers.page(document)
    document["answers"]["rft"]["T1"] |= {"result": "fail", "seen": "a batch that *differs*"}
    assert "| T1 | fail |" in peers.table(document)
    assert r"- T1 fail: a batch that \*differs\*" in peers.page(document)


def test_answers_of_earlier_calls_keep_their_commit():
    document = files.read_json(str(peers.RESULTS))
    again = {"result": "fail", "seen": "asked again", "commit": "0" * 12}
    part = {**document, "commit": "0" * 12, "answers": {"litdata": {"T9": again}}, "own_tests": {}}
    both = peers.with_earlier(part, document)
    assert both["own_tests"] == document["own_tests"]
    text = peers.page(both)
    assert "\n- T9 fail: asked again\n" in text
    answers = sum(len(found) for found in document["answers"].values())
    assert len(re.findall(r"^- T.* \(commit \w+\)$", text, re.MULTILINE)) == answers - 1
