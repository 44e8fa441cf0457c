"""The merge commands on real run folders: output, skips and refusals."""

import json
import shutil
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from rft.averages import ingredients
from rft.averages.ingredients import shared_seed
from rft.clip import model_folder
from rft.clip.classifier import build_classifier, load_state, save_state
from rft.config import Config
from rft.evaluate import command as evaluate_command
from rft.loading.batches import plan_training
from rft.loading.dataset import PackedDataset
from rft.merge import command as merge_command
from rft.method.averaging import interpolate, model_stock, uniform_soup
from rft.runs.filenames import LAST, SELECTED
from rft.storage import documents, files
from tests import tiny
from tests.conftest import build_model
from tests.tiny import call, forget_weights, torchrun

pytestmark = pytest.mark.slow  # together

HELD_OUT = 40


@pytest.fixture
def merge(capsys):
    """Run a merge in this process; return its output."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        call(merge_command, *arguments)
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(refused):
    """Run an invalid merge; return its one-line error."""
    return partial(refused, merge_command)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load_state(path / SELECTED if path.is_dir() else path)[0]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def config_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data, tiny_clip) -> Path:
    """Folder of three runs with one split: zero-shot, vanilla, and the paper's own."""
    root = tmp_path_factory.mktemp("trained")
    for recipe, seed in (("zero-shot", 0), ("vanilla", 3), ("object-mask-single-fill", 4)):
        options = ("--loader.held-out", HELD_OUT, "--seed", seed, "--split-seed", 0)
        options += ("--optim.epochs", 0 if recipe == "zero-shot" else 2, "--optim.lr", 3e-3)
        tiny.train(recipe, tiny_data, tiny_clip, root / recipe, *options)
    return root


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """A copy of them that a test may modify."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def shake(run: Path, copy: Path, seed: int, strength: float) -> Path:
    """A copy of a run folder with noise on its selected weights: one more soup ingredient."""
    shutil.copytree(run, copy)
    state, architecture, metadata, classes = load_state(run / SELECTED)
    generator = torch.Generator().manual_seed(seed)
    noisy = {
        name: value + strength * value.std() * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
        if value.numel() > 1
    }
    save_state(str(copy / SELECTED), {**state, **noisy}, architecture, metadata, classes)
    forget_weights(copy)
    return copy


def change_config(run: Path, **values: object) -> None:
    files.write_json(str(run / "config.json"), {**config_of(run), **values})


# WiSE


def test_one_alpha_makes_the_run_folder_itself(runs, tmp_path, merge):
    start, end, out = runs / "zero-shot", runs / "vanilla", tmp_path / "merged"
    printed = merge("wise", start, end, "--alpha", 0.3, "--out", out)
    config = config_of(out)
    assert (config["recipe"], config["alpha"], config["seed"]) == ("wise-ft-0.3", 0.3, 3)
    assert config["end_weights"] == "best"
    assert config["merged_from"] == [
        {"path": str(path), "sha256": files.sha256_file(path / SELECTED)} for path in (start, end)
    ]
    assert same(state_of(out), interpolate(state_of(start), state_of(end), 0.3))
    assert load_state(out / SELECTED)[2]["recipe"] == "wise-ft-0.3"
    assert json.loads((out / "provenance.json").read_text())["command"][0] == "rft"
    data = config_of(end)["data"]
    sets = "imagenet-val imagenet-r imagenet-a"  # those of the tiny world
    command = f"python -m rft.evaluate {out} --data {data} --sets {sets}"
    assert printed == f"merged: {out}\nnext: {command}\n"


def test_several_alphas_make_one_folder_each(runs, tmp_path, merge):
    start, end, out = runs / "zero-shot", runs / "object-mask-single-fill", tmp_path / "sweep"
    printed = merge("wise", start, end, "--alpha", 0, 0.1, 0.5, 1, "--out", out)
    names = [f"wise-object-mask-single-fill-{alpha}" for alpha in ("0", "0.1", "0.5", "1")]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [config_of(out / name)["recipe"] for name in names] == names
    assert same(state_of(out / names[0]), state_of(start))
    assert same(state_of(out / names[3]), state_of(end))
    assert same(state_of(out / names[1]), interpolate(state_of(start), state_of(end), 0.1))
    assert printed.splitlines()[-1].startswith(f"next: python -m rft.evaluate {out / names[0]} ")

    before = everything(out)
    printed = merge("wise", start, end, "--alpha", 0.5, 0.7, "--out", out)
    assert printed.startswith(f"already merged: {out / names[2]}\nmerged: ")
    assert before.items() <= everything(out).items()


def test_the_default_is_the_middle(runs, tmp_path, merge):
    merge("wise", runs / "zero-shot", runs / "vanilla", "--out", tmp_path / "merged")
    assert config_of(tmp_path / "merged")["recipe"] == "wise-ft-0.5"


def test_the_last_weights_of_the_end(runs, tmp_path, merge, refused):
    start, end, out = runs / "zero-shot", runs / "vanilla", tmp_path / "merged"
    # the last model is rarely the selected one; here they surely differ
    shutil.copy(shake(end, tmp_path / "other", 1, 0.1) / SELECTED, end / LAST)
    forget_weights(end)
    merge("wise", start, end, "--alpha", 1, "--end-weights", "last", "--out", out)
    assert same(state_of(out), state_of(end / LAST))
    assert not same(state_of(out), state_of(end))
    assert config_of(out)["end_weights"] == "last"
    assert config_of(out)["merged_from"][1]["sha256"] == files.sha256_file(end / LAST)
    assert "holds a different merge" in refused("wise", start, end, "--alpha", 1, "--out", out)

    (end / LAST).unlink()
    last = ("--end-weights", "last", "--out", tmp_path / "more")
    line = refused("wise", start, end, *last)
    assert "did not keep its last weights" in line
    assert "--end-weights best" in line
    line = refused("wise", start, end / SELECTED, *last)
    assert "means a run folder's" in line


def test_weights_files_without_a_run_folder(runs, tmp_path, merge):
    start, own = tmp_path / "start.safetensors", tmp_path / "own.safetensors"
    shutil.copy(runs / "zero-shot" / SELECTED, start)
    shutil.copy(runs / "object-mask-single-fill" / SELECTED, own)
    printed = merge("wise", start, own, "--out", tmp_path / "merged")
    # the file's own metadata counts
    assert config_of(tmp_path / "merged")["recipe"] == "wise-object-mask-single-fill-0.5"
    assert config_of(tmp_path / "merged")["end_weights"] == "file"
    assert printed.endswith(
        "--data DATA\n  (DATA: folder or URL below which the packed sets lie)\n"
    )
    saved = load_state(own)
    save_state(str(own), saved.state, saved.architecture, {"step": "0"}, saved.classes)
    merge("wise", start, own, "--out", tmp_path / "unknown")
    assert config_of(tmp_path / "unknown")["recipe"] == "wise-ft-0.5"


def test_an_imported_model_has_not_been_trained(runs, tmp_path, merge, refused):
    # as left by rft.convert: a run folder without training.json
    end, out = runs / "vanilla", tmp_path / "merged"
    (end / "training.json").unlink()
    document = {"recipe": "theirs", "seed": 1, "imported_from": {"format": "theirs"}}
    files.write_json(str(end / "config.json"), document)
    saved = load_state(end / SELECTED)
    entries = {"recipe": "theirs", "step": "0"}
    save_state(str(end / SELECTED), saved.state, saved.architecture, entries, saved.classes)
    printed = merge("wise", runs / "zero-shot", end, "--out", out)
    assert config_of(out)["recipe"] == "wise-theirs-0.5"
    assert printed.endswith(
        "--data DATA\n  (DATA: folder or URL below which the packed sets lie)\n"
    )
    assert "holds a different model" in refused("wise", runs / "zero-shot", end, "--out", end)


def test_a_set_of_ones_own_is_evaluated_on_its_test_set(runs, tmp_path, merge):
    files.write_json(str(tmp_path / "data" / "test" / "manifest.json"), {})
    change_config(runs / "vanilla", train_set="mine", data=str(tmp_path / "data"))
    printed = merge("wise", runs / "zero-shot", runs / "vanilla", "--out", tmp_path / "merged")
    assert printed.endswith(" --sets test\n")


def test_a_merged_model_can_be_merged(runs, tmp_path, merge):
    start, end = runs / "zero-shot", runs / "vanilla"
    merge("wise", start, end, "--out", tmp_path / "half")
    merge("wise", start, tmp_path / "half", "--out", tmp_path / "quarter")
    quarter = interpolate(state_of(start), state_of(end), 0.25)
    for name, value in state_of(tmp_path / "quarter").items():
        torch.testing.assert_close(value, quarter[name])


# uniform soup


def test_uniform_soup(runs, tmp_path, merge):
    paths = [runs / "vanilla", runs / "object-mask-single-fill", runs / "zero-shot" / SELECTED]
    out = tmp_path / "soup"
    merge("uniform-soup", *paths, "--out", out)
    assert same(state_of(out), uniform_soup(map(state_of, paths)))
    config = config_of(out)
    assert (config["recipe"], config["seed"]) == ("uniform-soup", 0)
    assert [record["path"] for record in config["merged_from"]] == [str(path) for path in paths]
    ends = [load_state(path / SELECTED).metadata for path in paths[:2]]
    assert load_state(out / SELECTED).metadata == {
        "recipe": "uniform-soup",
        "step": str(max(int(end["step"]) for end in ends)),
        "trained_on": ends[0]["trained_on"],  # the same for both
    }


def test_model_stock(runs, tmp_path, merge, capsys):
    start, end, out = runs / "zero-shot", runs / "vanilla", tmp_path / "stock"
    other = runs / "object-mask-single-fill"
    printed = merge("model-stock", start, end, other, "--out", out)
    expected, ratios = model_stock(state_of(start), [state_of(end), state_of(other)])
    assert same(state_of(out), expected)
    # neither the start nor the soup
    assert not same(state_of(out), state_of(start))
    assert not same(state_of(out), uniform_soup([state_of(end), state_of(other)]))
    config = config_of(out)
    assert (config["recipe"], config["seed"]) == ("model-stock", 0)
    assert config["stock"] == {"ratios": ratios}
    assert [one["path"] for one in config["merged_from"]] == [str(start), str(end), str(other)]
    assert "share of the fine-tuned mean: " in printed
    assert f"over {len(ratios)} tensors" in printed
    before = everything(out)
    printed = merge("model-stock", start, end, other, "--out", out)
    assert printed.startswith(f"already merged: {out}\n")
    assert everything(out) == before
    # with its own header, and the images seen by any ingredient
    assert (
        load_state(out / SELECTED)[2]["trained_on"] == load_state(end / SELECTED)[2]["trained_on"]
    )


def test_what_a_model_stock_cannot_take(runs, tmp_path, merge, refused):
    start, end, out = runs / "zero-shot", runs / "vanilla", ("--out", tmp_path / "stock")
    other = runs / "object-mask-single-fill"
    line = refused("model-stock", start, end, *out)
    assert "needs START and at least two fine-tuned models, 1 named" in line
    assert "same weights; name one" in refused("model-stock", start, end, end, *out)
    line = refused("model-stock", start, end, start, *out)
    assert "are the same weights; START is the zero-shot model" in line
    assert "swap the two" in refused("model-stock", end, other, start, *out)
    merge("model-stock", start, end, other, *out)
    assert "holds a different merge: merged_from.1: " in refused(
        "model-stock", start, other, end, *out
    )


def test_the_tower_alone(runs, tmp_path, merge, refused):
    start, end, out = runs / "zero-shot", runs / "vanilla", tmp_path / "tower"
    merge("wise", start, end, "--alpha", 0.3, "--parts", "tower", "--out", out)
    found, first, last = state_of(out), state_of(start), state_of(end)
    for name, value in found.items():
        if name.startswith("visual."):
            assert torch.equal(value, 0.7 * first[name] + 0.3 * last[name]), name
        else:
            assert torch.equal(value, last[name]), name
    assert any(not torch.equal(first[name], last[name]) for name in found if "head" in name)
    config = config_of(out)
    assert (config["recipe"], config["parts"]) == ("wise-tower-0.3", "tower")
    assert "parts" in refused("wise", start, end, "--alpha", 0.3, "--out", out)
    own = runs / "object-mask-single-fill"
    merge("wise", start, own, "--alpha", 1, 0.5, "--parts", "tower", "--out", tmp_path / "own")
    names = [f"wise-tower-object-mask-single-fill-{alpha}" for alpha in ("0.5", "1")]
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == names
    assert same(state_of(tmp_path / "own" / names[1]), state_of(own))


def test_a_seed_that_all_share_is_the_soups(runs, tmp_path, merge):
    more = shake(runs / "vanilla", tmp_path / "more", 1, 0.1)
    merge("uniform-soup", runs / "vanilla", more, "--out", tmp_path / "soup")
    assert config_of(tmp_path / "soup")["seed"] == 3


def test_models_of_several_seeds_share_none():
    models = [types.SimpleNamespace(seed=seed) for seed in (3, 4, 3)]
    assert shared_seed(models[::2]) == 3
    assert shared_seed(models) == 0


# greedy soup


@pytest.fixture
def pot(runs, tmp_path) -> list[Path]:
    """Training runs of which some help: two opposite errors that cancel out, and noise."""
    noise = [(1, 8.0), (2, 0.4), (2, -0.4), (3, 8.0), (4, 1.0)]
    return [
        shake(runs / "vanilla", tmp_path / f"shaken-{n}", seed, strength)
        for n, (seed, strength) in enumerate(noise)
    ]


def count_by_hand(state: dict[str, torch.Tensor], run: Path, data: Path) -> int:
    """Held-out images that are right, one after the other."""
    config = documents.convert(config_of(run), Config, "config")
    packed = PackedDataset(str(data / config.train_set))
    _, samples, held_out = plan_training(packed, config)
    assert len(held_out) == HELD_OUT
    assert not set(samples) & set(held_out)
    model = build_classifier(state, load_state(run / SELECTED)[1])
    right = 0
    for sample in held_out:
        image = torch.from_numpy(packed.image(int(sample), model.architecture.image_size))
        with torch.no_grad():
            right += int(int(model(image[None]).argmax()) == int(packed.index.label[sample]))
    return right


def test_greedy_soup_is_the_recipe_and_the_same_on_two_ranks(pot, tmp_path, tiny_data, merge):
    alone = {path: count_by_hand(state_of(path), path, tiny_data) for path in pot}
    order = sorted(pot, key=alone.__getitem__)[::-1]  # of equal ones the last named comes first
    kept, best, expected = [order[0]], alone[order[0]], []
    for path in order[1:]:
        candidate = uniform_soup(map(state_of, [*kept, path]))
        found = count_by_hand(candidate, path, tiny_data)
        expected.append((str(path), alone[path], found, found > best))
        if found > best:
            kept, best = [*kept, path], found
    # a test in which everything or nothing is kept would prove little
    assert 1 < len(kept) < len(pot)

    options = ("--data", tiny_data, "--workers", 0, "--batch-size", 5)
    single, double = tmp_path / "single", tmp_path / "double"
    printed = merge("greedy-soup", *pot, "--out", single, *options)
    config = config_of(single)
    assert config["soup"]["correct"] == best
    assert config["soup"]["total"] == HELD_OUT
    steps = [
        (step["path"], step["correct"], step["soup_correct"], step["kept"])
        for step in config["soup"]["steps"]
    ]
    first = (str(order[0]), alone[order[0]], alone[order[0]], True)
    assert steps == [first, *expected]
    for step in config["soup"]["steps"]:
        assert step["sha256"] == files.sha256_file(Path(step["path"]) / SELECTED)
    assert config["recipe"] == "greedy-soup"
    assert (config["train_set"], config["split_seed"]) == ("imagenet-train", 0)
    assert config["loader"] == {"held_out": HELD_OUT}
    assert (
        config["manifest_sha256"]
        == PackedDataset(str(tiny_data / "imagenet-train")).manifest.sha256
    )
    assert same(state_of(single), uniform_soup(map(state_of, kept)))
    assert f"{order[0]}: {alone[order[0]]} of {HELD_OUT} held-out images\n" in printed
    assert f"soup with {expected[0][0]}: {expected[0][2]}, " in printed

    arguments = [str(value) for value in (*pot, "--out", double, *options, "--device", "cpu")]
    result = torchrun(2, "rft.merge", "greedy-soup", *arguments)
    assert result.stdout.count(f"merged: {double}\n") == 1
    assert config_of(double) == config
    assert (double / SELECTED).read_bytes() == (single / SELECTED).read_bytes()
    assert (double / "provenance.json").is_file()

    before = everything(double)
    printed = merge("greedy-soup", *arguments)
    assert f"already merged: {double}\n" in printed
    assert "held-out images" not in printed
    assert everything(double) == before


def test_ranks_that_see_other_runs_are_stopped(runs, tmp_path, tiny_data, disagreeing, refused):
    disagreeing("set of models and data")
    command = ("greedy-soup", runs / "vanilla", runs / "object-mask-single-fill")
    line = refused(*command, "--data", tiny_data, "--out", tmp_path / "out", "--workers", 0)
    assert "ranks [1] have a different set of models and data" in line
    assert not (tmp_path / "out").exists()


# afterwards


def test_evaluation_takes_what_was_merged(runs, tmp_path, tiny_data, merge):
    paths = [runs / "vanilla", runs / "object-mask-single-fill"]
    outs = [tmp_path / name for name in ("sweep", "uniform", "greedy")]
    merge("wise", runs / "zero-shot", paths[0], "--alpha", 0.2, 0.4, "--out", outs[0])
    merge("uniform-soup", *paths, "--out", outs[1])
    merge("greedy-soup", *paths, "--data", tiny_data, "--workers", 0, "--out", outs[2])
    found = [*sorted(outs[0].iterdir()), *outs[1:]]
    options = ("--data", tiny_data, "--workers", 0, "--sets", "imagenet-val", "imagenet-a")
    call(evaluate_command, *found, *options)
    for path in found:
        results = json.loads((path / "results.json").read_text())
        totals = {name: entry["total"] for name, entry in results["sets"].items()}
        assert totals == {"imagenet-val": 28, "imagenet-a": 12}
        assert results["checkpoint_sha256"] == files.sha256_file(path / SELECTED)
        assert results["config_sha256"] == files.sha256_file(path / "config.json")


@pytest.mark.parametrize("kind", ["wise", "uniform-soup", "greedy-soup"])
def test_the_same_command_again_does_nothing(kind, runs, tmp_path, tiny_data, merge, monkeypatch):
    data = ("--data", tiny_data, "--workers", 0) if kind == "greedy-soup" else ()
    command = [kind, runs / "vanilla", runs / "object-mask-single-fill", *data]
    merge(*command, "--out", tmp_path / "merged")
    before = everything(tmp_path / "merged")
    times = {path: Path(path).stat().st_mtime_ns for path in before}
    # runs may move: weights are identified by their hash
    runs.rename(tmp_path / "moved")
    command[1:3] = [tmp_path / "moved" / path.name for path in command[1:3]]
    monkeypatch.setattr(ingredients, "load_state", None)  # no weights are read either
    assert f"already merged: {tmp_path / 'merged'}" in merge(*command, "--out", tmp_path / "merged")
    assert everything(tmp_path / "merged") == before
    assert {path: Path(path).stat().st_mtime_ns for path in before} == times


def test_a_merge_whose_weights_nothing_vouches_for_is_warned_of(runs, tmp_path, capsys):
    out = tmp_path / "merged"
    command = ("wise", runs / "zero-shot", runs / "vanilla", "--out", out)
    call(merge_command, *command)
    call(merge_command, *command)
    assert "weights_sha256" not in capsys.readouterr().err
    forget_weights(out)
    state, architecture, metadata, classes = load_state(out / SELECTED)
    other = {name: value + 1 for name, value in state.items()}
    save_state(str(out / SELECTED), other, architecture, metadata, classes)
    call(merge_command, *command)
    printed = capsys.readouterr()
    assert f"already merged: {out}" in printed.out
    assert f"WARNING: {out}/provenance.json has no weights_sha256, so" in printed.err


def test_a_merge_that_stopped_is_done_again(runs, tmp_path, merge, refused, monkeypatch):
    start, end, out = runs / "zero-shot", runs / "vanilla", tmp_path / "merged"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "save_state", full)
        assert "No space left" in refused("wise", start, end, "--out", out)
    assert not (out / SELECTED).exists()
    assert not (out / "provenance.json").exists()
    # nothing prevents a later merge
    merge("wise", start, end, "--alpha", 0.7, "--out", out)
    (out / "provenance.json").unlink()
    assert "merged: " in merge("wise", start, end, "--alpha", 0.7, "--out", out)
    assert (out / "provenance.json").exists()


# mistakes


def test_out_is_never_anothers(runs, tmp_path, merge, refused):
    start, end, out = runs / "zero-shot", runs / "vanilla", tmp_path / "merged"
    merge("wise", start, end, "--out", out)
    before = everything(tmp_path)
    line = refused("wise", start, end, "--alpha", 0.7, "--out", out)
    assert "holds a different merge: alpha: 0.5 -> 0.7" in line
    assert "a different merge" in refused("uniform-soup", start, end, "--out", out)
    line = refused("wise", start, runs / "object-mask-single-fill", "--out", out)
    assert "merged_from.1: " in line
    assert "is a run folder; with several" in refused(
        *("wise", start, end, "--alpha", 0.1, 0.2, "--out", out)
    )
    for path in (start, end):
        assert "holds a training run" in refused("wise", start, end, "--out", path)
        assert "holds a training run" in refused("uniform-soup", start, end, "--out", path)
    assert "not a run folder" in refused("wise", start, end, "--out", runs)
    assert "is a file" in refused("wise", start, end, "--out", end / "config.json")
    assert "must be a local folder" in refused("uniform-soup", start, end, "--out", "s3://b/x")
    assert everything(tmp_path) == before


def test_nothing_is_written_if_one_of_several_is_in_the_way(runs, tmp_path, merge, refused):
    start, end, out = runs / "zero-shot", runs / "vanilla", tmp_path / "sweep"
    more = shake(end, tmp_path / "more", 1, 0.1)
    merge("wise", start, end, "--alpha", 0.5, "--out", out / "wise-ft-0.5")
    line = refused("wise", start, more, "--alpha", 0.1, 0.5, "--out", out)
    assert "wise-ft-0.5 holds a different merge" in line
    assert [path.name for path in out.iterdir()] == ["wise-ft-0.5"]


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (["1.5"], "--alpha is 1.5; it must be in [0, 1]"),
        (["0.5", "-0.1"], "--alpha is -0.1"),
        (["nan"], "--alpha is nan"),
        (["0.5", "0.50000001"], "--alpha has 0.5 twice"),
        ([], "--alpha needs at least one value"),
        (["half"], "half"),
    ],
)
def test_alpha_out_of_range(runs, tmp_path, refused, alpha, message):
    ends = (runs / "zero-shot", runs / "vanilla")
    assert message in refused("wise", *ends, "--out", tmp_path / "out", "--alpha", *alpha)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_misspelt(runs, tmp_path, refused, capsys):
    assert "unknown merge 'wize'; did you mean 'wise'?" in refused("wize", "a", "b")
    assert "--out" in refused("wise", runs / "zero-shot", runs / "vanilla")
    assert "--data" in refused("greedy-soup", runs / "vanilla", "--out", tmp_path / "out")
    out = ("--out", tmp_path / "out")
    assert "no checkpoint at" in refused("wise", runs / "zero-shot", runs / "none", *out)
    (runs / "vanilla" / SELECTED).unlink()
    line = refused("wise", runs / "zero-shot", runs / "vanilla", *out)
    assert "no checkpoint at" in line
    assert str(SELECTED) in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stopped:
        call(merge_command)
    assert stopped.value.code == 0
    helped = capsys.readouterr().out
    assert all(name in helped for name in ("wise", "uniform-soup", "greedy-soup"))


def test_a_run_that_is_not_finished(runs, tmp_path, refused, merge):
    end, out = runs / "vanilla", ("--out", tmp_path / "out")
    (end / "training.json").unlink()
    assert "has not finished training" in refused("wise", runs / "zero-shot", end, *out)
    assert "has not finished training" in refused("uniform-soup", runs / "zero-shot", end, *out)
    merge("wise", runs / "zero-shot", end / SELECTED, *out)


def test_models_that_are_not_alike(runs, tmp_path, refused):
    start, out = runs / "zero-shot", ("--out", tmp_path / "out")
    other = tmp_path / "other.safetensors"
    model = build_model()
    classes = load_state(start / SELECTED).classes
    model.head = torch.nn.Linear(12, 4)
    save_state(str(other), model.state_dict(), model.architecture, {"step": "0"}, classes)
    for kind in ("wise", "uniform-soup"):
        line = refused(kind, start, other, *out)
        assert f"{start} and {other} have different architectures: embed_dim: 16 -> 12" in line

    state, architecture, metadata, _ = load_state(start / SELECTED)
    more = {**state, "head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5)}
    save_state(str(other), more, architecture, metadata, None)
    for kind in ("wise", "uniform-soup"):
        assert "'head.bias' has shapes (4,) and (5,)" in refused(kind, start, other, *out)
    del more["head.bias"]
    save_state(str(other), more, architecture, metadata, None)
    line = refused("wise", start, other, *out)
    assert f"{other} is damaged: it has no 'head.bias'" in line
    other.write_bytes(b"not weights")
    assert "no safetensors header ends within its 11 bytes" in refused("wise", start, other, *out)
    assert not (tmp_path / "out").exists()


def test_soups_of_one_or_of_the_same(runs, tmp_path, tiny_data, refused):
    one, out = runs / "vanilla", ("--out", tmp_path / "out")
    assert "at least two models, 1 named" in refused("uniform-soup", one, *out)
    assert "at least two models, 0 named" in refused("uniform-soup", *out)
    assert "are the same weights" in refused("uniform-soup", one, one, *out)
    shutil.copytree(one, tmp_path / "copy")
    line = refused("greedy-soup", one, tmp_path / "copy", *out, "--data", tiny_data)
    assert f"{one} and {tmp_path / 'copy'} are the same weights" in line


def test_runs_that_were_not_selected_by_the_same_images(runs, tmp_path, tiny_data, refused):
    one, two = runs / "vanilla", runs / "object-mask-single-fill"
    command = ("greedy-soup", one, two, "--data", tiny_data, "--out", tmp_path / "out")
    document = config_of(two)
    change_config(two, split_seed=None)  # then it is the seed, which is 4
    line = refused(*command)
    assert f"{one} and {two} were selected by other held-out images: split_seed: 0 -> 4;" in line
    assert "--split-seed" in line
    change_config(two, train_set="mine", split_seed=0)
    assert "train_set: 'imagenet-train' -> 'mine'" in refused(*command)
    change_config(two, train_set="imagenet-train", loader={**document["loader"], "held_out": 20})
    assert f"loader.held_out: {HELD_OUT} -> 20" in refused(*command)
    change_config(two, loader={**document["loader"], "held_out": 0})
    line = refused(*command)
    assert f"{two} held no images out" in line
    change_config(one, loader={**document["loader"], "held_out": 0})
    assert f"{one} held no images out" in refused(*command)
    change_config(one, strange=1)
    line = refused(*command)
    assert f"{one}/config.json: strange is an unknown field; it was written by a different" in line
    assert not (tmp_path / "out").exists()


def test_what_a_greedy_soup_cannot_take(runs, tmp_path, tiny_data, merge, refused):
    one, two = runs / "vanilla", runs / "object-mask-single-fill"
    rest = ("--data", tiny_data, "--out", tmp_path / "out")
    merge("wise", runs / "zero-shot", one, "--out", tmp_path / "wise")
    line = refused("greedy-soup", one, tmp_path / "wise", *rest)
    assert "is a merged or imported model" in line
    assert "is not a run folder" in refused("greedy-soup", one, two / SELECTED, *rest)
    line = refused("greedy-soup", one, two, "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert "no packed dataset at" in line
    assert "--batch-size" in refused("greedy-soup", one, two, *rest, "--batch-size", 0)
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in refused("greedy-soup", one, two, *rest, "--device", "cuda")


def test_other_data_than_the_runs_were_trained_on(runs, tmp_path, tiny_data, refused):
    one, two = runs / "vanilla", runs / "object-mask-single-fill"
    shutil.copytree(tiny_data / "imagenet-train", tmp_path / "data" / "imagenet-train")
    path = tmp_path / "data" / "imagenet-train" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "plan_hash": "0" * 64}))
    rest = ("--data", tmp_path / "data", "--out", tmp_path / "out")
    assert f"{one} was trained on other data than" in refused("greedy-soup", one, two, *rest)
    for run in (one, two):
        record = {"steps": 3, "best_step": 3, "world_size": 1}
        (run / "training.json").write_text(json.dumps(record))  # as before the hash was recorded
    more = {"classes": [*manifest["classes"], "fifth"], "class_ids": [*manifest["class_ids"], "5"]}
    path.write_text(json.dumps({**manifest, **more}))
    line = refused("greedy-soup", one, two, *rest)
    assert "class 4 is missing in the first, '5' ('fifth') in the second (4 and 5 classes)" in line
    assert not (tmp_path / "out").exists()
