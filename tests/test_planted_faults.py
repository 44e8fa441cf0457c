"""The table of planted faults fits the tree, and the tool that plants them reports its results."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAVED = ROOT / "benchmarks" / "results" / "planted_faults"
LARGEST_SHARE = 0.05  # of faults that no test can notice


def load_tool():
    spec = importlib.util.spec_from_file_location("plant_faults", ROOT / "tools/plant_faults.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


tool = load_tool()
FAULTS = tool.load(tool.TABLE)


def test_every_fault_can_be_planted_and_its_tests_are_there():
    tool.check(FAULTS, ROOT)
    names = [(fault.area, fault.name) for fault in FAULTS]
    assert len(set(names)) == len(names)


def test_there_are_enough_and_few_survive():
    assert len(FAULTS) >= 150
    assert sum(bool(fault.survives) for fault in FAULTS) <= LARGEST_SHARE * len(FAULTS)


def test_the_saved_result_is_the_tables_and_its_page_is_made_of_it():
    document = json.loads(SAVED.with_suffix(".json").read_text())
    assert SAVED.with_suffix(".md").read_text() == tool.to_markdown(document)
    saved = [
        (area, fault["name"]) for area, of in document["areas"].items() for fault in of["faults"]
    ]
    assert set(saved) == {(fault.area, fault.name) for fault in FAULTS}, "run make faults"
    for area in document["areas"].values():
        for fault in area["faults"]:
            assert bool(fault["noticed_by"]) != bool(fault["survives"]), fault["name"]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A repository with one function and one test."""
    monkeypatch.setattr(tool, "HEAVY", ("hypothesis",))  # a plugin of pytest imports it anyway
    root = tmp_path / "tree"
    root.mkdir()
    (root / "sums.py").write_text("def add(a, b):\n    return a + b  # and no more\n")
    (root / "test_sums.py").write_text(
        "from sums import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n"
    )
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def fault(**changes):
    fields = {"name": "f", "area": "sums", "file": "sums.py", "old": "a + b", "new": "a - b"}
    return tool.Fault(**{**fields, "tests": ("test_sums.py::test_add",), **changes})


@pytest.mark.slow
def test_faults_are_noticed_or_survive(tree):
    told = []
    outcomes = tool.try_all([fault(), fault(new="b + a")], tree, 1, told.append)
    assert [outcome.noticed_by for outcome in outcomes] == ["test_sums.py::test_add", ""]
    assert [outcome.is_bad for outcome in outcomes] == [False, True]
    assert told == outcomes
    page = tool.to_markdown(tool.to_document(outcomes))
    assert "| sums | 2 | 1 | 1 |\n| all | 2 | 1 | 1 |" in page
    assert "| sums: f | sums.py | `test_add` |" in page
    # the original tree is unchanged
    assert "a + b  # and" in (tree / "sums.py").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old": "a * b"}, "its text occurs 0 times in sums.py, not once"),
        ({"old": "a"}, "its text occurs 4 times in sums.py, not once"),
        ({"new": "a + b"}, "not once"),
        ({"file": "gone.py"}, "gone.py"),
        ({"tests": ()}, "names no test"),
        ({"tests": ("test_other.py",)}, "test_other.py does not exist"),
        ({"tests": ("test_sums.py::test_minus",)}, "test_sums.py has no test test_minus"),
    ],
)
def test_a_fault_that_does_not_fit_is_an_error(tree, changes, message):
    with pytest.raises(ValueError, match=message):
        tool.check([fault(**changes)], tree)


def test_all_faults_that_do_not_fit_are_named_at_once(tree):
    stale = [fault(name=name, old="gone") for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"'one': its text .*; fault 'two': its text"):
        tool.check([stale[0], fault(), stale[1]], tree)


@pytest.mark.slow
def test_a_test_that_fails_without_a_fault_is_an_error(tree):
    (tree / "sums.py").write_text("def add(a, b):\n    return a + b + 1\n")
    with pytest.raises(ValueError, match="test_add fails without any fault"):
        tool.try_all([fault()], tree, 1, lambda _: None)


@pytest.mark.slow
def test_a_fault_that_cannot_be_imported_proves_nothing(tree):
    with pytest.raises(ValueError, match="cannot be run"):
        tool.try_all([fault(new="a +")], tree, 1, lambda _: None)


def test_a_reason_is_for_a_survivor():
    assert tool.Outcome(fault(survives="because"), "").is_bad is False
    assert tool.Outcome(fault(survives="because"), "test_add").is_bad is True


def test_mistakes_are_one_line(refused):
    assert "unknown area 'heads'; did you mean 'head'?" in refused(tool, "--only", "heads")
    assert "--jobs is 0" in refused(tool, "--jobs", "0")
