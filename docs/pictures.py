"""The two pictures of the README: `python docs/pictures.py` writes them to docs/pictures.

`result-*.svg` shows the accuracies in rft/paper.py and in docs/results/miniature/statistics.csv.
`method-*.png` shows a step of the method, computed by the functions of a training step. Each has a
version for light and one for dark grounds, and is readable at the width of a phone.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from rft.clip.classifier import Classifier
from rft.clip.head import zero_shot_head
from rft.clip.load import MINIATURE, load_clip
from rft.config import ModelConfig
from rft.demo import captions, objects, render, scenes, world
from rft.evaluate.measure_cam import label_map
from rft.method.counterfactual import StepAddress, cam_mask, donors, draw
from rft.method.refill import DROP
from rft.paper import OURS, published
from rft.recipes import MASKED
from rft.report import gallery
from rft.report.colors import DARK, LIGHT, legible
from rft.report.plots import MASK_COLORS
from rft.rng import numpy_generator
from rft.runs.gallery_file import Gallery
from rft.sets import BENCHMARKS, ID_SET, OOD_SETS, TRAIN_SET
from rft.storage import files
from rft.train.pictures import one_of_each_class

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/pictures"
STATISTICS = ROOT / "docs/results/miniature/statistics.csv"


class Theme(NamedTuple):
    """The colours of a picture: those of the report's page (rft/report/base.css), and a tint."""

    ground: str
    ink: str
    muted: str
    tint: str
    accent: str


ORANGE = MASK_COLORS["object"]  # the paper's method, as in the report
THEMES = {
    "light": Theme(LIGHT, "#1f2328", "#5c646d", "#fdf1e7", legible(ORANGE, "#fdf1e7")),
    "dark": Theme(DARK, "#e2e5e9", "#9aa3ad", "#33281f", legible(ORANGE, "#33281f")),
}

# The result. Lengths are units of the SVG.

WIDTH, MARGIN, GAP, ROW, HEAD, TEXT, LINE = 720, 24, 20, 42, 128, 22, 30
NAMES, NUMBER = 178, 74  # widths of the columns
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
SYSTEMS = {
    "zero-shot": "zero-shot",
    "vanilla": "fine-tuning",
    "wise-ft-0.5": "WiSE-FT",
    "no-mask": "distillation",
    OURS: "object masks",
}
"""Recipe -> name in the picture."""
NOTES = (
    "Top-1 accuracy in %. Bar: change from zero-shot.",
    f"Out of distribution: mean of {len(OOD_SETS)} test sets.",
    "Thin line: 95% interval (not given in the paper).",
    "Distillation: the paper's method without masks.",
)


class Panel(NamedTuple):
    """The accuracies from one source."""

    title: str
    about: str
    rows: dict[str, list[list[float]]]
    """Recipe -> in distribution and the average out of it: percent, and its interval if known."""


def panels(statistics: str) -> list[Panel]:
    """Read the paper's accuracies and those of a statistics.csv."""
    printed = {row.recipe: [row.percent[0], row.percent[-1]] for row in published("ViT-B/32")}
    lines = {(line["recipe"], line["set"]): line for line in csv.DictReader(statistics.split("\n"))}
    sets, columns = (BENCHMARKS[ID_SET].title, "OOD avg"), ("top1", "low", "high")
    paper = {name: [[value] for value in printed[name] if value is not None] for name in SYSTEMS}
    here = {
        name: [[float(lines[name, one][column]) for column in columns] for one in sets]
        for name in SYSTEMS
    }
    seeds = lines[OURS, sets[1]]["n"]
    about = f"a tiny CLIP on the miniature world, {seeds} seed{'s' if seeds != '1' else ''}"
    return [
        Panel("From the paper", "CLIP ViT-B/32 on ImageNet", paper),
        Panel("Measured in this repository", about, here),
    ]


def result(shown: Sequence[Panel], theme: Theme) -> str:
    """Draw the accuracies as SVG: a panel for each source, a row for each system."""
    lows, highs = [], []  # of the bars in each column, in points from zero-shot
    for column in (0, 1):
        changes = [
            value - panel.rows["zero-shot"][column][0]
            for panel in shown
            for scores in panel.rows.values()
            for value in scores[column]
        ]
        lows.append(min(changes))
        highs.append(max(changes))
    space = WIDTH - 2 * MARGIN - NAMES - 2 * NUMBER - 3.5 * GAP
    scale = space / (sum(highs) - sum(lows))  # units per point, in every panel
    first = MARGIN + NAMES + NUMBER
    rights = first, first + 2 * GAP + scale * (highs[0] - lows[0]) + NUMBER  # of the numbers
    zeros = [right + GAP - scale * low for right, low in zip(rights, lows, strict=True)]
    parts, top = [], float(MARGIN)
    for panel in shown:
        parts += _panel(panel, theme, top, (rights, zeros), scale)
        top += HEAD + ROW * len(panel.rows) + MARGIN
    for number, note in enumerate(NOTES):
        parts.append(_text(MARGIN, top + LINE * (number + 0.5), note, theme.muted))
    size = {"width": WIDTH, "height": round(top) + LINE * len(NOTES) + MARGIN}
    body = "\n".join(["", _element("rect", **size, rx=12, fill=theme.ground), *parts, ""])
    look = {"viewBox": f"0 0 {WIDTH} {size['height']}", **size, "font_family": FONT}
    return _element("svg", body, xmlns="http://www.w3.org/2000/svg", **look) + "\n"


