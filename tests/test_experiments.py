"""The plan covers the paper, its commands are real, and together they give its tables."""

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_world import environment
from rft import cli, recipes, stages
from rft import experiments as experiments_command
from rft.demo import command as demo_command
from rft.demo.render import IMAGE_SIZE
from rft.demo.world import write_world
from rft.ensemble import command as ensemble_command
from rft.evaluate import command as evaluate_command
from rft.experiments import Experiment, Study, experiments
from rft.merge import choose as choose_command
from rft.merge import command as merge_command
from rft.packing.pack import Options, pack
from rft.paper import FIGURE_7, VIT_B_16, VIT_B_32
from rft.report import command as report_command
from rft.runs import filenames
from rft.sets import BENCHMARKS
from rft.shards.label_space import LabelSpace
from rft.storage import files
from rft.train import command as train_command
from tests import reproduction
from tests.test_docs import updater

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "rft.train": train_command,
    "rft.merge": merge_command,
    "rft.merge.choose": choose_command,
    "rft.ensemble": ensemble_command,
    "rft.evaluate": evaluate_command,
    "rft.report": report_command,
}
PAPER = Study(runs="runs", data="data")
LATER = Study(runs="runs", data="data", suite="post-2023")


def recipe_of(run: str) -> str:
    """The recipe of a run folder by its name."""
    return Path(run).name.partition("-seed")[0]


def made(plan: Study) -> Counter[str]:
    return Counter(recipe_of(run) for one in experiments(plan) for run in one.makes)


@pytest.mark.parametrize("preset", ["paper", "official-parity"])
def test_every_row_of_the_paper_is_made_by_one_experiment_a_seed(preset):
    counts = made(Study(runs="runs", data="data", seeds=3, preset=preset))
    rows = {row.recipe for row in (*VIT_B_32, *VIT_B_16)} | reproduction.figure_7()
    assert {name: counts[name] for name in rows} == {
        name: 1 if name == "zero-shot" else 3 for name in rows
    }
    # a WiSE family of Fig. 7 is one merge
    for family in filter(reproduction.is_family, FIGURE_7):
        makers = [one for one in experiments(PAPER) if any(family in run for run in one.makes)]
        assert [one.name for one in makers] == [f"{family}-seed{seed}" for seed in range(3)]
    assert set(counts) - rows == {"linear-probe", "greedy-soup"}


def test_every_recipe_is_in_the_plan():
    names = {one.name for one in experiments(PAPER)}
    for name in (*recipes.PAPER, *recipes.PAPER_MERGED):
        assert f"{name}-seed0" in names
        assert (f"{name}-seed2" in names) == (name != "zero-shot")


@pytest.mark.parametrize("plan", [PAPER, LATER], ids=["paper", "post-2023"])
def test_each_stands_behind_what_makes_the_folders_it_reads(plan):
    maker: dict[str, str] = {}
    for one in experiments(plan):
        assert set(one.after) <= set(maker.values()), one.name
        saved = [word for word in one.command if word.endswith(f"{one.name}.json")]
        own = {plan.at(one.name), *one.makes, *saved}
        assert not own & maker.keys()
        named = {word for word in one.command if word.startswith("runs/")}
        needed = {maker[path] for path in named - own}
        if one.name != "report":  # which waits for the evaluations of what it reads
            assert needed == set(one.after), one.name
        maker |= dict.fromkeys(own, one.name)


