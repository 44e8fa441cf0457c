"""The benchmark of predictions times both ways on the same images and divides them by round."""

import statistics

import pytest

from benchmarks.predict import Arguments, measure


@pytest.mark.slow
def test_both_ways_are_timed_in_every_round_and_divided(tmp_path, tiny_clip):
    # more images than one forward holds
    found = measure(Arguments(images=70, rounds=2, workers=0, clip=tiny_clip, work=tmp_path))
    seconds = found["seconds"]
    assert [len(rounds) for rounds in seconds.values()] == [2] * 4
    rounds = list(zip(*seconds.values(), strict=True))
    assert list(seconds) == ["predict", "predict_first", "evaluate", "evaluate_first"]
    expected = statistics.median(whole / other for whole, _, other, _ in rounds)
    assert found["predict_over_evaluate"]["median"] == pytest.approx(expected, abs=2e-3)
    # the first images are subtracted; the differences may have any size here
    added = [(a - b) / (c - d) for a, b, c, d in rounds]
    assert found["added_over_added"]["lowest"] == pytest.approx(min(added), rel=0.02, abs=2e-3)
