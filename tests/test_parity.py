"""rft against the released code of each method, if a checkout exists; and the harness itself."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine, parities, parity
from rft.storage import files
from tests import tiny

METHODS = parity.methods()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_released_code_makes_the_same_of_the_same_numbers(name):
    method = METHODS[name]
    folder = parity.checkout(method)
    if folder is None:
        pytest.skip(parity.absence(method))
    differences = method.measure(folder)
    assert differences
    for what, difference in differences.items():
        assert difference <= parity.TOLERANCE, what


def test_every_method_names_its_repository_and_a_variable_of_its_own():
    for name, method in METHODS.items():
        assert method.REPOSITORY.count("/") == 1, name
        assert method.VARIABLE.startswith("RFT_PEER_"), name
    assert len({method.VARIABLE for method in METHODS.values()}) == len(METHODS)


def test_the_saved_page_is_made_of_the_saved_result_which_is_within_the_tolerance():
    document = files.read_json(str(parity.RESULT))
    assert parity.PAGE.read_text() == parity.page(document)
    assert parity.beyond(document) == []
    assert document["parities"].keys() <= METHODS.keys()
    for found in document["parities"].values():
        assert all(found[name] for name in ("date", "commit", "torch", "peer_commit"))


def method(name: str, difference: float) -> SimpleNamespace:
    return SimpleNamespace(
        REPOSITORY=f"owner/{name}",
        VARIABLE=f"RFT_PEER_{name.upper()}",
        measure=lambda folder: {"weights": difference},
    )


@pytest.fixture
def two(monkeypatch, tmp_path):
    """Two methods, the first with a checkout, and their own results."""
    known = {"one": method("one", 2e-7), "two": method("two", 3e-7)}
    monkeypatch.setattr(parity, "methods", lambda: known)
    monkeypatch.setattr(parity, "RESULT", tmp_path / "parity.json")
    monkeypatch.setattr(parity, "PAGE", tmp_path / "parity.md")
    (tmp_path / "checkout").mkdir()
    monkeypatch.setenv("RFT_PEER_ONE", str(tmp_path / "checkout"))
    return known


def printed(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_has_no_checkout_is_named_and_keeps_its_earlier_result(two, capsys, monkeypatch):
    tiny.call(parity, "--save")
    output = capsys.readouterr().out
    assert "two: not measured, RFT_PEER_TWO is not set to a checkout of github.com/owner/two" in (
        output
    )
    assert files.read_json(str(parity.RESULT))["parities"].keys() == {"one"}
    monkeypatch.setenv("RFT_PEER_TWO", str(parity.RESULT.parent / "checkout"))
    monkeypatch.delenv("RFT_PEER_ONE")
    tiny.call(parity, "--save")
    both = printed(capsys)["parities"]
    assert {name: found["differences"]["weights"] for name, found in both.items()} == {
        "one": 2e-7,
        "two": 3e-7,
    }
    assert "| `one` | owner/one at not recorded | weights | 2.0e-07 | " in parity.PAGE.read_text()


def test_nothing_is_written_unless_asked_for(two, capsys):
    tiny.call(parity)
    assert printed(capsys)["parities"].keys() == {"one"}
    assert not parity.RESULT.exists()


@pytest.mark.parametrize("difference", [2e-5, math.nan, math.inf])
def test_a_difference_beyond_the_tolerance_is_an_error(two, refused, difference):
    two["one"].measure = lambda folder: {"weights": difference}
    line = refused(parity)
    assert "not equal to the released code within 1e-05: one, weights: " in line


def test_a_variable_that_names_no_folder_is_an_error(two, refused, monkeypatch, tmp_path):
    monkeypatch.setenv("RFT_PEER_TWO", str(tmp_path / "absent"))
    line = refused(parity)
    assert "absent, which is not a folder; clone https://github.com/owner/two and set" in line


def test_a_checkout_inside_another_repository_has_no_commit_of_its_own(tmp_path):
    assert len(parity.peer_commit(machine.ROOT)) == 40
    assert parity.peer_commit(Path(__file__).parent) == "not recorded"
    assert parity.peer_commit(tmp_path) == "not recorded"


def test_differences_are_relative_to_the_released_codes_largest_number():
    ours, theirs = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -5.0])
    assert parities.difference(ours, theirs) == pytest.approx(0.2)
    assert math.isnan(parities.difference(ours * torch.nan, theirs))
    with pytest.raises(ValueError, match="zeros"):
        parities.difference(ours, torch.zeros(2))
    with pytest.raises(ValueError, match=r"tensor of \(2,\) is compared with \(2, 2\)"):
        parities.difference(ours, torch.ones(2, 2))


def test_a_file_of_a_checkout_is_imported_without_its_package(tmp_path):
    (tmp_path / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "code.py").write_text("answer = 42")
    assert parities.load(tmp_path / "code.py").answer == 42
    with pytest.raises(FileNotFoundError):
        parities.load(tmp_path / "absent.py")
