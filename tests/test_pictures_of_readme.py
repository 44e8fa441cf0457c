"""The pictures of the README: drawn from the committed results, by the method's own functions."""

import csv
import re

import numpy as np
import pytest
from PIL import Image

from docs import pictures
from rft.paper import OURS, VIT_B_32
from rft.recipes import MASKED
from rft.report.gallery import to_pixels

ROWS = list(pictures.SYSTEMS)
# other machines may round a product of floats differently: of levels 0 to 255
LEVELS = 2


@pytest.fixture(scope="module")
def panels():
    return pictures.panels(pictures.STATISTICS.read_text())


@pytest.mark.parametrize("theme", pictures.THEMES)
def test_the_picture_of_the_result_is_the_committed_one(panels, theme):
    committed = (pictures.FOLDER / f"result-{theme}.svg").read_text()
    assert pictures.result(panels, pictures.THEMES[theme]) == committed


def test_it_shows_the_numbers_of_the_paper_and_of_the_table(panels):
    with pictures.STATISTICS.with_name("table.csv").open() as file:
        table = {row["recipe"]: row for row in csv.DictReader(file)}
    paper = {row.recipe: row for row in VIT_B_32}
    expected = [paper[name].percent[column] for name in ROWS for column in (0, -1)]
    expected += [float(table[name][column]) for name in ROWS for column in ("ImageNet", "OOD avg")]
    drawn = pictures.result(panels, pictures.THEMES["light"])
    assert re.findall(r">(\d+\.\d)<", drawn) == [f"{number:.1f}" for number in expected]
    assert [panel.title for panel in panels] == ["From the paper", "Measured in this repository"]
    assert f"{table[OURS]['n']} seeds" in drawn


def test_bars_and_numbers_stay_inside_and_apart(panels):
    # other numbers: what gains most loses most, and intervals are wide
    rows = {name: [[50.0, 20.0, 80.0], [50.0 - 9 * n]] for n, name in enumerate(ROWS)}
    for shown in (panels, [panels[0], panels[1]._replace(rows=rows)]):
        drawn = pictures.result(shown, pictures.THEMES["dark"])
        ends = [float(x) for x in re.findall(r'(?:cx|x1|x2)="([\d.]+)"', drawn)]
        numbers = {float(x) for x in re.findall(r'<text x="([\d.]+)"[^>]*>\d+\.\d<', drawn)}
        first, second = sorted(numbers)
        assert first + 8 < min(ends)
        assert max(ends) < pictures.WIDTH - 8
        assert not any(second - pictures.NUMBER < x < second + 8 for x in ends)


def test_texts_are_readable_on_a_phone_and_nothing_is_loaded(panels):
    drawn = pictures.result(panels, pictures.THEMES["light"])
    assert min(int(size) for size in re.findall(r'font-size="(\d+)"', drawn)) >= 22
    assert re.findall(r"https?://[^\"]+", drawn) == ["http://www.w3.org/2000/svg"]
    assert "href" not in drawn


@pytest.fixture(scope="module")
def step():
    return pictures.first_step()


@pytest.mark.slow
def test_masks_are_of_the_recipe_and_refilled_from_another_image(step):
    mask = step.relevance_BP > MASKED[OURS].threshold
    assert mask.any(axis=1).all()
    own = np.arange(pictures.IMAGES)[:, None]
    donor = step.donors[OURS]
    assert np.array_equal(donor != own, mask)
    images, _, hatched, refilled = pictures.tiles(step)
    masked = to_pixels(mask, step.patch)[..., 0]
    for row in range(pictures.IMAGES):
        (source,) = set(donor[row].tolist()) - {row}
        assert np.array_equal(refilled[row][masked[row]], images[source][masked[row]])
        for shown in (hatched, refilled):
            assert np.array_equal(shown[row][~masked[row]], images[row][~masked[row]])


@pytest.mark.slow
@pytest.mark.parametrize("theme", pictures.THEMES)
def test_the_picture_of_the_method_is_the_committed_one(step, theme):
    committed = np.asarray(Image.open(pictures.FOLDER / f"method-{theme}.png"))
    drawn = np.asarray(pictures.method(step, pictures.THEMES[theme]))
    # pixels, because another version of Pillow may compress or draw letters differently
    assert committed.shape == drawn.shape
    side = step.images_BHWC.shape[1]
    times, lefts, tops = pictures.layout(side)
    for left, column in zip(lefts, pictures.tiles(step), strict=True):
        for top, tile in zip(tops, column, strict=True):
            for page in (committed, drawn):
                shown = page[top : top + times * side : times, left : left + times * side : times]
                assert np.abs(shown.astype(int) - tile).max() <= LEVELS
