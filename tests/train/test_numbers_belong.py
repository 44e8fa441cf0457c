"""Heads belong to their classes and numbers to their weights: every command that could mix them up.

The same images are packed twice, the second time with the classes in reverse order: the number of
classes, the architecture and every shape agree, but each label means something else.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import tiny_world
from benchmarks.tiny_world import LABELS, SIZE
from rft.clip.classifier import load_state, save_state
from rft.convert import command as convert
from rft.evaluate import command as evaluate_command
from rft.evaluate import localisation
from rft.merge import command as merge_command
from rft.packing.pack import Options, pack
from rft.report import command as report_command
from rft.runs import folder as runs
from rft.runs.filenames import LAST, SELECTED
from rft.shards.label_space import LabelSpace
from rft.storage import files
from rft.train import command as train_command
from tests import tiny
from tests.tiny import call

pytestmark = pytest.mark.slow  # together

REVERSED = LabelSpace(ids=LABELS.ids[::-1], names=LABELS.names[::-1], templates=LABELS.templates)
FIRST = "class 0 is 'n00000000' ('red') in the first, 'n00000003' ('grey') in the second"
SECOND = "class 0 is 'n00000003' ('grey') in the first, 'n00000000' ('red') in the second"
SAME = "(the same classes in a different order)"


@pytest.fixture(scope="module")
def reversed_data(tiny_data, tmp_path_factory) -> Path:
    """The tiny world's images, packed with its classes in reverse order."""
    root = tmp_path_factory.mktemp("reversed")
    for dataset in tiny_world.COUNTS:
        options = Options(encoding="pixels", size=SIZE, shard_mb=0.02, workers=1)
        pack(dataset, str(tiny_data.parent / "images"), str(root), REVERSED, options)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data, reversed_data, tiny_clip) -> Path:
    """Folder of four runs: zero-shot and vanilla, on either order of the classes."""
    root = tmp_path_factory.mktemp("trained")
    for name, data in (("", tiny_data), ("-reversed", reversed_data)):
        for recipe, epochs, seed in (("zero-shot", 0, 0), ("vanilla", 1, 1)):
            options = ("--optim.epochs", epochs, "--split-seed", 0, "--seed", seed)
            tiny.train(recipe, data, tiny_clip, root / f"{recipe}{name}", *options)
    return root


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of the runs that a test may modify."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def evaluation(*runs: Path, data: Path) -> tuple[object, ...]:
    options = ("--sets", "imagenet-val", "--workers", 0, "--device", "cpu")
    return (*runs, "--data", data, *options)


def evaluate(*runs: Path, data: Path) -> None:
    call(evaluate_command, *evaluation(*runs, data=data))


def forget_classes(weights: Path) -> None:
    """Rewrite a weights file in its format before it carried its classes."""
    saved = load_state(weights)
    save_state(str(weights), saved.state, saved.architecture, saved.metadata, None)
    tiny.forget_weights(weights.parents[1])


def spoil(weights: Path, value: float = 0.5) -> None:
    """Replace a weights file by different weights of the same kind."""
    saved = load_state(weights)
    state = {name: tensor.clone() for name, tensor in saved.state.items()}
    state["head.bias"][0] += value
    save_state(str(weights), state, saved.architecture, saved.metadata, saved.classes)
    tiny.forget_weights(weights.parents[1])


def document(path: Path) -> dict:
    return json.loads(path.read_text())


# classes


def test_a_trained_head_carries_the_classes_of_its_data(folder):
    assert load_state(folder / "vanilla" / SELECTED).classes == LABELS.classes
    assert load_state(folder / "vanilla" / LAST).classes == LABELS.classes
    assert load_state(folder / "vanilla-reversed" / SELECTED).classes == REVERSED.classes
    # the subject of the test: only the order distinguishes the two
    state = load_state(folder / "zero-shot" / SELECTED).state["head.weight"]
    assert torch.equal(
        state.flip(0), load_state(folder / "zero-shot-reversed" / SELECTED).state["head.weight"]
    )


def test_evaluation(folder, reversed_data, refused):
    run = folder / "vanilla"
    line = refused(evaluate_command, *evaluation(run, data=reversed_data))
    assert f"{run} and {reversed_data}/imagenet-val have different classes: {FIRST} {SAME}" in line
    assert not (run / "results.json").exists()


