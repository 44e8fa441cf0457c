"""The announced comparison of the research recipes: its statistics, and one run of its pipeline."""

import pytest
from scipy import stats

from benchmarks import research
from rft import recipes
from rft.sets import ID_SET, OOD_SETS


def test_differences_are_students_paired():
    values, others = [60.0, 61.5, 59.0, 62.0, 60.5], [59.0, 61.0, 59.5, 60.0, 60.0]
    found = research.paired(values, others)
    expected = stats.ttest_rel(values, others)
    low, high = expected.confidence_interval(0.95)
    assert (found["p"], found["low"], found["high"]) == pytest.approx((expected.pvalue, low, high))
    assert found["mean"] == pytest.approx(0.7)
    # equal in each seed: no difference, and nothing to divide by
    assert research.paired(values, values)["p"] == 1
    assert research.paired([1.0, 2.0], [0.0, 1.0])["p"] == 0


def test_what_helps_is_above_zero_after_the_correction():
    def system(*ood: float):
        return [dict.fromkeys((ID_SET, *OOD_SETS, "ood"), value) for value in ood]

    start = (50.0, 51.0, 52.0, 50.5, 51.5)
    systems = {name: system(*start) for name in research.SYSTEMS}
    better, worse, *_ = recipes.RESEARCH
    steps = (2.0, 2.1, 1.9, 2.05, 1.95)
    systems[better] = system(*(one + step for one, step in zip(start, steps, strict=True)))
    systems[worse] = system(*(one - step for one, step in zip(start, steps, strict=True)))
    result = {"systems": systems, **research.compare(systems)}
    helps = {name for name, found in result["against"].items() if found.get("helps")}
    assert helps == {better}
    assert "helps" not in result["against"][research.CONTROL]
    counts = {"0.1": [3, 4], "1": [5, 1]}
    text = research.table(
        result | {"development": {"held_out_correct": counts, "chosen": research.WEIGHTS[0]}}
    )
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(research.SYSTEMS)
    assert f"| {better} | 53.0 ± 0.7 |" in text
    assert "+2.00 [+1.90, +2.10]" in text
