"""The plotted data, read from matplotlib's own objects: which number is on which axis."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from rft.report import plots
from rft.report.colors import LIGHT, legible
from rft.report.read import load_runs
from rft.report.tables import ID_COLUMN, result_rows
from rft.statistics.calibration import Bins
from tests.report.make_runs import make_run, run_of


def percent(imagenet: float, ood: float) -> tuple[float, ...]:
    return (imagenet, ood - 2, ood - 1, ood, ood + 1, ood + 2)


# recipe -> ImageNet and OOD average of two seeds; the spreads of the two differ
POINTS = {
    "zero-shot": [(63.0, 48.0), (63.0, 48.0)],
    "vanilla": [(75.0, 40.0), (77.0, 50.0)],
    "object-mask-single-fill": [(77.0, 53.0), (78.0, 53.2)],
}
MEAN = {"zero-shot": (63, 48), "vanilla": (76, 45), "object-mask-single-fill": (77.5, 53.1)}
# the sample deviation of two values is their distance over the root of two
SPREAD = {
    "zero-shot": (0, 0),
    "vanilla": (2 / 2**0.5, 10 / 2**0.5),
    "object-mask-single-fill": (1 / 2**0.5, 0.2 / 2**0.5),
}


def rows(points=POINTS):
    return result_rows(
        [
            run_of(recipe, seed, percent(*pair))
            for recipe, pairs in points.items()
            for seed, pair in enumerate(pairs)
        ]
    )


def marks(figure: Figure) -> dict[str, ErrorbarContainer]:
    """The marks, by the recipe with their look."""
    (axes,) = figure.axes
    found = {}
    for container in axes.containers:
        line = container[0]
        look = (line.get_marker(), to_hex(line.get_color()))
        (recipe,) = (n for n in POINTS if (plots.style(n).marker, plots.style(n).color) == look)
        found[recipe] = container
    return found


def bars(container: ErrorbarContainer) -> tuple[float, float]:
    """Half the lengths of the horizontal and of the vertical error bar."""
    horizontal, vertical = (lines.get_segments()[0] for lines in container[2])
    assert horizontal[0][1] == horizontal[1][1], "a horizontal line"
    assert vertical[0][0] == vertical[1][0], "a vertical line"
    return (horizontal[1][0] - horizontal[0][0]) / 2, (vertical[1][1] - vertical[0][1]) / 2


def test_imagenet_lies_along_x_and_the_ood_average_along_y():
    figure = plots.scatter(rows())
    (axes,) = figure.axes
    assert axes.get_xlabel() == "ImageNet top-1 (%)"
    assert axes.get_ylabel() == "OOD average top-1 (%)"
    for recipe, container in marks(figure).items():
        line = container[0]
        point = (line.get_xdata()[0], line.get_ydata()[0])
        assert point == pytest.approx(MEAN[recipe]), recipe
        assert bars(container) == pytest.approx(SPREAD[recipe], abs=1e-9), recipe
    assert len(axes.containers) == len(POINTS)


def test_each_name_is_nearest_to_its_own_mark():
    (axes,) = plots.scatter(rows()).axes
    assert sorted(text.get_text() for text in axes.texts) == sorted(POINTS)
    for text in axes.texts:
        color = plots.style(text.get_text()).color
        assert to_hex(text.get_color()) == legible(color, LIGHT)
        left, low = plots.DPI * np.array(text.get_position())

        def distance(recipe: str, x: float = left, y: float = low) -> float:
            anchor = axes.transData.transform(MEAN[recipe])
            return (anchor[0] - x) ** 2 + (anchor[1] - y) ** 2

        assert min(POINTS, key=distance) == text.get_text()


def test_a_single_seed_has_no_bars():
    (axes,) = plots.scatter(rows({"vanilla": [(75.0, 40.0)]})).axes
    assert not any(container.has_xerr for container in axes.containers)
    assert not any(container.has_yerr for container in axes.containers)


def test_the_wise_line_goes_through_its_models_by_alpha():
    path = {"zero-shot": (63, 48), "wise-ft-0.25": (70, 53), "wise-ft-0.75": (76, 51)}
    points = {**path, "vanilla": (75, 45), "wise-kd-vanilla": (77, 47)}
    (axes,) = plots.wise_picture(rows({name: [pair] for name, pair in points.items()})).axes
    drawn = [
        list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.lines
        if line.get_zorder() == 2 and line.get_linewidth() == 1
    ]
    assert drawn == [
        [pytest.approx(p) for p in [(63, 48), (70, 53), (76, 51), (75, 45)]],
        [pytest.approx(p) for p in [(75, 45), (77, 47)]],
    ]


def test_models_along_a_path_have_no_bars():
    points = {"zero-shot": [(63, 48), (63, 48)], "vanilla": [(75, 40), (77, 50)]}
    points |= {f"wise-ft-{a}": [(70 + a, 50), (72 + a, 53)] for a in (0.2, 0.5)}
    containers = plots.wise_picture(rows(points)).axes[0].containers
    with_bars = [c for c in containers if c.has_xerr]
    # the two ends and the model nearest to 0.5
    assert (len(containers), len(with_bars)) == (4, 3)
    assert all(c.has_xerr == c.has_yerr for c in containers)


def test_curves_are_values_over_steps(tmp_path):
    paths = [make_run(tmp_path, "no-mask", seed, metrics=False) for seed in (0, 1)]
    for seed, path in enumerate(paths):
        lines = [
            f'{{"step": {step}, "ce": {step / 10 + seed}, "mse": 0.5, "kd": 0}}\n'
            for step in (10, 20)
        ]
        held_out = f'{{"step": 20, "held_out_correct": {30 + 10 * seed}, "held_out_total": 50}}\n'
        (path / "metrics.jsonl").write_text("".join([*lines, held_out]))
    runs = load_runs(paths)
    figure = plots.curves(runs, result_rows(runs))
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "cross-entropy (training)",
        "feature MSE to the teacher (training)",
        "held-out accuracy (%)",
    ]
    assert all(ax.get_xlabel() == "step" for ax in figure.axes)
    thin, other, mean = figure.axes[0].lines
    for line, values in ((thin, [1, 2]), (other, [2, 3]), (mean, [1.5, 2.5])):
        assert list(line.get_xdata()) == [10, 20]
        assert list(line.get_ydata()) == pytest.approx(values)
    assert mean.get_linewidth() > thin.get_linewidth()
    (level,) = figure.axes[2].lines  # one point: a level across the panel
    assert list(level.get_ydata()) == pytest.approx([70, 70])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["no-mask"]


def test_settings_of_one_recipe_differ_in_colour():
    runs = [replace(run_of("vanilla", 0, percent(70 + n, 50)), variant=f"lr {n}") for n in range(4)]
    runs.append(run_of("no-mask", 0, percent(75, 50)))
    styles = plots.looks(result_rows(runs))
    assert len({look.color for look in styles.values()}) == 5
    assert {look.marker for name, look in styles.items() if name != "no-mask"} == {"X"}
    assert styles["no-mask"] == plots.style("no-mask")
    texts = plots.scatter(result_rows(runs)).axes[0].texts
    assert {text.get_text(): to_hex(text.get_color()) for text in texts} == {
        name: legible(look.color, LIGHT) for name, look in styles.items()
    }


def test_a_calibration_panel_is_accuracy_over_confidence():
    (row,) = rows({"vanilla": [(75.0, 40.0)]})
    one = Bins(np.array([10, 30]), np.array([0.3, 0.8]), np.array([0.2, 0.9]))
    figure = plots.calibration_picture([row], {("vanilla", ID_COLUMN): one})
    (axes,) = figure.axes
    diagonal, line = axes.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    assert line.get_xydata().tolist() == [[0.3, 0.2], [0.8, 0.9]]
    assert axes.get_title(loc="left") == "vanilla"
    assert plots.calibration_picture([row], {}) is None