def test_localisation(folder, reversed_data, tmp_path, refused):
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.fromarray(np.ones((SIZE, SIZE), np.uint8)).save(masks / "n00000000_0.png")
    options = ("--data", reversed_data, "--masks", masks, "--set", "imagenet-val")
    line = refused(localisation, folder / "vanilla" / SELECTED, *options, "--classes", "all")
    assert FIRST in line


@pytest.mark.parametrize("kind", ["wise", "uniform-soup"])
def test_merges(folder, tmp_path, refused, kind):
    one, two = folder / "zero-shot", folder / "vanilla-reversed"
    line = refused(merge_command, kind, one, two, "--out", tmp_path / "out")
    assert f"{one} and {two} have different classes: {FIRST} {SAME}" in line
    assert not (tmp_path / "out").exists()


def test_a_greedy_soup_on_other_data(folder, tmp_path, reversed_data, tiny_data, refused):
    one, two = folder / "zero-shot", folder / "vanilla"
    options = ("--data", reversed_data, "--out", tmp_path / "out")
    line = refused(merge_command, "greedy-soup", one, two, *options)
    assert "was trained on other data" in line
    for run in (one, two):  # as before the hash was recorded
        record = {"steps": 3, "best_step": 3, "world_size": 1}
        (run / "training.json").write_text(json.dumps(record))
    assert FIRST in refused(merge_command, "greedy-soup", one, two, *options)
    pair = (one, folder / "vanilla-reversed")
    line = refused(merge_command, "greedy-soup", *pair, *options)
    assert "have different classes" in line


@pytest.mark.parametrize(
    ("recipe", "option"), [("lp-ft", "--model.start"), ("wise-kd-vanilla", "--method.kd-teacher")]
)
def test_training_on_a_start_or_a_second_teacher(
    folder, tmp_path, tiny_data, tiny_clip, refused, recipe, option
):
    other = folder / "vanilla-reversed"
    words = tiny.training(recipe, tiny_data, tiny_clip, tmp_path / "run", option, other)
    line = refused(train_command, *words)
    assert f"{option} {other} and the training set have different classes: {SECOND}" in line
    assert not (tmp_path / "run").exists()


def test_import_and_export_keep_the_classes(folder, tmp_path, reversed_data, refused, tiny_data):
    run, file = folder / "vanilla", tmp_path / "m.safetensors"
    call(convert, "export", run, "--to", "safetensors", "--out", file)
    card = document(tmp_path / "m.safetensors.json")
    assert (card["classes"], card["class_ids"]) == (list(LABELS.names), list(LABELS.ids))
    options = ("--out", tmp_path / "again", "--set", "imagenet-val", "--data")
    line = refused(convert, "import", file, *options, reversed_data)
    assert f"{file} and {reversed_data}/imagenet-val have different classes: {FIRST}" in line
    call(convert, "import", file, *options, tiny_data)
    assert load_state(tmp_path / "again" / SELECTED).classes == LABELS.classes


def test_an_exported_folder_names_the_classes_of_the_weights(
    folder, tmp_path, tiny_data, reversed_data, capsys
):
    """Not those of the data now at that path."""
    data = tmp_path / "data"
    shutil.copytree(reversed_data, data)
    run = folder / "vanilla"
    files.write_json(str(run / "config.json"), {**document(run / "config.json"), "data": str(data)})
    call(convert, "export", run, "--to", "open-clip", "--out", tmp_path / "hub")
    assert document(tmp_path / "hub" / "card.json")["classes"] == list(LABELS.names)
    # and a folder of such weights brings them back
    call(convert, "import", tmp_path / "hub", "--out", tmp_path / "again")
    assert load_state(tmp_path / "again" / SELECTED).classes == LABELS.classes

    # weights without a record: the data decides only if it is still that of the training
    forget_classes(run / SELECTED)
    call(convert, "export", run, "--to", "safetensors", "--out", tmp_path / "a.safetensors")
    assert document(tmp_path / "a.safetensors.json")["classes"] is None
    assert "imagenet-train was repacked after the run was trained" in capsys.readouterr().err
    files.write_json(
        str(run / "config.json"), {**document(run / "config.json"), "data": str(tiny_data)}
    )
    call(convert, "export", run, "--to", "safetensors", "--out", tmp_path / "b.safetensors")
    assert document(tmp_path / "b.safetensors.json")["classes"] == list(LABELS.names)


def test_the_card_of_other_weights(folder, tmp_path, refused):
    call(convert, "export", folder / "vanilla", "--to", "open-clip", "--out", tmp_path / "hub")
    card = tmp_path / "hub" / "card.json"
    changed = document(card)
    changed["files"]["head.safetensors"] = "0" * 64
    card.write_text(json.dumps(changed))
    line = refused(convert, "import", tmp_path / "hub", "--out", tmp_path / "again")
    assert f"{card} describes other weights than {tmp_path}/hub/head.safetensors" in line