def _panel(
    panel: Panel, theme: Theme, top: float, columns: Sequence[Sequence[float]], scale: float
) -> Iterator[str]:
    """Yield the elements of a panel; `columns` are right edges of numbers, and zeros of bars."""
    yield _text(MARGIN, top + 26, panel.title, theme.ink, font_size=28, font_weight=600)
    yield _text(MARGIN, top + 58, panel.about, theme.muted)
    yield _text(columns[0][0] - NUMBER, top + 104, "in distribution", theme.ink)
    yield _text(WIDTH - MARGIN, top + 104, "out of distribution", theme.ink, text_anchor="end")
    top += HEAD
    for row, (name, scores) in enumerate(panel.rows.items()):
        y = top + ROW * (row + 0.5)
        color, bar, weight = theme.ink, theme.muted, 400
        if name == OURS:
            color, bar, weight = theme.accent, theme.accent, 700
            box = {"x": MARGIN / 2, "y": y - ROW / 2, "width": WIDTH - MARGIN, "height": ROW}
            yield _element("rect", **box, rx=8, fill=theme.tint)
        yield _text(MARGIN, y + 8, SYSTEMS[name], color, font_weight=weight)
        zero_shot = panel.rows["zero-shot"]
        for score, (start, *_), right, zero in zip(scores, zero_shot, *columns, strict=True):
            look = {"text_anchor": "end", "font_weight": weight}
            yield _text(right, y + 8, f"{score[0]:.1f}", color, **look)
            end, *interval = (zero + scale * (value - start) for value in score)
            yield _line(zero, y, end, y, bar, 10)
            yield _element("circle", cx=end, cy=y, r=8, fill=bar)
            if interval:
                yield _line(interval[0], y, interval[1], y, theme.ink, 2)
    for zero in columns[1]:
        yield _line(zero, top - 8, zero, top + ROW * len(panel.rows), theme.ink, 1.5)


def _text(x: float, y: float, text: str, color: str, **look: object) -> str:
    look = {"x": x, "y": y, "fill": color, "font_size": TEXT, **look}
    return _element("text", escape(text, quote=False), **look)


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float) -> str:
    return _element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=color, stroke_width=width)


def _element(name: str, content: str = "", **attributes: object) -> str:
    texts = {
        key.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else value
        for key, value in attributes.items()
    }
    written = "".join(f' {key}="{value}"' for key, value in texts.items())
    return f"<{name}{written}>{content}</{name}>"


# The method. Lengths are pixels of the PNG, which is shown at half its size.

PAGE, EDGE, SIZE, CAPTION, BOX, TOP = 1440, 48, 44, 78, 260, 270
TILE = 288  # at most, and a multiple of an image's side
IMAGES = 3
COLUMNS = (
    ("image", "labelled"),
    ("relevance", "for the label"),
    ("object mask", f"above {MASKED[OURS].threshold:g}"),
    ("counterfactual", "refilled"),
)
BOXES = (
    ("clean image", "the student learns", "its label"),
    ("counterfactual", "the student keeps the", "frozen model's features"),
)


def first_step() -> Gallery:
    """Compute relevance, mask and counterfactual of a few images by the paper's recipe.

    The images are the first training image of a few classes, spread over the labels; their random
    numbers are those of rft/demo/world.py. The model is the pre-trained one, as the student is at
    its first step.
    """
    image_set, bank = world.SETS[TRAIN_SET], world.SETS[TRAIN_SET].setting.bank
    silhouettes, labels = objects.load_silhouettes(bank), np.array(image_set.classes)
    chosen = one_of_each_class(labels, np.arange(len(labels)), IMAGES)
    drawn = []
    for number in chosen.tolist():
        rng = numpy_generator(0, TRAIN_SET, number)
        scene = scenes.draw_scene(image_set.setting, int(labels[number]), silhouettes, rng)
        drawn.append(render.render(scene, rng)[0])
    images, names = np.stack(drawn), tuple(objects.CLASSES[label] for label in labels[chosen])
    clip = load_clip(ModelConfig(clip=MINIATURE))
    head = zero_shot_head(clip, objects.CLASSES, captions.TEMPLATES)
    model = Classifier(clip.model.visual, head, clip.architecture)
    # the first permutation of the seed in which no image is its own donor
    method = replace(MASKED[OURS], single_fill="derangement")
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    relevance = label_map(model, batch, torch.from_numpy(labels[chosen]), method.cam)
    draws = draw(method, range(IMAGES), relevance.shape[1], IMAGES, StepAddress(0, 0, 0, 0))
    mask = cam_mask(method.mask, relevance, method.threshold)
    made = {
        "object-mask-no-fill": torch.where(mask, DROP, draws.own_B1).numpy(),
        OURS: donors(method, draws, relevance).numpy(),
    }
    return Gallery(images, names, relevance.numpy(), model.patch_side, made, frames=None)


