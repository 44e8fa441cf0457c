"""Colours that are readable on light and dark backgrounds."""

import pytest

from rft.report.colors import DARK, LEGIBLE, LIGHT, contrast, legible
from rft.report.plots import MASK_COLORS


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == contrast("#ffffff", "#000000") == pytest.approx(21)
    # examples of WebAIM's contrast checker
    assert contrast("#0000ff", "#ffffff") == pytest.approx(8.59, abs=0.005)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("ground", [LIGHT, DARK])
def test_every_colour_becomes_legible(ground):
    for color in (*MASK_COLORS.values(), "#440154", "#56b4e9", "#000000", "#ffffff"):
        found = legible(color, ground)
        assert contrast(found, ground) >= LEGIBLE
        assert (found == color) == (contrast(color, ground) >= LEGIBLE)
