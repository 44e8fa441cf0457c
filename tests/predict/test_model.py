"""A model in Python: the results of an evaluation, on the same files."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import rft
from rft.classes import Classes
from rft.clip.classifier import build_classifier, load_state, save_classifier
from rft.clip.weights import HUB_CONFIG
from rft.convert import command as convert
from rft.dist import World
from rft.evaluate.count import predict
from rft.loading.dataset import PackedDataset
from rft.photos.plan import Task
from rft.predict.images import read_squares
from rft.predict.model import Model
from rft.runs.folder import checkpoint_path, read_results
from rft.runs.predictions import path_of
from tests import tiny
from tests.conftest import build_model
from tests.predict.conftest import evaluate, images_of
from tests.reference import textbook

ALONE = World(rank=0, size=1, local_rank=0)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(home) -> Model:
    return rft.load(home.run)


def test_logits_are_those_of_an_evaluation_bit_by_bit(home, model):
    saved = load_state(checkpoint_path(home.run))
    (expected,) = predict(
        [build_classifier(saved.state, saved.architecture)],
        PackedDataset(str(home.data / "test")),
        image_size=16,
        world=ALONE,
        device=torch.device("cpu"),
        logits=np.float32,
    )
    paths = images_of(home)
    # more than one forward takes, and a part of one
    assert len(paths) == 72
    np.testing.assert_array_equal(model.logits(paths), expected.logits_NK)


def test_probabilities_are_those_that_an_evaluation_keeps(home, model):
    recorded = np.load(path_of(home.run, "test"))
    found = model.classify(map(str, images_of(home)), top=1)
    assert [one.labels[0] for one in found] == recorded["prediction"].tolist()
    scaled = np.array([one.probability for one in found]).astype(np.float32)
    np.testing.assert_array_equal(scaled, recorded["scaled_confidence"])
    assert {one.temperature for one in found} == {model.temperature}
    assert model.temperature == read_results(home.run).sets["test"].temperature.value


def test_without_a_fitted_temperature_they_are_the_models_own(home, tmp_path):
    shutil.copytree(home.run, tmp_path / "run")
    for name in ("results.json", "predictions/test.npz"):
        (tmp_path / "run" / name).unlink()
    evaluate(home, tmp_path / "run")
    found = rft.load(tmp_path / "run").classify(images_of(home), top=1)
    recorded = np.load(path_of(tmp_path / "run", "test"))["confidence"]
    np.testing.assert_array_equal(np.float32([one.probability for one in found]), recorded)
    assert {one.temperature for one in found} == {None}


def test_classes_come_in_the_order_of_their_probability(home, model):
    (one,) = model.classify(images_of(home)[:1], top=9)
    assert sorted(one.names) == list(model.class_names) == ["blue", "green", "grey", "red"]
    assert one.ids == one.names == tuple(model.class_names[label] for label in one.labels)
    assert list(one.probabilities) == sorted(one.probabilities, reverse=True)
    assert sum(one.probabilities) == pytest.approx(1)
    assert (one.name, one.probability) == one.shares[0] == (one.names[0], one.probabilities[0])
    assert model.classify([]) == []


def test_of_equal_logits_the_first_class_comes_first(model):
    (one,) = model.predictions(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), top=3)
    assert one.labels == (1, 2, 3)
    with pytest.raises(ValueError, match="top is 0; it must be 1 or more"):
        model.predictions(torch.zeros(1, 4), top=0)
    for value, text in ((1.5, "1.5"), ("2", "'2'"), (None, "None")):
        with pytest.raises(ValueError, match=f"top is {text}; it must be a whole number"):
            model.predictions(torch.zeros(1, 4), top=value)
    assert len(model.predictions(torch.zeros(1, 4), top=np.int64(2))[0].names) == 2
    # results.json may contain any value
    tiny_one = dataclasses.replace(model, temperature=1e-308)
    with pytest.raises(ValueError, match="its temperature, 1e-308, is not usable"):
        tiny_one.predictions(torch.tensor([[100.0, 1.0]]), top=1)


def test_opened_images_are_treated_as_their_files(home, model):
    paths = images_of(home)
    opened = [Image.open(path) for path in paths]
    assert {image.mode for image in opened} >= {"RGB", "RGBA", "P", "CMYK", "I;16"}
    mixed = [one if number % 3 else paths[number] for number, one in enumerate(opened)]
    np.testing.assert_array_equal(model.logits(mixed), model.logits(paths))


def test_features_are_those_that_the_head_reads(home, model):
    paths = images_of(home)
    features_NE = torch.from_numpy(model.features(paths))
    head = model.classifier.head
    logits_NK = F.linear(F.normalize(features_NE, dim=-1), head.weight, head.bias)
    torch.testing.assert_close(logits_NK, torch.from_numpy(model.logits(paths)))
    assert model.features([]).shape == (0, features_NE.shape[1])


def test_relevance_is_the_methods_own(home, model):
    paths = images_of(home)[:20]  # more than one forward of maps takes
    (squares,) = read_squares(paths, 16, 64, max_pixels=1)
    labels = [number % 4 for number in range(20)]
    # without gradients, as users run it
    with torch.no_grad():
        found_NGG = model.relevance(paths, labels)
        predicted_NGG = model.relevance(paths)
    best = [one.labels[0] for one in model.classify(paths, top=1)]
    pixels_NCHW = textbook.normalise_images(model.classifier, squares.images_BCHW)
    model.classifier.requires_grad_(True)
    for maps_NGG, wanted in ((found_NGG, labels), (predicted_NGG, best)):
        for map_GG, image_CHW, label in zip(maps_NGG, pixels_NCHW, wanted, strict=True):
            expected_P = textbook.relevance(model.classifier, image_CHW, label).detach()
            expected_GG = (expected_P / expected_P.max()).view(4, 4).numpy()
            np.testing.assert_allclose(map_GG, expected_GG, atol=1e-4)
    model.classifier.requires_grad_(False)
    assert not np.allclose(found_NGG, predicted_NGG)
    names = [model.class_names[label] for label in labels]
    np.testing.assert_array_equal(model.relevance(paths, names), found_NGG)


def test_classes_that_are_none_are_refused(home, model):
    paths = images_of(home)[:2]
    for classes, message in (
        (["red", "rde"], r"no class is named 'rde'; did you mean 'red'\?"),
        ([0, 4], "no class has label 4; labels go from 0 to 3"),
        ([0, -1], "no class has label -1; labels go from 0 to 3"),
        ([0, 1.5], "a class is 1.5; it must be a whole number"),
        ([0, None], "a class is None; it must be a whole number"),
        (["red"], "1 classes were given for a different number of images"),
        ("red", "'red' is one class; pass a list with a class for each image"),
        (1, "1 is one class; pass a list"),
        (["red"] * 3, "3 classes were given for a different number of images"),
    ):
        with pytest.raises(ValueError, match=message):
            model.relevance(paths, classes)


def test_a_name_of_several_classes_is_refused_and_its_id_is_not(tmp_path):
    path = tmp_path / "m.safetensors"
    classes = Classes(names=("crane", "crane", "ox"), ids=("n1", "n2", "n3"))
    save_classifier(str(path), build_model(classes=3), {"step": "0"}, classes)
    model = rft.load(path)
    assert model.label_of("n2") == 1
    assert model.label_of("ox") == 2
    message = r"have the name or id 'crane' \(labels 0 and 1\); pass a label"
    with pytest.raises(ValueError, match=message):
        model.label_of("crane")


def test_an_id_that_is_the_name_of_a_different_class_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    classes = Classes(names=("11", "ox", "12"), ids=("10", "11", "12"))
    save_classifier(str(path), build_model(classes=3), {"step": "0"}, classes)
    model = rft.load(path)
    with pytest.raises(ValueError, match=r"have the name or id '11' \(labels 0 and 1\)"):
        model.label_of("11")
    assert model.label_of("12") == 2  # id and name of one class
    assert model.label_of("10") == 0


def test_an_image_that_cannot_be_read_is_named(home, model, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for images, message in (
        ([*images_of(home)[:3], tmp_path / "broken.jpg"], "broken.jpg is not a readable JPEG"),
        ([tmp_path / "none.png"], "none.png cannot be read: No such file or directory"),
        ([tmp_path], "cannot be read: .* is a folder"),
        ([Image.new("RGB", (8, 8)), Image.new("F", (8, 8))], "image 1 cannot be read: .* mode F"),
        (tmp_path / "broken.jpg", "is one image; pass a list"),
        (str(tmp_path / "broken.jpg"), "is one image; pass a list"),
        (Image.new("RGB", (8, 8)), r"^this is a PIL image \(Image\); pass a list of PIL images"),
        (np.zeros((8, 8, 3)), r"^this is numpy\.ndarray; pass a list of PIL images or paths$"),
        ([np.zeros((8, 8, 3))], r"image 0 is numpy\.ndarray; .* PIL\.Image\.fromarray\(array\)"),
        ([None], r"image 0 is NoneType; it must be a path or a PIL image$"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            model.classify(images)
        assert " at 0x" not in str(refused.value)


def test_paths_may_come_in_an_array(home, model):
    paths = [str(path) for path in images_of(home)[:3]]
    assert model.classify(np.array(paths)) == model.classify(paths)


def test_a_model_prints_as_one_line(home, model):
    expected = f"<rft.Model {home.run}: {model.classifier.architecture.clip}, 4 classes, "
    assert repr(model).startswith(expected)
    assert re.search(r", temperature [\d.]+, on (cpu|cuda)", repr(model))
    assert "\n" not in repr(model)


def test_a_file_an_export_and_a_run_are_one_model(home, model, tmp_path, tiny_clip):
    paths = images_of(home)[:5]
    expected = model.logits(paths)
    weights = checkpoint_path(home.run)
    inside = rft.load(weights)
    # a file in its run folder has the run's temperature, a copy has none
    assert inside.temperature == model.temperature
    shutil.copy(weights, tmp_path / "copy.safetensors")
    outside = rft.load(tmp_path / "copy.safetensors")
    assert outside.temperature is None
    export = ("export", home.run, "--to", "open-clip", "--out", tmp_path / "export")
    tiny.call(convert, *export)
    # the card of an export has the temperature
    shutil.copytree(tmp_path / "export", tmp_path / "fitted")
    card = json.loads((tmp_path / "fitted" / "card.json").read_text())
    (tmp_path / "fitted" / "card.json").write_text(json.dumps(card | {"temperature": 1.5}))
    assert rft.load(tmp_path / "fitted").classify(paths, top=1)[0].temperature == 1.5
    # as left in such a folder by third-party code
    (tmp_path / "export" / "config.json").write_text('{"model_type": "clip"}')
    exported = rft.load(str(tmp_path / "export"))
    for one in (inside, outside, exported):
        assert one.classes == model.classes
        np.testing.assert_array_equal(one.logits(paths), expected)


def test_an_export_without_one_of_its_files_names_it(home, tmp_path, tiny_clip):
    export = tmp_path / "export"
    tiny.call(convert, "export", home.run, "--to", "open-clip", "--out", export)
    for name in ("head.safetensors", "open_clip_model.safetensors", HUB_CONFIG):
        data = (export / name).read_bytes()
        (export / name).unlink()
        with pytest.raises(ValueError, match=rf"{name} is missing, but card\.json lists it: copy"):
            rft.load(export)
        (export / name).write_bytes(data)
    (export / "README.md").unlink()
    rft.load(export)


def test_what_is_no_model_is_refused(tmp_path, tiny_clip):
    clip = tiny_clip.removeprefix("local-dir:")
    (tmp_path / "text.safetensors").write_text("no weights")
    bad = build_model()
    with torch.no_grad():
        bad.head.weight[0, 0] = torch.nan
    save_classifier(str(tmp_path / "nan.safetensors"), bad, {"step": "0"}, None)
    for path, message in (
        (tmp_path / "none", "no weights at .*none"),
        (tmp_path, "no checkpoint at .*best.safetensors"),
        (clip, "has no classification head; make .* for your classes: rft convert import "),
        (tmp_path / "text.safetensors", "has an unknown format"),
        (tmp_path / "nan.safetensors", "head.weight are not finite"),
        ("s3://bucket/run", "it must be a local folder or file"),
        (tmp_path / "a.PNG", r"a\.PNG is an image; name the model first: a run folder"),
    ):
        with pytest.raises(ValueError, match=message):
            rft.load(path)
    message = r"hf-hub:me/m is on the model hub; download it: hf download me/m --local-dir FOLDER"
    with pytest.raises(ValueError, match=message):
        rft.load("hf-hub:me/m")
    with pytest.raises(ValueError, match=r"unknown device 'gpu'; .*cpu"):
        rft.load(tmp_path, device="gpu")


def test_a_model_is_found_by_open_clips_prefix_and_in_the_home_folder(tmp_path, monkeypatch):
    save_classifier(str(tmp_path / "m.safetensors"), build_model(), {"step": "0"}, None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f"local-dir:{tmp_path}/m.safetensors", "~/m.safetensors"):
        assert rft.load(name).where == str(tmp_path / "m.safetensors")


def test_the_folder_above_runs_names_them(home, tmp_path):
    for number in range(4):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / f"run{number}").symlink_to(home.run)
    runs = tmp_path / "runs"
    message = f"no checkpoint at .*; name one of the runs: {runs}/run0, .*run2 and 1 more$"
    for path in (tmp_path, runs):
        with pytest.raises(ValueError, match=message):
            rft.load(path)


def test_the_folder_that_holds_an_export_is_answered_with_it(tmp_path):
    export = Task.model.fget(SimpleNamespace(out=tmp_path))  # as left by `rft photos`
    (export / HUB_CONFIG).parent.mkdir()
    (export / HUB_CONFIG).touch()
    with pytest.raises(ValueError, match=rf"^{tmp_path} is not a model; did you mean {export}\?$"):
        rft.load(tmp_path)


def test_logits_that_are_not_finite_are_refused(tmp_path):
    model = build_model()
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    save_classifier(str(tmp_path / "m.safetensors"), model, {"step": "0"}, None)
    with pytest.raises(ValueError, match=r"m\.safetensors: the logits of an image are NaN"):
        rft.load(tmp_path / "m.safetensors").classify([Image.new("RGB", (20, 20), "red")])


def test_a_head_without_names_has_numbers_and_a_warning(tmp_path, capsys):
    save_classifier(str(tmp_path / "m.safetensors"), build_model(), {"step": "0"}, None)
    model = rft.load(tmp_path / "m.safetensors")
    assert model.class_names == tuple(f"class {number}" for number in range(5))
    (line,) = tiny.complaints(capsys.readouterr().err)
    assert "does not name the classes of its head" in line


def test_the_temperature_of_other_weights_is_not_used(home, tmp_path, capsys):
    shutil.copytree(home.run, tmp_path / "run")
    results = tmp_path / "run" / "results.json"
    document = json.loads(results.read_text())
    results.write_text(json.dumps(document | {"checkpoint_sha256": "0" * 64}))
    capsys.readouterr()
    assert rft.load(tmp_path / "run").temperature is None
    (line,) = tiny.complaints(capsys.readouterr().err)
    assert "was evaluated with other weights, so its temperature is not used" in line
    # equal weights, and sets that contradict each other
    other = json.loads(json.dumps(document["sets"]["test"]))
    other["temperature"]["value"] *= 2
    document["sets"]["other"] = other
    results.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"run: its sets were evaluated at different temp"):
        rft.load(tmp_path / "run")


def test_importing_rft_imports_nothing_that_is_slow():
    """Its attributes are also available without torch."""
    code = (
        "import sys, rft\n"
        "slow = {'torch', 'numpy', 'PIL', 'pydantic', 'fsspec', 'rich'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        "assert {'load', 'Model', 'Prediction'} <= set(dir(rft))\n"
        "assert not hasattr(rft, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    # the types for type checkers
    stub = Path(rft.__file__).with_suffix(".pyi").read_text()
    assert re.findall(r" as (\w+)", stub) == ["Model", "Prediction", "load"]


def test_the_lines_of_the_readme_run(home, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import rft\n.*?)```", readme, re.S)
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / "model").symlink_to(home.run)
    shutil.copy(images_of(home)[0], tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - a page of our own
    assert capsys.readouterr().out.split()[0] in names["model"].class_names
    assert names["features"].shape == (1, 16)
    assert names["relevance"].shape == (1, 4, 4)
