"""Models are exported completely, in third-party formats."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rft.clip import hub, load, unpickle, weights
from rft.clip.classifier import build_classifier, load_state, save_state
from rft.config import ModelConfig
from rft.convert import command as convert_command
from rft.evaluate import command as evaluate_command
from rft.evaluate.checkpoints import Loaded
from rft.evaluate.results import write_results
from rft.merge import command as merge_command
from rft.runs.filenames import SELECTED
from rft.shards.manifest import Manifest
from rft.storage import files
from rft.train import command as train_command
from tests import formats
from tests.convert.compare import document, same, state_of
from tests.predicted import evaluated
from tests.tiny import call, forget_weights, training

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("known_models")]


def test_released_and_model_soups_round_trips(convert, run, released, state, tmp_path):
    text = tmp_path / "text.pt"
    torch.save(formats.build_clip().state_dict(), text)
    for to in ("released", "model-soups"):
        out = tmp_path / f"{to}.pt"
        options = ("--text", text) if to == "model-soups" else ()
        convert("export", run, "--to", to, "--out", out, *options)
        convert("import", out, "--out", tmp_path / to, "--clip", formats.NAME)
        assert same(state_of(tmp_path / to), state)
        assert document(tmp_path / to / "config.json")["imported_from"]["format"] == to
    # loadable by the third-party code: the same names as in its own files, plain tensors only
    theirs = unpickle.read(released)[0]["model"]
    ours = torch.load(tmp_path / "released.pt", weights_only=True)
    assert ours["model"].keys() == theirs.keys()
    assert ours["test_acc"] is None
    formats.write_model_soups(tmp_path / "theirs.pt", state)
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    assert same(torch.load(tmp_path / "model-soups.pt", weights_only=True), theirs)


def test_released_export_carries_the_accuracy_that_the_teacher_prints(
    convert, run, tmp_path, tiny_data
):
    call(evaluate_command, run, "--data", tiny_data, "--sets", "imagenet-val", "--workers", 0)
    convert("export", run, "--to", "released", "--out", tmp_path / "m.pt")
    counts = document(run / "results.json")["sets"]["imagenet-val"]
    expected = 100 * counts["correct"] / counts["total"]
    assert torch.load(tmp_path / "m.pt", weights_only=True)["test_acc"] == expected
    card = document(tmp_path / "m.pt.json")
    kept = ("correct", "total", "manifest_sha256")
    found = card["metrics"]["imagenet-val"]
    assert {name: found[name] for name in kept} == {name: counts[name] for name in kept}
    # four classes of seven images each
    assert found["mean_per_class"] == pytest.approx(counts["correct"] / counts["total"])


def test_safetensors_export_is_evaluated_and_described(convert, openai, tmp_path, tiny_data):
    options = ("--clip", formats.NAME, "--data", tiny_data)
    convert("import", openai, "--out", tmp_path / "run", *options)
    out = tmp_path / "m.safetensors"
    convert("export", tmp_path / "run", "--to", "safetensors", "--out", out)
    assert same(load_state(out)[0], state_of(tmp_path / "run"))
    call(evaluate_command, out, "--data", tiny_data, "--sets", "imagenet-val", "--workers", 0)
    card = document(tmp_path / "m.safetensors.json")
    assert card["files"] == {"m.safetensors": files.sha256_file(out)}
    assert card["activation"] == "QuickGELU"
    assert card["architecture"]["embed_dim"] == 16
    assert card["preprocessing"]["size"] == 16
    assert card["head"]["logit_scale_in_weight"] is True
    assert card["classes"] == list(Manifest.load(f"{tiny_data}/imagenet-val").classes)
    assert card["source"]["sha256"] == files.sha256_file(out)
    assert card["provenance"]["packages"] == files.provenance()["packages"]
    # the header has everything that import needs
    convert("import", out, "--out", tmp_path / "again")
    assert same(state_of(tmp_path / "again"), state_of(tmp_path / "run"))


def test_open_clip_export_gives_the_same_features(convert, run, state, tmp_path, openai):
    out = tmp_path / "hub"
    convert("export", run, "--to", "open-clip", "--out", out, "--text", openai)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model.eval()
    generator = torch.Generator().manual_seed(0)
    pixels_BHWC = torch.randint(256, (5, 16, 16, 3), generator=generator, dtype=torch.uint8)
    theirs_BCHW = torch.stack([transform(Image.fromarray(p.numpy())) for p in pixels_BHWC])
    ours = build_classifier(*load_state(run / SELECTED)[:2])
    images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        features_BE = model.encode_image(theirs_BCHW)
        expected_BE = ours.features(ours.patches(images_BCHW))
        torch.testing.assert_close(features_BE, expected_BE, rtol=1e-4, atol=1e-5)
        head = load_file(out / "head.safetensors")
        normal_BE = torch.nn.functional.normalize(features_BE, dim=-1)
        logits_BK = normal_BE @ head["head.weight"].T + head["head.bias"]
        torch.testing.assert_close(logits_BK, ours(images_BCHW), rtol=1e-4, atol=1e-3)
    # image tower from the run, text tower from the original
    text = weights.read(openai).text
    visual = {k: v for k, v in state.items() if k.startswith("visual.")}
    assert same(model.state_dict(), {**visual, **text})
    assert open_clip.get_tokenizer(f"local-dir:{out}")(["a cat"]).shape == (1, 12)


def test_open_clip_round_trip(convert, run, state, tmp_path, openai):
    out = tmp_path / "hub"
    convert("export", run, "--to", "open-clip", "--out", out, "--text", openai)
    convert("import", f"local-dir:{out}", "--out", tmp_path / "again")
    assert same(state_of(tmp_path / "again"), state)
    assert load_state(tmp_path / "again" / SELECTED)[1] == load_state(run / SELECTED)[1]
    source = document(tmp_path / "again" / "config.json")["imported_from"]
    assert source["sha256"].keys() == {"open_clip_model.safetensors", "head.safetensors"}
    # and the folder is a CLIP to fine-tune, or to build other heads from
    clip = load.load_clip(ModelConfig(clip=f"local-dir:{out}", pretrained=""))
    assert clip.architecture.quick_gelu


def test_a_folder_of_the_users_own_with_its_words(convert, tmp_path, tiny_clip, tiny_data):
    folder = tiny_clip.removeprefix("local-dir:")
    convert("import", folder, "--out", tmp_path / "run", "--data", tiny_data)
    convert("export", tmp_path / "run", "--to", "open-clip", "--out", tmp_path / "hub")
    clip = load.load_clip(ModelConfig(clip=f"local-dir:{tmp_path / 'hub'}", pretrained=""))
    assert clip.tokenize(["a red square"]).shape == (1, 8)
    original = load_file(Path(folder) / "open_clip_model.safetensors")
    assert same(clip.model.state_dict(), original)
    assert clip.architecture.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("theirs", [{"resize_mode": "squash"}, {"interpolation": "bilinear"}])
def test_another_way_to_resize_is_warned_of(tmp_path, tiny_clip, tiny_data, capsys, theirs):
    def warning(*arguments: object) -> str:
        capsys.readouterr()
        call(convert_command, *arguments)
        return capsys.readouterr().err

    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip.removeprefix("local-dir:"), folder)
    config = document(folder / weights.HUB_CONFIG)
    config["preprocess_cfg"] |= theirs
    (folder / weights.HUB_CONFIG).write_text(json.dumps(config))
    said = f"{folder} was trained on images resized by open_clip's"
    line = ("import", folder, "--out", tmp_path / "run", "--data", tiny_data)
    assert warning(*line).count(said) == 1
    # the exported model was trained on images resized by rft
    line = ("export", tmp_path / "run", "--to", "open-clip", "--out", tmp_path / "hub")
    assert said in warning(*line)
    exported = document(tmp_path / "hub" / weights.HUB_CONFIG)["preprocess_cfg"]
    assert exported["mean"] == config["preprocess_cfg"]["mean"]
    assert (exported["resize_mode"], exported["interpolation"]) == ("shortest", "bicubic")
    line = ("import", tmp_path / "hub", "--data", tiny_data, "--out")
    assert "resized" not in warning(*line, tmp_path / "again")
    # with a head, the complete CLIP is not loaded
    (tmp_path / "hub" / weights.HUB_CONFIG).write_text(json.dumps(config))
    assert warning(*line, tmp_path / "headed").count("resized") == 1


def test_a_merged_model_finds_its_text_tower(convert, openai, tmp_path, tiny_data):
    options = ("--clip", formats.NAME, "--data", tiny_data)
    convert("import", openai, "--out", tmp_path / "a", *options)
    formats.write_released(tmp_path / "m.pt", formats.build_state(1))
    convert("import", tmp_path / "m.pt", "--out", tmp_path / "b", *options)
    call(merge_command, "wise", tmp_path / "b", tmp_path / "a", "--out", tmp_path / "m")
    convert("export", tmp_path / "m", "--to", "open-clip", "--out", tmp_path / "hub")
    found = weights.read(tmp_path / "hub")
    assert same(found.text, weights.read(openai).text)
    assert same({**found.visual, **found.head}, state_of(tmp_path / "m"))


def test_training_starts_from_an_openai_file_and_its_run_is_exported(
    convert, openai, tmp_path, tiny_data
):
    options = ("--scale", "miniature", "--data", tiny_data, "--run-dir", tmp_path / "run")
    options += ("--model.clip", formats.NAME, "--model.pretrained", openai)
    options += ("--loader.held-out", 8, "--loader.batch-size", 34, "--optim.epochs", 1)
    call(train_command, "vanilla", *options)
    tuned = state_of(tmp_path / "run")
    assert not same({**tuned, **weights.read(openai).visual}, tuned)
    convert("export", tmp_path / "run", "--to", "open-clip", "--out", tmp_path / "hub")
    found = weights.read(tmp_path / "hub")
    assert same(found.text, weights.read(openai).text)
    assert same({**found.visual, **found.head}, tuned)
    card = document(tmp_path / "hub" / "card.json")
    assert card["classes"] == ["red", "green", "blue", "grey"]
    assert (card["recipe"], card["seed"]) == ("vanilla", 0)
    assert card["settings"]["loader"]["batch_size"] == 34
    page = (tmp_path / "hub" / "README.md").read_text()
    ((_, manifest, *_),) = card["trained_on"]
    for line in (
        "| recipe | vanilla |",
        "| optim.epochs | 1 |",
        f"| training set imagenet-train | manifest {manifest} |",
        "- ImageNet: its terms of access",
        "datasets:\n- ILSVRC/imagenet-1k",
        "0. red\n1. green\n",
    ):
        assert line in page


def test_export_refuses(convert, refused, run, tmp_path, openai, monkeypatch):
    hub = ("--to", "open-clip", "--out", tmp_path / "hub")
    assert "no checkpoint at" in refused("export", tmp_path / "none.safetensors", *hub)
    line = refused("export", run, *hub)
    assert f"the text tower of this {formats.NAME} is not recorded; add --text" in line
    assert "nor a file; tags: none" in refused("export", run, *hub, "--text", "nope")
    line = refused("export", run, *hub, "--text", tmp_path / "ckpt-best.pt")
    assert "has no text tower" in line
    line = refused("export", run, "--to", "released", "--out", tmp_path / "m.bin")
    assert "its name must end in .pt" in line
    saved = load_state(run / SELECTED)
    gelu = load.architecture_of(formats.GELU_NAME)
    path = str(tmp_path / "gelu.safetensors")
    save_state(path, saved.state, gelu, saved.metadata, saved.classes)
    line = refused(
        "export", tmp_path / "gelu.safetensors", "--to", "released", "--out", tmp_path / "m.pt"
    )
    assert "the format released is for OpenAI's image towers, which have quick_gelu True" in line
    assert f"{formats.GELU_NAME} has False" in line
    formats.write_hub_folder(tmp_path / "other")
    line = refused("export", run, *hub, "--text", f"local-dir:{tmp_path / 'other'}")
    assert "the text tower belongs to a different model: mean: " in line
    assert not (tmp_path / "hub").exists()


def test_a_text_tower_that_was_trained_too_is_not_replaced(
    convert, refused, tmp_path, tiny_clip, tiny_data
):
    zero = training("zero-shot", tiny_data, tiny_clip, tmp_path / "zero-shot")
    call(train_command, *zero, "--optim.epochs", 0)
    call(train_command, *training("flyp", tiny_data, tiny_clip, tmp_path / "flyp"))
    ends = (tmp_path / "zero-shot", tmp_path / "flyp")
    call(merge_command, "wise", *ends, "--out", tmp_path / "wise")
    for name in ("flyp", "wise"):
        line = refused("export", tmp_path / name, "--to", "open-clip", "--out", tmp_path / "hub")
        assert "flyp trained its text tower as well (--method.loss contrastive)" in line
        assert not (tmp_path / "hub").exists()
        out = tmp_path / f"{name}.safetensors"
        convert("export", tmp_path / name, "--to", "safetensors", "--out", out)


@pytest.mark.parametrize("named", [(), ("--clip", formats.NAME)])
def test_the_card_beside_a_file_keeps_its_preprocessing(convert, run, tmp_path, named):
    state, architecture, metadata, classes = load_state(run / SELECTED)
    own = dataclasses.replace(architecture, mean=(0.1, 0.2, 0.3))
    save_state(str(tmp_path / "own.safetensors"), state, own, metadata, classes)
    convert("export", tmp_path / "own.safetensors", "--to", "released", "--out", tmp_path / "m.pt")
    convert("import", tmp_path / "m.pt", "--out", tmp_path / "back", *named)
    found, returned, _, _ = load_state(tmp_path / "back" / SELECTED)
    assert returned == own
    assert same(found, state)


@pytest.mark.parametrize("text", [None, "openai", "openai.pt"])
def test_the_hub_is_not_asked_for_what_weights_name(refused, run, openai, monkeypatch, text):
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda *a: asked.append(a))
    path = openai.parent / "m.safetensors"
    state, architecture, metadata, classes = load_state(run / SELECTED)
    named = dataclasses.replace(architecture, clip="hf-hub:evil/model")
    save_state(str(path), state, named, metadata, classes)
    option = ("--text", openai.parent / text) if text else ()
    line = refused("export", path, "--to", "open-clip", "--out", openai.parent / "hub", *option)
    assert "add --text hf-hub:evil/model if you trust it" in line
    assert asked == []


def test_export_never_overwrites(convert, refused, run, tmp_path, openai):
    hub = ("--to", "open-clip", "--out", tmp_path / "hub", "--text", openai)
    convert("export", run, *hub)
    before = files.sha256_file(tmp_path / "hub" / "open_clip_model.safetensors")
    (tmp_path / "hub" / "open_clip_config.json").unlink()
    convert("export", run, *hub)  # stopped before its end: resumes
    assert (tmp_path / "hub" / "open_clip_config.json").is_file()
    assert files.sha256_file(tmp_path / "hub" / "open_clip_model.safetensors") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "card.json").write_text("{}")
    line = refused("export", run, "--to", "open-clip", "--out", tmp_path / "mine", "--text", openai)
    assert "already exists; choose another --out" in line
    (tmp_path / "m.pt").write_bytes(b"mine")
    line = refused("export", run, "--to", "released", "--out", tmp_path / "m.pt")
    assert "already exists" in line
    assert (tmp_path / "m.pt").read_bytes() == b"mine"
    formats.write_released(tmp_path / "other.pt", formats.build_state(1))
    convert("import", tmp_path / "other.pt", "--out", tmp_path / "run2", "--clip", formats.NAME)
    line = refused("export", tmp_path / "run2", *hub)
    assert "holds a different export: weights: '" in line
    assert len(line.replace(str(tmp_path), "")) < 150


def test_the_same_run_by_a_different_path_is_the_same_export(
    convert, refused, run, tmp_path, openai, monkeypatch
):
    hub = ("--to", "open-clip", "--out", tmp_path / "hub")
    convert("export", run, *hub, "--text", openai)
    monkeypatch.chdir(tmp_path)
    convert("export", run.name, *hub, "--text", openai.name)
    assert document(tmp_path / "hub" / "card.json")["source"]["path"] == run.name
    # equal weights with other settings are a different export
    shutil.copytree(run, tmp_path / "other")
    config = document(run / "config.json")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"seed": 5}))
    line = refused("export", "other", *hub, "--text", openai)
    assert "holds a different export: seed: 0 -> 5; choose another --out" in line


def test_an_export_of_an_export_names_its_run(convert, refused, run, tmp_path, openai):
    hub = ("--to", "open-clip", "--out", tmp_path / "hub", "--text", openai)
    convert("export", run, *hub)
    line = refused("export", tmp_path / "hub", "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert line.endswith(f"{tmp_path / 'hub'} is an export; name its run: {run}")


CLASSES = "## Classes\n\n0. crimson\n1. green\n2. blue\n3. white"


def test_an_edited_card_is_kept(convert, refused, run, tmp_path, openai, capsys):
    out = tmp_path / "hub"
    command = ("export", run, "--to", "open-clip", "--out", out, "--text", openai)
    convert(*command)
    convert(*command)  # unedited: written anew
    names = ["crimson", "green", "blue", "white"]
    edited = json.dumps(document(out / "card.json") | {"classes": names})
    (out / "card.json").write_text(edited)
    call(convert_command, *command)
    printed = capsys.readouterr()
    assert f"{out / 'card.json'} was edited, so this export is kept" in printed.out
    warning = f"{out / 'README.md'} lists other classes than card.json; edit its list as well"
    assert warning in printed.err
    page = out / "README.md"
    text = page.read_text()
    page.write_text(text[: text.index("## Classes")] + f"{CLASSES}\n")
    call(convert_command, *command)
    assert warning not in capsys.readouterr().err
    assert (out / "card.json").read_text() == edited
    assert weights.read(out).classes.names == tuple(names)
    (out / "head.safetensors").unlink()
    assert "head.safetensors is missing; choose another --out" in refused(*command)


def test_a_card_is_of_these_very_weights(convert, refused, run, tmp_path):
    """An equal file name does not make a file this export, nor old counts current."""
    counts = {"correct": 3, "total": 10, "manifest_sha256": "0" * 64, "mean_per_class": 0.3}
    weights_path = run / SELECTED
    loaded = Loaded(run, files.sha256_file(weights_path), load_state(weights_path))
    write_results(loaded, {"imagenet-val": evaluated(3)})
    command = ("export", run, "--to", "safetensors", "--out", tmp_path / "m.safetensors")
    convert(*command)
    card = document(tmp_path / "m.safetensors.json")
    (found,) = card["metrics"].values()
    # scipy's, to six digits; by hand (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    assert found["interval"] == pytest.approx([0.107791, 0.603222], abs=1e-6)
    assert found == counts | {"interval": found["interval"]}
    assert card["source"]["sha256"] == files.sha256_file(run / SELECTED)
    convert(*command)  # the same weights again
    state, architecture, metadata, classes = load_state(run / SELECTED)
    other = {name: value + 1 for name, value in state.items()}
    save_state(str(run / SELECTED), other, architecture, metadata, classes)
    forget_weights(run)
    line = refused(*command)
    assert "holds a different export: weights: " in line
    assert document(tmp_path / "m.safetensors.json") == card
    (tmp_path / "m.safetensors").unlink()
    (tmp_path / "m.safetensors.json").unlink()
    convert(*command)
    assert document(tmp_path / "m.safetensors.json")["metrics"] == {}
