"""Refusals, and their messages."""

import json
import re

import pytest

from rft.report import read as runs
from rft.report.read import find_runs, load_run, load_runs
from rft.runs.filenames import SELECTED
from rft.runs.records import Provenance, read_metrics
from rft.storage import files
from tests.report.make_runs import configured, edit, make_run, make_weights, run_of
from tests.tiny import unstamped


def test_a_run_folder_is_read_whole(tmp_path):
    run = load_run(make_run(tmp_path, "no-mask", 3, percent=(75, 60), total=200))
    assert (run.recipe, run.seed, run.results.step) == ("no-mask", 3, 250)
    assert (run.counts["imagenet-val"].correct, run.counts["imagenet-val"].total) == (150, 200)
    assert list(run.counts) == ["imagenet-val", "imagenet-v2"]
    assert len(run.metrics) == 60


def test_a_merged_model_has_no_metrics_or_provenance(tmp_path):
    path = make_run(tmp_path, "wise-ft-0.5", metrics=False, merged_from=[])
    (path / "provenance.json").unlink()
    edit(path / "results.json", config_sha256=None)
    run = load_run(path)
    assert (run.metrics, run.provenance) == ((), Provenance())
    assert run.results.config_sha256 is None


def test_a_run_must_be_evaluated_first(tmp_path):
    path = make_run(tmp_path)
    (path / "results.json").unlink()
    with pytest.raises(ValueError, match="evaluate it first: python -m"):
        load_run(path)


