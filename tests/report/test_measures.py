"""Statistics of rows and pairs from predictions equal a plain computation; files must agree."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from rft.report import details, tables
from rft.report import measures as measures_module
from rft.report.measures import AveragePair, SetPair, Units, measure, significant
from rft.report.page import compose, render
from rft.report.read import load_runs
from rft.report.tables import OOD_COLUMN
from rft.runs import predictions
from rft.sets import OOD_SETS, TEST_SETS
from rft.statistics import calibration, paired
from rft.statistics.accuracy import Interval, wilson
from rft.statistics.paired import Difference
from rft.storage import files
from tests.report.make_runs import edit, make_predicted, make_run, predict

SEEDS = (0, 1, 2)


def measured(paths, **changes):
    runs = load_runs(paths)
    found = measure(tables.by_row(runs), TEST_SETS, {OOD_COLUMN: OOD_SETS}, **changes)
    return runs, found


def rows_of(path, name):
    count = json.loads((path / "results.json").read_text())["sets"][name]
    return predictions.read(predictions.path_of(path, name), count["total"])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three rows: two with three seeds, zero-shot with one."""
    folder = tmp_path_factory.mktemp("measured")
    skills = {"zero-shot": 0.5, "vanilla": 0.55, "no-mask": 0.7}
    paths = {
        name: [
            make_predicted(folder, name, seed, skill=skill)
            for seed in SEEDS[: 1 if name == "zero-shot" else 3]
        ]
        for name, skill in skills.items()
    }
    runs, found = measured([path for members in paths.values() for path in members])
    return paths, runs, found


def test_a_rows_numbers_are_those_of_its_images(world):
    paths, _, found = world
    for row, members in paths.items():
        for name in TEST_SETS:
            one = found.sets[row, name]
            for path, numbers in zip(members, one.seeds, strict=True):
                rows = rows_of(path, name)
                assert numbers.top1 == np.mean(rows.prediction == rows.label)
                assert numbers.top5 == np.mean(rows.rank < 5)
                by_class = [np.mean(rows.right[rows.label == label]) for label in (0, 1)]
                assert numbers.per_class == pytest.approx(np.mean(by_class))
                assert numbers.nll == pytest.approx(-rows.log_likelihood.astype(float).mean())
                bins = calibration.bins(rows.confidence, rows.right)
                assert numbers.error_width == bins.error
                mass = calibration.bins(rows.confidence, rows.right, "mass")
                assert numbers.error_mass == mass.error


def test_one_seed_has_wilsons_interval_and_several_that_of_their_images(world):
    paths, _, found = world
    right_N = rows_of(paths["zero-shot"][0], "imagenet-a").right
    interval = found.sets["zero-shot", "imagenet-a"].interval
    assert interval == wilson(int(right_N.sum()), len(right_N))
    right_SN = np.stack([rows_of(path, "imagenet-a").right for path in paths["vanilla"]])
    expected = paired.bootstrap([right_SN.mean(axis=0)], seed=5).interval
    width = expected.high - expected.low
    interval = found.sets["vanilla", "imagenet-a"].interval
    assert interval == pytest.approx(expected, abs=0.05 * width)


def test_the_averages_interval_draws_each_set_by_itself(world):
    paths, _, found = world
    gains = [
        np.mean([rows_of(path, name).right for path in paths["vanilla"]], axis=0)
        for name in OOD_SETS
    ]
    expected = paired.bootstrap(gains, seed=5).interval
    width = expected.high - expected.low
    assert found.averages["vanilla", OOD_COLUMN] == pytest.approx(expected, abs=0.05 * width)


