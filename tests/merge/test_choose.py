"""The choice by held-out images: exact counts, a rule for ties, no test images read."""

import shutil
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rft.averages import average
from rft.config import load_config
from rft.evaluate.count import Count
from rft.merge import choose
from rft.merge import command as merge
from rft.merge.choose import Standing
from rft.runs import choice, filenames
from rft.storage import files
from rft.train.command import parse
from tests import tiny
from tests.merge.test_merge import HELD_OUT, count_by_hand, state_of


def loaded(step: int, average: object = None):
    metadata = types.SimpleNamespace(metadata={"step": str(step)})
    return types.SimpleNamespace(path=Path("absent"), saved=metadata, average=average)


def count(correct: int) -> Count:
    return Count(correct=correct, total=10)


def test_of_equal_counts_the_model_nearest_to_the_pre_trained_one_is_first():
    mean = object()
    tied = [
        (loaded(9), 7),
        (loaded(9, mean), 7),
        (loaded(0), 7),
        (loaded(9, mean), 7),
        (loaded(9), 8),
    ]
    standings = [Standing.of(n, one, count(right)) for n, (one, right) in enumerate(tied)]
    assert [one.place for one in sorted(standings)] == [4, 2, 1, 3, 0]


@pytest.mark.slow
def test_every_candidate_is_counted_on_the_held_out_images(train, tiny_data, tmp_path, capsys):
    held_out = ("--loader.held-out", HELD_OUT)
    zero_shot = train("zero-shot", "--optim.epochs", 0, *held_out)
    vanilla = train("vanilla", "--optim.lr", 0.01, *held_out)
    # the training set is all that exists
    data = tmp_path / "data"
    shutil.copytree(tiny_data / "imagenet-train", data / "imagenet-train")
    capsys.readouterr()
    options = ("--wise", zero_shot, vanilla, 0.5, "--out", tmp_path, "--workers", 0)
    saved = tmp_path / "choice.json"
    tiny.call(choose, zero_shot, vanilla, "--data", data, *options, "--save", saved)
    found = choice.read(saved)
    states = [state_of(zero_shot), state_of(vanilla)]
    (mean,) = average.states(average.wise(zero_shot, vanilla, [0.5], "best", "--alpha"))
    by_hand = [count_by_hand(state, vanilla, data) for state in (*states, mean)]
    assert [one.correct for one in found.candidates] == by_hand
    assert found.images == HELD_OUT
    best = max(by_hand)
    kinds = [0, 2, 1]
    expected = min(range(3), key=lambda n: (best - by_hand[n], kinds[n]))
    assert found.chosen == found.candidates[expected].path
    paths = [one.path for one in found.candidates]
    last, *following = capsys.readouterr().out.splitlines()[len(paths) :]
    assert last == f"chosen by held-out images: {found.chosen}"
    merging = f"python -m rft.merge wise {zero_shot} {vanilla} --alpha 0.5 --out {paths[2]}"
    export = f"python -m rft.convert export {found.chosen} --to open-clip --out model"
    assert following == [
        *([f"next: {merging}", f"then: {export}"] if expected == 2 else [f"next: {export}"]),
        f"then, after rft evaluate of the same models: python -m rft.report {' '.join(paths)} "
        f"--out report --data {data} --chosen {saved}",
    ]
    assert not (tmp_path / "wise-ft-0.5").exists()
    # an average that was written in between still counts as one, also in a tie
    tiny.call(merge, "wise", zero_shot, vanilla, "--out", tmp_path / "wise-ft-0.5")
    tiny.call(choose, zero_shot, vanilla, "--data", data, *options, "--save", saved)
    assert choice.read(saved) == found


@pytest.mark.slow
def test_runs_without_held_out_images_are_refused(train, tiny_data, tmp_path, refused):
    runs = [train("vanilla", "--loader.held-out", 0, "--seed", n, name=f"v{n}") for n in (0, 1)]
    line = refused(choose, *runs, "--data", tiny_data, "--save", tmp_path / "choice.json")
    assert "held out no images" in line
    assert not (tmp_path / "choice.json").exists()
    assert "two models" in refused(choose, runs[0], "--data", tiny_data, "--save", tmp_path / "c")