def tiles(step: Gallery) -> list[np.ndarray]:
    """Make the columns of the picture, each uint8 (B, H, W, 3); masked patches are hatched."""
    images = step.images_BHWC
    made = (gallery.apply_donors(images, one, step.patch) for one in step.donors.values())
    return [images, gallery.heat_map(images, step.relevance_BP), *made]


def layout(side: int) -> tuple[int, list[int], list[int]]:
    """Place images of so many pixels a side: times enlarged, left of columns, top of rows."""
    times = max(1, TILE // side)
    lefts = np.linspace(EDGE, PAGE - EDGE - times * side, len(COLUMNS)).astype(int).tolist()
    return times, lefts, [TOP + row * (times * side + CAPTION) for row in range(IMAGES)]


def method(step: Gallery, theme: Theme) -> Image.Image:
    """Draw a step of the method: a row for each image, then what is learnt from which."""
    times, lefts, tops = layout(step.images_BHWC.shape[1])
    side = times * step.images_BHWC.shape[1]
    end = tops[-1] + side + CAPTION
    page = Image.new("RGB", (PAGE, end + BOX + 2 * EDGE), theme.ground)
    pen = ImageDraw.Draw(page)

    def put(x: float, y: float, text: str, color: str, anchor: str = "ms", bold: str = "") -> None:
        # the font comes with matplotlib: it is the same on every machine
        path = Path(matplotlib.get_data_path(), f"fonts/ttf/DejaVuSans{bold}.ttf")
        pen.text((x, y), text, color, ImageFont.truetype(path, SIZE), anchor)

    put(EDGE, 78, "One training step of the paper's method", theme.ink, "ls", "-Bold")
    for left, (title, about), column in zip(lefts, COLUMNS, tiles(step), strict=True):
        center = left + side // 2
        put(center, 172, title, theme.accent if left == lefts[-1] else theme.ink)
        put(center, 232, about, theme.muted)
        for top, tile in zip(tops, column, strict=True):
            large = tile.repeat(times, axis=0).repeat(times, axis=1)
            page.paste(Image.fromarray(large), (left, top))
            if left != lefts[0]:
                x, y = left - 14, top + side // 2
                pen.polygon([(x, y), (x - 26, y - 18), (x - 26, y + 18)], theme.muted)
    for row, (top, name, donor) in enumerate(zip(tops, step.names, step.donors[OURS], strict=True)):
        put(lefts[0], top + side + 50, f"{row + 1}: {name}", theme.ink, "ls")
        # an image's mask has at least its most relevant patch
        (other,) = set(donor.tolist()) - {row}
        put(lefts[-1] + side, top + side + 50, f"from image {other + 1}", theme.ink, "rs")
    width, y = (PAGE - 3 * EDGE) // 2, end + EDGE
    looks = (
        (EDGE, lefts[0], theme.ink, None),
        (PAGE - EDGE - width, lefts[-1], theme.accent, theme.tint),
    )
    for (left, column, color, tint), (title, *lines) in zip(looks, BOXES, strict=True):
        x, center = column + side // 2, left + width // 2
        pen.polygon([(x, y - 14), (x - 18, y - 40), (x + 18, y - 40)], color)
        pen.rounded_rectangle((left, y, left + width, y + BOX), 24, tint, color, 4)
        put(center, y + 72, title, color, bold="-Bold")
        for number, line in enumerate(lines):
            put(center, y + 144 + 60 * number, line, theme.ink)
    return page


def main(*, steps: bool = True) -> None:
    """Write the picture of the result, and that of a step if it is wanted."""
    shown, step = panels(STATISTICS.read_text()), first_step() if steps else None
    for name, theme in THEMES.items():
        files.write_bytes(str(FOLDER / f"result-{name}.svg"), result(shown, theme).encode())
        if step is not None:
            stream = io.BytesIO()
            method(step, theme).save(stream, "PNG", optimize=True)
            files.write_bytes(str(FOLDER / f"method-{name}.png"), stream.getvalue())
    print(f"wrote {FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
