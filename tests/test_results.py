"""Every saved result has its provenance: commit, day, versions, processor and threads."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import machine

RESULTS = machine.ROOT / "benchmarks" / "results"
# the part of the description that a reader needs to reproduce a result
FIELDS = {"date", "commit", "code", "machine", "processor", "threads", "python", "versions"}
# trees and areas with a commit each: tools/compare_versions.py, tools/plant_faults.py
OF_SEVERAL_COMMITS = {"versions.json", "planted_faults.json"}


def lacking(path: Path) -> set[str]:
    document = json.loads(path.read_text())
    return {name for name in FIELDS if not document.get(name)}


def test_every_result_names_what_made_it():
    paths = [path for path in RESULTS.glob("*.json") if path.name not in OF_SEVERAL_COMMITS]
    assert [path.name for path in paths if lacking(path)] == []


def test_results_of_several_commits_name_each():
    versions = json.loads((RESULTS / "versions.json").read_text())
    assert all(versions[name] for name in ("old", "new", "python", "torch"))
    areas = json.loads((RESULTS / "planted_faults.json").read_text())["areas"]
    assert all(
        area["provenance"]["git"] and area["provenance"]["packages"] for area in areas.values()
    )


def test_a_description_has_every_field():
    assert machine.describe().keys() >= FIELDS


@pytest.mark.slow
def test_only_code_makes_a_commit_dirty(tmp_path, monkeypatch):
    """A saved result changes the tree, but the next one still has the same commit."""

    def git(*words: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True)

    package = tmp_path / "rft"
    package.mkdir()
    for path in (package / "__init__.py", tmp_path / "result.json"):
        path.write_text("")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "one")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine.files.rft, "__file__", str(package / "__init__.py"))
    clean = machine.commit()
    assert clean is not None
    assert "dirty" not in clean
    (tmp_path / "result.json").write_text("{}")
    assert machine.commit() == clean
    (package / "__init__.py").write_text("x = 1")
    assert machine.commit() == f"{clean}-dirty"
