"""The benchmark of predictions times both ways on the same images and divides them by round."""

import statistics

import pytest

from benchmarks.predict import Arguments, measure


@pytest.mark.slow
def test_both_ways_are_timed_in_every_round_and_divided(tmp_path, tiny_clip):
    # more images than one forward takes
    found = measure(Arguments(images=70, rounds=2, clip=tiny_clip, work=tmp_path))
    seconds = found["seconds"]
    assert [len(rounds) for rounds in seconds.values()] == [2] * 4
    for name in ("predict", "evaluate"):
        pairs = zip(seconds[name], seconds[f"{name}_after_first"], strict=True)
        assert all(whole > rest > 0 for whole, rest in pairs)
    rounds = zip(seconds["predict"], seconds["evaluate"], strict=True)
    expected = statistics.median(one / other for one, other in rounds)
    assert found["predict_over_evaluate"]["median"] == pytest.approx(expected, abs=1e-3)
