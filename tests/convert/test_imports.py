"""Third-party weights become run folders that every command accepts."""

import dataclasses
import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from rft.clip import hub, load, weights
from rft.clip.classifier import load_state
from rft.config import ModelConfig
from rft.evaluate import command as evaluate_command
from rft.merge import command as merge_command
from rft.report import command as report_command
from rft.runs.filenames import SELECTED
from rft.shards.manifest import Manifest
from rft.storage import files
from tests import formats
from tests.convert.compare import document, same, state_of
from tests.reference import zero_shot
from tests.tiny import call

pytestmark = pytest.mark.usefixtures("known_models")


WRITERS = {
    "released": formats.write_released,
    "model-soups": formats.write_model_soups,
    "wise-ft": formats.write_wise_ft,
}


@pytest.mark.parametrize("name", WRITERS)
def test_import_of_models_with_a_head(convert, state, tmp_path, name):
    WRITERS[name](tmp_path / "model.pt", state)
    out = tmp_path / "run"
    options = ("--clip", formats.NAME, "--recipe", "theirs", "--seed", 2)
    printed = convert("import", tmp_path / "model.pt", "--out", out, *options)
    assert f"imported: {out} ({name}, {formats.NAME}, 4 classes)" in printed
    found, architecture, metadata, _ = load_state(out / SELECTED)
    assert f"\nnext: python -m rft.evaluate {out} --data DATA\n  (DATA: " in printed
    assert same(found, state)
    assert architecture == load.architecture_of(formats.NAME)
    assert metadata == {"recipe": "theirs", "step": "0"}
    config = document(out / "config.json")
    sha256 = files.sha256_file(tmp_path / "model.pt")
    assert config["imported_from"]["sha256"] == {"model.pt": sha256}
    assert (config["recipe"], config["seed"]) == ("theirs", 2)
    assert config["imported_from"]["format"] == name
    assert (out / "provenance.json").is_file()


