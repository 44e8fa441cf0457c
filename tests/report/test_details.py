"""Tables and files derived from predictions: each number is below its heading."""

import csv
import io

import numpy as np
import pytest

from rft.report import details, tables
from rft.report.measures import Measures, measure
from rft.report.read import load_runs
from rft.report.tables import ID_COLUMN, OOD_COLUMN
from rft.runs import predictions
from rft.sets import OOD_SETS, TEST_SETS
from rft.statistics import calibration
from tests.report.make_runs import make_predicted, make_run, predict, run_of

IMAGES = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("details")
    paths = [
        make_predicted(folder, name, seed, skill=skill)
        for name, skill in (("vanilla", 0.55), ("no-mask", 0.7))
        for seed in (0, 1)
    ]
    runs = load_runs(paths)
    rows = tables.result_rows(runs)
    return paths, rows, measure(tables.by_row(runs), TEST_SETS, {OOD_COLUMN: OOD_SETS})


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_an_averages_numbers_are_the_means_of_its_sets(made):
    _, _, measured = made
    for seed, found in enumerate(details.numbers(measured, "vanilla", OOD_COLUMN)):
        of_sets = [measured.sets["vanilla", name].seeds[seed] for name in OOD_SETS]
        assert found.top5 == pytest.approx(np.mean([one.top5 for one in of_sets]))
        assert found.error_mass == pytest.approx(np.mean([one.error_mass for one in of_sets]))
    assert details.numbers(measured, "vanilla", "zoo") == []


def test_what_the_page_shows_of_a_row(made):
    _, rows, measured = made
    grid = details.statistics_grid(rows, measured, ID_COLUMN)
    assert grid.header == ["top-1", "95% interval", "top-5", "per class", "NLL", "ECE",
                           "ECE, equal mass"]  # fmt: skip
    (row, cells), _ = grid.lines
    one = measured.sets["vanilla", ID_COLUMN]
    assert row.name == "vanilla"
    assert cells[1] == f"{100 * one.interval.low:.1f} to {100 * one.interval.high:.1f}"
    assert cells[4].startswith(f"{np.mean([seed.nll for seed in one.seeds]):.3f} ")
    assert details.statistics_grid(rows, Measures(), ID_COLUMN) is None


def test_numbers_at_a_temperature_are_shown_where_one_was_fitted(tmp_path, made):
    _, rows, measured = made
    line = read(details.statistics_csv(rows, measured))[0]
    assert (line["scaled_nll"], line["scaled_error sd"]) == ("", "")
    new, old = (make_predicted(tmp_path, name) for name in ("vanilla", "no-mask"))
    right_N = np.arange(IMAGES) % 3 > 0
    predict(new, dict.fromkeys(TEST_SETS, right_N), scaled=True)
    runs = load_runs([new, old])
    rows = tables.result_rows(runs)
    measured = measure(tables.by_row(runs), TEST_SETS, {OOD_COLUMN: OOD_SETS})
    grid = details.statistics_grid(rows, measured, ID_COLUMN)
    assert grid.header[-2:] == ["NLL, scaled", "ECE, scaled"]
    (_, cells), (_, without) = grid.lines
    kept = predictions.read(predictions.path_of(new, ID_COLUMN), IMAGES)
    error = calibration.bins(kept.scaled_confidence, right_N).error
    nll = -kept.scaled_log_likelihood.astype(float).mean()
    assert cells[-2:] == [f"{nll:.3f}", f"{100 * error:.1f}"]
    assert without[-2:] == ["-", "-"]


def test_statistics_read_back(made):
    _, rows, measured = made
    found = {(line["recipe"], line["set"]): line for line in
             read(details.statistics_csv(rows, measured))}  # fmt: skip
    assert len(found) == 2 * 7
    line, one = found["no-mask", "A"], measured.sets["no-mask", "imagenet-a"]
    assert (line["images"], line["n"]) == (str(IMAGES), "2")
    assert float(line["top5"]) == pytest.approx(100 * np.mean([s.top5 for s in one.seeds]))
    assert float(line["nll"]) == pytest.approx(np.mean([s.nll for s in one.seeds]), abs=1e-6)
    assert float(line["high"]) == pytest.approx(100 * one.interval.high, abs=1e-6)
    assert found["no-mask", "OOD avg"]["images"] == ""


def test_differences_read_back(made):
    _, rows, measured = made
    lines = read(details.differences_csv(rows, measured))
    assert [(line["recipe"], line["against"]) for line in lines] == [("no-mask", "vanilla")] * 7
    (line,) = [line for line in lines if line["set"] == "R"]
    pair = measured.pair("no-mask", "vanilla", "imagenet-r")
    assert float(line["difference"]) == pytest.approx(100 * pair.difference.value, abs=1e-6)
    assert (line["images gained"], line["images lost"]) == (str(pair.gained), str(pair.lost))
    assert [float(text) for text in line["McNemar p by seed"].split()] == pytest.approx(
        pair.mcnemar, rel=1e-5
    )
    (average,) = [line for line in lines if line["set"] == "OOD avg"]
    assert (average["images gained"], average["McNemar p by seed"]) == ("", "")


