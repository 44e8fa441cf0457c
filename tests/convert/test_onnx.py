"""A classifier exported to ONNX computes rft's logits, for any number of images."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import rft
from rft.clip.classifier import build_classifier, load_state
from rft.convert import model_card, onnx_model
from rft.runs.filenames import SELECTED
from rft.storage import files
from tests import formats
from tests.conftest import build_model
from tests.convert.compare import document

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("known_models")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> bytes:
    model = build_model()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    return onnx_model.to_bytes(state, model.architecture, {"classes": ["a", "caf\u00e9"]})


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_gives_rfts_logits(exported, batch):
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 3, 16, 16)
    images_BCHW = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (found_BK,) = session.run(["logits"], {"images": images_BCHW.numpy()})
    with torch.no_grad():
        expected_BK = build_model()(images_BCHW)
    assert expected_BK.abs().max() > 5  # logits of CLIP's scale, so that 1e-4 is a meaningful bound
    torch.testing.assert_close(torch.from_numpy(found_BK), expected_BK, rtol=0, atol=1e-4)


def test_the_file_names_its_classes_and_no_path(exported):
    model = onnx.load_model_from_string(exported)
    onnx.checker.check_model(model, full_check=True)
    (opset,) = model.opset_import
    assert opset.version == onnx_model.OPSET
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata == {"classes": ["a", "caf\u00e9"]}
    (images,) = model.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert (images.type.tensor_type.elem_type, dims) == (
        onnx.TensorProto.UINT8,
        ["batch", 3, 16, 16],
    )
    assert b".py" not in exported


def test_the_export_of_a_run(convert, refused, run, tmp_path, monkeypatch):
    out = tmp_path / "m.onnx"
    convert("export", run, "--to", "onnx", "--out", out)
    card = document(tmp_path / "m.onnx.json")
    assert card["files"] == {"m.onnx": files.sha256_file(out)}
    model = onnx.load(out)
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["source_sha256"] == files.sha256_file(run / SELECTED)
    assert metadata["temperature"] is None
    images_BCHW = np.zeros((1, 3, 16, 16), np.uint8)
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    (found_BK,) = session.run(None, {"images": images_BCHW})
    with torch.no_grad():
        ours = build_classifier(*load_state(run / SELECTED)[:2])
        expected_BK = ours(torch.from_numpy(images_BCHW))
    torch.testing.assert_close(torch.from_numpy(found_BK), expected_BK, rtol=0, atol=1e-4)
    line = refused("export", run, "--to", "onnx", "--out", tmp_path / "m.bin")
    assert "its name must end in .onnx" in line
    monkeypatch.setattr(onnx_model, "PACKAGES", ("onnx", "no_such_package"))
    line = refused("export", run, "--to", "onnx", "--out", tmp_path / "m2.onnx")
    assert "needs no_such_package; in rft's clone: pip install '.[onnx]'" in line


def test_the_example_of_the_page_gives_rfts_probabilities(
    convert, released, tmp_path, tiny_data, monkeypatch, capsys
):
    options = ("--clip", formats.NAME, "--data", tiny_data)
    convert("import", released, "--out", tmp_path / "run", *options)
    convert("export", tmp_path / "run", "--to", "onnx", "--out", tmp_path / "ours.onnx")
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (read,) = re.findall(r"^def read.*?\n(?=\n\n)", code, re.S | re.M)
    assert read in model_card.loader().decode()
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(37, 50, 3), dtype=np.uint8)
    deep = Image.fromarray(rng.integers(2**16, size=(37, 50), dtype=np.uint16))
    clear = Image.fromarray(rng.integers(256, size=(37, 50, 4), dtype=np.uint8))
    images = {"photo.jpg": Image.fromarray(pixels), "deep.png": deep, "clear.png": clear}
    model = rft.load(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for name, image in images.items():
        image.save(name)
        (expected,) = model.classify([name], top=1)
        names: dict = {}
        exec(compile(code.replace("photo.jpg", name), "export.md", "exec"), names)  # noqa: S102 - a page of our own
        assert capsys.readouterr().out.split()[0] == expected.name
        assert names["probabilities"].max() == pytest.approx(expected.probability, abs=1e-5)


def test_weights_beyond_what_protobuf_holds(monkeypatch):
    monkeypatch.setattr(onnx_model, "BYTES", 1000)
    with pytest.raises(ValueError, match="bytes; ONNX files are limited to 1,000"):
        onnx_model.to_bytes({"head.weight": torch.zeros(1000)}, build_model().architecture, {})
