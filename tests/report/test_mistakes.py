"""A row's mistakes: counted by hand, bounded, and on the page."""

from collections import Counter

import numpy as np
import pytest

from rft.config import MAX_PIXELS
from rft.report import mistakes
from rft.report.measures import SetClasses
from rft.report.mistakes import Pictures
from rft.report.page import compose, mistakes_of, render
from rft.report.read import load_runs
from rft.runs.predictions import Predictions
from rft.statistics.accuracy import wilson
from tests.report.make_runs import make_predicted

CLASSES = 5


def rows(images: int = 200, classes: int = CLASSES) -> Predictions:
    rng = np.random.default_rng(images)
    label_N = rng.integers(0, classes, images).astype(np.int32)
    prediction_N = np.where(rng.uniform(size=images) < 0.6, label_N, (label_N * 3 + 1) % classes)
    return Predictions(
        key=np.array([f"k{n:05d}" for n in range(images)]),
        label=label_N,
        prediction=prediction_N.astype(np.int32),
        rank=np.where(prediction_N == label_N, 0, 1).astype(np.int32),
        confidence=(rng.integers(1, 9, images) / 8).astype(np.float32),
        log_likelihood=np.full(images, -1, dtype=np.float32),
        scaled_confidence=None,
        scaled_log_likelihood=None,
    )


def test_mistakes_are_those_that_one_counts_by_hand():
    given = rows()
    found = mistakes.find(given)
    pairs = list(zip(given.label.tolist(), given.prediction.tolist(), strict=True))
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1])
    assert found.wrong == sum(wrong.values())
    assert found.predicted == len(set(given.prediction.tolist()))
    assert {(one.label, one.prediction): one.images for one in found.pairs} == dict(wrong)
    numbers = [one.images for one in found.pairs]
    assert numbers == sorted(numbers, reverse=True)
    assert found.matrix_KK is not None
    for row, label in enumerate(found.label_K):
        for column, prediction in enumerate(found.label_K):
            assert found.matrix_KK[row, column] == pairs.count((label, prediction))
    order = sorted(
        (n for n, pair in enumerate(pairs) if pair[0] != pair[1]),
        key=lambda n: (-given.confidence[n], given.key[n]),
    )
    assert [one.sample for one in found.confident] == order[: mistakes.CONFIDENT]
    first = found.confident[0]
    assert (first.key, first.label, first.prediction) == (
        given.key[first.sample],
        given.label[first.sample],
        given.prediction[first.sample],
    )


def test_many_classes_have_no_matrix():
    found = mistakes.find(rows(4000, mistakes.MATRIX + 1))
    assert (found.matrix_KK, found.label_K) == (None, ())
    assert len(found.pairs) == mistakes.PAIRS
    assert len(found.confident) == mistakes.CONFIDENT


def test_a_model_without_mistakes_has_none():
    given = rows()
    found = mistakes.find(
        Predictions(**{**vars(given), "prediction": given.label, "rank": 0 * given.rank})
    )
    assert (found.wrong, found.pairs, found.confident) == (0, (), ())


def test_the_worst_classes_come_first_with_their_interval():
    images_K = np.array([10, 30, 20, 10])
    correct_K = np.array([9.0, 6.0, 20.0, 9.0])
    classes = SetClasses(label_K=np.arange(4), images_K=images_K, known=None)

    class Found:
        class_correct_K = correct_K

    lines = mistakes.class_lines(classes, Found())
    assert [line.name for line in lines] == ["class 1", "class 0", "class 3", "class 2"]
    low, high = wilson(6, 30)
    assert lines[0] == ("class 1", 30, pytest.approx(20), 100 * low, 100 * high)


def test_pictures_stop_where_the_page_has_no_room():
    half = bytes(mistakes.BYTES // 2)
    found = Pictures.of({7: half, 3: half, 5: half})
    assert found.numbers == {7: 0, 3: 1}
    assert len(found.pictures) == 2
    assert ".mistake-1{" in found.styles()


@pytest.mark.slow
def test_the_page_has_them_for_the_rows_that_are_shown(tmp_path):
    runs = [make_predicted(tmp_path, name, skill=0.5) for name in ("zero-shot", "vanilla")]
    report = compose(load_runs(runs), draw=False)
    text = render(report)
    assert "Classes and mistakes" in text
    for name in ("zero-shot", "vanilla"):
        found = report.measures.sets[name, "imagenet-val"].mistakes
        assert f"{name} on ImageNet: {found.wrong} wrong" in text
        assert found.confident[0].key in text
    # the set is missing: nothing is shown, and the message about its absence is for other images
    assert mistakes_of(report, str(tmp_path), MAX_PIXELS) == Pictures()