def test_a_pair_is_the_bootstrap_of_its_images_and_mcnemars_test_of_each_seed(world):
    paths, _, found = world
    gains = []
    for name in OOD_SETS:
        one_SN, two_SN = (
            np.stack([rows_of(path, name).right for path in paths[row]])
            for row in ("no-mask", "vanilla")
        )
        gain_N = paired.gains(one_SN, two_SN)
        gains.append(gain_N)
        pair = found.pair("no-mask", "vanilla", name)
        assert pair.difference.value == pytest.approx(gain_N.mean())
        expected = paired.bootstrap([gain_N], seed=5).interval
        width = expected.high - expected.low
        assert pair.difference.interval == pytest.approx(expected, abs=0.1 * width)
        assert (pair.gained, pair.lost) == ((gain_N > 1e-9).sum(), (gain_N < -1e-9).sum())
        tests = [paired.mcnemar(a_N, b_N) for a_N, b_N in zip(one_SN, two_SN, strict=True)]
        assert pair.mcnemar == pytest.approx([test.p for test in tests])
        own = [a_N.mean() - b_N.mean() for a_N, b_N in zip(one_SN, two_SN, strict=True)]
        assert pair.seeds == pytest.approx(own)
    average = found.average_pair("no-mask", "vanilla", OOD_COLUMN)
    expected = paired.bootstrap(gains, seed=5)
    width = expected.interval.high - expected.interval.low
    assert average.difference.value == pytest.approx(expected.value)
    assert average.difference.interval == pytest.approx(expected.interval, abs=0.1 * width)
    assert average.seeds == pytest.approx(
        np.mean([found.pair("no-mask", "vanilla", name).seeds for name in OOD_SETS], axis=0)
    )


def test_the_other_order_of_a_pair_has_the_other_sign(world):
    _, _, found = world
    there, back = (found.pair(*pair, "objectnet") for pair in (
        ("no-mask", "vanilla"), ("vanilla", "no-mask"),
    ))  # fmt: skip
    assert back == -there
    assert (back.gained, back.lost) == (there.lost, there.gained)
    there, back = (found.average_pair(*pair, OOD_COLUMN) for pair in (
        ("no-mask", "vanilla"), ("vanilla", "no-mask"),
    ))  # fmt: skip
    assert back == -there
    assert found.pair("no-mask", "no-mask", "objectnet") is None


def test_different_seeds_are_compared_each_with_each(world):
    paths, _, found = world
    right_N = rows_of(paths["zero-shot"][0], "imagenet-r").right
    own = [rows_of(path, "imagenet-r").right.mean() - right_N.mean() for path in paths["vanilla"]]
    assert found.pair("vanilla", "zero-shot", "imagenet-r").seeds == pytest.approx(own)


@pytest.mark.slow
def test_equal_seeds_are_paired_whatever_their_order(tmp_path):
    """A run's file may be named by any seed; pairs are matched by number."""
    one = [make_predicted(tmp_path / "a", "vanilla", seed) for seed in (0, 1)]
    two = [make_predicted(tmp_path / "b", "no-mask", seed) for seed in (1, 0)]
    _, found = measured([*one, *two])
    expected = [
        rows_of(two[1 - seed], "imagenet-v2").right.mean()
        - rows_of(one[seed], "imagenet-v2").right.mean()
        for seed in (0, 1)
    ]
    assert found.pair("no-mask", "vanilla", "imagenet-v2").seeds == pytest.approx(expected)


@pytest.mark.slow
def test_intervals_do_not_depend_on_what_else_is_compared(world):
    paths, _, found = world
    _, alone = measured([*paths["vanilla"], *paths["no-mask"]])
    pair = ("no-mask", "vanilla", OOD_COLUMN)
    assert alone.average_pairs[pair] == found.average_pairs[pair]
    assert alone.averages["vanilla", OOD_COLUMN] == found.averages["vanilla", OOD_COLUMN]


@pytest.mark.parametrize(
    ("low", "high", "seeds", "expected"),
    [
        (0.1, 0.2, (0.1, 0.2), True),
        (-0.2, -0.1, (-0.1, -0.2), True),
        (-0.1, 0.2, (0.1, 0.2), False),
        (0.1, 0.2, (0.3, -0.01), False),
        (0.1, 0.2, (0.3, 0.0), False),
        (0.0, 0.2, (0.1,), False),
    ],
)
def test_what_is_significant(low, high, seeds, expected):
    difference = Difference((low + high) / 2, Interval(low, high), 0.01)
    assert significant(AveragePair(difference, seeds)) == expected
    pair = SetPair(difference, 1, 1, seeds, (1.0,) * len(seeds))
    assert significant(pair) == significant(-pair) == expected