def test_a_folder_must_be_a_run(tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        load_runs([tmp_path])
    with pytest.raises(ValueError, match="at least one run"):
        load_runs([])


def test_runs_are_found_at_any_depth(tmp_path):
    sweep, other = tmp_path / "runs" / "sweep", tmp_path / "runs" / "a" / "b"
    wise = [make_run(sweep, f"wise-ft-0.{n}", metrics=False) for n in (1, 2)]
    runs = [make_run(other, "vanilla"), *wise]
    (wise[0] / "checkpoints" / "of-a-run").mkdir(parents=True)
    (wise[0] / "checkpoints" / "of-a-run" / "config.json").write_text("{}")
    (sweep / ".killed").mkdir()
    (sweep / ".killed" / "config.json").write_text("{}")
    (sweep / "notes.txt").write_text("mine")
    (tmp_path / "runs" / "empty").mkdir()
    assert find_runs([tmp_path / "runs"]) == runs
    assert [run.path for run in load_runs([sweep, other])] == [*wise, runs[0]]
    for path in (tmp_path / "runs" / "empty", sweep / "notes.txt", tmp_path / "none"):
        with pytest.raises(ValueError, match=f"{path.name} is not a run folder"):
            find_runs([sweep, path])


def test_a_run_that_several_paths_reach_counts_once(tmp_path):
    run = make_run(tmp_path / "runs", "vanilla")
    (tmp_path / "runs" / "back").symlink_to(tmp_path / "runs", target_is_directory=True)
    (tmp_path / "runs" / "self").symlink_to("self")
    (tmp_path / "runs" / "gone").symlink_to("nowhere")
    link = tmp_path / "link"
    link.symlink_to(run, target_is_directory=True)
    assert find_runs([tmp_path / "runs", run, run, link]) == [run]
    assert find_runs([link, run]) == [link]


def test_a_seed_counts_once(tmp_path):
    paths = [make_run(tmp_path / name, "vanilla", 0) for name in ("a", "b")]
    with pytest.raises(ValueError, match="both vanilla with seed 0") as caught:
        load_runs(paths)
    assert all(str(path) in str(caught.value) for path in paths)


@pytest.mark.parametrize(
    ("recipe", "step", "config", "refused"),
    [
        ("vanilla", 250, {}, True),
        ("uniform-soup", 250, {"merged_from": []}, True),
        ("wise-ft-0.5", 250, {"alpha": 0.5, "merged_from": []}, True),
        # the same for every seed: not trained, a merge of such, a merge without the trained model
        ("zero-shot", 0, {}, False),
        ("uniform-soup", 0, {"merged_from": []}, False),
        ("wise-ft-0", 250, {"alpha": 0.0, "merged_from": []}, False),
    ],
)
def test_the_same_weights_are_not_two_seeds(tmp_path, recipe, step, config, refused):
    paths = [make_run(tmp_path, recipe, seed, **config) for seed in range(2)]
    for path in paths:
        sha256 = files.sha256_file(make_weights(path, recipe, step=str(step)))
        edit(path / "results.json", checkpoint_sha256=sha256, step=step)
    if not refused:
        assert len(load_runs(paths)) == 2
        return
    message = f"{paths[0]} and {paths[1]} are seeds 0 and 1 of {recipe}, but have the same weights"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_runs(paths)
    # a different recipe may start from, or end at, the same weights
    other = make_run(tmp_path, "other")
    weights = make_weights(other, "other", step=str(step))
    edit(other / "results.json", checkpoint_sha256=files.sha256_file(weights), step=step)
    assert len(load_runs([paths[0], other])) == 2


def test_weights_without_classes_are_warned_of_once(tmp_path, capsys):
    paths = [make_run(tmp_path, "vanilla", seed) for seed in range(3)]
    load_runs(paths)
    assert capsys.readouterr().err == ""
    for path in paths[1:]:
        make_weights(path, "vanilla", (), tilt=int(path.name[-1]))
        edit(path / "results.json", checkpoint_sha256=files.sha256_file(path / SELECTED))
    load_runs(paths)
    (line,) = unstamped(capsys.readouterr().err).splitlines()
    assert line.startswith(
        f"WARNING: {paths[1]} (and 1 more runs): the weights do not name the classes"
    )


def test_all_runs_must_have_seen_the_same_data(tmp_path):
    first, second = make_run(tmp_path, "vanilla"), make_run(tmp_path, "no-mask")
    sets = json.loads((second / "results.json").read_text())["sets"]
    sets["objectnet"]["manifest_sha256"] = "0" * 64
    edit(second / "results.json", sets=sets)
    with pytest.raises(ValueError, match="objectnet is not the same data in all runs"):
        load_runs([first, second])


def test_seeds_of_a_recipe_must_have_the_same_sets(tmp_path):
    paths = [make_run(tmp_path, seed=0), make_run(tmp_path, seed=1, percent=(1, 2, 3, 4, 5))]
    with pytest.raises(ValueError, match="has imagenet-a; evaluate both on the same sets"):
        load_runs(paths)


def test_recipes_may_have_other_sets(tmp_path):
    paths = [make_run(tmp_path, "vanilla"), make_run(tmp_path, "no-mask", percent=(1, 2))]
    assert len(load_runs(paths)) == 2


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("results.json", {"schema": 2}, "schema is 2; it must be 1; .*evaluate again"),
        ("results.json", {"sets": [1]}, "sets is .*; it must be an object"),
        (
            "results.json",
            {"sets": {"objectnet": {"correct": 1}}},
            "sets.objectnet.total is missing",
        ),
        ("results.json", {"step": None}, "step is None; it must be a whole number"),
        ("config.json", {"recipe": "a\x1b[2Jb"}, "no control characters"),
        ("config.json", {"recipe": 7}, "recipe is 7; it must be a text"),
        ("config.json", {"seed": "0"}, "seed is '0'"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, changes, message):
    path = make_run(tmp_path)
    edit(path / name, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_run(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("correct", "total"), [(11, 10), (-1, 10), (0, 0), (0.5, 10), ("1", 2)])
def test_impossible_counts_are_refused(tmp_path, correct, total):
    path = make_run(tmp_path)
    entry = {"correct": correct, "total": total, "manifest_sha256": "0" * 64}
    edit(path / "results.json", sets={"objectnet": entry})
    with pytest.raises(ValueError, match=r"sets.objectnet(\.correct|\.total)?( is|: )"):
        load_run(path)


def test_metrics_end_at_the_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line.metrics.step for line in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        list(read_metrics(path))


@pytest.mark.parametrize("value", ["1e308", "-1e308", "1.7e200"])
@pytest.mark.parametrize("term", ["ce", "mse", "kd", "contrastive", "context", "lipsum", "head"])
def test_a_loss_that_no_axis_shows_is_refused(tmp_path, term, value):
    path = make_run(tmp_path)
    (path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": 2, "{term}": {value}}}\n')
    with pytest.raises(
        ValueError, match=rf"metrics.jsonl line 2: {term} is -?1.*; it must be from"
    ):
        load_run(path)


def test_metrics_are_counted_over_all_runs(tmp_path, monkeypatch, capsys):
    paths = [make_run(tmp_path, seed=seed) for seed in range(3)]  # 60 lines each
    monkeypatch.setattr(runs, "MAX_LINES", 180)
    assert [len(run.metrics) for run in load_runs(paths)] == [60, 60, 60]
    monkeypatch.setattr(runs, "MAX_LINES", 179)
    assert capsys.readouterr().err == ""
    # a mean curve of two of three seeds would be wrong
    assert [run.metrics for run in load_runs(paths)] == [(), (), ()]
    assert "no training curves: the metrics of all runs together have more than 179" in (
        capsys.readouterr().err
    )


def test_documents_are_counted_over_all_runs(tmp_path, monkeypatch):
    paths = [make_run(tmp_path, seed=seed) for seed in range(3)]
    monkeypatch.setattr(runs, "DOCUMENT_BYTES", 10_000)
    load_runs(paths)
    monkeypatch.setattr(runs, "DOCUMENT_BYTES", 2_500)
    with pytest.raises(
        ValueError, match=r"config.json, .* have 3,\d+ bytes; the limit of a report is 2,500"
    ):
        load_runs(paths)


def test_settings_without_end_are_cut_between_values():
    found = runs.shown_settings(configured(run_of("vanilla"), a=1, z=["x" * 1000] * 100).config)
    assert found.startswith('{\n  "a": 1,\n')
    assert found.endswith(f'"{"x" * 1000}"\n... (too long to show)')
    assert len(found) < runs.SETTINGS_LETTERS + 100


def test_seeds_with_other_settings_are_not_averaged(tmp_path):
    """They are separate rows, named by their differences."""
    paths = [
        make_run(tmp_path / str(rate), seed=seed, optim={"lr": rate, "epochs": 10})
        for rate in (3e-5, 1e-3)
        for seed in (0, 1)
    ]
    assert [run.row for run in load_runs(paths)] == [
        *["vanilla, lr 3e-05"] * 2,
        *["vanilla, lr 0.001"] * 2,
    ]


def test_one_seed_may_have_several_settings_but_none_twice(tmp_path):
    paths = [make_run(tmp_path / str(rate), optim={"lr": rate}) for rate in (3e-5, 1e-3)]
    assert [run.seed for run in load_runs(paths)] == [0, 0]
    again = make_run(tmp_path / "again", optim={"lr": 1e-3})
    with pytest.raises(ValueError, match=r"are both vanilla, lr 0.001 with seed 0"):
        load_runs([*paths, again])


def test_seeds_in_different_precisions_are_not_averaged(tmp_path):
    paths = [
        make_run(tmp_path, seed=seed, optim={"epochs": 10}, precision=precision)
        for seed, precision in enumerate(("fp32", "bf16"))
    ]
    assert [run.row for run in load_runs(paths)] == [
        "vanilla, precision fp32",
        "vanilla, precision bf16",
    ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"precision": "bf16", "optim": {"epochs": 10}}, "bf16"),
        ({"precision": "auto", "optim": {"epochs": 10}}, "auto"),
        ({"precision": "\x1b[31m", "optim": {}}, r"\x1b[31m"),
        ({"optim": {"epochs": 10}}, ""),
        # nothing was trained
        ({"precision": "bf16", "optim": {"epochs": 0}}, ""),
        ({"precision": "bf16", "merged_from": []}, ""),
    ],
)
def test_the_precision_of_a_run(tmp_path, config, expected):
    assert load_run(make_run(tmp_path, **config)).precision == expected


