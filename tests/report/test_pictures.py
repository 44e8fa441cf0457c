"""Figures: contents, positions and sizes; the donor map in pixels; positions of labels."""

import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from PIL import Image
from sklearn.datasets import load_sample_images

from rft.report import gallery, plots
from rft.report import label_placement as labels
from rft.report.read import load_runs
from rft.report.tables import GRID, result_rows
from rft.runs.gallery_file import read as read_gallery
from rft.runs.records import Metrics
from tests.report.make_runs import make_gallery, make_run, run_of
from tests.tiny import unstamped

ALL = (70.0, 60.0, 50.0, 40.0, 30.0, 20.0)


def decode(png: bytes) -> np.ndarray:
    """Pixels of a PNG."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.fixture
def drawn():
    """Draw; return the shape of the PNG and the axes that it is of."""

    def draw(function, *arguments) -> tuple[tuple[int, ...], list[Axes]]:
        figure = function(*arguments)
        return decode(plots.png(figure)).shape, figure.axes

    return draw


def places(axes: Axes) -> dict[tuple[float, float], tuple[float, float]]:
    """The points of a scatter, each with the half lengths of its horizontal and vertical bar."""
    found = {}
    for point, _, bars in axes.containers:
        lengths = [0.0, 0.0]
        for bar in bars:
            (segment,) = bar.get_segments()
            spread = np.ptp(segment, axis=0)
            lengths[int(spread[1] > spread[0])] = spread.max() / 2
        ((x, y),) = point.get_xydata()
        found[round(x, 6), round(y, 6)] = tuple(lengths)
    return found


@pytest.mark.slow
def test_scatter_of_many_recipes(drawn):
    rng = np.random.default_rng(0)
    names = ["zero-shot", "vanilla", "no-mask", "mine $x_", *GRID]
    names += [f"wise-ft-0.{tenth}" for tenth in (1, 3, 5, 9)]
    percents = {n: np.array(ALL) + rng.normal(0, (4, 1, 1, 1, 1, 1), (3, 6)) for n in names}
    runs = [run_of(n, s, tuple(percents[n][s])) for n in names for s in range(3)]
    rows = result_rows(runs)
    shape, (axes,) = drawn(plots.scatter, rows)
    assert shape == (1120, 1640, 3)
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "ImageNet top-1 (%)", "OOD average top-1 (%)",
    )  # fmt: skip
    shown = [name for name in names if name not in ("wise-ft-0.1", "wise-ft-0.3", "wise-ft-0.9")]
    assert sorted(text.get_text() for text in axes.texts) == sorted(shown)
    left, right, low, high = *axes.get_xlim(), *axes.get_ylim()
    expected = plots.accuracy_points(rows)
    found = places(axes)
    assert len(found) == len(shown)
    for name in shown:
        x, y = expected[name]
        # the first set is ImageNet; the seeds spread four times as far there
        assert x.mean == pytest.approx(percents[name][:, 0].mean(), abs=0.1)
        assert x.sd > y.sd
        bars = found[round(x.mean, 6), round(y.mean, 6)]
        assert bars == pytest.approx((x.sd, y.sd))
        assert left < x.mean - x.sd
        assert x.mean + x.sd < right
        assert low < y.mean < high


def test_scatter_of_one_run(drawn):
    _, (axes,) = drawn(plots.scatter, result_rows([run_of("vanilla", percent=ALL)]))
    assert places(axes) == {(70.0, 40.0): (0.0, 0.0)}


def test_nothing_to_scatter():
    assert plots.scatter(result_rows([run_of("vanilla", percent=ALL[:3])])) is None


def test_families_differ_without_colour():
    families = [
        "zero-shot", "linear-probe", "vanilla", "lp-ft", "wise-ft-0.5", "uniform-soup", "no-mask",
        "object-mask-single-fill", "wise-object-mask-single-fill-0.5", "wise-kd-vanilla", "mine",
    ]  # fmt: skip
    assert len({plots.style(name).marker for name in families}) == len(families)
    fills = {plots.style(f"object-mask-{fill}-fill") for fill in ("no", "single", "multi")}
    assert len({(look.marker, look.hollow) for look in fills}) == 3
    assert plots.style("greedy-soup").hollow != plots.style("uniform-soup").hollow


def test_models_made_of_others_have_their_colour():
    ours = plots.style("object-mask-single-fill").color
    assert plots.style("wise-object-mask-single-fill-0.3").color == ours
    assert plots.style("wise-kd-object-mask-single-fill").color == ours
    assert plots.style("wise-kd-vanilla").color == plots.style("vanilla").color
    # curves have no markers
    trained = ["zero-shot", "linear-probe", "vanilla", "lp-ft", "no-mask", *GRID]
    trained += ["wise-kd-vanilla", "wise-kd-object-mask-single-fill"]
    looks = [plots.style(name) for name in trained]
    assert len({(look.color, look.line) for look in looks}) == len(trained)


def marks_of(monkeypatch, draw, rows):
    """The marks and lines that a function draws."""
    monkeypatch.setattr(plots, "_picture", lambda marks, lines: (marks, lines))
    return draw(rows)


SWEEP = [f"wise-ft-{tenth / 10:g}" for tenth in range(11)]


def test_the_scatter_has_one_point_of_a_path(monkeypatch):
    rows = result_rows([run_of(name, percent=ALL) for name in ["vanilla", *SWEEP]])
    marks, lines = marks_of(monkeypatch, plots.scatter, rows)
    assert [mark.label for mark in marks] == ["vanilla", "wise-ft-0.5"]
    assert lines == []


def test_a_path_goes_from_zero_shot_to_the_fine_tuned_end():
    ours = [f"wise-object-mask-single-fill-{a}" for a in ("0.75", "0.25")]
    paths = plots.wise_paths({*SWEEP, *ours, "zero-shot", "vanilla", "no-mask"})
    assert paths == {
        "wise-ft": ["zero-shot", *SWEEP[1:10], "vanilla"],
        # its fine-tuned end is missing
        "wise-object-mask-single-fill": ["zero-shot", *ours[::-1]],
    }
    assert plots.wise_paths(set(SWEEP)) == {"wise-ft": SWEEP}


def test_what_the_wise_picture_draws(monkeypatch):
    percents = {name: (70.0 + n, *ALL[1:]) for n, name in enumerate(SWEEP)}
    names = [*SWEEP, "zero-shot", "vanilla", "no-mask", "lp-ft", "wise-kd-vanilla", "wise-kd-lost"]
    runs = [run_of(name, seed, percents.get(name, ALL)) for name in names for seed in (0, 1)]
    marks, lines = marks_of(monkeypatch, plots.wise_picture, result_rows(runs))
    assert {mark.label for mark in marks if not mark.minor} == {
        "zero-shot", "vanilla", "wise-ft-0.5", "wise-kd-vanilla", "wise-kd-lost",
    }  # fmt: skip
    alphas = [mark.label for mark in marks if mark.minor]
    assert alphas == ["0.1", "0.2", "0.3", "0.4", "0.6", "0.7", "0.8", "0.9"]
    path, student = lines  # wise-kd-lost has no fine-tuned end
    assert [x for x, _ in path.through] == [70, *range(71, 80), 70]
    assert student.through == ((70, 40), (70, 40))
    assert (path.dashes, student.dashes) == (plots.SOLID, plots.DOTTED)


@pytest.mark.slow
def test_wise_pictures(drawn):
    rng = np.random.default_rng(1)
    names = ["zero-shot", "vanilla", *SWEEP, "wise-kd-vanilla", "wise-no-mask-0.5"]
    runs = [run_of(n, s, tuple(ALL + rng.normal(0, 4, 6))) for n in names for s in range(2)]
    rows = result_rows(runs)
    shape, (axes,) = drawn(plots.wise_picture, rows)
    assert shape == (1120, 1640, 3)
    points = {name: (x.mean, y.mean) for name, (x, y) in plots.accuracy_points(rows).items()}
    through = [line.get_xydata() for line in axes.lines if line.get_linestyle() != "None"]
    paths = [list(map(tuple, line)) for line in through if len(line) > 1]
    assert [points[name] for name in ("zero-shot", *SWEEP[1:10], "vanilla")] in paths
    _, (axes,) = drawn(plots.wise_picture, result_rows([run_of("wise-kd-vanilla", percent=ALL)]))
    assert list(places(axes)) == [(70.0, 40.0)]


def test_no_wise_picture_without_such_a_model():
    runs = [run_of("vanilla", percent=ALL), run_of("wise-ft-0.5", percent=ALL[:3])]
    assert plots.wise_picture(result_rows(runs)) is None


@pytest.mark.slow
def test_curves(tmp_path, drawn):
    paths = [make_run(tmp_path, name, s) for name in ("vanilla", "no-mask") for s in (0, 1)]
    level = make_run(tmp_path, "zero-shot", metrics=False)
    (level / "metrics.jsonl").write_text('{"step":0,"held_out_correct":3,"held_out_total":4}\n')
    runs = load_runs([*paths, level])
    shape, panels = drawn(plots.curves, runs, result_rows(runs))
    assert shape == (740, 2400, 3)
    shown = [panel for panel in plots.PANELS if any(plots.curve(run, panel) for run in runs)]
    assert [axes.get_title(loc="left") for axes in panels] == [panel.title for panel in shown]
    for axes, panel in zip(panels, shown, strict=True):
        lines = [dict(line.get_xydata()) for line in axes.lines]
        for first in (0, 2):  # each run thin, and their mean
            two = [found for run in runs[first : first + 2] if (found := plots.curve(run, panel))]
            for line in [*two, *([plots.mean_curve(two)] if two else [])]:
                assert line in lines
    levels = [list(line.get_ydata()) for line in panels[-1].lines]
    assert [75.0, 75.0] in levels  # a single point
    # vanilla logs an MSE of zero: it has no such term
    assert plots.curve(runs[0], plots.PANELS[1]) == {}
    assert plots.curve(runs[4], plots.PANELS[-1]) == {0: 75.0}


@pytest.mark.slow
def test_distilled_logits_have_a_panel(tmp_path, drawn):
    runs = load_runs([make_run(tmp_path, "wise-kd-vanilla"), make_run(tmp_path, "vanilla")])
    shape, panels = drawn(plots.curves, runs, result_rows(runs))
    assert shape == (740, 3200, 3)
    assert [len(axes.lines) for axes in panels] == [2, 1, 1, 2]
    assert [bool(plots.curve(run, plots.PANELS[2])) for run in runs] == [True, False]


@pytest.mark.slow
def test_pictures_have_a_bounded_number_of_models(drawn, monkeypatch):
    monkeypatch.setattr(plots, "MODELS", 8)
    names = [f"wise-m{family}-0.{tenth}" for family in range(3) for tenth in range(1, 10)]
    runs = [
        replace(run_of(name, percent=ALL), metrics=(Metrics(step=1, ce=1.0),)) for name in names
    ]
    rows = result_rows(runs)
    _, (axes,) = drawn(plots.scatter, rows)  # one of each family
    assert (len(axes.containers), axes.get_title(loc="left")) == (3, "")
    _, (axes,) = drawn(plots.wise_picture, rows)
    assert len(axes.containers) == 8
    assert axes.get_title(loc="left") == "the first 8 of 27 models"
    _, (axes,) = drawn(plots.curves, runs, result_rows(runs))
    assert len(axes.lines) == 8
    (legend,) = axes.figure.legends
    assert legend.get_title().get_text() == "the first 8 of 27 models"


@pytest.mark.slow
def test_the_curves_of_many_recipes_leave_room_for_their_names(drawn):
    metrics = (Metrics(step=1, ce=1.0), Metrics(step=2, ce=2.0))
    runs = [replace(run_of(f"r{n}", percent=ALL), metrics=metrics) for n in range(64)]
    (height, *_), (axes,) = drawn(plots.curves, runs, result_rows(runs))
    (legend,) = axes.figure.legends
    below = legend.get_window_extent().y1 / height
    assert below < axes.get_position().y0


@pytest.mark.slow
def test_the_names_of_curves_lie_within_the_picture(drawn):
    metrics = (Metrics(step=1, ce=1.0), Metrics(step=2, ce=2.0))
    names = [f"{n} object-mask-single-fill of some setting" for n in range(12)]
    runs = [replace(run_of(name, percent=ALL), metrics=metrics) for name in names]
    (_, width, _), (axes,) = drawn(plots.curves, runs, result_rows(runs))
    (legend,) = axes.figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= width


def test_labels_without_a_width_have_a_bounded_number_of_places():
    bounds = (0.0, 0.0, 1640.0, 1120.0)
    for width in (0.0, 0.1):
        assert 1000 < len(labels.grid_boxes((width, 24.0), bounds)) < 20_000


def test_steps_are_drawn_in_their_order():
    lines = tuple(Metrics(step=step, ce=float(step)) for step in (5, 1, 3))
    run = replace(run_of("vanilla"), metrics=lines)
    assert list(plots.curve(run, plots.PANELS[0])) == [1, 3, 5]


def test_a_run_that_is_never_right_is_drawn():
    lines = tuple(Metrics(step=n, held_out_correct=0, held_out_total=8) for n in (1, 2))
    run = replace(run_of("vanilla"), metrics=lines)
    assert plots.curve(run, plots.PANELS[-1]) == {1: 0.0, 2: 0.0}


def test_letters_without_a_glyph_are_one_line_that_a_terminal_can_show(capsys):
    with plots.explained():
        rows = result_rows([run_of("\u4e00\u4e01\U0001f3f4\U000e0067", percent=ALL)])
        assert plots.scatter(rows)
    (line,) = unstamped(capsys.readouterr().err).splitlines()
    assert re.fullmatch(r"matplotlib warned while drawing: Glyph \d+ .* more warnings\)", line)
    assert line.isprintable()


def test_nothing_to_curve():
    runs = [run_of("vanilla", percent=ALL)]
    assert plots.curves(runs, result_rows(runs)) is None


def test_mean_curve_is_over_common_steps():
    assert plots.mean_curve([{1: 1.0, 2: 2.0, 3: 5.0}, {3: 7.0, 2: 4.0}]) == {2: 3.0, 3: 6.0}


@settings(max_examples=10)
@given(st.lists(st.tuples(st.floats(200, 1000), st.floats(200, 700)), min_size=2, max_size=6))
def test_labels_keep_clear_of_each_other(anchors):
    bounds = (0.0, 0.0, 1600.0, 1100.0)
    boxes = labels.place_labels(anchors, [(150, 24)] * len(anchors), [], [], bounds)
    for index, box in enumerate(boxes):
        assert labels.overlap(box, bounds) == pytest.approx(150 * 24)
        assert all(labels.overlap(box, other) == 0 for other in boxes[:index])


def crowded(shape: str, count: int) -> list[labels.Point]:
    """Points of a plot of 1300 x 900 pixels that are hard to distinguish."""
    rng = np.random.default_rng(count)
    steps = np.arange(count) / count
    places = {
        "equal": np.full((count, 2), (650, 450)),
        "a line": np.stack([100 + 1000 * steps, 200 + 500 * steps], axis=1),
        "a column": np.stack([np.full(count, 300), 100 + 10 * steps], axis=1),
        "clusters": rng.normal(0, 12, (count, 2)) + rng.choice([350, 800], (count, 1)),
    }
    return [(float(x), float(y)) for x, y in places[shape]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "count"),
    [("equal", 100), ("a line", 40), ("a column", 40), ("clusters", 40), ("equal", 2)],
)
def test_crowds_get_clear_labels_in_a_bounded_number_of_tries(monkeypatch, shape, count):
    compared = []
    real = labels._cheapest

    def counted(point, cost_C, boxes_C4, points_O2, others_O4):
        compared.append(len(cost_C) * len(others_O4))
        return real(point, cost_C, boxes_C4, points_O2, others_O4)

    monkeypatch.setattr(labels, "_cheapest", counted)
    anchors, bounds = crowded(shape, count), (0.0, 0.0, 1300.0, 900.0)
    markers = [(x - 13, y - 13, x + 13, y + 13) for x, y in anchors]
    boxes = labels.place_labels(anchors, [(110.0, 18.0)] * count, markers, [], bounds)
    places = len(boxes) * max(2 * count, labels.PAIRS // count)
    assert len(compared) <= places / count
    assert sum(compared) <= 2000 * places
    for index, box in enumerate(boxes):
        assert labels.overlap(box, bounds) == pytest.approx(110 * 18)
        assert not labels.overlap(box, np.array(boxes[:index]).reshape(-1, 4)).any()
        # its own point is the nearest, or a line leads to it
        away = [math.dist(labels.nearest(box, other), other) for other in anchors]
        assert away[index] == min(away) or away[index] > plots.LED


def test_nothing_to_label():
    assert labels.place_labels([], [], [], [], (0, 0, 1, 1)) == []


def test_geometry():
    box = (0.0, 0.0, 2.0, 1.0)
    assert labels.overlap(box, (1.0, 0.5, 5.0, 5.0)) == 0.5
    assert labels.nearest(box, (3.0, -1.0)).tolist() == [2.0, 0.0]
    start, end = [(-1.0, 0.5), (1.0, 0.5), (-1.0, 2.0)], [(3.0, 0.5), (9.0, 9.0), (3.0, 2.0)]
    assert labels.crosses(start, end, box).tolist() == [True, True, False]


@pytest.mark.slow
@given(st.lists(st.tuples(*[st.integers(-5, 5)] * 4), min_size=1, max_size=20))
def test_a_segment_enters_a_box_if_one_of_its_points_is_inside(segments):
    # no line through two integer points meets a corner, so none only touches the box
    box = np.array([-2.239, -1.541, 2.713, 1.277])
    start, end = np.array(segments, dtype=float).reshape(-1, 2, 2).swapaxes(0, 1)
    share = np.linspace(0, 1, 4001)[:, None, None]
    seen = labels.inside(start + share * (end - start), box).any(axis=0)
    found = labels.crosses(start, end, box)
    assert (found >= seen).all()
    slack = labels.inside(start + share * (end - start), box + 0.01 * np.array([-1, -1, 1, 1]))
    assert (found <= slack.any(axis=0)).all()


@st.composite
def donor_maps(draw):
    batch, grid = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    donors = st.lists(
        st.integers(-1, batch - 1), min_size=batch * grid**2, max_size=batch * grid**2
    )
    return np.array(draw(donors)).reshape(batch, grid**2), draw(st.integers(1, 5))


@given(donor_maps())
def test_donors_on_pixels_equal_a_loop(case):
    donor_BP, patch = case
    batch, count = donor_BP.shape
    grid = round(count**0.5)
    size = grid * patch
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    expected = images.copy()
    grey = gallery.hatch(size)
    for n in range(batch):
        for p in range(count):
            y, x = p // grid * patch, p % grid * patch
            source = grey if donor_BP[n, p] == -1 else images[donor_BP[n, p]]
            expected[n, y : y + patch, x : x + patch] = source[y : y + patch, x : x + patch]
    np.testing.assert_array_equal(gallery.apply_donors(images, donor_BP, patch), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "patch", "shown"), [(48, 8, 192), (224, 32, 224), (16, 4, 192)])
def test_gallery(tmp_path, size, patch, shown):
    loaded = read_gallery(make_gallery(tmp_path / "gallery.npz", size, patch, batch=3))
    assert gallery.enlarge(loaded).images_BHWC.shape == (3, shown, shown, 3)
    names = [(view.group, view.title) for view in gallery.columns(loaded)]
    assert names[:4] == [
        ("", "image"), ("", "relevance"), ("", "object mask"), ("random-mask", "no-fill"),
    ]  # fmt: skip
    assert len(names) == 12
    pixels = decode(gallery.picture(loaded))
    views = gallery.columns(gallery.enlarge(loaded))
    for left, view in zip(gallery._lefts(views, shown), views, strict=True):
        for row, tile in enumerate(view.tiles()):
            top = gallery.HEAD + row * (shown + gallery.GAP)
            np.testing.assert_array_equal(pixels[top : top + shown, left : left + shown], tile)
    # around the tiles are their names and a scale
    assert (pixels[: gallery.HEAD] < 255).any()
    assert (pixels[:, : gallery.NAMES] < 255).any()
    assert (pixels[-gallery.FOOT :] < 255).any()


@pytest.mark.slow
def test_small_images_are_enlarged_without_blur(tmp_path):
    loaded = read_gallery(make_gallery(tmp_path / "gallery.npz"))
    large = gallery.enlarge(loaded)
    np.testing.assert_array_equal(large.images_BHWC[:, ::4, ::4], loaded.images_BHWC)
    found = Image.open(io.BytesIO(gallery.picture(loaded))).convert("RGB")
    top, left = gallery.HEAD, gallery.NAMES
    tile = np.asarray(found)[top : top + 192, left : left + 192]
    np.testing.assert_array_equal(tile, large.images_BHWC[0])


def test_the_mask_is_read_off_the_drops(tmp_path):
    loaded = read_gallery(make_gallery(tmp_path / "gallery.npz"))
    mask = gallery.columns(loaded)[2].tiles()
    dropped = (loaded.donors["object-mask-no-fill"] == -1).reshape(-1, 6, 6)
    dark = (mask[:, ::8, ::8] == gallery.MASKED).all(axis=3)
    np.testing.assert_array_equal(dark, dropped)


def test_an_unknown_strategy_has_its_own_column(tmp_path):
    donors = np.zeros((6, 36), dtype=np.int64)
    path = make_gallery(tmp_path / "g.npz", **{"donor/mosaic": donors})
    assert gallery.columns(read_gallery(path))[-1].group == "mosaic"


@pytest.mark.slow
@pytest.mark.parametrize("masks", [True, False])
def test_frames_show_relevance_and_masks_of_each_step(tmp_path, masks):
    path = make_gallery(tmp_path / "gallery.npz", batch=3, frames=4)
    if not masks:
        arrays = dict(np.load(path))
        del arrays["masked_SBP"]
        np.savez(path, **arrays)
    loaded = read_gallery(path)
    found = gallery.frames(loaded)
    assert list(found) == [0, 100, 200, 300]
    large = gallery.enlarge(loaded).images_BHWC
    for place, webp in enumerate(found.values()):
        shown = decode(webp).astype(int)
        assert shown.shape == (192 * (1 + masks), 3 * 192, 3)
        heat = gallery.heat_map(large, loaded.frames.relevance_SBP[place])
        assert abs(shown[:192] - np.hstack([*heat])).mean() < 4
        if masks:
            masked = loaded.frames.masked_SBP[place].reshape(3, 6, 6).repeat(32, 1).repeat(32, 2)
            below = np.hstack([*np.where(masked[..., None], gallery.MASKED, large)])
            assert abs(shown[192:] - below).mean() < 6
    assert len(set(found.values())) == 4


@pytest.mark.slow
def test_frames_of_large_images_are_no_larger_than_a_page(tmp_path):
    path = make_gallery(tmp_path / "gallery.npz", size=288, patch=32, batch=2, frames=2)
    for webp in gallery.frames(read_gallery(path)).values():
        assert decode(webp).shape == (288, 288, 3)


def test_without_two_steps_there_are_no_frames(tmp_path):
    for frames in (0, 1):
        path = make_gallery(tmp_path / "gallery.npz", batch=2, frames=frames)
        assert gallery.frames(read_gallery(path)) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "steps"), [("photos", 9), ("noise", 2)])
def test_frames_are_small(tmp_path, what, steps):
    images = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    if what == "photos":
        crops = [(n, y, x) for n in (0, 1) for y in (0, 200) for x in (0, 400)]
        photos = load_sample_images().images
        images = np.stack([photos[n][y : y + 224, x : x + 224] for n, y, x in crops])
    columns = {"images_BCHW": images.transpose(0, 3, 1, 2)}
    path = make_gallery(tmp_path / "gallery.npz", 224, 16, 8, steps, **columns)
    found = gallery.frames(read_gallery(path))
    assert len(found) == steps
    assert max(map(len, found.values())) <= 60_000
    sizes = {decode(webp).shape for webp in found.values()}
    # noise is not small enough at any quality
    assert all(width < 8 * 224 for _, width, _ in sizes) == (what == "noise"), sizes


def letter(code: int) -> np.ndarray:
    """Six class names that numpy does not read as text."""
    return np.full(6, code, np.uint32).view("<U1")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"patch": np.array(7)}, "does not divide"),
        ({"relevance_BP": np.zeros((6, 35))}, "relevance_BP has shape"),
        ({"relevance_BP": np.full((6, 36), "x")}, "relevance_BP is of type <U1"),
        ({"relevance_BP": np.full((6, 36), np.nan)}, "relevance_BP must be finite"),
        ({"relevance_BP": np.full((6, 36), 1e300)}, "relevance_BP must be finite"),
        ({"donor/x": np.full((6, 36), 6)}, "donor/x must be from -1 to 5"),
        ({"donor/x": np.full((6, 36), -2)}, "donor/x must be from -1 to 5"),
        ({"donor/x": np.zeros((6, 36))}, "donor/x is of type float64"),
        ({"donor/x": np.zeros((6, 36), bool)}, "donor/x is of type bool"),
        ({"donor/\x1b[31m": np.zeros((6, 36), int)}, "name of a donor map: it is '.x1b"),
        ({"donor/": np.zeros((6, 36), int)}, "name of a donor map"),
        ({"images_BCHW": np.zeros((6, 3, 48, 48))}, "uint8"),
        ({"images_BCHW": np.zeros((6, 3, 48, 48), np.uint16)}, "uint8"),
        ({"images_BCHW": np.zeros((6, 3, 0, 0), np.uint8)}, "6 images of 0 pixels"),
        ({"images_BCHW": np.zeros((6, 3, 48, 40), np.uint8)}, "square"),
        ({"patch": np.array(np.inf)}, "patch is of type float64"),
        ({"patch": np.array(0)}, "patch is 0"),
        ({"patch": np.array([8])}, "patch has shape"),
        ({"labels_B": np.zeros(6)}, "labels_B is of type float64"),
        ({"labels_B": np.full(6, np.nan)}, "labels_B is of type float64"),
        ({"class_names": np.full((6, 1), "x")}, "class_names has shape"),
        ({"class_names": letter(0xD800)}, "class_names has characters that are not Unicode"),
        ({"class_names": letter(0x7FFFFFFF)}, "class_names has characters that are not Unicode"),
        ({"class_names": np.full(6, "x" * 100_001)}, "class_names: it is 'x.* at most 100000"),
        ({"images_BCHW": np.zeros((3, 48, 48), dtype=np.uint8)}, "not a gallery"),
        ({"labels_B": np.arange(1, 7)}, "labels_B"),
        ({"steps_S": np.array([0, 200, 100])}, "steps_S must be 1 to 12 ascending steps"),
        ({"steps_S": np.array([0, 100, 100])}, "steps_S must be 1 to 12 ascending steps"),
        ({"steps_S": np.arange(13)}, "steps_S must be 1 to 12 ascending steps"),
        ({"steps_S": np.array([], int)}, "steps_S must be 1 to 12 ascending steps"),
        ({"steps_S": np.array([-1, 0, 1])}, "steps_S must be from 0"),
        ({"steps_S": np.array([0, 1, 2**63], np.uint64)}, "steps_S must be from 0"),
        ({"steps_S": np.zeros(3)}, "steps_S is of type float64"),
        ({"relevance_SBP": np.zeros((2, 6, 36))}, "relevance_SBP has shape"),
        ({"relevance_SBP": np.full((3, 6, 36), np.nan)}, "relevance_SBP must be finite"),
        ({"masked_SBP": np.zeros((3, 36), bool)}, "masked_SBP has shape"),
        (
            {"masked_SBP": np.zeros((3, 6, 36), int)},
            "masked_SBP is of type int64; .* true or false",
        ),
        ({"class_names": np.array([{}], dtype=object)}, "not a gallery"),
    ],
)
def test_galleries_that_do_not_fit_are_refused(tmp_path, columns, message):
    path = make_gallery(tmp_path / "gallery.npz", frames=3)
    np.savez(path, **{**np.load(path), **columns})
    with pytest.raises(ValueError, match=message) as caught:
        read_gallery(path)
    assert str(path) in str(caught.value)


def test_a_gallery_without_an_array_is_refused(tmp_path):
    path = make_gallery(tmp_path / "gallery.npz", frames=3)
    arrays = dict(np.load(path))
    optional = ("donor/", "masked_SBP")
    for name in [name for name in arrays if not name.startswith(optional)]:
        np.savez(path, **{other: array for other, array in arrays.items() if other != name})
        with pytest.raises(ValueError, match=f"gallery.npz is not.*: {name} is missing"):
            read_gallery(path)


def test_whole_numbers_of_any_type_are_donors(tmp_path):
    donors = np.zeros((6, 36), np.uint64)
    path = make_gallery(tmp_path / "gallery.npz", **{"donor/mosaic": donors})
    loaded = read_gallery(path)
    tiles = gallery.columns(loaded)[-1].tiles()
    np.testing.assert_array_equal(tiles, loaded.images_BHWC[np.zeros(6, int)])


def test_what_is_not_npz_is_refused(tmp_path):
    path = tmp_path / "gallery.npz"
    for content in (b"", b"PK\x03\x04 broken", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a gallery"):
            read_gallery(path)