def test_the_matrix_is_row_minus_column(made):
    _, rows, measured = made
    (one, cells), (_, others) = details.matrix(rows, measured, OOD_COLUMN)
    assert one.name == "vanilla"
    assert (cells[0].text, others[1].text) == ("", "")
    value = 100 * measured.average_pair("no-mask", "vanilla", OOD_COLUMN).difference.value
    assert value > 3
    assert others[0].text == f"{value:+.2f}*"
    assert cells[1].text == f"{-value:+.2f}*"
    assert others[0].title.startswith("+")
    assert details.matrix(rows, Measures(), OOD_COLUMN) == []


def test_gained_and_lost_images_are_against_the_reference(made):
    _, rows, measured = made
    grid = details.flips_grid(rows, measured, rows[0])
    ((row, cells),) = grid.lines
    pair = measured.pair("no-mask", "vanilla", "imagenet-v2")
    assert row.name == "no-mask"
    assert cells[grid.header.index("V2")] == f"+{pair.gained} -{pair.lost}"


def test_classes_gain_and_lose(tmp_path):
    """Class 0 (cat) is the one's, class 1 (dog) the other's; A has one class more of images."""
    paths = [make_run(tmp_path, name, percent=()) for name in ("vanilla", "no-mask")]
    label_N = np.arange(40) % 2
    for path, own in zip(paths, (0, 1), strict=True):
        predict(
            path,
            {
                name: (label_N == own) & (np.arange(40) < 40 - 10 * own * (name == "imagenet-a"))
                for name in TEST_SETS
            },
        )
    runs = load_runs(paths)
    measured = measure(tables.by_row(runs), TEST_SETS, {OOD_COLUMN: OOD_SETS})
    gains, losses = details.class_changes(measured, "no-mask", "vanilla", ID_COLUMN)
    assert [(one.name, one.images, one.points) for one in gains] == [("a dog", 20, 100.0)]
    assert [(one.name, one.images, one.points) for one in losses] == [("a cat", 20, -100.0)]
    # over all OOD images: 95 of 100 dogs
    gains, _ = details.class_changes(measured, "no-mask", "vanilla", OOD_COLUMN)
    assert [(one.name, one.images, one.points) for one in gains] == [("a dog", 100, 95.0)]
    (first, second, *_) = read(details.per_class_csv(tables.result_rows(runs), measured))
    assert first == {
        "set": "ImageNet", "class id": "cat", "class": "a cat", "images": "20",
        "vanilla": "100.0000", "no-mask": "0.0000",
    }  # fmt: skip
    assert (second["class"], second["no-mask"]) == ("a dog", "100.0000")


def test_no_more_classes_than_a_page_shows(monkeypatch, made):
    _, _, measured = made
    monkeypatch.setattr(details, "CLASSES", 1)
    lists = details.class_changes(measured, "no-mask", "vanilla", ID_COLUMN)
    assert all(len(found) <= 1 for found in lists)


def test_a_diagram_of_all_ood_images_is_of_their_bins(made):
    paths, rows, measured = made
    found = details.diagrams(rows, measured)["vanilla", OOD_COLUMN]
    read_rows = [
        predictions.read(predictions.path_of(path, name), IMAGES)
        for path in paths[:2]
        for name in OOD_SETS
    ]
    expected = calibration.bins(
        np.concatenate([one.confidence for one in read_rows]),
        np.concatenate([one.right for one in read_rows]),
    )
    assert found.count_M.tolist() == expected.count_M.tolist()
    assert found.confidence_M == pytest.approx(expected.confidence_M)
    assert found.accuracy_M == pytest.approx(expected.accuracy_M)


def test_latex_shows_names_as_they_are():
    rows = tables.result_rows(
        [
            run_of("a_b & 5% $x^2$ {~\\#}", percent=(70, 60)),
            run_of("vanilla", percent=(71, 50)),
            run_of("no-mask", percent=(60,)),
            # a line that begins with a bracket or star would be an option of the preceding line
            run_of("[x] `a--b---c`", percent=(60,)),
            run_of('*"', percent=(60,)),
        ]
    )
    lines = details.tex(rows).splitlines()
    names = {line.split(" & ")[0] for line in lines}
    assert {r"{[}x] \char96{}a-{}-b-{}-{}-c\char96{}", r"{*}\char34{}"} <= names
    assert lines[0] == r"\begin{tabular}{lrr}"
    assert lines[2] == r" & ImageNet & V2 \\"
    assert r"vanilla & \textbf{71.0} & 50.0 \\" in lines
    assert r"no-mask & 60.0 & -- \\" in lines
    assert any(
        line.startswith(
            r"a\_b \& 5\% \$x\textasciicircum{}2\$ \{\textasciitilde{}\textbackslash{}\#\} & 70.0"
        )
        for line in lines
    )