@pytest.mark.parametrize("plan", [PAPER, LATER], ids=["paper", "post-2023"])
def test_the_report_waits_for_everything(plan):
    found = {one.name: one for one in experiments(plan)}
    reached, waiting = set(), ["report"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += found[name].after
    assert reached == set(found)


@pytest.fixture
def parsed():
    """Parse a command line like its own `main`."""

    def parse(command: tuple[str, ...]):
        launcher, flag, module, *options = command
        assert flag == "-m"
        if module == "rft.train":
            return launcher, train_command.parse(options)
        kind = COMMANDS[module].Arguments
        return launcher, cli.parse(kind, args=options, prog=module)

    return parse


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "official-parity"])
@pytest.mark.parametrize("scale", ["paper", "miniature"])
def test_the_commands_are_those_of_the_real_command_lines(parsed, scale, preset):
    plan = Study(runs="R", data="s3://b/d", scale=scale, preset=preset, seeds=2, epochs=4)
    rates = {}
    for one in experiments(plan):
        launcher, arguments = parsed(one.command)
        module = one.command[2]
        if module == "rft.train":
            recipe = recipes.build(arguments.recipe, scale=scale, preset=preset)
            assert (arguments.scale, arguments.preset, launcher) == (scale, preset, "torchrun")
            assert arguments.method.mask == recipe.method.mask
            assert arguments.run == f"R/{one.name}"
            assert arguments.seed == int(one.name[-1])
            assert arguments.optim.epochs == (0 if arguments.recipe == "zero-shot" else 4)
            if arguments.recipe == "vanilla" and arguments.seed == 1:
                rates[one.name] = arguments.optim.lr / recipe.optim.lr
        if module == "rft.merge" and one.command[3] == "wise":
            assert arguments.merge.alpha == recipes.ALPHAS
            assert arguments.merge.end_weights == ("best" if preset == "paper" else "last")
        # the others do not support several ranks
        assert (launcher == "python") == (
            module == "rft.report" or one.command[3] in ("wise", "uniform-soup")
        )
    assert sorted(rates.values()) == pytest.approx(sorted(recipes.SOUP_RATES))
    assert rates["vanilla-seed1"] == 1


@pytest.mark.slow
def test_teachers_and_starts_are_those_of_the_same_seed(parsed):
    found = {one.name: parsed(one.command)[1] for one in experiments(PAPER)}
    for seed in range(3):
        assert found[f"lp-ft-seed{seed}"].model.start == f"runs/linear-probe-seed{seed}"
        for student in ("vanilla", recipes.DEFAULT):
            config = found[f"wise-kd-{student}-seed{seed}"]
            assert config.method.kd_teacher == f"runs/wise-ft-seed{seed}/wise-ft-0.5"
        soup = found[f"greedy-soup-seed{seed}"].merge
        assert len(soup.runs) == len(recipes.SOUP_RATES)
        assert {str(path)[-1] for path in soup.runs} == {str(seed)}


def test_some_recipes_bring_what_they_build_on():
    names = [one.name for one in experiments(Study(runs="R", data="D", seeds=2, only=("lp-ft",)))]
    assert names == [
        *("linear-probe-seed0", "lp-ft-seed0", "linear-probe-seed1", "lp-ft-seed1"),
        *("evaluate-seed0", "evaluate-seed1", "report"),
    ]
    soups = experiments(Study(runs="R", data="D", seeds=1, only=("uniform-soup",)))
    assert len(soups) == len(recipes.SOUP_RATES) + 3
    assert soups[-1].command[3:5] == ("R/vanilla-seed0", "R/uniform-soup-seed0")
    alone = experiments(Study(runs="R", data="D", only=("zero-shot",)))
    assert [one.name for one in alone] == ["zero-shot-seed0", "evaluate-seed0", "report"]


def test_every_method_that_came_later_is_compared_on_equal_terms():
    found = {one.name: one for one in experiments(LATER)}
    rows = {recipe_of(run) for one in found.values() for run in one.makes}
    # WiSE at its authors' own alpha
    merged = {f"{name}-0.5" if "wise" in name else name for name in recipes.SUITE_MERGED}
    assert rows == {*recipes.SUITE, *merged, *recipes.ENSEMBLES}
    for name in recipes.SUITE:
        declared = recipes.TRAINED[name].grid
        tried = [one for one in found if one.startswith(f"{name}-at")]
        assert len(tried) == (len(declared[1]) if declared else 0)
        for seed in range(3 if name != "zero-shot" else 1):
            like = ("--like", f"runs/post-2023/{name}-choice.json")
            command = found[f"{name}-seed{seed}"].command
            assert (command[-2:] == like) == bool(declared)
    # none of its runs belongs to the paper's suite, whose settings may differ
    assert not {one.name for one in experiments(PAPER) if one.makes} - {"report"} & {
        path.removeprefix("runs/") for one in found.values() for path in one.makes
    }


