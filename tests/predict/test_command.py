"""`rft predict`: output, files and refusals."""

import csv
import os
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import rft
from rft.predict import command
from rft.predict.images import read_squares
from rft.predict.model import Prediction
from rft.predict.page import shown
from rft.text import is_hidden
from tests import tiny
from tests.predict.conftest import images_of

pytestmark = pytest.mark.slow

HOSTILE = (
    "=HYPERLINK(1).png",
    "<script>alert(1)<.png",
    "\x1b[31mred\nline.png",
    "\u202egnp.png",
    "{{ 7*7 }}'\".png",
)


@pytest.fixture
def predict(home, capsys):
    """Run the command on the trained model; return its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            tiny.call(command, home.run, *arguments)
        printed = capsys.readouterr()
        return stopped.value.code, printed.out.splitlines(), tiny.complaints(printed.err)

    return run


@pytest.fixture
def folder(home, tmp_path) -> Path:
    """Three photos in a folder."""
    made = tmp_path / "new"
    made.mkdir()
    for path in images_of(home)[:3]:
        shutil.copy(path, made)
    return made


class Page(HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_every_image_has_a_line_with_classes_and_probabilities(home, predict, folder):
    code, out, errors = predict(folder, "--top", 2)
    assert (code, errors) == (0, [])
    paths = sorted(folder.iterdir())
    found = rft.load(home.run).classify(paths, top=2)
    for line, path, one in zip(out[:3], paths, found, strict=True):
        shares = [f"{name} {100 * share:.1f}%" for name, share in one.shares]
        assert line == f"{path}: {', '.join(shares)}"
    assert re.fullmatch(
        r"3 images, probabilities at temperature \S+, fitted on held-out images", out[3]
    )


def test_long_lines_are_wrapped_on_a_terminal(monkeypatch):
    names = tuple(f"class number {number}" for number in range(5))
    one = Prediction(names, names, tuple(range(5)), (0.2,) * 5)
    whole = f"a/b.png: {command.in_words(one)}"
    monkeypatch.setenv("COLUMNS", "80")
    assert command.line("a/b.png", one) == whole
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    first, *below = command.line("a/b.png", one).split("\n")
    assert first == "a/b.png:"
    assert all(len(part) <= 80 and part.startswith("  ") for part in below)
    assert " ".join([first, *map(str.strip, below)]) == whole
    monkeypatch.setenv("COLUMNS", "200")
    assert command.line("a/b.png", one) == whole


def test_the_help_shows_no_empty_default(capsys):
    with pytest.raises(SystemExit):
        tiny.call(command, "--help")
    text = capsys.readouterr().out
    assert "(default: )" not in text
    assert len({len(line) for line in text.splitlines() if line.startswith("│")}) == 1


def test_the_csv_has_a_row_for_each_image(home, predict, folder, tmp_path):
    out = tmp_path / "deep" / "p.csv"
    code, printed, _ = predict(folder, "--out", out, "--top", 3)
    assert (code, printed[-1]) == (0, f"written: {out}")
    with out.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    model = rft.load(home.run)
    paths = sorted(folder.iterdir())
    assert [row["image"] for row in rows] == list(map(str, paths))
    for row, one in zip(rows, model.classify(paths, top=3), strict=True):
        names = (row["class"], row["class 2"], row["class 3"])
        shares = (row["probability"], row["probability 2"], row["probability 3"])
        assert names == one.names
        assert [float(share) for share in shares] == pytest.approx(one.probabilities, abs=1e-6)
        assert float(row["temperature"]) == pytest.approx(model.temperature, rel=1e-5)


def test_with_a_file_a_summary_is_printed(home, predict, folder, tmp_path, capsys):
    out = tmp_path / "p.csv"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        tiny.call(command, home.run, folder, "--out", out)
    printed = capsys.readouterr()
    # nor a line of progress, if there is a result at once
    assert printed.err == ""
    first, second, third = printed.out.splitlines()
    assert first.startswith("3 images, probabilities at temperature ")
    names = Counter(one.name for one in rft.load(home.run).classify(sorted(folder.iterdir())))
    assert second == "predicted: " + ", ".join(f"{name} {n}" for name, n in names.most_common())
    assert third == f"written: {out}"
    # one image gives one line
    code, lines, _ = predict(min(folder.iterdir()))
    assert code == 0
    assert lines[1].startswith("1 image, probabilities ")


def test_an_image_in_the_place_of_the_model_is_named(home, folder, refused):
    photo = min(folder.iterdir())
    assert f"{photo} is an image; name the model first" in refused(command, photo, home.run)


def test_the_page_shows_what_the_model_saw(home, predict, folder, tmp_path):
    out = tmp_path / "p.html"
    code, _, _ = predict(folder, "--html", out, "--top", 2)
    page = Page(out)
    assert code == 0
    assert len(page.of("img")) == 3
    assert all(image["src"].startswith("data:image/webp;base64,") for image in page.of("img"))
    assert len(page.of("li")) == 6
    for path in folder.iterdir():
        assert str(path) in page.text
    policy = page.of("meta")[2]["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not page.of("script")
    assert not page.of("link")
    # again, with the relevance beside each image: a page of this command is replaced
    code, _, _ = predict(folder, "--html", out, "--top", 2, "--cam")
    with_maps = Page(out)
    assert code == 0
    assert len(with_maps.of("img")) == 6
    sources = [image["src"] for image in with_maps.of("img")]
    assert sources[::2] == [image["src"] for image in page.of("img")]
    # of the first class of each
    model, paths = rft.load(home.run), sorted(folder.iterdir())
    (squares,) = read_squares(paths, 16, 64, max_pixels=1)
    found = model.classify(paths, top=2)
    maps_BGG = model.relevance(paths, [one.name for one in found])
    expected = shown(list(map(str, paths)), found, squares.images_BCHW.numpy(), maps_BGG)
    assert sources[1::2] == [one.overlay for one in expected]
    assert not set(sources[::2]) & set(sources[1::2])


def test_a_page_has_a_bounded_number_of_images(predict, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SHOWN", 2)
    code, _, _ = predict(folder, "--html", tmp_path / "p.html")
    page = Page(tmp_path / "p.html")
    assert (code, len(page.of("img"))) == (0, 2)
    assert "Only the first 2 images are shown." in page.text


def test_what_cannot_be_read_is_named_and_the_rest_is_predicted(predict, folder, tmp_path):
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "phone.heic").touch()
    out, html = tmp_path / "p.csv", tmp_path / "p.html"
    code, printed, errors = predict(folder, "--out", out, "--html", html)
    assert code == 1
    assert errors[0].endswith("2 files not read:")
    assert f"  {folder}/broken.jpg is not a readable JPEG, PNG or WebP image" in errors
    assert any("phone.heic does not have an image's suffix" in line for line in errors)
    assert printed[0].startswith("3 images, ")
    assert len(out.read_text().splitlines()) == 1 + 3
    assert "broken.jpg is not a readable" in Page(html).text
    # an ignored file is not an error
    (folder / "broken.jpg").unlink()
    assert predict(folder, "--ignore", "*.heic")[0] == 0
    # a repeated option adds to the first, and takes several values
    (folder / "a.txt").touch()
    assert predict(folder, "--ignore", "*.heic", "--ignore", "*.txt")[0] == 0
    code, _, (error,) = predict("--ignore", "*.heic", folder)
    assert code == 2
    assert f"--ignore took '{folder}' as a name to skip: write it before" in error


def test_files_of_an_earlier_call_may_lie_beside_the_images(predict, folder):
    files = ("--out", folder / "p.csv", "--html", folder / "p.html")
    assert predict(folder, *files)[::2] == (0, [])
    assert predict(folder, *files)[::2] == (0, [])
    assert predict(folder)[0] == 1


def test_a_long_list_of_what_cannot_be_read_is_cut(predict, folder):
    for number in range(command.LINES + 5):
        (folder / f"bad{number:02d}.jpg").touch()
    code, _, errors = predict(folder)
    assert code == 1
    assert len(errors) == 1 + command.LINES + 1
    assert errors[-1].strip() == "... and 5 more"


def test_files_without_an_images_suffix_share_a_line(predict, folder):
    for number in range(command.LINES + 5):
        (folder / f"{number:02d}.json").touch()
    (folder / "a.TXT").touch()
    code, _, errors = predict(folder)
    assert code == 1
    assert errors[0].endswith(f"{command.LINES + 6} files not read:")
    more = command.LINES + 4
    assert errors[1].startswith(f"  {folder}/00.json and {more} more like *.json do not have an ")
    assert errors[1].endswith("convert them, or skip them with --ignore '*.json'")
    assert errors[2].endswith("convert it, or skip it with --ignore '*.txt'")
    assert len(errors) == 3


def test_nothing_is_written_where_nothing_was_read(predict, folder, tmp_path):
    (tmp_path / "bad.jpg").touch()
    code, _, errors = predict(tmp_path / "bad.jpg", "--out", tmp_path / "p.csv")
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith(f"error: {tmp_path}/bad.jpg ")
    assert not (tmp_path / "p.csv").exists()


def test_hostile_names_are_text_everywhere(predict, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    for name in HOSTILE:
        Image.new("RGB", (20, 20), "red").save(folder / name)
    (folder / "\x1b[2Jbad\n.jpg").touch()
    # a name that is no UTF-8
    shutil.copy(folder / HOSTILE[0], os.fsencode(folder) + b"/\xff.png")
    out, html = tmp_path / "p.csv", tmp_path / "p.html"
    # the names themselves, without the parent folder
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, printed, errors = predict(".", "--out", out, "--html", html)
    assert code == 1
    # the count, the classes, two files: each image has its line only in the file
    assert len(printed) == 4
    assert not any(map(is_hidden, "".join([*printed, *errors])))
    with out.open(newline="") as stream:
        names = [row["image"] for row in csv.DictReader(stream)]
    assert "'=HYPERLINK(1).png" in names
    assert {"{{ 7*7 }}'\".png", "\\udcff.png"} < set(names)
    assert not any(map(is_hidden, "".join(names)))
    page = Page(html)
    assert not page.of("script")
    assert "<script>alert(1)<.png" in page.text
    assert "{{ 7*7 }}'\".png" in page.text
    assert not any(map(is_hidden, page.text.replace("\n", "")))


def test_what_exists_as_something_else_is_not_replaced(home, folder, tmp_path, refused):
    photo = min(folder.iterdir())
    before = photo.read_bytes()
    (tmp_path / "folder").mkdir()

    def line(*arguments: object) -> str:
        return refused(command, home.run, folder, *arguments)

    for option in ("--out", "--html"):
        assert "exists and was not written by rft predict" in line(option, photo)
        assert "is a folder and cannot be replaced" in line(option, tmp_path / "folder")
        assert "it must be a local folder or file" in line(option, "s3://bucket/x")
    both = tmp_path / "both"
    assert "name two different files" in line("--out", both, "--html", both)
    assert "name one with --html" in line("--cam")
    assert photo.read_bytes() == before
    assert not both.exists()


def test_there_must_be_something_to_read(home, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "name at least one image" in refused(command, home.run)
    assert "empty holds no images" in refused(command, home.run, tmp_path / "empty")
    assert "no weights at" in refused(command, tmp_path / "none", __file__)
    (tmp_path / "model").mkdir()
    line = refused(command, tmp_path / "models", __file__)
    there = f"{tmp_path}/models: it does not exist; did you mean {tmp_path}/model?"
    assert line.endswith(f"no weights at {there}")