@pytest.mark.slow
def test_only_the_first_rows_are_compared(world, monkeypatch):
    paths, _, _ = world
    monkeypatch.setattr(measures_module, "COMPARED", 2)
    _, found = measured([path for members in paths.values() for path in members])
    assert set(found.average_pairs) == {("vanilla", "zero-shot", OOD_COLUMN)}
    assert ("no-mask", "imagenet-a") in found.sets


def test_runs_without_predictions_have_counts_alone(tmp_path):
    old = make_run(tmp_path, "vanilla", percent=(70, 60, 50, 40, 30, 20), total=60)
    new = make_predicted(tmp_path, "no-mask")
    runs, found = measured([old, new])
    assert found.without == (runs[0],)
    assert {row for row, _ in found.sets} == {"no-mask"}
    assert found.pairs == {}
    # one seed of two: the mean over seeds would be a different quantity
    half = make_run(tmp_path, "no-mask", 1, percent=(70, 60, 50, 40, 30, 20), total=60)
    _, found = measured([old, new, half])
    assert found.sets == {}


def test_runs_of_different_images_are_refused(tmp_path):
    paths = [make_predicted(tmp_path, name) for name in ("vanilla", "no-mask")]
    right_N = np.ones(60, bool)
    labels = {"imagenet-r": (np.arange(60) + 1) % 2}
    predict(paths[1], {"imagenet-r": right_N}, labels=labels)
    words = f"{paths[0]} and {paths[1]} have predictions of different labels for imagenet-r"
    with pytest.raises(ValueError, match=re.escape(words)):
        measured(paths)


def test_runs_of_different_keys_are_refused(tmp_path):
    paths = [make_predicted(tmp_path, name) for name in ("vanilla", "no-mask")]
    data = rows_of(paths[0], "imagenet-r")
    key_N = data.key[::-1].copy()
    other = predictions.Predictions(**{**vars(data), "key": key_N}).to_bytes()
    where = predictions.path_of(paths[1], "imagenet-r")
    where.write_bytes(other)
    sets = json.loads((paths[1] / "results.json").read_text())["sets"]
    sets["imagenet-r"] |= {
        "predictions_sha256": files.sha256_bytes(other),
        "correct": int(data.right.sum()),
    }
    edit(paths[1] / "results.json", sets=sets)
    with pytest.raises(ValueError, match=r"different images for imagenet-r.*first: row 0"):
        measured(paths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": 1}, "right predictions, results.json has 1; evaluate the run again"),
        ({"predictions_sha256": "0" * 64}, "was changed after results.json was written"),
    ],
)
def test_predictions_that_do_not_belong_are_refused(tmp_path, changes, message):
    path = make_predicted(tmp_path, "vanilla")
    sets = json.loads((path / "results.json").read_text())["sets"]
    sets["imagenet-a"] |= changes
    edit(path / "results.json", sets=sets)
    with pytest.raises(ValueError, match=message) as caught:
        measured([path])
    assert str(path) in str(caught.value)


def declare(path, *names):
    """Make sets of a run declared OOD sets."""
    sets = json.loads((path / "results.json").read_text())["sets"]
    for name in names:
        sets[name]["ood"] = True
    edit(path / "results.json", sets=sets)


def test_declared_sets_count_into_an_average_of_their_own(tmp_path):
    """The benchmarks' average does not change; a row with all declared sets has the other one."""
    sets = (*TEST_SETS, "garden", "zoo")
    paths = [make_predicted(tmp_path, name, sets=sets) for name in ("vanilla", "no-mask")]
    few = make_predicted(tmp_path, "zero-shot")
    for path in paths:
        declare(path, "imagenet-val", "zoo")
    report = compose(load_runs([*paths, few]), draw=False)
    (average,) = (name for name in tables.columns(report.rows) if tables.heading(name) == (
        "OOD avg (6 sets)"
    ))  # fmt: skip
    names = (*OOD_SETS, "zoo")
    assert tables.sets_of(average) == names
    none, one, two = report.rows
    assert none.cells.keys() == {*TEST_SETS, OOD_COLUMN}
    for row in (one, two):
        assert row.cells[average].mean == pytest.approx(
            np.mean([row.cells[name].mean for name in names])
        )
        assert row.cells[OOD_COLUMN].mean == pytest.approx(
            np.mean([row.cells[name].mean for name in OOD_SETS])
        )
    found = report.measures
    pair = tables.pair_of(found, "no-mask", "vanilla", average)
    assert pair.difference.value == pytest.approx(
        np.mean([found.pair("no-mask", "vanilla", name).difference.value for name in names])
    )
    drawn = [rows_of(paths[0], name).right.astype(float) for name in names]
    expected = paired.bootstrap(drawn, seed=5).interval
    assert found.averages["vanilla", average] == pytest.approx(
        expected, abs=0.1 * (expected.high - expected.low)
    )
    assert "OOD avg (6 sets) is the unweighted mean of V2, R, Sketch, ObjectNet, A, zoo." in (
        report.tables[0].caption
    )
    assert "No OOD avg (6 sets) because a set is missing: zero-shot." in report.summary.warnings