@pytest.mark.slow
def test_its_values_are_tried_by_the_option_that_the_recipe_declares(parsed):
    for one in experiments(replace(LATER, scale="miniature")):
        if one.command[2] != "rft.train" or "--like" in one.command:
            continue
        config = parsed(one.command)[1]
        own = recipes.build(config.recipe, scale="miniature")
        changed = files.difference(own.identity(), config.identity())
        declared = recipes.TRAINED[config.recipe].grid
        if "-at" in one.name and declared:
            value = float(one.name.partition("-at")[2].partition("-seed")[0])
            unit = own.optim.lr if declared[0] == recipes.RATE else 1
            assert any(value == pytest.approx(one * unit, rel=1e-5) for one in declared[1])
            option = declared[0].removeprefix("--").replace("-", "_")
            assert all(line.startswith(f"{option}: ") for line in changed)
            group, name = option.split(".")
            assert getattr(getattr(config, group), name) == value


def test_the_demo_runs_a_part_of_it_in_the_same_folders():
    demo = Study(runs="R", data="D", seeds=1, only=demo_command.SHOWN, alphas=(0.5,))
    found = experiments(demo)
    assert [one.name for one in found[:-2]] == [
        *("zero-shot-seed0", "vanilla-seed0", "no-mask-seed0", "object-mask-single-fill-seed0"),
        "wise-ft-seed0",
    ]
    assert found[-3].makes == ("R/wise-ft-0.5-seed0",)
    everything = {one.command for one in experiments(Study(runs="R", data="D", seeds=1))}
    assert {one.command for one in found[:4]} <= everything


def printed(capsys, monkeypatch, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["rft.experiments", *options])
    experiments_command.main()
    return capsys.readouterr().out


def test_lines_are_for_a_shell_script(capsys, monkeypatch):
    where = ("--runs", "my runs", "--data", "D")
    lines = printed(capsys, monkeypatch, *where, "--lines", "--seeds", "2").splitlines()
    found = experiments(Study(runs="my runs", data="D", seeds=2))
    fields = [line.split("\t") for line in lines]
    assert [(one.name, ",".join(one.after)) for one in found] == [(f[0], f[1]) for f in fields]
    assert [list(one.command) for one in found] == [shlex.split(f[2]) for f in fields]


@pytest.mark.slow
def test_options_behind_the_dashes_reach_every_training(capsys, monkeypatch, parsed):
    options = ("--lines", "--seeds", "1", "--", "--model.clip", "ViT-B-16", "--precision", "bf16")
    out = printed(capsys, monkeypatch, "--runs", "R", "--data", "D", *options)
    for line in out.splitlines():
        command = tuple(shlex.split(line.split("\t")[2]))
        if command[2] == "rft.train":
            config = parsed(command)[1]
            assert (config.model.clip, config.precision) == ("ViT-B-16", "bf16")
        else:
            assert "ViT-B-16" not in line


def test_the_plan_for_people_has_every_command(capsys, monkeypatch):
    out = printed(capsys, monkeypatch, "--runs", "R", "--data", "D", "--seeds", "1")
    for one in experiments(Study(runs="R", data="D", seeds=1)):
        assert f"\n    {shlex.join(one.command)}\n" in out
        assert f"\n{one.name}" in f"\n{out}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "0"), "--seeds is 0"),
        (("--only", "lpft"), "^unknown recipe 'lpft'; did you mean 'lp-ft'?"),
        (("--", "--optim.lr=1"), "--optim.lr=1 is set by the plan"),
        (("--scale", "tiny"), "tiny"),
        (("--lines", "--", "--model.clip", "x\nrm -r y"), r"'x\nrm -r y' has a line break or tab"),
    ],
)
def test_mistakes_are_one_line(options, message, monkeypatch, capsys):
    with pytest.raises(ValueError, match=re.escape(message).replace("\\^", "^")):
        printed(capsys, monkeypatch, "--runs", "R", "--data", "D", *options)


def script(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "launch" / "reproduce.sh"), *options]
    # without a .venv it takes the first Python, as in an activated environment
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_hands_its_options_on(tmp_path):
    result = script("--miniature", "--seeds", "0", "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: --seeds is 0; it must be greater than 0 (see --help)"
    ]
    assert not (tmp_path / "out").exists()
    assert "launch/reproduce.sh --miniature" in script("--help").stdout


