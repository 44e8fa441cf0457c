"""Averages evaluated without their weights on disk equal those that rft.merge writes."""

import json
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest

from rft.averages import average
from rft.clip.classifier import Saved, load_state
from rft.clip.model_folder import write_run
from rft.convert import command as convert_command
from rft.dist import World
from rft.evaluate import command as evaluate_command
from rft.evaluate.checkpoints import load_checkpoints
from rft.evaluate.unwritten import Unwritten
from rft.loading.dataset import PackedDataset
from rft.merge import command as merge_command
from rft.report import command as report_command
from rft.runs import derived
from rft.runs.filenames import CONFIG, PROVENANCE, RESULTS, SELECTED
from rft.storage import files
from tests.conftest import build_model
from tests.tiny import call

SETS = ("imagenet-val", "imagenet-a")
DONE = "all results are current, nothing to do"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data) -> Path:
    """Folder of three run folders: zero-shot, vanilla, and a second vanilla."""
    root = tmp_path_factory.mktemp("made")
    classes = PackedDataset(str(tiny_data / "imagenet-val")).manifest.label_space
    for seed, (name, recipe) in enumerate(
        [("zero", "zero-shot"), ("end", "vanilla"), ("more", "vanilla")]
    ):
        model = build_model(seed, len(classes))
        metadata = {"step": str(5 * (seed > 0)), "recipe": recipe, "trained_on": "[]"}
        saved = Saved(dict(model.state_dict()), model.architecture, metadata, classes)
        origin = {"imported_from": {"format": "test"}, "data": str(tiny_data)}
        write_run(root / name, saved, {"recipe": recipe, "seed": seed, **origin})
    return root


@pytest.fixture
def runs(made, tmp_path) -> Path:
    """A copy of them that a test may modify."""
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def evaluate(tiny_data, capsys):
    """Evaluate in this process; return its output and log."""

    def run(*words: object, sets: tuple[str, ...] = SETS) -> str:
        capsys.readouterr()
        call(evaluate_command, *words, *options(tiny_data, sets))
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


@pytest.fixture
def wrong(tiny_data, refused):
    """Evaluate invalid options; return the one-line error."""
    return lambda *words: refused(evaluate_command, *words, *options(tiny_data))


def options(data: Path, sets: tuple[str, ...] = SETS) -> list[object]:
    return ["--data", data, "--workers", 0, "--sets", *sets]


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a run folder without weights and fields that depend on time and provenance."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in (str(SELECTED), PROVENANCE):
            found[name] = path.read_bytes()
    if RESULTS in found:
        results = json.loads(found[RESULTS])
        for changing in ("provenance", "without_weights"):
            del results[changing]
        found[RESULTS] = json.dumps(results).encode()
    return found


def weights(folder: Path) -> list[Path]:
    return list(folder.rglob("*.safetensors"))


@pytest.mark.slow
def test_what_is_recorded_is_that_of_the_written_weights(runs, tmp_path, evaluate):
    ends, out, merged = (runs / "zero", runs / "end"), tmp_path / "out", tmp_path / "merged"
    evaluate(
        *(runs / "end", "--wise", *ends, 0, 0.3, 1, "--soup", *ends, runs / "more"),
        *("--out", out, "--logits"),
    )
    call(merge_command, "wise", *ends, "--alpha", 0, 0.3, 1, "--out", merged)
    soup = merged / "uniform-soup"
    call(merge_command, "uniform-soup", *ends, runs / "more", "--out", soup)
    names = ["uniform-soup", "wise-ft-0", "wise-ft-0.3", "wise-ft-1"]
    assert sorted(path.name for path in out.iterdir()) == names
    evaluate(*(merged / name for name in names), "--logits")
    for name in names:
        found = contents(out / name)
        assert found == contents(merged / name)
        # config.json, results.json, and predictions and logits of two sets
        assert len(found) == 6
        results = json.loads((out / name / RESULTS).read_text())
        assert results["checkpoint_sha256"] == files.sha256_file(merged / name / SELECTED)
        assert results["without_weights"]
    assert not weights(out)
    # the ends are the models themselves
    end = contents(runs / "end")
    assert end["predictions/imagenet-val.npz"] == found["predictions/imagenet-val.npz"]
    assert not json.loads((runs / "end" / RESULTS).read_text())["without_weights"]