def test_own_sets_have_an_average_where_several_are_declared(tmp_path):
    path = make_predicted(tmp_path, "vanilla", sets=("garden", "zoo"))

    def shown():
        rows = tables.result_rows(load_runs([path]))
        return [tables.heading(name) for name in tables.columns(rows)], tables.target(rows)

    assert shown() == (["garden", "zoo"], "garden")
    declare(path, "zoo")
    assert shown() == (["garden", "zoo"], "garden")
    declare(path, "garden")
    assert shown() == (["garden", "zoo", "OOD avg (2 sets)"], "//garden//zoo")


def test_a_set_that_is_too_large_is_counted_and_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measures_module, "IMAGES", 59)
    large = make_predicted(tmp_path, "vanilla", sets=("imagenet-val",))
    small = make_predicted(tmp_path, "no-mask", sets=("zoo",), images=59)
    report = compose(load_runs([large, small]), draw=False)
    assert report.measures.sets.keys() == {("no-mask", "zoo")}
    assert report.measures.without == ()
    assert tables.ID_COLUMN in report.rows[0].cells
    (line,) = (one for one in report.summary.warnings if one.startswith("ImageNet: more than"))
    assert "no intervals, p-values" in line


def with_domains(path, name, domains, label_N):
    """Name a run's images like those of domains: several versions of each image."""
    rows = rows_of(path, name)
    images = len(rows.key) // len(domains)
    domain_N = np.repeat(domains, images)
    keys = [
        f"{domain.replace('/', '_')}_n01_{number % images:05d}"
        for number, domain in enumerate(domain_N)
    ]
    changed = vars(rows) | {"key": np.array(keys), "domain": domain_N, "label": label_N}
    prediction_N = np.where(rows.right, label_N, label_N + 1).astype(np.int32)
    data = predictions.Predictions(**changed | {"prediction": prediction_N}).to_bytes()
    predictions.path_of(path, name).write_bytes(data)
    sets = json.loads((path / "results.json").read_text())["sets"]
    sets[name]["predictions_sha256"] = files.sha256_bytes(data)
    edit(path / "results.json", sets=sets)


def corrupted(folder, recipe, skill, seeds=1):
    """Runs on 40 images in 6 domains; easy images are so in all of them."""
    paths = []
    for seed in range(seeds):
        path = make_predicted(folder, recipe, seed, sets=("c",), images=240)
        hard_N = np.tile(np.random.default_rng(0).uniform(size=40), 6)
        noise_N = np.random.default_rng([seed, *recipe.encode()]).normal(0, 0.05, 240)
        predict(path, {"c": hard_N + noise_N < skill})
        label_N = np.tile(np.arange(40) % 2, 6).astype(np.int32)
        with_domains(
            path, "c", [f"{one}/{n}" for one in ("fog", "snow") for n in (1, 2, 3)], label_N
        )
        paths.append(path)
    return paths


