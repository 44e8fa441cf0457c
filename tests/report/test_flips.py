"""The images behind a class: the correct ones, bounded, from the evaluated data."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from rft.config import MAX_PIXELS
from rft.packing.layouts import read_source
from rft.packing.pack import Options, pack_source
from rft.report import command as reporting
from rft.report import flips
from rft.report.page import compose, flips_of, render
from rft.report.read import load_runs
from rft.report.thumbnails import thumbnail
from rft.runs import predictions
from rft.runs.predictions import Predictions, path_of
from rft.shards.label_space import LabelSpace
from rft.shards.packed import PackedSet
from rft.storage import files
from tests import tiny
from tests.report.make_runs import edit, make_run, make_weights

pytestmark = pytest.mark.slow
SET = "imagenet-val"
OWN = ("garden", "zoo")
PER_CLASS, BORDER = 12, 10
HOSTILE = "</style><script>alert(1)</script>\"'{{ 7*7 }}"
LABELS = LabelSpace(ids=("n00000000", "n00000001"), names=("cat", "dog"), templates=("{c}",))


def colour_of(key: str, name: str = SET) -> np.ndarray:
    """Each image of a set has a colour far from the others'; those of the zoo are inverse."""
    number = int(key[10:]) + PER_CLASS * int(key[8])
    colour = np.array([number % 3 * 100, number // 3 % 3 * 100, number // 9 * 80]) + 20
    return 255 - colour if name == "zoo" else colour


@pytest.fixture(scope="module")
def data(request, tmp_path_factory):
    """Sets of wide images in red frames, packed as pixels or in the encoding of the test."""
    encoding = getattr(request, "param", "pixels")
    root = tmp_path_factory.mktemp(encoding)
    for name in (SET, *OWN):
        for wnid in LABELS.ids:
            folder = root / name / "imagenet/val" / wnid
            folder.mkdir(parents=True)
            for n in range(PER_CLASS):
                key = f"{wnid}_{n}"
                image = Image.new("RGB", (310, 210), "red")
                image.paste(tuple(colour_of(key, name).tolist()), (BORDER, BORDER, 300, 200))
                image.save(folder / f"{key}.png")
        found = read_source(SET, root / name, LABELS)
        found = replace(found, dataset=name, crop_border=BORDER, ood=name in OWN)
        options = Options(encoding=encoding, size=64, shard_mb=1, workers=1)
        assert pack_source(found, str(root / "shards"), LABELS, options)
    return root / "shards"


def make(
    folder: Path,
    data: Path,
    recipe: str,
    seed: int = 0,
    *,
    right: dict[str, np.ndarray],
    likelihood: dict[str, np.ndarray] | None = None,
) -> Path:
    """A run with predictions of packed sets, right where `right` says."""
    run = make_run(folder, recipe, seed, percent=())
    counts = {}
    for name, right_N in right.items():
        packed = PackedSet(str(data / name))
        label_N = packed.index.label
        plain_N = np.where(right_N, -0.1, -2)
        rows = Predictions(
            key=packed.index.key.astype(str),
            label=label_N,
            prediction=np.where(right_N, label_N, 1 - label_N).astype(np.int32),
            rank=(~right_N).astype(np.int32),
            confidence=np.full(len(label_N), 0.9, np.float32),
            log_likelihood=(likelihood or {}).get(name, plain_N).astype(np.float32),
        )
        content = rows.to_bytes()
        files.write_bytes(str(path_of(run, name)), content)
        counts[name] = {
            "correct": int(right_N.sum()),
            "total": len(label_N),
            "manifest_sha256": packed.manifest.sha256,
            "predictions_sha256": files.sha256_bytes(content),
            "ood": packed.manifest.is_ood,
        }
    edit(run / "results.json", sets=counts)
    return run


class Shown(HTMLParser):
    """The pictures of a page: text and class of each, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[tuple[str, str]] = []
        self.kinds: list[str] = []
        self.sheet = dict(
            re.findall(
                r"\.(thumb-\d+)\{background-image:url\(data:image/webp;base64,([^)]+)\)\}", text
            )
        )
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("class", "").startswith("thumb-"):
            self.pictures.append((found["aria-label"], found["class"]))

    def handle_data(self, data):
        # of the class's accuracy, then of its images
        if found := re.match(r"Images (gained|lost): (\d+)|ImageNet, (gained|lost):", data):
            self.kinds.append(found[0])

    def keys(self) -> list[str]:
        return [text.split(",")[0] for text, _ in self.pictures]

    def image(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(self.sheet[name])))

    def has_colour(self, picture: tuple[str, str], name: str = SET) -> bool:
        text, number = picture
        pixels_HWC = np.asarray(self.image(number).convert("RGB"), dtype=float)
        # blocks at the edges contain part of the frame
        inside_HWC = pixels_HWC[20:-20, 20:-20]
        return np.abs(inside_HWC - colour_of(text.split(",")[0], name)).max() < 8

    def is_framed(self, number: str) -> bool:
        pixels_HWC = np.asarray(self.image(number).convert("RGB"), dtype=float)
        edges = [*pixels_HWC[[0, -1]], *pixels_HWC[:, [0, -1]].swapaxes(0, 1)]
        return all(np.mean(edge[:, 0] - edge[:, 1:].max(axis=1)) > 60 for edge in edges)


def page_of(runs, data: object = "") -> str:
    """The page of a report, without figures."""
    report = compose(load_runs(runs), draw=False)
    return render(report, flips_of(report, str(data), MAX_PIXELS) if data else None)


def shown(runs, data: object = "") -> Shown:
    return Shown(page_of(runs, data))


def at(data: Path, name: str, *keys: str) -> np.ndarray:
    """Which images of a set have these keys, bool (N,)."""
    return np.isin(PackedSet(str(data / name)).index.key.astype(str), keys)


def keys(number: int, *images: int) -> list[str]:
    return [f"n0000000{number}_{n}" for n in images]


@pytest.fixture
def pair(data, tmp_path):
    """No-mask gains images 1, 5 and 3 of the first class, and loses 2 of the other."""
    hard = at(data, SET, *keys(0, 1, 5, 3))
    lost = at(data, SET, *keys(1, 2))
    gain_N = np.zeros(24)
    for key, gain in zip(keys(0, 1, 5, 3), (1.5, 4, 1.5), strict=True):
        gain_N[at(data, SET, key)] = gain
    one = make(tmp_path, data, "vanilla", right={SET: ~hard}, likelihood={SET: np.full(24, -5)})
    two = make(tmp_path, data, "no-mask", right={SET: ~lost}, likelihood={SET: gain_N - 5})
    return [one, two]


@pytest.mark.parametrize("data", ["original", "pixels"], indirect=True)
def test_the_pictures_are_the_images_that_flipped(pair, data):
    """By the change of the label's likelihood, then by key; each with its colour and shape."""
    page = shown(pair, data)
    assert page.keys() == [*keys(0, 5, 1, 3), *keys(1, 2)]
    assert page.kinds == [
        *("ImageNet, gained:", "Images gained: 3", "ImageNet, lost:", "Images lost: 1"),
    ]
    for picture in page.pictures:
        is_original = data.parent.name.startswith("original")
        assert page.image(picture[1]).size == ((96, 63) if is_original else (64, 64))
        assert page.has_colour(picture)
        # ObjectNet's terms, whose packed images have no frame
        assert page.is_framed(picture[1])
    text, _ = page.pictures[0]
    assert text == "n00000000_5, a cat, ImageNet; vanilla: a dog; no-mask: a cat"


def test_without_data_the_page_says_how_to_see_them(pair):
    text = page_of(pair)
    assert (Shown(text).pictures, Shown(text).sheet) == ([], {})
    assert "<code>python -m rft.report ... --data URL</code>" in text
    # nothing flipped
    assert "--data URL" not in page_of(pair[:1])


def test_the_same_data_give_the_same_bytes(pair, data):
    assert page_of(pair, data) == page_of(pair, data)


def test_an_image_that_several_rows_gain_is_there_once(pair, data, tmp_path):
    third = make(tmp_path, data, "x", right={SET: np.ones(24, bool)})
    page = shown([*pair, third], data)
    assert page.keys().count("n00000000_5") == 2
    assert len({name for text, name in page.pictures if text.startswith("n00000000_5,")}) == 1
    assert len(page.sheet) == len(set(page.keys())) == 4


def test_of_several_seeds_those_count_that_have_it_right_more_often(data, tmp_path):
    """One of three is less than two of three, and two of three less than the one of one."""
    first, second = keys(0, 4, 6)
    everything = np.ones(24, bool)
    runs = [
        make(
            tmp_path,
            data,
            "no-mask",
            seed,
            right={SET: ~at(data, SET, *([first] if seed else []))},
        )
        for seed in (0, 1, 2)
    ]
    runs += [
        make(tmp_path, data, "vanilla", seed, right={SET: ~at(data, SET, *missed)})
        for seed, missed in enumerate([[first, second], [], [first]])
    ]
    page = shown(runs, data)
    # the first has one of three in both rows' mean: two misses each
    assert page.pictures[0][0] == (
        "n00000000_6, a cat, ImageNet; vanilla: a cat (2 of 3), a dog (1 of 3); no-mask: a cat"
    )
    assert len(page.pictures) == 1
    single = make(tmp_path, data, "x", right={SET: everything})
    page = shown([*runs, single], data)
    assert page.keys() == [second, first, second]


def test_an_average_has_the_images_of_all_its_sets(data, tmp_path):
    """Sets that are declared OOD; each image is from the set in which it flipped."""
    wrong = {"garden": keys(0, 3), "zoo": keys(0, 8)}
    runs = [
        make(
            tmp_path,
            data,
            recipe,
            right={
                name: ~at(data, name, *(missed if fails else ())) for name, missed in wrong.items()
            },
        )
        for recipe, fails in (("vanilla", True), ("no-mask", False))
    ]
    page = shown(runs, data)
    assert page.keys() == keys(0, 3, 8)
    for name, picture in zip(wrong, page.pictures, strict=True):
        assert page.has_colour(picture, name)


def test_a_page_is_bounded(pair, data, monkeypatch):
    everything = shown(pair, data)
    monkeypatch.setattr(flips, "PER_CLASS", 2)
    assert shown(pair, data).keys() == [*keys(0, 5, 1), *keys(1, 2)]
    monkeypatch.setattr(flips, "IMAGES", 2)
    text = page_of(pair, data)
    # the first of both classes, before the second of one
    assert Shown(text).keys() == [*keys(0, 5), *keys(1, 2)]
    assert "The page has no space for 1 more images." in text
    monkeypatch.undo()
    sizes = {text.split(",")[0]: len(base64.b64decode(everything.sheet[name]))
             for text, name in everything.pictures}  # fmt: skip
    first, second = keys(0, 5)[0], keys(1, 2)[0]
    monkeypatch.setattr(flips, "BYTES", sizes[first] + sizes[second])
    text = page_of(pair, data)
    assert Shown(text).keys() == [first, second]
    assert "The page has no space for 2 more images." in text


def test_large_thumbnails_stay_small():
    """Noise, which compresses worst."""
    noise = np.random.default_rng(0).integers(0, 256, (500, 400, 3), dtype=np.uint8)
    made = thumbnail(Image.fromarray(noise), framed=True)
    assert Image.open(io.BytesIO(made)).size == (77, 96)
    assert len(made) < 9_000


def test_other_data_are_refused(pair, data, tmp_path):
    """Of the same images, with a different manifest."""
    found = read_source(SET, data.parent / SET, LABELS)
    options = Options(encoding="jpeg", size=32, shard_mb=1, workers=1)
    assert pack_source(found, str(tmp_path / "other"), LABELS, options)
    with pytest.raises(ValueError, match="is not the set that the runs were evaluated on") as error:
        page_of(pair, tmp_path / "other")
    assert str(tmp_path / "other" / SET) in str(error.value)
    assert PackedSet(str(data / SET)).manifest.sha256[:12] in str(error.value)


def test_a_root_without_any_of_the_sets_is_refused(refused, pair, data, tmp_path):
    line = refused(reporting, *pair, "--out", tmp_path / "report", "--data", data.parent)
    assert f"no packed dataset at {data.parent}/imagenet-val" in line
    assert f"did you mean --data {data}?" in line
    assert not (tmp_path / "report").exists()


def test_a_set_that_is_missing_is_named(data, tmp_path, capsys):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/garden").symlink_to(data / "garden")
    runs = [
        make(tmp_path, data, recipe, right={name: ~at(data, name, *wrong) for name in OWN})
        for recipe, wrong in (("vanilla", keys(0, 3)), ("no-mask", []))
    ]
    text = page_of(runs, tmp_path / "root")
    assert Shown(text).keys() == keys(0, 3)
    assert "Images of zoo are not shown" in text
    (warning,) = tiny.complaints(capsys.readouterr().err)
    assert warning == (
        f"WARNING: {tmp_path}/root has no packed set zoo, so its images are not shown"
    )


@pytest.mark.parametrize("data", ["original", "pixels"], indirect=True)
def test_a_broken_image_is_named_and_left_out(pair, data, tmp_path, capsys):
    root = shutil.copytree(data, tmp_path / "root")
    packed = PackedSet(str(root / SET))
    sample = packed.index.key.tolist().index(b"n00000000_1")
    tar = root / SET / packed.manifest.shards[0].name
    content = bytearray(tar.read_bytes())
    content[int(packed.index.offset[sample]) + 150] ^= 1
    tar.write_bytes(content)
    assert shown(pair, root).keys() == [*keys(0, 5, 3), *keys(1, 2)]
    (warning,) = tiny.complaints(capsys.readouterr().err)
    assert "image not shown: damaged bytes (crc32 mismatch)" in warning
    assert "'n00000000_1'" in warning
    tar.unlink()
    with pytest.raises(ValueError, match="missing shard"):
        page_of(pair, root)


def test_predictions_of_other_images_are_refused(pair, data, tmp_path):
    """Both runs agree with each other, but not with the data."""
    for run in pair:
        where = path_of(run, SET)
        rows = predictions.read(where, 24)
        content = replace(rows, key=np.roll(rows.key, 1)).to_bytes()
        where.write_bytes(content)
        counts = json.loads((run / "results.json").read_text())["sets"]
        counts[SET]["predictions_sha256"] = files.sha256_bytes(content)
        edit(run / "results.json", sets=counts)
    with pytest.raises(ValueError, match=r"predictions of the same data have 'n0.*evaluate"):
        page_of(pair, data)


def test_names_of_classes_are_text(pair, data):
    for run in pair:
        sha256 = files.sha256_file(
            make_weights(run, run.name.removesuffix("-seed0"), ids=(HOSTILE, "x" * 3000))
        )
        edit(run / "results.json", checkpoint_sha256=sha256)
    text = page_of(pair, data)
    assert HOSTILE not in text
    assert "<script>alert" not in text
    page = Shown(text)
    label = f"a {HOSTILE}"[: flips.LETTERS]
    text, _ = page.pictures[0]
    assert text.startswith(f"n00000000_5, {label}")
    assert max(len(text) for text, _ in page.pictures) < 500


def test_the_command_shows_them(pair, data, tmp_path):
    tiny.call(reporting, *pair, "--out", tmp_path / "report", "--data", data)
    assert Shown((tmp_path / "report/index.html").read_text()).pictures


def test_a_remote_root_gives_the_same_page(pair, data, bucket):
    store = fsspec.filesystem("s3")
    store.put(str(data / SET), f"{bucket}/{SET}", recursive=True)
    assert page_of(pair, bucket) == page_of(pair, data)
    shard = PackedSet(f"{bucket}/{SET}").manifest.shards[0].name
    store.rm(f"{bucket}/{SET}/{shard}")
    with pytest.raises(ValueError, match="missing shard"):
        page_of(pair, bucket)
