"""The benchmark of kept features measures trainings with and without them."""

import pytest

from benchmarks.features import ROWS, Arguments, measure, table


@pytest.mark.slow
def test_every_way_is_measured_and_divided_as_named(tmp_path):
    arguments = Arguments(
        model="rft-rehearsal",
        batch_size=4,
        steps=6,
        epochs=2,
        rounds=1,
        workers=0,
        work=tmp_path,
    )
    found = measure(arguments)
    runs = {
        (recipe, way): run["steps"]
        for recipe, ways in found["seconds"].items()
        for way, (run,) in ways.items()
    }
    assert all(len(epochs) == 2 for epochs in runs.values())
    assert len(runs) == 4
    first, second = runs["linear-probe", "kept"]
    # seconds are rounded to 0.1 ms, ratios to one digit
    assert found["probe_first_over_later"] == pytest.approx(first / second, rel=0.1, abs=0.06)
    without, kept = (runs["no-mask", way][1] for way in ("without", "kept"))
    assert found["no_mask_without_over_kept"] == pytest.approx(without / kept, rel=0.1)
    assert [len(pair) for pair in found["evaluation_seconds"]] == [2]
    assert not list(tmp_path.glob("**/*.features"))
    page = table(found)
    assert all(f"| {ROWS[name]} | {found[name]:.3g} |" in page for name in ROWS)
