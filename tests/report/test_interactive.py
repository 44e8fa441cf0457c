"""The inputs of the page's script, and that only this script may run."""

import base64
import csv
import hashlib
import io
import itertools
import re

import pytest

from rft.report import details, interactive
from rft.report.page import compose, render
from rft.report.read import load_runs
from rft.report.tables import columns, heading
from tests.report.make_runs import make_predicted, make_run

pytestmark = pytest.mark.slow


@pytest.fixture
def report(tmp_path):
    for name, skill in (("zero-shot", 0.45), ("vanilla", 0.5), ("wise-ft-0.5", 0.6)):
        make_predicted(tmp_path, name, skill=skill)
    return compose(load_runs([tmp_path]), draw=False)


def test_differences_are_those_of_the_file(report):
    data = interactive.page_data(report.rows, report.shown, report.measures)
    lines = csv.DictReader(io.StringIO(details.differences_csv(report.rows, report.measures)))
    found = {(line["recipe"], line["against"], line["set"]): line for line in lines}
    for one, other in itertools.combinations(range(len(report.shown)), 2):
        for column, name in enumerate(columns(report.shown)):
            line = found.pop((report.shown[other].name, report.shown[one].name, heading(name)))
            *numbers, counts = data["pairs"][other][one][column]
            ends = [float(line[key]) for key in ("difference", "low", "high")]
            assert numbers == pytest.approx(ends, abs=0.005001)
            assert counts == (line["significant"] == "yes")
    assert not found


def test_a_path_goes_from_zero_shot_to_fine_tuned(report):
    data = interactive.page_data(report.rows, report.shown, report.measures)
    path = [(alpha, data["rows"][row]["name"]) for alpha, row in data["paths"]["wise-ft"]]
    assert path == [(0, "zero-shot"), (0.5, "wise-ft-0.5"), (1, "vanilla")]


def test_without_predictions_there_are_means_alone(tmp_path):
    for name in ("vanilla", "no-mask"):
        make_run(tmp_path, name, percent=(70, 60))
    report = compose(load_runs([tmp_path]), draw=False)
    data = interactive.page_data(report.rows, report.shown, report.measures)
    assert data["means"] == [[70, 60], [70, 60]]
    assert data["pairs"] == [[], [[None, None]]]


def test_differences_of_many_sets_are_bounded(tmp_path, monkeypatch):
    for name, skill in (("vanilla", 0.5), ("no-mask", 0.6), ("mine", 0.7)):
        make_predicted(tmp_path, name, skill=skill)
    report = compose(load_runs([tmp_path]), draw=False)
    # two rows have one pair in seven columns, three have three
    monkeypatch.setattr(interactive, "CELLS", 20)
    data = interactive.page_data(report.rows, report.shown, report.measures)
    assert [len(line) for line in data["pairs"]] == [0, 1]
    assert len(data["means"]) == 3


def test_the_policy_names_the_script_that_is_there(report):
    text = render(report)
    # as in a browser: from the tag to the first end tag
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy[1].split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{own}'",
    ]