def complaints(text: str) -> list[str]:
    """Return the warnings of a report, except the one for random models."""
    return [line for line in text.splitlines() if "WARNING" in line and "collapsed" not in line]


@pytest.mark.slow
def test_a_merge_completes_the_folder(runs, tmp_path, evaluate, capsys):
    ends, out = (runs / "zero", runs / "end"), tmp_path / "out"
    evaluate(runs / "zero", runs / "end", "--wise", *ends, 0.2, 0.5, "--out", out)
    beside = [runs / "zero", runs / "end", out]
    call(report_command, *beside, "--out", tmp_path / "report")
    printed = capsys.readouterr()
    assert not complaints(printed.err)
    assert "wise-ft-0.5" in printed.out
    table = (tmp_path / "report" / "table.csv").read_text()
    before = contents(out / "wise-ft-0.2")

    call(merge_command, "wise", *ends, "--alpha", 0.2, 0.5, "--out", out)
    assert len(weights(out)) == 2
    assert contents(out / "wise-ft-0.2") == before
    assert DONE in evaluate(out / "wise-ft-0.2", "--wise", *ends, 0.2, 0.5, "--out", out)
    call(report_command, *beside, "--out", tmp_path / "report")
    assert not complaints(capsys.readouterr().err)
    assert (tmp_path / "report" / "table.csv").read_text() == table


@pytest.mark.slow
def test_results_of_an_earlier_merge_are_found(runs, tmp_path, evaluate):
    ends, out = (runs / "zero", runs / "end"), tmp_path / "out"
    call(merge_command, "wise", *ends, "--alpha", 0.5, "--out", out / "wise-ft-0.5")
    evaluate(out / "wise-ft-0.5")
    assert DONE in evaluate("--wise", *ends, 0.5, "--out", out)
    # one that was not evaluated yet is evaluated with its own weights
    call(merge_command, "uniform-soup", *ends, "--out", out / "uniform-soup")
    evaluate("--soup", *ends, "--out", out)
    assert not json.loads((out / "uniform-soup" / RESULTS).read_text())["without_weights"]


@pytest.mark.slow
def test_what_is_done_is_skipped(runs, tmp_path, evaluate):
    ends, out = (runs / "zero", runs / "end"), tmp_path / "out"
    some = evaluate("--wise", *ends, 0.5, "--out", out, sets=SETS[:1])
    assert f"{out}/wise-ft-0.5: imagenet-val " in some
    before = contents(out / "wise-ft-0.5")
    # runs may move: weights are identified by their hash
    runs.rename(tmp_path / "moved")
    ends = (tmp_path / "moved" / "zero", tmp_path / "moved" / "end")
    assert DONE in evaluate("--wise", *ends, 0.5, "--out", out, sets=SETS[:1])
    more = evaluate("--wise", *ends, 0.5, 0.7, "--out", out, sets=SETS[:1])
    assert f"{out}/wise-ft-0.7: " in more
    # the earlier result is printed too
    assert f"{out}/wise-ft-0.5: " in more
    assert contents(out / "wise-ft-0.5") == before
    # counts of one set are kept when another set is added
    evaluate("--wise", *ends, 0.5, "--out", out, sets=SETS[1:])
    results = json.loads((out / "wise-ft-0.5" / RESULTS).read_text())
    assert sorted(results["sets"]) == sorted(SETS)
    assert DONE in evaluate("--wise", *ends, 0.5, "--out", out)


