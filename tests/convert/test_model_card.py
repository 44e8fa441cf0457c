"""Files beside an export's weights: the page, and a loader that needs only open_clip."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from rft.clip import card
from rft.clip.classifier import build_classifier, load_state
from rft.convert import command as convert_command
from rft.convert import model_card, text_tower
from rft.evaluate.checkpoints import Loaded
from rft.evaluate.results import write_results
from rft.predict.images import read_square
from rft.runs import records
from rft.runs.filenames import SELECTED
from rft.storage import files
from tests.conftest import ARCHITECTURE
from tests.convert.compare import document
from tests.predicted import evaluated
from tests.tiny import call, complaints

pytestmark = pytest.mark.usefixtures("known_models")
TEMPERATURE = 1.75
OPENAI = "timm/vit_base_patch32_clip_224.openai"  # from which open_clip takes OpenAI's weights
# each would end the metadata, a cell, a line or an attribute, or has a different type
HOSTILE = (
    "---\n",
    "a: b",
    "*x",
    "no",
    "1.5",
    "[link](http://evil.example)",
    "<script>alert(1)</script>",
    "a|b",
    "`code`",
    "caf\u00e9 \u732b",
    "'\"",
    "# head",
    "1. one",
    "- dash",
    "www.evil.example",
    "\\",
)


@pytest.fixture
def counted(run) -> Path:
    """A run with counts and a fitted temperature."""
    weights = run / SELECTED
    loaded = Loaded(run, files.sha256_file(weights), load_state(weights))
    write_results(loaded, {"imagenet-val": evaluated(3), "my|set": evaluated(9)})
    results = document(run / "results.json")
    fitted = {"value": TEMPERATURE, "images": 8, "train_set": "train", "held_out": 8}
    for count in results["sets"].values():
        count["temperature"] = {**fitted, "manifest_sha256": "0" * 64, "split_seed": 0}
    (run / "results.json").write_text(json.dumps(results))
    return run


@pytest.fixture
def folder(convert, counted, openai, tmp_path) -> Path:
    """Its export."""
    out = tmp_path / "hub"
    convert("export", counted, "--to", "open-clip", "--out", out, "--text", openai)
    return out


def run_without_rft(script: str, *arguments: object) -> str:
    """Run Python code in a process that cannot import rft; return its output."""
    hidden = f"import sys; sys.modules['rft'] = None\n{script}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", hidden, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_loader_gives_rfts_probabilities(folder, counted, tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate([(16, 16), (40, 31), (23, 90)]):
        paths.append(tmp_path / f"{number}.png")
        pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    colours = Image.fromarray(rng.integers(256, size=(30, 20, 3), dtype=np.uint8))
    clear = colours.copy()
    clear.putalpha(Image.fromarray(rng.integers(256, size=(30, 20), dtype=np.uint8)))
    deep = Image.fromarray(rng.integers(2**16, size=(30, 20), dtype=np.uint16))
    kinds = {"rgba": clear, "la": clear.convert("LA"), "i16": deep, "cmyk": colours.convert("CMYK")}
    for name, image in {**kinds, "p": colours.quantize(8)}.items():
        paths.append(tmp_path / f"{name}.{'jpg' if name == 'cmyk' else 'png'}")
        image.save(paths[-1], **({"transparency": 3} if name == "p" else {}))
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(paths[1]).save(turned, exif=exif, quality=95)
    # run as the page shows, in one process that also records its results
    script = (
        "import json, runpy\n"
        "del sys.argv[0]\n"
        "found = runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(json.dumps([found['names'], found['probabilities'].tolist()]))"
    )
    *lines, computed = run_without_rft(script, folder / "load.py", *paths, turned).splitlines()
    names, found = json.loads(computed)
    squares = [read_square(path, 16, path.name, 1) for path in [*paths, turned]]
    images_BCHW = torch.from_numpy(np.stack(squares))
    model = build_classifier(*load_state(counted / SELECTED)[:2])
    with torch.no_grad():
        expected_BK = (model(images_BCHW) / TEMPERATURE).softmax(dim=1)
    torch.testing.assert_close(torch.tensor(found), expected_BK, rtol=0, atol=1e-5)
    assert names == [f"class {n}" for n in range(4)]  # the released code's file has no class names
    for path, line, row_K in zip([*paths, turned], lines, expected_BK, strict=True):
        assert line == f"{path}: class {int(row_K.argmax())} ({float(row_K.max()):.1%})"


@pytest.mark.slow
def test_an_import_names_the_temperature_that_it_loses(folder, convert, tmp_path, capsys):
    capsys.readouterr()
    call(convert_command, "import", folder, "--out", tmp_path / "again")
    (line,) = [one for one in complaints(capsys.readouterr().err) if "temperature" in one]
    assert f"the temperature of {folder}, {TEMPERATURE}, is not imported; fit it again" in line


@pytest.mark.slow
def test_the_page_has_metadata_and_what_is_known(folder, counted):
    page = ModelCard.load(folder / "README.md")
    data = page.data.to_dict()
    assert data["pipeline_tag"] == "image-classification"
    assert data["library_name"] == "open_clip"
    assert data["license"] == "unknown"
    assert "base_model" not in data
    (index,) = data["model-index"]
    results = {one["dataset"]["type"]: one["metrics"][0] for one in index["results"]}
    assert results["imagenet-val"]["value"] == 0.3
    assert results["my|set"]["value"] == 0.9
    text = page.text
    assert "| ImageNet | 30.00 | 10.78 to 60.32 | 3 of 10 | 30.00 |" in text
    assert "| my\\|set | 90.00 |" in text
    assert f"divided by {TEMPERATURE}" in text
    assert files.sha256_file(folder / "head.safetensors") in text
    assert files.sha256_file(counted / SELECTED) in text
    assert str(folder.parent) not in text  # no local path
    assert card.read(folder / "card.json").temperature == TEMPERATURE


def test_what_held_or_froze_weights_is_among_the_settings():
    optim = {"freeze": ["visual.conv1*", "head.*"], "optimizer": "ftp", "l2_sp": 0.1}
    text = described(settings={"optim": optim})
    assert "| optim.freeze | visual.conv1\\* head\\.\\* |" in text
    assert "| optim.optimizer | ftp |" in text
    method = {"teacher": "wma", "head_weight": 0.1, "donor_choice": "unlike", "loss": "contrastive"}
    text = described(settings={"method": method, "loader": {"shots": 4, "augment": "crop-flip"}})
    plain = text.replace("\\", "")
    for row in ("method.teacher | wma", "method.head_weight | 0.1", "loader.shots | 4"):
        assert f"| {row} |" in plain
    for name in ("donor_choice", "loss", "augment"):
        assert f".{name} |" in plain
    # of a run that froze nothing, and of a third-party document
    for value in ([], [1], ["a", {}], {}):
        assert "optim.freeze" not in described(settings={"optim": {"freeze": value}})


def described(**fields: object) -> str:
    """The page of a card with these fields."""
    tower = ARCHITECTURE
    pixels = card.Preprocessing(size=tower.image_size, mean=tower.mean, std=tower.std)
    plain = {
        "format": "open-clip",
        "source": card.Source(path="run", sha256="0" * 64),
        "files": {},
        "architecture": tower,
        "activation": "QuickGELU",
        "preprocessing": pixels,
        "head": card.Head(classes=len(fields.get("classes", "ab")), features=tower.embed_dim),
    }
    return model_card.page(card.Card(**{**plain, **fields})).decode()


def test_foreign_names_stay_text():
    names = tuple(name.strip() for name in HOSTILE)
    count = {"correct": 1, "total": 2, "manifest_sha256": "0" * 64, "interval": (0.1, 0.9)}
    text = described(
        classes=names,
        recipe="x: [1, '---'] | <b>",
        base_model="some/one: *a",
        metrics={"s: |<i>": count},
    )
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    data = yaml.safe_load(head)
    assert data["base_model"] == "some/one: *a"
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == "s: |<i>"
    # no character of a name has a meaning: each is escaped by a backslash
    for number, name in enumerate(names):
        (line,) = re.findall(rf"^{number}\. (.*)$", body, re.M)
        assert re.sub(r"\\(.)", r"\1", line) == name
        assert not re.findall(r"(?<!\\)(?:\\\\)*[<>`|*\[\]#:]|^-|www\.|^1\. ", line)
    assert "<b>" not in body
    assert "<i>" not in body


@pytest.mark.parametrize(
    ("base", "licence"),
    [
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "MIT"),
        ("timm/vit_base_patch32_clip_224.openai", "MIT"),
        ("someone/else", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_licence_that_is_not_known_is_unknown(base, licence):
    text = described(base_model=base)
    (line,) = re.findall(r"^- Pre-trained weights.*$", text, re.M)
    assert line.endswith(f": {licence}.")
    assert "- Training images: unknown to rft." in text


def test_the_licence_of_the_included_model_is_rfts():
    text = described(architecture=dataclasses.replace(ARCHITECTURE, clip="rft-miniature"))
    assert "- Pre-trained weights (rft-miniature): Apache-2.0." in text


@pytest.mark.parametrize(
    ("text", "clip", "pretrained", "base"),
    [
        ("", "ViT-B-32", "laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("", "ViT-B-32-quickgelu", "openai", OPENAI),
        ("openai", "ViT-B-32-quickgelu", "", OPENAI),
        ("", "hf-hub:someone/else", "", "someone/else"),
        ("hf-hub:someone/else", "ViT-B-32", "", "someone/else"),
        ("hf-hub:someone/else", "ViT-B-32-quickgelu", "openai", OPENAI),
        ("", "ViT-B-32", "weights.pt", None),
        ("weights.pt", "ViT-B-32-quickgelu", "openai", OPENAI),
        ("", "local-dir:/home/me/clip", "", None),
    ],
)
def test_the_base_model_is_that_of_the_hub(text, clip, pretrained, base):
    tower = dataclasses.replace(ARCHITECTURE, clip=clip)
    model = records.Model(clip=clip, pretrained=pretrained)
    config = records.RunConfig(recipe="vanilla", seed=0, model=model)
    assert text_tower.base_model(text, tower, config) == base


def test_a_thousand_classes_are_in_the_card():
    text = described(classes=tuple(f"name {n}" for n in range(1000)))
    assert "99. name 99\n\nand 900 more in card.json.\n" in text
    assert "name 100\n" not in text


@pytest.mark.parametrize(
    ("clip", "settings", "weights"),
    [
        ("rft-miniature", {}, "included in rft"),
        ("local-dir:/home/me/clip", {"model": {"pretrained": "openai"}}, "from a local folder"),
        ("ViT-B-32", {"model": {"pretrained": "/home/me/own.pt"}}, "own.pt"),
        ("ViT-B-32", {"model": 3}, "not recorded"),
    ],
)
def test_pre_trained_weights_have_a_name(clip, settings, weights):
    tower = dataclasses.replace(ARCHITECTURE, clip=clip)
    text = described(architecture=tower, settings=settings)
    assert f"| pre-trained weights | {model_card._text(weights)} |" in text
    assert ("trained on images and texts from the web" in text) == (clip != "rft-miniature")
    assert "/home/me" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "usage: python load.py IMAGE..."),
        (("README.md",), "error: README.md: cannot identify image file "),
        (("none.png",), "error: none.png: No such file or directory"),
        (("cut.png",), "error: cut.png: "),
        (("deep.tif",), "error: deep.tif: unsupported pixel mode F; save it with 8 bits"),
        (("key.png",), "error: key.png: one of its colours is transparent; save it with an alpha"),
    ],
)
def test_a_mistake_of_the_loader_is_a_line(folder, words, line):
    Image.new("L", (8, 8), 3).save(folder / "key.png", transparency=3)
    Image.new("F", (8, 8), 3).save(folder / "deep.tif")
    Image.effect_noise((40, 40), 50).save(folder / "cut.png")
    data = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    done = subprocess.run(
        [sys.executable, folder / "load.py", *words], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_loader_checks_an_edited_card(folder):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    whole = document(folder / "card.json")
    for edit, line in (
        ({"classes": ["a", "b", "c"]}, "classes must be null or a list of 4 names"),
        ({"classes": "abcd"}, "classes must be null or a list of 4 names"),
        ({"temperature": -5}, "temperature is -5; it must be null or above 0"),
        ({"temperature": 0}, "temperature is 0; it must be null or above 0"),
        ({"temperature": "1"}, "temperature is '1'; it must be null or above 0"),
        (None, "Expecting value: line 1 column 1 (char 0)"),
    ):
        text = json.dumps(whole | edit) if edit else "x"
        (folder / "card.json").write_text(text)
        command = [sys.executable, folder / "load.py", "a.png"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"error: {folder / 'card.json'}: {line}\n"


def test_the_page_names_the_commands_that_take_it():
    assert "`rft predict FOLDER IMAGE...`, or `rft.load(FOLDER)`" in described()
    assert "rft convert import" not in described()


def test_what_is_not_known_is_named():
    text = described(unfinished="step 3 of 9")
    for line in (
        "| recipe | not recorded |",
        "Not measured.",
        "not ended (step 3 of 9)",
        "Not recorded",
    ):
        assert line in text
    assert "model-index" not in text
    assert "model_name" not in text