@pytest.mark.parametrize("seeds", [1, 2])
def test_versions_of_an_image_are_drawn_together(tmp_path, seeds):
    paths = [
        *corrupted(tmp_path, "vanilla", 0.5, seeds),
        *corrupted(tmp_path, "no-mask", 0.6, seeds),
    ]
    runs = load_runs(paths)
    found = measure(tables.by_row(runs), ["c"], {})
    assert found.versions == ("c",)
    right_SN = np.stack([rows_of(path, "c").right for path in paths])
    # of equal size, so units' means have the mean of the images
    own_SU = right_SN.reshape(2, seeds, 6, 40).mean(axis=(1, 2))
    for row, own_U in zip(("vanilla", "no-mask"), own_SU, strict=True):
        expected = paired.bootstrap([own_U], seed=5).interval
        width = expected.high - expected.low
        assert found.sets[row, "c"].interval == pytest.approx(expected, abs=0.05 * width)
    pair = found.pair("no-mask", "vanilla", "c")
    expected = paired.bootstrap([own_SU[1] - own_SU[0]], seed=5).interval
    width = expected.high - expected.low
    assert pair.difference.interval == pytest.approx(expected, abs=0.1 * width)
    # images are counted one by one, and no test treats them as independent
    gain_N = right_SN[seeds:].mean(axis=0) - right_SN[:seeds].mean(axis=0)
    assert (pair.gained, pair.lost) == ((gain_N > 0).sum(), (gain_N < 0).sum())
    assert pair.mcnemar == ()
    report = compose(runs, draw=False)
    assert any(
        "c: for intervals, images with the same name" in one for one in report.summary.warnings
    )
    assert details.differences_csv(report.rows, report.measures).splitlines()[1].endswith(",")


def test_files_of_one_name_in_two_classes_are_different_images():
    """Numbered files: 1.jpg of cats is not a version of 1.jpg of dogs."""
    zeros = np.zeros(4, np.int32)
    rows = predictions.Predictions(
        key=np.array(["fog_1", "snow_1", "fog_1", "snow_1"]),
        label=np.array([0, 0, 1, 1], np.int32),
        domain=np.array(["fog", "snow", "fog", "snow"]),
        **dict.fromkeys(("prediction", "rank", "confidence", "log_likelihood"), zeros),
    )
    found = Units.of(rows)
    assert found.number_N.tolist() == [0, 0, 1, 1]
    assert found.size_U.tolist() == [2, 2]
    # packing adds a hash if names are not distinct
    hashed = [f"{domain}_1-{n:016x}" for n, domain in enumerate(("fog", "snow", "fog", "snow"))]
    assert Units.of(replace(rows, key=np.array(hashed))).size_U.tolist() == [2, 2]
    # no image has a second version
    assert Units.of(replace(rows, key=np.array(["fog_1", "snow_2", "fog_3", "snow_4"]))) is None
    assert Units.of(replace(rows, domain=None)) is None


def test_names_that_repeat_by_chance_make_no_interval_narrow(tmp_path):
    """A photo of each class at many places, all called 0.jpg, is two units."""
    path = make_predicted(tmp_path, "vanilla", sets=("places",), images=400)
    rows = rows_of(path, "places")
    domain_N = np.repeat([f"site{n}" for n in range(200)], 2)
    keys = [f"{site}_{'cat' if n % 2 else 'dog'}_0" for n, site in enumerate(domain_N)]
    data = replace(rows, key=np.array(keys), domain=domain_N).to_bytes()
    predictions.path_of(path, "places").write_bytes(data)
    sets = json.loads((path / "results.json").read_text())["sets"]
    sets["places"]["predictions_sha256"] = files.sha256_bytes(data)
    edit(path / "results.json", sets=sets)
    found = measure(tables.by_row(load_runs([path])), ["places"], {})
    assert found.versions == ("places",)
    expected = wilson(int(rows.right.sum()), 400)
    low, high = found.sets["vanilla", "places"].interval
    assert high - low == pytest.approx(expected.high - expected.low, rel=0.05)


def test_an_infinite_likelihood_has_no_spread(tmp_path):
    """A label's probability may be 0 in float32."""
    for seed in (0, 1):
        path = make_predicted(tmp_path, "vanilla", seed, sets=("zoo",))
        rows = rows_of(path, "zoo")
        likelihood_N = np.where(rows.right, rows.log_likelihood, -np.inf).astype(np.float32)
        data = predictions.Predictions(**vars(rows) | {"log_likelihood": likelihood_N}).to_bytes()
        predictions.path_of(path, "zoo").write_bytes(data)
        sets = json.loads((path / "results.json").read_text())["sets"]
        sets["zoo"]["predictions_sha256"] = files.sha256_bytes(data)
        edit(path / "results.json", sets=sets)
    report = compose(load_runs([tmp_path]), draw=False)
    (line,) = details.statistics_csv(report.rows, report.measures).splitlines()[1:]
    assert ",inf,," in line
    grid = details.statistics_grid(report.shown, report.measures, "zoo")
    assert "inf" in grid.lines[0][1]