def test_what_seeds_build_on_may_differ(tmp_path):
    kd = [
        make_run(
            tmp_path,
            "wise-kd-vanilla",
            seed,
            order_seed=seed,
            method={"kd_weight": 1, "kd_teacher": f"runs/wise-ft-0.5-seed{seed}"},
            model={"clip": "x", "start": f"runs/probe-seed{seed}"},
            loader={"batch_size": 512, "workers": seed},
        )
        for seed in (0, 1)
    ]
    soups = [
        make_run(
            tmp_path,
            "greedy-soup",
            seed,
            merged_from=[{"path": f"runs/{seed}", "sha256": "0" * 64}],
            soup={"correct": seed, "total": 1, "steps": []},
        )
        for seed in (0, 1)
    ]
    assert [run.row for run in load_runs([*kd, *soups])] == [
        *["wise-kd-vanilla"] * 2,
        *["greedy-soup"] * 2,
    ]
    edit(kd[1] / "config.json", method={"kd_weight": 2, "kd_teacher": ""})
    assert [run.variant for run in load_runs(kd)] == ["kd_weight 1", "kd_weight 2"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"clip": "ViT-B-16-quickgelu"}, "ViT-B-16-quickgelu"),
        ({"clip": "local-dir:/some/folder/ViT-B-16"}, "ViT-B-16"),
        ({"clip": "red\x1b[31m \u00e9"}, r"red\x1b[31m \xe9"),
        ({}, ""),
    ],
)
def test_the_name_of_the_clip(tmp_path, model, expected):
    assert load_run(make_run(tmp_path, model=model)).clip == expected


def test_a_merged_model_does_not_name_its_clip(tmp_path):
    assert load_run(make_run(tmp_path, "wise-ft-0.5", merged_from=[])).clip == ""


def test_what_is_not_known_of_a_run_is_noted(tmp_path):
    paths = [make_run(tmp_path, "vanilla", seed, optim={"epochs": 1}) for seed in range(4)]
    (paths[1] / "training.json").unlink()
    (paths[2] / SELECTED).unlink()
    edit(paths[3] / "config.json", data="elsewhere")
    first, *others = load_runs(paths)
    assert first.notes == ()
    for run, words in zip(
        others, ("training has not ended", "weights are missing", "was changed"), strict=True
    ):
        (note,) = run.notes
        assert words in note


def test_an_average_that_was_never_written_lacks_nothing(tmp_path):
    path = make_run(tmp_path, "wise-ft-0.5", merged_from=[])
    results = json.loads((path / "results.json").read_text())
    edit(
        path / "results.json",
        without_weights=True,
        config_sha256=files.sha256_file(path / "config.json"),
    )
    (path / SELECTED).unlink(missing_ok=True)
    assert "sets" in results
    (run,) = load_runs([path])
    assert run.notes == ()