@pytest.mark.slow
def test_a_headless_file_gets_the_head_of_a_packed_sets_names(convert, openai, tmp_path, tiny_data):
    out = tmp_path / "run"
    options = ("--clip", formats.NAME, "--data", tiny_data, "--recipe", "zero-shot")
    printed = convert("import", openai, "--out", out, *options)
    sets = "imagenet-val imagenet-r imagenet-a"  # those of the tiny world
    assert printed.endswith(
        f"next: python -m rft.evaluate {out} --data {tiny_data} --sets {sets}\n"
    )
    clip = load.load_clip(ModelConfig(clip=formats.NAME, pretrained=str(openai)))
    manifest = Manifest.load(f"{tiny_data}/imagenet-val")
    expected = zero_shot.head_weight(clip, manifest.classes, manifest.templates)
    found = state_of(out)
    torch.testing.assert_close(found["head.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["head.bias"], torch.zeros(4))
    visual = {k: v for k, v in found.items() if k.startswith("visual.")}
    assert same(visual, weights.read(openai).visual)
    source = document(out / "config.json")["imported_from"]
    assert source["manifest_sha256"] == manifest.sha256


@pytest.mark.slow
def test_a_weights_tag(convert, openai, tmp_path, tiny_data, monkeypatch):
    tag = {"url": "-", "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, formats.NAME, {"tiny": tag})
    path = tmp_path / "tiny.pt"
    torch.save(formats.build_clip().state_dict(), path)
    monkeypatch.setattr(hub, "download_pretrained", lambda _: str(path))
    options = ("--clip", formats.NAME, "--data", tiny_data, "--out", tmp_path / "run")
    convert("import", "tiny", *options)
    architecture = load_state(tmp_path / "run" / SELECTED).architecture
    assert architecture.mean == (0.5,) * 3
    # the run records the location of its text tower
    convert("export", tmp_path / "run", "--to", "open-clip", "--out", tmp_path / "hub")
    exported = load_file(tmp_path / "hub" / "open_clip_model.safetensors")
    assert same(exported, formats.build_clip().state_dict())


@pytest.mark.slow
def test_imported_runs_are_evaluated_merged_and_reported(convert, released, tmp_path, tiny_data):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = {k: v + 0.01 * torch.randn_like(v) for k, v in formats.build_state(0).items()}
    formats.write_wise_ft(tmp_path / "wise.pt", other)
    options = ("--clip", formats.NAME, "--data", tiny_data)
    convert("import", released, "--out", tmp_path / "a", *options, "--recipe", "zero-shot")
    convert(
        "import", tmp_path / "wise.pt", "--out", tmp_path / "b", *options, "--recipe", "vanilla"
    )
    convert("import", tmp_path / "wise.pt", "--out", tmp_path / "c", *options, "--seed", 7)
    call(merge_command, "wise", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "m")
    middle = {k: (v + other[k]) / 2 for k, v in formats.build_state().items()}
    for name, value in state_of(tmp_path / "m").items():
        torch.testing.assert_close(value, middle[name])
    runs = [tmp_path / name for name in "abcm"]
    sets = ("--sets", "imagenet-val", "imagenet-r", "--workers", 0)
    call(evaluate_command, *runs, "--data", tiny_data, *sets)
    counts = document(tmp_path / "a" / "results.json")["sets"]
    assert counts["imagenet-val"]["total"] == 28
    assert (
        document(tmp_path / "b" / "results.json")["sets"]
        == document(tmp_path / "c" / "results.json")["sets"]
    )
    call(report_command, *runs, "--out", tmp_path / "report")
    table = (tmp_path / "report" / "table.md").read_text()
    for recipe in ("zero-shot", "vanilla", "imported", "wise-ft-0.5"):
        assert f"| {recipe} |" in table


def test_seeds_of_one_imported_recipe_share_a_row(convert, tmp_path, tiny_data):
    for seed in range(2):
        formats.write_released(tmp_path / f"{seed}.pt", formats.build_state(seed))
        options = ("--out", tmp_path / f"run{seed}", "--clip", formats.NAME, "--seed", seed)
        convert("import", tmp_path / f"{seed}.pt", *options)
    runs = [tmp_path / f"run{seed}" for seed in range(2)]
    call(evaluate_command, *runs, "--data", tiny_data, "--sets", "imagenet-val", "--workers", 0)
    call(report_command, *runs, "--out", tmp_path / "report")
    assert "| imported | 2 |" in (tmp_path / "report" / "table.md").read_text()


# configurations that import refuses


def test_import_needs_the_models_name(refused, released, tmp_path):
    line = refused("import", released, "--out", tmp_path / "run")
    assert "does not name its model (width 64, 2 layers, 4 x 4 patches of 4 px, 16 f" in line
    # the released code only has QuickGELU
    assert line.endswith(f"add --clip NAME; models of this shape: {formats.NAME}")
    assert not (tmp_path / "run").exists()


def test_the_shape_of_the_included_model_is_known(refused, tmp_path):
    folder = load._local_folder(load.MINIATURE)
    shutil.copy(folder / weights.HUB_WEIGHTS, tmp_path / "toy.safetensors")
    line = refused("import", tmp_path / "toy.safetensors", "--out", tmp_path / "run")
    assert line.endswith(f"models of this shape: {load.MINIATURE}")


def test_import_refuses_what_does_not_fit(refused, released, openai, tmp_path, tiny_data):
    out = ("--out", tmp_path / "run")
    line = refused("import", released, *out, "--clip", formats.OTHER_NAME)
    assert "has a different image tower" in line
    line = refused("import", released, *out, "--clip", formats.GELU_NAME)
    assert f"were trained as {formats.NAME}; use that model" in line
    line = refused("import", released, *out, "--clip", "ViT-Z")
    assert "open_clip has no model 'ViT-Z'" in line
    line = refused("import", openai, *out, "--clip", formats.NAME)
    assert "has no classification head" in line
    assert "--data URL [--set SET]" in line
    line = refused("import", tmp_path / "none.pt", *out, "--clip", "ViT-B-32")
    assert "no weights at" in line
    assert "laion2b_s34b_b79k" in line
    line = refused("import", released, *out, "--clip", formats.NAME, "--data", tmp_path)
    assert "no packed dataset at" in line
    known = ("--clip", formats.NAME, "--data", tiny_data, "--set", "unlike-all")
    assert "name one with --set NAME, or check --data" in refused("import", released, *out, *known)
    line = refused("import", released, *out, "--clip", formats.NAME, "--recipe", "a\x1bb")
    assert "import: recipe is " in line
    line = refused("import", released, "--out", "s3://bucket/run", "--clip", formats.NAME)
    assert "must be a local folder" in line
    assert not (tmp_path / "run").exists()


def test_import_refuses_a_head_of_other_classes(refused, released, tmp_path, tiny_data):
    shutil.copytree(tiny_data / "imagenet-val", tmp_path / "data" / "imagenet-val")
    path = tmp_path / "data" / "imagenet-val" / "manifest.json"
    manifest = document(path)
    manifest["classes"].append("fifth")
    manifest["class_ids"].append("n00000004")
    path.write_text(json.dumps(manifest))
    options = ("--clip", formats.NAME, "--data", tmp_path / "data")
    line = refused("import", released, "--out", tmp_path / "run", *options)
    assert "has a 4-class head" in line
    assert "imagenet-val has 5 classes" in line
    assert not (tmp_path / "run").exists()


def test_weights_with_neither_head_nor_text(refused, state, tmp_path, tiny_data):
    torch.save({k: v for k, v in state.items() if "visual" in k}, tmp_path / "m.pt")
    options = ("--clip", formats.NAME, "--data", tiny_data)
    line = refused("import", tmp_path / "m.pt", "--out", tmp_path / "run", *options)
    assert "has neither a classification head nor a text tower to make one" in line


def test_import_never_overwrites(convert, refused, run, released, tmp_path):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    again = ("import", released, "--out", run, "--clip", formats.NAME)
    assert convert(*again) == f"already imported: {run}\n"
    moved = released.rename(tmp_path / "moved.pt")
    assert "imported_from.sha256" in refused("import", moved, *again[2:])
    moved.rename(released)
    assert "seed: 0 -> 1" in refused(*again, "--seed", 1)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "config.json").write_text('{"recipe": "vanilla", "seed": 0}')
    line = refused("import", released, "--out", tmp_path / "trained", "--clip", formats.NAME)
    assert "holds a different model; choose another --out" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    line = refused("import", released, "--out", tmp_path / "other", "--clip", formats.NAME)
    assert "is not empty and not a run folder" in line
    line = refused("import", released, "--out", released, "--clip", formats.NAME)
    assert "is a file; choose another" in line
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_an_import_that_was_stopped_goes_on(convert, run, released, state):
    (run / "provenance.json").unlink()
    (run / SELECTED).unlink()
    convert("import", released, "--out", run, "--clip", formats.NAME)
    assert same(state_of(run), state)
    # nothing prevents a later import
    (run / "provenance.json").unlink()
    (run / SELECTED).unlink()
    convert("import", released, "--out", run, "--clip", formats.NAME, "--seed", 1)
    assert document(run / "config.json")["seed"] == 1


def test_an_attack_is_one_line(refused, tmp_path):
    data = b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00touch\x85R."
    (tmp_path / "evil.pt").write_bytes(data)
    line = refused("import", tmp_path / "evil.pt", "--out", tmp_path / "run", "--clip", "ViT-B-32")
    assert "evil.pt is refused: it names posix.system" in line
    formats.write_hub_folder(tmp_path / "hub")
    path = tmp_path / "hub" / "open_clip_config.json"
    config = document(path)
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    path.write_text(json.dumps(config))
    line = refused("import", tmp_path / "hub", "--out", tmp_path / "run")
    assert "open_clip_config.json: model_cfg.text_cfg.tokenizer_kwargs: of a tokenizer's" in line


def test_an_import_does_not_ask_the_hub_for_what_a_header_names(
    refused, tmp_path, tiny_data, monkeypatch
):
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda *a: asked.append(a))
    tower = dataclasses.replace(load.architecture_of(formats.NAME), clip="hf-hub:evil/model")
    own = {"rft": json.dumps({"step": "0", "architecture": tower.to_json()})}
    save_file(formats.build_clip().state_dict(), tmp_path / "m.safetensors", metadata=own)
    out = ("--out", tmp_path / "run", "--data", tiny_data)
    line = refused("import", tmp_path / "m.safetensors", *out)
    assert "add --clip hf-hub:evil/model if you trust it" in line
    assert asked == []


def test_unknown_conversions(refused):
    assert "did you mean 'import'" in refused("imprt")