def test_the_first_failure_stops_with_one_line(capfd):
    with pytest.raises(ValueError, match="vanilla-seed1 ended with exit code 3"):
        stages.run("vanilla-seed1", (sys.executable, "-c", "raise SystemExit(3)"))
    assert capfd.readouterr().out == "\n$ python -c 'raise SystemExit(3)'\n"


@pytest.fixture(scope="module")
def small_plan(tmp_path_factory) -> Study:
    """The complete plan, on a twentieth of the miniature's images."""
    folder = tmp_path_factory.mktemp("reproduction")
    write_world(folder / "world", scale=0.05)
    labels = LabelSpace.load(str(folder / "world" / "classes.json"))
    options = Options(encoding="pixels", size=IMAGE_SIZE, shard_mb=2, workers=1)
    for dataset in BENCHMARKS:
        pack(dataset, str(folder / "world"), str(folder / "shards"), labels, options)
    return Study(
        runs=str(folder / "runs"),
        data=str(folder / "shards"),
        report=str(folder / "report"),
        scale="miniature",
        seeds=1,
        epochs=1,
        options=("--loader.batch-size", "16", "--loader.held-out", "16"),
    )


def run_all(stages: list[Experiment], monkeypatch) -> None:
    """Run commands of a plan in this process, as on one rank."""
    for one in stages:
        _, _, module, *options = one.command
        monkeypatch.setattr(sys, "argv", [module, *options])
        COMMANDS[module].main()


def outcomes(plan: Study) -> dict[Path, int]:
    """The times at which all weights and results were written."""
    kinds = ("*.safetensors", "results.json")
    found = [path for kind in kinds for path in Path(plan.runs).rglob(kind)]
    return {path: path.stat().st_mtime_ns for path in found}


@pytest.mark.slow
@pytest.mark.program
@pytest.mark.timeout(600)
def test_all_commands_together_give_the_papers_tables(small_plan, monkeypatch, tmp_path):
    *stages, last = experiments(small_plan)
    assert not any(demo_command.is_done(stage, small_plan.data) for stage in stages[:-1])
    run_all([*stages, last], monkeypatch)
    report = Path(small_plan.report)
    assert reproduction.missing(report) == []
    assert all(demo_command.is_done(stage, small_plan.data) for stage in stages)
    # it can be copied into the documentation
    update = updater()
    monkeypatch.setattr(update, "ROOT", tmp_path)
    update.copy_report(report.parent, "report", "reproduction")
    kept = {path.name for path in (tmp_path / "docs/results/reproduction").iterdir()}
    made = {path.name for path in report.iterdir()}
    # the page, what is large, and the same figures as SVG
    large = {"index.html", "differences.csv", "per_class.csv"}
    assert kept == made - large - {n for n in made if n.endswith(".svg")} | {"provenance.json"}
    before = outcomes(small_plan)
    run_all(stages, monkeypatch)  # again, and nothing is done
    assert outcomes(small_plan) == before
    assert reproduction.missing_later(report), "no method of the later suite was run"
    # the check would notice a missing row
    table = (report / "paper.md").read_text()
    (report / "paper.md").write_text(table.replace("| lp-ft | here", "| lp | here"))
    assert reproduction.missing(report) == ["lp-ft in paper.md"]


@pytest.mark.slow
@pytest.mark.program
@pytest.mark.timeout(900)
def test_all_commands_of_the_later_suite_give_its_table(small_plan, monkeypatch):
    plan = replace(small_plan, suite="post-2023", report=f"{small_plan.report}-later")
    *stages, last = experiments(plan)
    run_all([*stages, last], monkeypatch)
    assert reproduction.missing_later(Path(plan.report)) == []
    assert all(demo_command.is_done(stage, plan.data) for stage in stages)
    before = outcomes(plan)
    run_all(stages, monkeypatch)  # again, and nothing is done
    assert outcomes(plan) == before
    # a choice among other weights does not count among these
    chosen = next(one for one in stages if one.name.endswith("-choice"))
    (Path(plan.at(chosen.after[0])) / filenames.SELECTED).unlink()
    assert not demo_command.is_done(chosen, plan.data)
