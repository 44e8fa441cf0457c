"""The top of the page: sentences that are true of the runs."""

from dataclasses import replace

import pytest

from rft.report.page import compose
from rft.report.read import load_runs
from rft.runs.filenames import SELECTED
from tests.report.make_runs import configured, make_predicted, make_run, run_of

ALL = (70.0, 60.0, 50.0, 40.0, 30.0, 20.0)


def summary(runs):
    return compose(list(runs), draw=False).summary


def better(points: float) -> tuple[float, ...]:
    return tuple(share + points for share in ALL)


def test_what_was_compared():
    runs = [run_of("vanilla", seed, ALL) for seed in (0, 1, 2)] + [run_of("zero-shot", 0, ALL)]
    found = summary(configured(run, model={"clip": "ViT-B-32"}) for run in runs)
    assert found.compared == (
        "2 systems from 4 runs, 1 to 3 seeds of each, CLIP ViT-B-32. Test images: ImageNet "
        "(1,000), V2 (1,000), R (1,000), Sketch (1,000), ObjectNet (1,000), A (1,000)."
    )
    assert summary([run_of("vanilla", 0, ALL[:1])]).compared == (
        "1 system from 1 run, 1 seed of each (the variation between trainings is not known). "
        "Test images: ImageNet (1,000)."
    )


def test_counts_alone_do_not_say_whether_it_could_be_chance():
    runs = [
        run_of("vanilla", 0, ALL),
        run_of("no-mask", 0, better(1)),
        run_of("object-mask-single-fill", 0, better(3)),
    ]
    best, *others = summary(runs).conclusions
    assert best == (
        "Highest OOD avg: object-mask-single-fill, 43.0%. As the maximum of 3 rows on the "
        "same test images, it is slightly too optimistic."
    )
    assert others == [
        "object-mask-single-fill: +3.0 points over vanilla; significance unknown, because there "
        "are no predictions.",
        "object-mask-single-fill: +2.0 points over no-mask, the best baseline; significance "
        "unknown, because there are no predictions.",
    ]


def test_vanilla_as_the_best_baseline_stands_once():
    runs = [run_of("vanilla", 0, better(1)), run_of("zero-shot", 0, ALL), run_of("x", 0, better(2))]
    _, *others = summary(runs).conclusions
    (line,) = others
    assert line.startswith("x: +1.0 points over vanilla, the best baseline;")


def test_a_baseline_may_be_the_best():
    runs = [run_of("vanilla", 0, ALL), run_of("no-mask", 0, better(1)), run_of("x", 0, ALL)]
    best, line = summary(runs).conclusions
    assert best.startswith("Highest OOD avg: no-mask")
    assert line.startswith("no-mask: +1.0 points over vanilla;")


def test_one_system_is_not_the_best_of_anything():
    assert summary([run_of("vanilla", 0, ALL)]).conclusions == []


@pytest.mark.slow
def test_predictions_give_intervals_and_a_verdict(tmp_path):
    paths = [
        make_predicted(tmp_path, name, seed, skill=skill)
        for name, skill in (("vanilla", 0.4), ("no-mask", 0.4), ("x", 0.8))
        for seed in (0, 1)
    ]
    runs = load_runs(paths)
    best, one, two = summary(runs).conclusions
    assert "% (95% interval " in best
    for line in (one, two):
        assert "p < 0.001): significant." in line
    # the two baselines cannot be distinguished
    best, one = summary(runs[:4]).conclusions
    assert one.endswith("not significant.")


@pytest.mark.slow
def test_a_difference_that_one_seed_lacks_is_not_significant(tmp_path):
    paths = [
        make_predicted(tmp_path, "vanilla", seed, skill=0.5, images=200) for seed in (0, 1)
    ] + [
        make_predicted(tmp_path, "x", seed, skill=skill, images=200)
        for seed, skill in ((0, 0.9), (1, 0.48))
    ]
    _, line = summary(load_runs(paths)).conclusions
    assert line.endswith("not significant, because not every seed's own difference has this sign.")


def warnings(runs):
    return " ".join(summary(runs).warnings)


def test_one_seed_is_warned_of_and_zero_shot_has_no_other():
    runs = [run_of("vanilla", 0, ALL), run_of("zero-shot", 0, ALL)]
    assert "one seed" not in warnings(runs)
    assert "(the variation between trainings is not known)" in summary(runs).compared
    several = [*runs, run_of("vanilla", 1, ALL)]
    assert "one seed" not in warnings(several)
    assert "is not known" not in summary(several).compared
    assert "no-mask: one seed" in warnings([*several, run_of("no-mask", 0, ALL)])


def test_missing_sets_are_named():
    assert "Not evaluated: ObjectNet, A. No OOD average: no system has all 5" in warnings(
        [run_of("vanilla", 0, ALL[:4])]
    )
    found = warnings([run_of("vanilla", 0, ALL[:4]), run_of("no-mask", 0, ALL)])
    assert "No OOD avg because a set is missing: vanilla." in found
    assert "Not evaluated" not in found
    own = run_of("vanilla", 0)
    own.counts["zoo"] = run_of("vanilla", 0, ALL).counts["imagenet-val"]
    assert "OOD" not in warnings([own])


def test_what_is_not_known_of_runs_is_on_the_page(tmp_path):
    paths = [make_run(tmp_path, "vanilla", seed, optim={"epochs": 1}) for seed in range(3)]
    (paths[1] / "training.json").unlink()
    (paths[2] / SELECTED).unlink()
    found = warnings(load_runs(paths))
    assert "vanilla (unfinished, no step recorded) (seed 1): its training has not ended." in found
    assert "vanilla (seed 2): its weights are missing" in found


def test_the_miniature_is_not_imagenet_and_precisions_are_told_apart():
    runs = [configured(run_of("vanilla", 0, ALL), scale="miniature")]
    assert "do not apply to ImageNet" in warnings(runs)
    runs = [
        configured(run_of(name, 0, ALL), precision=precision, optim={"epochs": 1})
        for name, precision in (("vanilla", "fp32"), ("no-mask", "bf16"))
    ]
    assert "different precisions: bf16 (no-mask); fp32 (vanilla)" in warnings(runs)


def test_a_long_list_is_cut():
    runs = [replace(run_of("vanilla", 0, better(n)), variant=f"lr {n}") for n in range(10)]
    runs += [run_of("no-mask", seed, ALL) for seed in (0, 1)]
    assert "10 systems have one seed" in warnings(runs)
    assert "All runs: no predictions" in warnings(runs)


def test_runs_without_predictions_are_named_some_of_them(tmp_path):
    new = make_predicted(tmp_path, "no-mask")
    old = [make_run(tmp_path, "vanilla", seed, percent=ALL, total=60) for seed in range(10)]
    found = warnings(load_runs([new, *old]))
    assert "vanilla (seed 7) and 2 more: no predictions in the run folder" in found
