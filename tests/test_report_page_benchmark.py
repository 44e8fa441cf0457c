"""The benchmark of the report's page generates runs that the report accepts, and measures it."""

import pytest

from benchmarks import report_page
from rft.sets import TEST_SETS


def test_invented_systems_share_their_images_and_are_about_as_good_as_they_say():
    one, two = (report_page.invent("imagenet-a", 7500, skill, seed) for skill, seed in
                ((0.6, 0), (0.7, 1)))  # fmt: skip
    assert (one.key == two.key).all()
    assert (one.label == two.label).all()
    assert one.right.mean() == pytest.approx(0.6, abs=0.03)
    assert two.right.mean() == pytest.approx(0.7, abs=0.03)
    # hard images are hard for both
    assert (one.right & two.right).mean() > one.right.mean() * two.right.mean() + 0.1


@pytest.mark.slow
def test_a_small_report_is_measured(tmp_path):
    arguments = report_page.Arguments(runs=16, images=0.002)
    result = report_page.measure(arguments, tmp_path)
    assert result["page_bytes"] == (tmp_path / "report" / "index.html").stat().st_size
    assert result["images"] >= len(TEST_SETS)
    assert {"differences.csv", "per_class.csv", "curves.svg"} <= result["file_bytes"].keys()
    page = (tmp_path / "report" / "index.html").read_text()
    # two more recipes than exist: further settings of vanilla
    assert "vanilla, lr " in page
    assert f"| 16 | {result['images']:,} |" in report_page.table(result)