def test_a_report_of_heads_of_different_classes(
    folder, tmp_path, tiny_data, reversed_data, refused
):
    one, two = folder / "zero-shot", folder / "vanilla-reversed"
    evaluate(one, data=tiny_data)
    evaluate(two, data=reversed_data)
    # results that were wrongly attributed to one set
    results = document(two / "results.json")
    sha256 = document(one / "results.json")["sets"]["imagenet-val"]["manifest_sha256"]
    results["sets"]["imagenet-val"]["manifest_sha256"] = sha256
    (two / "results.json").write_text(json.dumps(results))
    line = refused(report_command, one, two, "--out", tmp_path / "report")
    assert f"{one} and {two} have different classes: {FIRST}" in line


def test_weights_that_do_not_say_are_accepted_with_a_warning(folder, tiny_data, capsys):
    run = folder / "vanilla"
    evaluate(run, data=tiny_data)
    before = runs.read_results(run)
    forget_classes(run / SELECTED)
    capsys.readouterr()
    evaluate(run, data=tiny_data)
    warning = capsys.readouterr().err
    assert f"WARNING: {run}: the file does not list the classes of its head" in warning
    assert warning.count("WARNING") == 1
    after = runs.read_results(run)
    assert before
    assert after
    assert after.sets == before.sets


def test_data_packed_before_manifests_had_ids(folder, tiny_data, tmp_path, refused):
    data = tmp_path / "data"
    for name, labels in (("imagenet-val", LABELS), ("imagenet-r", REVERSED)):
        shutil.copytree(tiny_data / name, data / name)
        manifest = document(data / name / "manifest.json")
        del manifest["class_ids"]
        manifest["classes"] = list(labels.names)
        (data / name / "manifest.json").write_text(json.dumps(manifest))
    evaluate(folder / "vanilla", data=data)
    options = ("--data", data, "--sets", "imagenet-r")
    line = refused(evaluate_command, folder / "vanilla", *options)
    assert "class 0 is 'n00000000' ('red') in the first, 'grey' in the second" in line


# numbers


def test_results_of_other_weights_are_stale(folder, tiny_data, tmp_path, refused, capsys):
    run, out = folder / "vanilla", tmp_path / "report"
    evaluate(run, data=tiny_data)
    call(report_command, run, "--out", out)
    spoil(run / SELECTED)
    line = refused(report_command, run, "--out", out)
    assert f"{run}/results.json is stale" in line
    command = f"python -m rft.evaluate {run} --data {tiny_data} --sets imagenet-val"
    assert line.endswith(command)
    capsys.readouterr()
    call(convert, "export", run, "--to", "safetensors", "--out", tmp_path / "m.safetensors")
    assert "the card will have no accuracies" in capsys.readouterr().err
    assert document(tmp_path / "m.safetensors.json")["metrics"] == {}
    # and the printed command repairs it
    call(evaluate_command, *command.split()[3:])
    call(report_command, run, "--out", out)


def test_counts_of_one_set_do_not_survive_new_weights(folder, tiny_data):
    run = folder / "vanilla"
    evaluate(run, data=tiny_data)
    spoil(run / SELECTED)
    call(evaluate_command, run, "--data", tiny_data, "--sets", "imagenet-r", "--workers", 0)
    results = runs.read_results(run)
    assert results is not None
    assert set(results.sets) == {"imagenet-r"}
    assert results.checkpoint_sha256 == files.sha256_file(run / SELECTED)


def test_weights_that_change_while_they_are_evaluated(folder, tiny_data, refused, monkeypatch):
    run = folder / "vanilla"
    predict = evaluate_command.predict

    def predicted_while_training(*arguments, **options):
        spoil(run / SELECTED)
        return predict(*arguments, **options)

    monkeypatch.setattr(evaluate_command, "predict", predicted_while_training)
    line = refused(evaluate_command, *evaluation(run, data=tiny_data))
    assert f"{run / SELECTED} was replaced during its evaluation" in line
    assert not (run / "results.json").exists()