@pytest.mark.slow
def test_systems_that_do_not_fit_at_once_are_the_same_in_several_passes(
    runs, tmp_path, evaluate, monkeypatch
):
    words = ("--wise", runs / "zero", runs / "end", 0.1, 0.5, 0.9, "--out")
    evaluate(*words, tmp_path / "once")
    monkeypatch.setattr(evaluate_command, "at_once", lambda *_: 2)
    assert "holds 2 of 3 models at once" in evaluate(*words, tmp_path / "twice")
    for name in ("wise-ft-0.1", "wise-ft-0.5", "wise-ft-0.9"):
        assert contents(tmp_path / "once" / name) == contents(tmp_path / "twice" / name)


def test_equal_towers_are_one(runs):
    ends = (runs / "zero", runs / "end")
    found = average.wise(*ends, [0, 0.5, 1], "best", "alpha")
    systems = [*ends, *(Unwritten(runs / one.name, one) for one in found)]
    world = World(rank=0, size=1, local_rank=0)
    loaded, models = load_checkpoints(systems, world, evaluate_command.torch.device("cpu"))
    zero, end, at_0, at_half, at_1 = (model.visual for model in models)
    assert at_0 is zero
    assert at_1 is end
    assert at_half not in (zero, end)
    # the weights are stored once
    assert not any(one.saved.state for one in loaded)


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_that_is_half_written(
    runs, tmp_path, evaluate, wrong, monkeypatch
):
    """Wherever writing stops, results name existing files, and a rerun completes the work."""
    words = ("--wise", runs / "zero", runs / "end", 0.3, 0.6, "--out")
    evaluate(*words, tmp_path / "clean")
    names = ("wise-ft-0.3", "wise-ft-0.6")
    clean = {name: contents(tmp_path / "clean" / name) for name in names}
    # config.json, two files of predictions, results.json
    writes = 4 * len(names)
    publish = files.publish
    for allowed in range(writes):
        out, left = tmp_path / str(allowed), iter(range(allowed))

        def fill(url, *rest, left=left):
            if next(left, None) is None:
                raise OSError(28, "No space left on device", url)
            return publish(url, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(files, "publish", fill)
            assert "No space left" in wrong(*words, out)
        for name in names:
            found = contents(out / name) if out.exists() else {}
            assert found.items() <= clean[name].items()
            # results.json is the last, config.json the first
            assert RESULTS not in found or found == clean[name]
            assert CONFIG in found or not found
        evaluate(*words, out)
        assert {name: contents(out / name) for name in names} == clean


@pytest.mark.slow
def test_a_tower_that_is_evaluated_is_the_one_that_rft_merge_writes(runs, tmp_path, evaluate):
    ends, out, merged = (runs / "zero", runs / "end"), tmp_path / "out", tmp_path / "merged"
    evaluate("--wise", *ends, 0.3, "--parts", "tower", "--out", out)
    call(merge_command, "wise", *ends, "--alpha", 0.3, "--parts", "tower", "--out", merged)
    evaluate(merged)
    assert contents(out / "wise-tower-0.3") == {
        name: data.replace(b"merged/", b"wise-tower-0.3/")
        for name, data in contents(merged).items()
    }
    # a command that needs the weights prints the merge that writes them
    with pytest.raises(ValueError, match=r"--alpha 0.3 --parts tower --out"):
        derived.require_weights(out / "wise-tower-0.3" / SELECTED)


# invalid systems


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wise", "zero", "end", "0.5"], "--wise and --soup need --out DIR"),
        (["end", "--parts", "tower"], "--parts tower needs --wise"),
        (["end", "--out", "out"], "--out needs --wise or --soup"),
        (["--wise", "zero", "end", "--out", "out"], "--wise takes START END and one or more"),
        (["--wise", "zero", "end", "0.5", "more", "--out", "out"], "'more' is not a number"),
        (["--wise", "zero", "end", "1.5", "--out", "out"], "an alpha of --wise is 1.5; it must"),
        (["--wise", "zero", "end", "nan", "--out", "out"], "an alpha of --wise is nan; it must"),
        (["--wise", "zero", "end", "0.5", "0.5", "--out", "out"], "has 0.5 twice"),
        (["--wise", "zero", "none", "0.5", "--out", "out"], "no checkpoint at none"),
        (["--wise", "s3://b/x", "end", "0.5", "--out", "out"], "must be a local folder"),
        (["--soup", "end", "--out", "out"], "a soup needs at least two models, 1 named"),
        (["--soup", "end", "end", "--out", "out"], "end and end are the same weights"),
        (["--soup", "zero", "end", "--soup", "zero", "more", "--out", "out"],
         "two averages are called uniform-soup: of zero, end and of zero, more; evaluate them"),
        (["--wise", "zero", "end", "0.5", "--wise", "zero", "more", "0.5", "--out", "out"],
         "two averages are called wise-ft-0.5"),
        (["--wise", "zero", "end", "0.5", "--end-weights", "last", "--out", "out"],
         "end did not keep its last weights"),
        ([], "name at least one run folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(runs, wrong, monkeypatch, words, message):
    monkeypatch.chdir(runs)
    assert message in wrong(*words)
    assert not (runs / "out").exists()


@pytest.mark.slow
def test_a_folder_that_holds_another_model(runs, tmp_path, evaluate, wrong, refused):
    ends, out = (runs / "zero", runs / "end"), tmp_path / "out"
    evaluate("--wise", *ends, 0.5, "--out", out)
    before = contents(out / "wise-ft-0.5")
    other = (runs / "zero", runs / "more")
    line = wrong("--wise", *other, 0.5, "--out", out)
    assert f"{out}/wise-ft-0.5 holds a different merge: merged_from.1: " in line
    merge = partial(refused, merge_command, "wise")
    assert "holds a different merge" in merge(*other, "--out", out / "wise-ft-0.5")
    assert "alpha: 0.5 -> 0.7" in merge(*ends, "--alpha", 0.7, "--out", out / "wise-ft-0.5")
    assert contents(out / "wise-ft-0.5") == before


@pytest.mark.slow
def test_without_weights_it_is_no_checkpoint(runs, tmp_path, evaluate, wrong, refused):
    ends, out = (runs / "zero", runs / "end"), tmp_path / "out"
    evaluate("--wise", *ends, 0.5, "--soup", *ends, "--out", out)
    wise, soup = out / "wise-ft-0.5", out / "uniform-soup"
    command = f"python -m rft.merge wise {ends[0]} {ends[1]} --alpha 0.5 --out {wise}"
    said = f"{wise} is an average without weights, made by rft.evaluate --wise or --soup; "
    lines = [
        wrong(wise),
        refused(merge_command, "wise", ends[0], wise, "--out", tmp_path / "more"),
        refused(merge_command, "uniform-soup", ends[0], wise, "--out", tmp_path / "more"),
        refused(convert_command, "export", wise, "--to", "safetensors", "--out", "x.safetensors"),
    ]
    assert lines == len(lines) * [f"error: {said}write them: {command}"]
    line = wrong(soup)
    assert line.endswith(f"python -m rft.merge uniform-soup {ends[0]} {ends[1]} --out {soup}")
    # as printed
    call(merge_command, *shlex.split(command)[3:])
    assert load_state(wise / SELECTED).metadata["recipe"] == "wise-ft-0.5"
    assert DONE in evaluate(wise)


def test_results_without_weights_belong_to_their_configuration(runs, tmp_path, evaluate, refused):
    out = tmp_path / "out"
    evaluate("--wise", runs / "zero", runs / "end", 0.5, "--out", out)
    config = out / "wise-ft-0.5" / CONFIG
    files.write_json(str(config), {**json.loads(config.read_text()), "alpha": 0.6})
    line = refused(report_command, out, "--out", tmp_path / "report")
    assert f"{config} was changed after {out}/wise-ft-0.5/results.json was written" in line


def test_weights_that_are_gone_are_warned_of(runs, tmp_path, evaluate, capsys):
    """They belong to no average that was never written."""
    out = tmp_path / "wise"
    call(merge_command, "wise", runs / "zero", runs / "end", "--out", out)
    evaluate(out)
    (out / SELECTED).unlink()
    call(report_command, out, "--out", tmp_path / "report")
    assert f"{out / SELECTED} is missing, so its results" in capsys.readouterr().err
