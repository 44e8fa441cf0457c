"""Ranks that read features computed by others learn exactly the same, bit by bit."""

import json

import pytest

from tests.tiny import complaints, torchrun, weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("ranks", "recipe"), [(2, "no-mask"), (3, "linear-probe")])
def test_the_weights_are_those_without(tmp_path, tiny_data, tiny_clip, ranks, recipe):
    result = torchrun(
        ranks, "tests.ranks.features", str(tiny_data), tiny_clip, str(tmp_path), recipe
    )
    expected = weights(tmp_path / "none")
    assert weights(tmp_path / "kept") == expected
    assert weights(tmp_path / "apart") == expected
    # a folder that not all ranks see is not used, with one message
    warnings = [line for line in complaints(result.stderr) if "features" in line]
    assert len(warnings) == 1, warnings
    assert "not every rank can read what was written to" in warnings[0]
    # images that were read, in lines of the training
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("kept", "none", "apart")
    }
    read = {
        name: sum(line["read_mb"] for line in found if line.get("epoch", 0) > 1)
        for name, found in lines.items()
    }
    counts = [
        [line["held_out_correct"] for line in found if "held_out_correct" in line]
        for found in lines.values()
    ]
    assert counts == 3 * [counts[0]]
    assert read["none"] > 0
    assert read["apart"] == pytest.approx(read["none"])
    assert read["kept"] == pytest.approx(0 if recipe == "linear-probe" else read["none"])