def test_a_run_that_has_not_ended_is_named(folder, tiny_data, tmp_path, capsys):
    run, other = folder / "vanilla", folder / "zero-shot"
    (run / "training.json").unlink()
    steps = document(run / "progress.json")
    reached = f"step {steps['step']} of {steps['of']}"
    capsys.readouterr()
    evaluate(run, other, data=tiny_data)
    printed = capsys.readouterr().out
    assert f"{run} (unfinished, {reached}): imagenet-val" in printed
    assert f"{other}: imagenet-val" in printed
    assert document(run / "results.json")["unfinished"] == reached
    call(report_command, run, other, "--out", tmp_path / "report")
    table = (tmp_path / "report" / "table.csv").read_text()
    assert f'"vanilla (unfinished, {reached})"' in table or f"(unfinished, {reached})" in table
    call(convert, "export", run, "--to", "safetensors", "--out", tmp_path / "m.safetensors")
    assert document(tmp_path / "m.safetensors.json")["unfinished"] == reached
    assert f"{run} has not finished training ({reached})" in capsys.readouterr().err
    # before its first checkpoint, its progress is unknown
    (run / "progress.json").unlink()
    assert runs.unfinished(run) == "no step recorded"


def test_results_of_before_still_load(folder, tiny_data, tmp_path):
    run = folder / "vanilla"
    evaluate(run, data=tiny_data)
    results = document(run / "results.json")
    del results["unfinished"]
    (run / "results.json").write_text(json.dumps(results))
    call(report_command, run, "--out", tmp_path / "report")


@pytest.mark.parametrize(
    "entry", [{"correct": True, "total": 2}, {"correct": 3, "total": 2}, {"correct": 1.0}]
)
def test_counts_that_are_none(folder, tiny_data, tmp_path, refused, entry):
    run = folder / "vanilla"
    evaluate(run, data=tiny_data)
    results = document(run / "results.json")
    results["sets"]["imagenet-val"] |= entry
    (run / "results.json").write_text(json.dumps(results))
    said = f"{run / 'results.json'}: sets.imagenet-val"
    assert said in refused(report_command, run, "--out", tmp_path / "report")
    assert said in refused(evaluate_command, *evaluation(run, data=tiny_data))


def test_weights_that_are_not_finite(folder, tiny_data, tmp_path, refused, tiny_clip):
    run, start = folder / "vanilla", folder / "zero-shot"
    spoil(run / SELECTED, float("nan"))
    finite = "1 of 4 weights of head.bias are not finite"
    assert finite in refused(evaluate_command, *evaluation(run, data=tiny_data))
    for kind in ("wise", "uniform-soup"):
        assert finite in refused(merge_command, kind, start, run, "--out", tmp_path / "out")
    options = ("--to", "safetensors", "--out", tmp_path / "m.safetensors")
    assert finite in refused(convert, "export", run, *options)
    out = ("--out", tmp_path / "run")
    assert finite in refused(convert, "import", run / SELECTED, *out)
    assert not any(tmp_path.glob("*.safetensors"))
    assert not (tmp_path / "out" / SELECTED).exists()
    assert not (tmp_path / "run").exists()


def test_the_ends_of_wise(folder, tmp_path, refused, capsys):
    start, end = folder / "zero-shot", folder / "vanilla"
    line = refused(merge_command, "wise", end, start, "--out", tmp_path / "out")
    assert "START is the zero-shot model, END the fine-tuned one; swap the two" in line
    capsys.readouterr()
    call(merge_command, "wise", end / SELECTED, end / LAST, "--out", tmp_path / "out")
    assert "is not a zero-shot model: it was trained" in capsys.readouterr().err
    call(merge_command, "wise", start, end, "--out", tmp_path / "right")
    assert "WARNING" not in capsys.readouterr().err
    assert load_state(tmp_path / "right" / SELECTED).classes == LABELS.classes


def test_a_merge_of_different_prompts_is_said(folder, tmp_path, capsys):
    saved = load_state(folder / "vanilla" / SELECTED)
    assert saved.classes is not None
    other = dataclasses.replace(saved.classes, prompts_sha256="0" * 64)
    path = tmp_path / "other.safetensors"
    save_state(str(path), saved.state, saved.architecture, saved.metadata, other)
    capsys.readouterr()
    call(merge_command, "wise", folder / "zero-shot", path, "--out", tmp_path / "out")
    assert "were built from different prompts" in capsys.readouterr().err