@pytest.mark.slow
def test_the_same_choice_again_counts_nothing(train, tiny_data, tmp_path, capsys):
    held_out = ("--loader.held-out", HELD_OUT, "--split-seed", 0)
    runs = [train("vanilla", *held_out, "--seed", n, name=f"chosen{n}") for n in (0, 1)]
    saved = tmp_path / "choice.json"
    command = ("--data", tiny_data, "--workers", 0, "--save", saved)
    tiny.call(choose, *runs, *command)
    first = saved.read_bytes()
    known = choice.read(saved)
    assert choice.is_current(known)
    capsys.readouterr()
    tiny.call(choose, *runs, *command)
    line, following, _ = capsys.readouterr().out.splitlines()
    assert line == f"already chosen by held-out images: {known.chosen}"
    assert following.startswith(f"next: python -m rft.convert export {known.chosen} ")
    # it is not a choice among other candidates, or of other weights
    tiny.call(choose, *runs[::-1], *command)
    assert [one.path for one in choice.read(saved).candidates] == list(map(str, runs[::-1]))
    saved.write_text("not a choice")
    tiny.call(choose, *runs, *command)
    assert saved.read_bytes() == first
    weights = runs[0] / filenames.SELECTED
    weights.rename(tmp_path / "moved")
    assert not choice.is_current(known)
    shutil.copy(runs[1] / filenames.SELECTED, weights)
    assert not choice.is_current(known)
    (tmp_path / "moved").replace(weights)
    assert choice.is_current(known)


@pytest.mark.slow
def test_a_training_takes_the_chosen_settings(train, tiny_data, tmp_path):
    held_out = ("--loader.held-out", HELD_OUT, "--split-seed", 0)
    runs = [
        train("vanilla", *held_out, "--optim.lr", lr, "--loader.workers", workers, name=f"lr{lr}")
        for lr, workers in ((0.01, 1), (0.02, 1))
    ]
    saved = tmp_path / "choice.json"
    tiny.call(choose, *runs, "--data", tiny_data, "--workers", 0, "--save", saved)
    chosen = load_config(Path(choice.read(saved).chosen))
    line = ["vanilla", "--data", str(tiny_data), "--run-dir", str(tmp_path / "again")]
    line += ["--scale", "miniature"]
    found = parse([*line, "--like", str(saved), "--seed", "3"])
    assert found.optim == chosen.optim
    assert found.precision == chosen.precision == "fp32"
    assert found.loader.held_out == HELD_OUT
    # a seed, and options without effect on results, come from this command line
    assert (found.seed, found.loader.workers) == (3, 0)
    assert found.run == str(tmp_path / "again")
    assert parse([*line, "--like", str(saved)]).seed == 0
    # the values that the choice names are changed
    assert parse([*line, f"--like={saved}", "--optim.lr", "0.5"]).optim.lr == 0.5
    with pytest.raises(ValueError, match="recipe is vanilla, but this run's is no-mask"):
        parse(["no-mask", *line[1:], "--like", str(saved)])
    with pytest.raises(ValueError, match="scale is miniature, but this run's is paper"):
        parse([*line, "--like", str(saved), "--scale", "paper"])
    merged = tmp_path / "merged.json"
    tiny.call(merge, "uniform-soup", *runs, "--out", tmp_path / "soup")
    found = choice.read(saved)
    candidates = (*found.candidates, replace(found.candidates[0], path=str(tmp_path / "soup")))
    document = asdict(replace(found, candidates=candidates, chosen=str(tmp_path / "soup")))
    files.write_json(str(merged), document)
    with pytest.raises(
        ValueError, match=r"soup, a merged or imported model without training options"
    ):
        parse([*line, "--like", str(merged)])
    weights = runs[0] / filenames.SELECTED
    weights.rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"weights of a compared model have changed or are missing"
    ):
        parse([*line, "--like", str(saved)])
    (tmp_path / "moved").rename(weights)
    with pytest.raises(ValueError, match=r"absent\.json"):
        parse([*line, "--like", str(tmp_path / "absent.json")])
