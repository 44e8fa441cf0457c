"""The benchmark of many systems times the same models in four ways and divides as described."""

import statistics

import pytest

from benchmarks.many_systems import Arguments, measure


@pytest.mark.slow
def test_parts_are_of_every_round_and_divided_as_named(tmp_path, tiny_data, tiny_clip):
    sets = ("imagenet-val", "imagenet-a")
    found = measure(
        Arguments(
            systems=3,
            rounds=3,
            whole_rounds=1,
            sets=sets,
            data=tiny_data,
            clip=tiny_clip,
            work=tmp_path / "work",
        )
    )
    seconds = found["seconds"]
    assert list(seconds) == ["reading", "answered", "own", "whole", "logits"]
    assert [len(rounds) for rounds in seconds.values()] == [3, 3, 3, 1, 1]
    assert all(min(rounds) > 0 for rounds in seconds.values())
    assert found["images"] == {"imagenet-val": 28, "imagenet-a": 12}
    rounds = zip(*(seconds[part] for part in ("reading", "answered", "own")), strict=True)
    expected = statistics.median((answered - own) / read for read, answered, own in rounds)
    assert found["rest_over_reading"]["median"] == pytest.approx(expected, rel=0.02)
    assert not list((tmp_path / "work").glob("out*"))