def test_a_configuration_of_another_run(folder, tiny_data, tmp_path, refused, capsys):
    run, out = folder / "vanilla", ("--out", tmp_path / "report")
    evaluate(run, data=tiny_data)
    config, results = document(run / "config.json"), document(run / "results.json")
    files.write_json(str(run / "config.json"), {**config, "recipe": "no-mask"})
    line = refused(report_command, run, *out)
    assert "names recipe 'no-mask', but its weights were made by 'vanilla'" in line
    files.write_json(str(run / "config.json"), {**config, "seed": 7})
    capsys.readouterr()
    call(report_command, run, *out)
    assert f"{run}/config.json was changed after the evaluation" in capsys.readouterr().err
    files.write_json(str(run / "config.json"), config)
    files.write_json(str(run / "results.json"), {**results, "step": results["step"] + 1})
    assert "the weights are of step" in refused(report_command, run, *out)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("results.json", [], "it is []; it must be an object"),
        ("results.json", {"checkpoint_sha256": None}, "checkpoint_sha256 is None"),
        ("results.json", {"step": "x"}, "step is 'x'"),
        ("provenance.json", [], "it is []; it must be an object"),
    ],
)
def test_damaged_files_of_a_run_are_named(
    folder, tiny_data, tmp_path, refused, name, value, message
):
    run = folder / "vanilla"
    evaluate(run, data=tiny_data)
    changed = {**document(run / name), **value} if isinstance(value, dict) else value
    (run / name).write_text(json.dumps(changed))
    line = refused(report_command, run, "--out", tmp_path / "report")
    assert f"{run}/{name}" in line
    assert message in line


def test_progress_that_is_none(folder):
    run = folder / "vanilla"
    (run / "training.json").unlink()
    for progress in ({"step": -3, "of": True}, {"step": 2, "of": 1}, {}, []):
        (run / "progress.json").write_text(json.dumps(progress))
        with pytest.raises(ValueError, match=r"/progress\.json: "):
            runs.unfinished(run)


def test_a_weights_file_is_as_far_as_its_run(folder, tiny_data, capsys):
    run = folder / "vanilla"
    (run / "training.json").unlink()
    evaluate(run / SELECTED, data=tiny_data)
    assert f"{run / SELECTED} (unfinished, step " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["best.safetensors", "./best.safetensors", "../best.safetensors"])
def test_a_bare_weights_file_is_as_far_as_its_run(folder, tmp_path, monkeypatch, name):
    run = folder / "vanilla"
    (run / "training.json").unlink()
    place = run / SELECTED.parent
    (place / "inner").mkdir()
    monkeypatch.chdir(place / "inner" if name.startswith("..") else place)
    assert runs.unfinished(Path(name)).startswith("step ")
    (tmp_path / "link").symlink_to(run / SELECTED)
    assert runs.unfinished(tmp_path / "link").startswith("step ")
    shutil.copy(run / SELECTED, tmp_path / "copy.safetensors")
    assert runs.unfinished(tmp_path / "copy.safetensors") == ""


def test_weights_of_an_unfinished_run_are_warned_of(folder, tmp_path, capsys):
    start, run = folder / "zero-shot", folder / "vanilla"
    (run / "training.json").unlink()
    said = f"WARNING: {run / SELECTED} belongs to a run that has not finished training (step "
    call(convert, "import", run / SELECTED, "--out", tmp_path / "imported")
    assert said in capsys.readouterr().err
    call(merge_command, "wise", start, run / SELECTED, "--out", tmp_path / "merged")
    assert said in capsys.readouterr().err
    call(merge_command, "uniform-soup", start, run / SELECTED, "--out", tmp_path / "soup")
    assert capsys.readouterr().err.count(said) == 1


def test_swapped_ends_that_are_files(folder, tmp_path, refused):
    start, end = folder / "zero-shot" / SELECTED, folder / "vanilla" / SELECTED
    shutil.copy(start, tmp_path / "start.safetensors")
    shutil.copy(end, tmp_path / "end.safetensors")
    names = (tmp_path / "end.safetensors", tmp_path / "start.safetensors")
    line = refused(merge_command, "wise", *names, "--out", tmp_path / "out")
    assert "swap the two" in line
    call(merge_command, "wise", *names[::-1], "--out", tmp_path / "out")


def test_a_run_without_results_names_its_data(folder, tiny_data, tmp_path, refused):
    run = folder / "vanilla"
    line = refused(report_command, run, "--out", tmp_path / "report")
    assert line.endswith(f"evaluate it first: python -m rft.evaluate {run} --data {tiny_data}")
    config = {**document(run / "config.json"), "train_set": "train"}
    files.write_json(str(run / "config.json"), config)
    assert refused(report_command, run, "--out", tmp_path / "report").endswith("--sets test")
