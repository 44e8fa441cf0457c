"""The page in Chromium: its script works, and makes no requests."""

import contextlib
import csv
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import screenshots
from rft.recipes import MASKED
from rft.report.colors import LEGIBLE, contrast
from rft.report.page import write_report
from rft.report.tables import Row
from rft.storage import files
from tests.report.make_runs import edit, make_gallery, make_predicted, make_run, make_weights

pytestmark = pytest.mark.slow

DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
HOSTILE = (
    "</script><img src=x onerror=\"document.title='changed'\">",
    "<!--<script>document.title='changed'</script>",
    "\"'`&quot;&lt;{{ 7*7 }}${7*7} \u05d0\u05d1",
)


@pytest.fixture(scope="module")
def browser():
    if reason := screenshots.why_not():
        if os.environ.get("RFT_REQUIRE_CHROMIUM"):
            pytest.fail(f"no browser, which RFT_REQUIRE_CHROMIUM asks for: {reason}")
        pytest.skip(f"no browser: {reason}")
    with screenshots.browser() as started:
        yield started


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A page with every part: paths over alpha, curves, predictions, a row without some sets."""
    folder = tmp_path_factory.mktemp("small")
    skills = {
        "zero-shot": 0.4,
        "vanilla": 0.5,
        "no-mask": 0.52,
        "object-mask-single-fill": 0.7,
        "wise-ft-0.25": 0.45,
        "wise-ft-0.5": 0.6,
        "wise-object-mask-single-fill-0.5": 0.72,
    }
    for name, skill in skills.items():
        for seed in (0, 1):
            make_predicted(folder / "runs", name, seed, skill=skill)
    # as text, 8.3 comes after 70.0
    make_run(folder / "runs", "mine", percent=(8.3, 20), total=60, metrics=False)
    make_gallery(folder / "runs" / "vanilla-seed0" / "gallery.npz", batch=2, frames=3)
    write_report([folder / "runs"], folder / "report")
    return folder / "report" / "index.html"


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> Path:
    """A page of 40 rows, ten of them with predictions."""
    folder = tmp_path_factory.mktemp("forty")
    for place, name in enumerate(MASKED):
        make_predicted(folder / "runs", name, skill=0.5 + place / 50, metrics=place < 2)
    for number in range(40 - len(MASKED)):
        percent = tuple(50 + (number * step) % 23 for step in range(1, 7))
        learning = {"optim": {"lr": round(1e-5 * (number + 1), 9), "epochs": 10}}
        make_run(
            folder / "runs" / str(number), percent=percent, total=60, metrics=False, **learning
        )
    write_report([folder / "runs"], folder / "report")
    return folder / "report" / "index.html"


@contextlib.contextmanager
def opened(browser, path: Path, viewport=DESK, **options) -> Iterator:
    """Open a page; at the end, nothing was printed, raised or requested from outside."""
    context = browser.new_context(viewport=viewport, **options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    found: list[str] = []
    requested: list[str] = []
    page.on("console", lambda message: found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(path.as_uri())
    try:
        yield page
    finally:
        context.close()
    assert found == []
    assert {url for url in requested if not url.startswith("data:")} == {path.as_uri()}


def row_id(name: str) -> str:
    recipe, _, variant = name.partition(", ")
    return Row(recipe, (), {}, variant=variant).id


def names(page) -> list[str]:
    return page.locator("#accuracy tbody th").all_inner_texts()


def column(page, place: int) -> list[str]:
    return page.locator(f"#accuracy tbody tr > :nth-child({place})").all_inner_texts()


def numbers(texts: list[str]) -> list[float]:
    return [float(text.split()[0].rstrip("*")) for text in texts if text != "-"]


def html_of(page) -> list[str]:
    return page.locator("#accuracy tbody tr").evaluate_all("all => all.map(one => one.outerHTML)")


def lit(page) -> set[str]:
    found = page.locator(".lit").evaluate_all("all => all.map(one => one.dataset.row)")
    return set(found)


def test_a_header_sorts_by_numbers_and_back(browser, small):
    with opened(browser, small) as page:
        before = names(page)
        for place in (3, 5, 9):
            head = page.locator(f"#accuracy thead th:nth-child({place})")
            orders = {}
            for order in ("descending", "ascending", "none"):
                head.get_by_role("button").click()
                assert head.get_attribute("aria-sort") == order
                orders[order] = column(page, place), names(page)
            assert orders["none"][1] == before
            falling, rising = orders["descending"][0], orders["ascending"][0]
            assert numbers(falling) == sorted(numbers(falling), reverse=True)
            assert numbers(rising) == sorted(numbers(rising))
            # a row without the set is last in both
            absent = int(place > 4)
            assert (falling.count("-"), rising.count("-")) == (absent, absent)
            assert (falling[-1] == "-", rising[-1] == "-") == (bool(absent), bool(absent))
        assert "8.3" in column(page, 3)
        page.locator("#accuracy thead button").first.click()
        assert names(page) == sorted(before)
        # a different column takes over
        page.locator("#accuracy thead button").nth(2).click()
        assert page.locator("#accuracy [aria-sort=ascending]").count() == 0
        assert page.locator("#accuracy [aria-sort=descending]").count() == 1
        grid = page.get_by_role("region", name="Images gained and lost")
        grid.locator("thead button").nth(1).click()
        gained = grid.locator("tbody td:nth-child(2)").all_inner_texts()
        assert numbers(gained) == sorted(numbers(gained), reverse=True)


def test_differences_to_any_row_are_those_of_the_file(browser, small):
    with (small.parent / "differences.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    with opened(browser, small) as page:
        recipes, before = names(page), html_of(page)
        select = page.locator("#accuracy select")
        heads = page.locator("#accuracy thead button").all_inner_texts()[2:]
        marks = 0
        for against, other in enumerate(recipes):
            select.select_option(label=f"difference to {other}")
            cells = page.locator("#accuracy tbody tr").evaluate_all(
                "rows => rows.map(r => [...r.cells].slice(2).map(c => c.innerText.split('\\n')))"
            )
            found = {
                (name, head): cells[row][place]
                for row, name in enumerate(recipes)
                for place, head in enumerate(heads)
            }
            assert page.locator("#accuracy strong").count() == 0
            assert all(found[other, head] in (["0"], ["-"]) for head in heads)
            for line in lines:
                sign = 1 if line["against"] == other else -1
                key = line["recipe"] if sign == 1 else line["against"]
                # the file has all rows, including those of a path over alpha
                if other not in (line["against"], line["recipe"]) or key not in recipes:
                    continue
                value, low, high = (
                    sign * float(line[name]) for name in ("difference", "low", "high")
                )
                low, high = sorted((low, high))
                mark = "*" if line["significant"] == "yes" else ""
                marks += bool(mark)
                assert found.pop((key, line["set"])) == [
                    f"{value:+z.2f}{mark}",
                    f"{low:+z.2f} to {high:+z.2f}",
                ]
            # the rest has no predictions, so no interval and no mark
            assert all(len(parts) == 1 and "*" not in parts[0] for parts in found.values())
            assert against or found["mine", heads[0]][0].startswith("-")
        assert marks > 0
        # sorting uses the displayed values
        select.select_option(label="difference to no-mask")
        page.locator("#accuracy thead th:nth-child(9) button").click()
        shown = column(page, 9)
        assert numbers(shown) == sorted(numbers(shown), reverse=True)
        assert "0" in shown
        page.locator("#accuracy thead th:nth-child(9) button").click(click_count=2)
        select.select_option(label="accuracy")
        assert html_of(page) == before


def at_marker(page, name: str) -> tuple[float, float]:
    box = page.locator(f"[data-figure=scatter] .point[data-row='{row_id(name)}']").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_row_under_the_pointer_is_highlighted_everywhere(browser, small):
    with opened(browser, small) as page:
        scatter, tip = page.locator("[data-figure=scatter]"), page.locator(".tip")
        scatter.scroll_into_view_if_needed()
        page.mouse.move(*at_marker(page, "vanilla"))
        page.locator(f"#accuracy tr.lit[data-row='{row_id('vanilla')}']").wait_for()
        assert lit(page) == {row_id("vanilla")}
        assert "vanilla" in tip.inner_text()
        numbers_of = page.locator(f"#accuracy tr[data-row='{row_id('vanilla')}'] td")
        assert f"ImageNet {numbers_of.nth(1).inner_text()}" in tip.inner_text()
        for figure in ("scatter", "wise", "curves", "calibration"):
            for name, opacity in (("vanilla", "1"), ("object-mask-single-fill", "0.2")):
                parts = page.locator(f"[data-figure={figure}] [data-row='{row_id(name)}']")
                assert parts.count() > 0
                seen = parts.evaluate_all("all => all.map(one => getComputedStyle(one).opacity)")
                assert set(seen) == {opacity}, (figure, name)
        # a table's row has its numbers beside its name
        page.locator("#margins tbody tr").last.hover()
        page.locator("#accuracy tr.lit").wait_for()
        assert lit(page) == {row_id("wise-object-mask-single-fill-0.5")}
        assert tip.is_hidden()
        page.keyboard.press("Escape")
        assert lit(page) == set()
        # a curve, at a point where it is above the others, and a panel beside its lines
        curves = page.locator("[data-figure=curves]")
        curves.scroll_into_view_if_needed()
        x, y = curves.evaluate(
            """(drawing, id) => {
              for (const path of drawing.querySelectorAll(`[data-row="${id}"] path`)) {
                if (path.getTotalLength() < 99) continue;
                for (let at = 0; at < path.getTotalLength(); at += 3) {
                  const {x, y} = path.getPointAtLength(at).matrixTransform(path.getScreenCTM());
                  const top = document.elementFromPoint(x, y)?.closest("[data-row]");
                  if (top?.dataset.row === id) return [x, y];
                }
              }
            }""",
            row_id("no-mask"),
        )
        page.mouse.move(x, y)
        page.locator(f"#accuracy tr.lit[data-row='{row_id('no-mask')}']").wait_for()
        panel = page.locator(f"[data-figure=calibration] [data-row='{row_id('mine')}']")
        assert panel.count() == 0
        panel = page.locator(f"[data-figure=calibration] [data-row='{row_id('wise-ft-0.5')}']")
        panel.hover()
        page.locator(f"#accuracy tr.lit[data-row='{row_id('wise-ft-0.5')}']").wait_for()
        page.locator("h1").hover()
        page.locator("#accuracy tr.lit").wait_for(state="detached")


def test_the_slider_marks_one_alpha_of_each_path(browser, small):
    with (small.parent / "table.csv").open() as stream:
        accuracies = {line["recipe"]: float(line["ImageNet"]) for line in csv.DictReader(stream)}
    at = {
        "0": ["zero-shot"] * 2,
        "0.25": ["wise-ft-0.25"],
        "0.5": ["wise-ft-0.5", "wise-object-mask-single-fill-0.5"],
        "1": ["vanilla", "object-mask-single-fill"],
    }
    with opened(browser, small) as page:
        figure = page.locator("figure", has=page.locator("[data-figure=wise]"))
        slider, output = figure.get_by_role("slider"), figure.locator("output")
        assert slider.get_attribute("aria-valuetext") == "0.5"
        slider.focus()
        page.keyboard.press("Home")
        for place, (alpha, recipes) in enumerate(at.items()):
            if place:
                page.keyboard.press("ArrowRight")
            assert slider.get_attribute("aria-valuetext") == alpha
            first, *lines = output.inner_text().splitlines()
            assert first == f"alpha {alpha}:"
            assert [line.split(": ImageNet ")[1].split()[0] for line in lines] == [
                f"{accuracies[name]:.1f}" for name in recipes
            ]
            centres = figure.locator(".ring").evaluate_all(
                "all => all.map(one => [one.getAttribute('cx'), one.getAttribute('cy')])"
            )
            markers = [figure.locator(f".point[data-row='{row_id(name)}'] use") for name in recipes]
            # the ends are on several paths
            assert {tuple(centre) for centre in centres} == {
                (marker.get_attribute("x"), marker.get_attribute("y")) for marker in markers
            }
        page.keyboard.press("ArrowRight")
        assert slider.get_attribute("aria-valuetext") == "1"


def seen_curves(page) -> set[str]:
    found = page.locator("[data-figure=curves] [data-row]:not([role])").evaluate_all(
        """all => all.filter(one => getComputedStyle(one).visibility === "visible"
          && !one.closest("[id*=legend]")).map(one => one.dataset.row)"""
    )
    return set(found)


def test_entries_of_the_legend_isolate_curves(browser, small):
    with opened(browser, small) as page:
        curves = page.locator("[data-figure=curves]")
        curves.scroll_into_view_if_needed()
        everything = seen_curves(page)
        assert len(everything) == 7
        entry = {
            name: curves.get_by_role("button", name=re.compile(f"^{name}: "))
            for name in ("vanilla", "no-mask")
        }
        entry["vanilla"].click()
        assert entry["vanilla"].get_attribute("aria-pressed") == "true"
        assert entry["no-mask"].get_attribute("aria-pressed") == "false"
        assert seen_curves(page) == {row_id("vanilla")}
        entry["no-mask"].click()
        assert seen_curves(page) == {row_id("vanilla"), row_id("no-mask")}
        entry["vanilla"].click()
        assert seen_curves(page) == {row_id("no-mask")}
        page.keyboard.press("Escape")
        assert seen_curves(page) == everything
        assert entry["no-mask"].get_attribute("aria-pressed") == "false"
        # the same by keys, one stop for all entries
        entry["vanilla"].focus()
        page.keyboard.press("Enter")
        assert seen_curves(page) == {row_id("vanilla")}
        page.keyboard.press("ArrowDown")
        page.keyboard.press(" ")
        assert len(seen_curves(page)) == 2
        page.keyboard.press("Escape")
        assert seen_curves(page) == everything


def test_frames_are_shown_one_at_a_time(browser, small):
    def shown(page) -> list[str]:
        return page.locator(".frames figure:visible figcaption").all_inner_texts()

    with opened(browser, small) as page:
        frames = page.locator(".frames")
        assert frames.locator("details").count() == 0
        assert frames.locator("figure").count() == 3
        assert shown(page) == [frames.locator("output").inner_text()] == ["step 200"]
        frames.get_by_role("slider").focus()
        for key, label in (("Home", "step 0"), ("ArrowRight", "step 100"), ("End", "step 200")):
            page.keyboard.press(key)
            assert shown(page) == [frames.locator("output").inner_text()] == [label]
    with opened(browser, small, java_script_enabled=False) as page:
        assert shown(page) == ["step 200"]
        page.locator(".frames summary").click()
        assert shown(page) == ["step 0", "step 100", "step 200"]


def test_the_keyboard_reaches_everything_in_few_steps(browser, forty):
    with opened(browser, forty) as page:
        stops = [""]
        # from the top, except the runs, which are opened one by one
        while stops[-1] != "Runs" and len(stops) < 60:
            page.keyboard.press("Tab")
            stops.append(
                page.evaluate(
                    "document.activeElement.closest('section')?.firstElementChild.innerText"
                )
            )
        # so are the classes of the rows with predictions
        found = [title for title in stops if title != "Images and classes gained and lost"]
        assert stops[-1] == "Runs"
        assert 15 < len(found) < 32, found
        page.locator("#accuracy select").focus()
        page.keyboard.press("Tab")  # the scrolling elements
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert page.locator("#accuracy th:nth-child(3)").get_attribute("aria-sort") == "descending"
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")
        first, second = names(page)[:2]
        assert page.evaluate("document.activeElement.textContent") == second
        assert lit(page) == {row_id(second)}
        page.keyboard.press("ArrowUp")
        assert lit(page) == {row_id(first)}
        page.keyboard.press("Escape")
        assert lit(page) == set()
        page.keyboard.press("End")
        assert lit(page) == {row_id(names(page)[-1])}
        assert page.locator("[data-figure=scatter] .point").count() == 40
        page.locator("[data-figure=scatter] .point").first.focus()
        page.keyboard.press("ArrowRight")
        label = page.evaluate("document.activeElement.getAttribute('aria-label')")
        (found_row,) = lit(page)
        tip = page.locator(".tip").inner_text().splitlines()
        assert label == ": ".join(tip)
        assert found_row == row_id(tip[0])


COLORS = """() => {
  const found = new Map();
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
  };
  for (const element of document.querySelectorAll("body *:not(script)")) {
    const texts = [...element.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
    if (!texts) continue;
    const style = getComputedStyle(element);
    const color = element instanceof SVGElement ? style.fill : style.color;
    found.set([color, ground(element)].join(" on "), element.textContent.trim().slice(0, 40));
  }
  return [...found];
}"""


def as_hex(color: str) -> str:
    channels = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", color)
    assert channels, color
    return "#" + "".join(f"{int(one):02x}" for one in channels.groups())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible(browser, small, forty, scheme):
    for path in (small, forty):
        with opened(browser, path, color_scheme=scheme) as page:
            page.locator("#accuracy tbody tr").first.hover()
            found = page.evaluate(COLORS)
            body = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert len(found) > 5
        dark = contrast(as_hex(body), "#ffffff") > contrast(as_hex(body), "#000000")
        assert dark == (scheme == "dark")
        for pair, text in found:
            color, ground = map(as_hex, pair.split(" on "))
            assert contrast(color, ground) >= LEGIBLE, (pair, text)


def test_a_phone_sees_all_of_it(browser, small, forty):
    for path in (small, forty):
        with opened(browser, path, PHONE, has_touch=True) as page:
            assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
            first, last = (
                page.locator(f"#accuracy tbody tr:first-child > :{place}-child")
                for place in ("first", "last")
            )
            region = page.locator("#accuracy .scroll")
            region.evaluate("one => { one.scrollLeft = one.scrollWidth; }")
            left, right = first.bounding_box(), last.bounding_box()
            assert left["x"] >= 0
            assert left["width"] < PHONE["width"] / 2
            assert left["x"] + left["width"] <= right["x"]
            assert right["x"] + right["width"] <= PHONE["width"]
            # text above and below a table does not scroll with it, and has the width of the text
            box_of_title = page.locator("#accuracy h2").bounding_box()
            for part in ("#accuracy caption span", "#accuracy select"):
                box = page.locator(part).bounding_box()
                assert box["x"] >= box_of_title["x"] - 0.5
                assert box["x"] + box["width"] <= box_of_title["x"] + box_of_title["width"] + 0.5
            # no other one covers the last one
            page.locator("[data-figure=scatter] .point").last.tap()
            assert page.locator(".tip").is_visible()
            box = page.locator(".tip").bounding_box()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= PHONE["width"]


def headings_of(data: bytes) -> str:
    """Return the texts of a PDF that stand in its outline."""
    objects = [data]
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL):
        with contextlib.suppress(zlib.error):
            objects.append(zlib.decompress(stream))
    found = b"\n".join(objects)
    texts = re.findall(rb"/Title \((.*?)\)", found)
    return b"\n".join(texts).decode("latin-1")


# widths of upright and landscape prints, in CSS pixels: A4 without margins of 12 mm
WIDTHS = {"": round((210 - 24) / 25.4 * 96), ".wide ": round((297 - 24) / 25.4 * 96)}


def test_a_print_has_whole_tables_and_no_controls(browser, small, forty, tmp_path):
    for path in (small, forty):
        with opened(browser, path, color_scheme="dark") as page:
            data = page.pdf(prefer_css_page_size=True, outline=True, tagged=True)
            assert data.startswith(b"%PDF")
            boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", data)
            assert len(boxes) > 2
            # tables of every row against every other are printed in landscape
            lying = [float(width) > float(height) for width, height in boxes]
            assert any(lying)
            assert not all(lying)
            for title in ("Accuracy", "Training", "Runs"):
                assert title in headings_of(data).splitlines()
            page.emulate_media(media="print")
            assert page.locator(".controls:visible").count() == 0
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
                "rgb(255, 255, 255)"
            )
            for part, width in WIDTHS.items():
                page.set_viewport_size({"width": width, "height": 900})
                tables = page.locator(f"{part}table:visible")
                assert tables.count() > 1
                for table in tables.all():
                    if part or not table.evaluate("one => Boolean(one.closest('.wide'))"):
                        assert table.bounding_box()["width"] <= width + 1
            # numbers are expanded for a print; the paper's rows are not
            assert page.locator(".matrix:visible").count() == 2
            assert page.locator(".beside:visible").count() == 0


def test_without_scripts_every_table_is_there_and_no_control(browser, small):
    with opened(browser, small) as page:
        tables = page.locator("table").count()
        cells = page.locator("#accuracy td").all_inner_texts()
    with opened(browser, small, java_script_enabled=False) as page:
        assert page.locator("table").count() == tables > 5
        assert page.locator("#accuracy td").all_inner_texts() == cells
        assert page.locator("button, select, input, output, [role=button]").count() == 0
        assert page.locator("svg.figure").count() == 4
        assert page.locator("svg.figure:visible").count() == 4


def test_hostile_names_are_names(browser, tmp_path):
    for name, skill in zip(HOSTILE, (0.4, 0.5, 0.6), strict=True):
        make_predicted(tmp_path / "runs" / str(skill), "x", skill=skill, note=name, metrics=False)
        (path,) = (tmp_path / "runs" / str(skill)).iterdir()
        rename(path, name)
    write_report([tmp_path / "runs"], tmp_path / "report")
    with opened(browser, tmp_path / "report" / "index.html") as page:
        assert sorted(names(page)) == sorted(HOSTILE)
        for name in HOSTILE:
            page.locator("#accuracy select").select_option(label=f"difference to {name}")
            page.locator(f"[data-figure=scatter] .point[data-row='{row_id(name)}']").focus()
            page.keyboard.press("Home")
            assert page.locator(".tip strong").inner_text() in HOSTILE
        assert page.title() == "Robust fine-tuning of CLIP: results"
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 2


def rename(run: Path, recipe: str) -> None:
    """Give a run a different recipe, with a name that its folder could not have."""
    edit(run / "config.json", recipe=recipe)
    edit(run / "results.json", checkpoint_sha256=files.sha256_file(make_weights(run, recipe)))


def test_no_other_script_runs_and_no_request_is_made(browser, small):
    inserted = (
        "<script>document.title = 'changed'</script>"
        "<img src='http://127.0.0.1:9/x' onerror='document.title = 1'>"
        "<link rel=stylesheet href='http://127.0.0.1:9/y'></main>"
    )
    path = small.with_name("other.html")
    path.write_text(small.read_text().replace("</main>", inserted))
    context = browser.new_context()
    page = context.new_page()
    found: list[str] = []
    failed: list[str] = []
    page.on("console", lambda message: found.append(message.text))
    page.on("requestfailed", lambda request: failed.append(request.failure))
    page.goto(path.as_uri())
    assert page.title() == "Robust fine-tuning of CLIP: results"
    # the page's own script still ran
    assert page.locator("#accuracy select").count() == 1
    context.close()
    assert sum("Content Security Policy" in text for text in found) >= 4
    assert set(failed) == {"csp"}