def test_a_sets_declared_score_is_a_column_and_what_averages_take(tmp_path):
    sets = ("imagenet-r", "wilds")
    paths = [make_predicted(tmp_path, name, sets=sets) for name in ("vanilla", "no-mask")]
    for path, value in zip(paths, (0.25, 0.375), strict=True):
        counts = json.loads((path / "results.json").read_text())["sets"]
        counts["wilds"] |= {
            "score": "worst-domain",
            "value": value,
            "ood": True,
            "worst_domain": "x",
        }
        edit(path / "results.json", sets=counts)
    report = compose(load_runs(paths), draw=False)
    column = tables.score_column("worst-domain", "wilds")
    assert [row.cells[column].mean for row in report.rows] == [25, 37.5]
    headings = [tables.heading(name) for name in tables.columns(report.rows)]
    assert headings == ["R", "wilds", "wilds, worst-domain", "OOD avg (2 sets)"]
    average = tables.columns(report.rows)[-1]
    for row in report.rows:
        mean = (row.cells["imagenet-r"].mean + row.cells[column].mean) / 2
        assert row.cells[average].mean == pytest.approx(mean)
        # drawing images gives no interval for a worst domain
        assert details.interval(report.measures, row.name, average) is None
    assert tables.pair_of(report.measures, "no-mask", "vanilla", average) is None
    assert tables.pair_of(report.measures, "no-mask", "vanilla", "wilds") is not None
    caption = report.tables[0].caption
    assert "or the score that a heading names" in caption
    assert "OOD avg (2 sets) is the unweighted mean of R, wilds, worst-domain." in caption
    assert "Declared scores have no intervals." in caption
    grid = details.statistics_grid(report.shown, report.measures, average)
    assert grid.header[0] == "score"
    assert details.matrix(report.shown, report.measures, average) == []
    assert "declared scores have no intervals" in report.summary.conclusions[1]
    render(report)
    # for one set alone, its score is used too
    for path in paths:
        counts = json.loads((path / "results.json").read_text())["sets"]
        edit(path / "results.json", sets={"wilds": counts["wilds"]})
    report = compose(load_runs(paths), draw=False)
    assert tables.target(report.rows) == column
    best, against = report.summary.conclusions
    assert best.startswith("Highest wilds, worst-domain: no-mask, 37.5%")
    assert "declared scores have no intervals" in against


def test_a_mean_over_domains_of_one_size_is_top1(tmp_path):
    path = make_predicted(tmp_path, "vanilla", sets=("imagenet-r", "c"))
    counts = json.loads((path / "results.json").read_text())["sets"]
    value = counts["c"]["correct"] / counts["c"]["total"]
    counts["c"] |= {"score": "mean-over-domains", "value": value + 1e-16, "ood": True}
    edit(path / "results.json", sets=counts)
    report = compose(load_runs([path]), draw=False)
    assert [tables.heading(name) for name in tables.columns(report.rows)] == [
        "R", "c", "OOD avg (2 sets)"
    ]  # fmt: skip
    average = tables.columns(report.rows)[-1]
    assert details.interval(report.measures, "vanilla", average) is not None


def test_a_copy_of_a_set_counts_once(tmp_path):
    path = make_predicted(tmp_path, "vanilla", sets=("imagenet-r", "imagenet-a", "mine", "zoo"))
    counts = json.loads((path / "results.json").read_text())["sets"]
    counts["mine"]["manifest_sha256"] = counts["imagenet-r"]["manifest_sha256"]
    edit(path / "results.json", sets=counts)
    declare(path, "mine", "zoo")
    report = compose(load_runs([path]), draw=False)
    average = tables.columns(report.rows)[-1]
    assert tables.sets_of(average) == ("imagenet-r", "imagenet-a", "zoo")
    assert any("mine is the same packed data as R" in one for one in report.summary.warnings)
