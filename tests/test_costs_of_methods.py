"""The benchmark of methods' costs: every recipe has a row, and takes the loop's own step."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import costs
from benchmarks.gpu.inputs import REHEARSAL
from rft import recipes
from rft.train import memory
from rft.train.step import accumulate_gradients
from tests import tiny
from tests.conftest import NAMES, TEMPLATES, build_clip

CPU = torch.device("cpu")
SMALL = costs.Arguments(batch_size=4, memory_images=4, classes=len(NAMES), rounds=1)
# a frozen tower sees their clean images
READ = {"car-ft", "lipsum-ft", "no-mask", "unlike-donors"}


@pytest.fixture(scope="module")
def result() -> dict:
    return costs.measure(SMALL, CPU, build_clip(), (NAMES, TEMPLATES))


@pytest.fixture
def shared() -> costs.Shared:
    return costs.Shared(SMALL, CPU, build_clip(), (NAMES, TEMPLATES))


@pytest.mark.slow
def test_every_method_is_measured_beside_vanilla(result):
    trained = {*recipes.SUITE, *recipes.RESEARCH, "no-mask", "moving-teacher"} - {"zero-shot"}
    found = result["recipes"]
    assert set(found) == trained
    assert found["vanilla"]["time"] == {"median": 1, "lowest": 1, "highest": 1}
    assert found["vanilla"]["memory"] == 1
    for name, row in found.items():
        assert row["time"]["lowest"] > 0, name
        assert (row["kept"] is not None) == (name in READ), name
        ratio = row["bytes"] / found["vanilla"]["bytes"]
        assert row["memory"] == pytest.approx(ratio, abs=1e-3), name


@pytest.mark.slow
def test_what_a_method_has_besides_takes_memory(result):
    counted = {name: row["bytes"] for name, row in result["recipes"].items()}
    for name in ("flyp", "lipsum-ft", "ftp", "teacher-cam", recipes.DEFAULT):
        assert counted[name] > counted["vanilla"], name


@pytest.mark.parametrize("table", ["SUITE", "RESEARCH"])
def test_a_new_recipe_is_measured(monkeypatch, table):
    new = recipes.Recipe("New.", recipes.OURS)
    probe = recipes.TRAINED["linear-probe"]
    monkeypatch.setattr(recipes, "TRAINED", {**recipes.TRAINED, "new": new, "new-probe": probe})
    rest = dict.fromkeys(getattr(recipes, table))
    monkeypatch.setattr(recipes, table, {**rest, "new": new, "new-probe": probe})
    assert "new" in costs.cases()
    assert "new-probe" not in costs.cases()  # it trains only the head


@pytest.mark.slow
def test_the_table_has_a_row_for_every_recipe_merge_and_ensemble(result):
    page = costs.page([result])
    lines = page.splitlines()
    for case in costs.cases().values():
        assert sum(line.startswith(f"| {case.title} |") for line in lines) == 1, case
    assert f"| `{recipes.DEFAULT}` with `--method.teacher ema` | " in page
    for name in (*recipes.MERGED, *recipes.ENSEMBLES):
        assert sum(line.startswith(f"| `{name}` |") for line in lines) == 1, name
    rates = len(recipes.SOUP_RATES)
    for name in ("uniform-soup", "greedy-soup", "model-stock"):
        assert f"| `{name}` | {rates} x `vanilla` | 1 | " in page
    assert f"| `wise-{recipes.DEFAULT}` | 1 x `{recipes.DEFAULT}` | 1 | - |" in page
    assert "| `dawin` | 1 x `vanilla` | 3 | " in page


@pytest.mark.slow
def test_a_cell_has_the_range_of_its_rounds(result):
    row = {**result["recipes"]["car-ft"], "memory": 1.234}
    row |= {"time": {"median": 1.2, "lowest": 1.1, "highest": 1.3}}
    row |= {"kept": {"median": 1.0, "lowest": 0.5, "highest": 1.5}}
    shown = costs.table({**result, "recipes": {"car-ft": row}})
    assert shown.endswith("| `car-ft` | 1.20 (1.10 to 1.30) | 0.50 to 1.50 | 1.23 |")


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return any(not value.equal(before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("name", costs.cases())
def test_a_step_trains_what_the_recipe_trains(shared, name):
    job = shared.job(costs.cases()[name].config)
    objective, contrastive = job.objective, job.config.method.loss == "contrastive"
    parts = {
        "tower": job.student.visual,
        "head": job.student.head,
        "teacher": objective.teacher.visual,
        **({"texts": objective.contrast.tower} if contrastive else {}),
    }
    before = {part: weights(module) for part, module in parts.items()}
    costs.one_step(job, shared.optimizer(job), shared.batch)
    found = {part for part, module in parts.items() if moved(module, before[part])}
    wanted = {"tower", "texts"} if contrastive else {"tower", "head"}
    assert found == wanted | ({"teacher"} if name == "moving-teacher" else set())
    # the next recipe's gradients are its own
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_what_recipes_share_is_what_none_of_them_changes_for_the_others(shared):
    jobs = {name: shared.job(case.config) for name, case in costs.cases().items()}
    assert len({id(job.student.visual) for job in jobs.values()}) == 1
    for name, job in jobs.items():
        assert job.student.head.weight.requires_grad == (name != "flyp"), name
        assert (job.objective.teacher is shared.teacher) == (name != "moving-teacher"), name
    optimizers = {name: shared.optimizer(job) for name, job in jobs.items()}
    alone = {"l2-sp", "spd", "ftp", "lipsum-ft", "flyp"}
    others = [optimizer for name, optimizer in optimizers.items() if name not in alone]
    assert all(optimizer is others[0] for optimizer in others)
    assert len({id(optimizer) for optimizer in optimizers.values()}) == len(alone) + 1


@pytest.mark.parametrize("name", sorted(READ))
def test_features_that_are_read_change_nothing_but_the_forward(shared, name, monkeypatch):
    job = shared.job(costs.cases()[name].config)
    steps, kept = costs.build_steps({name: job}, shared)
    forwards, features = [], type(job.student).features

    def counting(self, *arguments, **options):
        forwards.append(self is job.objective.teacher)
        return features(self, *arguments, **options)

    monkeypatch.setattr(type(job.student), "features", counting)
    state, losses, looks = copy.deepcopy(job.student.state_dict()), [], []

    def accumulate(job, module, batch, step):
        terms, norm = accumulate_gradients(job, module, batch, step)
        losses.append(torch.cat([terms, norm[None]]))

    monkeypatch.setattr(costs, "accumulate_gradients", accumulate)
    for run in (steps[name], steps[kept[name]]):
        forwards.clear()
        job.student.load_state_dict(state)
        run()
        looks.append(sum(forwards))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert looks[0] == looks[1] + 1


def test_texts_are_as_many_as_in_training(shared):
    found = {name: shared.job(case.config).objective for name, case in costs.cases().items()}
    assert found["car-ft"].contexts_ME.shape[0] == len(TEMPLATES)
    assert found["flyp"].contrast.prompts_KMT.shape[:2] == (len(NAMES), len(TEMPLATES))
    assert found["lipsum-ft"].random_texts is not None


@pytest.mark.slow
def test_memory_is_the_dry_runs(shared):
    job = shared.job(costs.cases()["car-ft"].config)
    loader = replace(job.config.loader, batch_size=9)
    nine = replace(job, config=replace(job.config, loader=loader))
    assert costs.count_memory(job, 9) == round(memory.needs(nine, [1]).totals[0])


def test_memory_that_is_only_estimated_is_refused(shared, monkeypatch):
    job = shared.job(costs.cases()["vanilla"].config)
    monkeypatch.setattr(memory, "needs", lambda *_: memory.Needs([1.0], "torch 0 failed"))
    with pytest.raises(ValueError, match="memory of vanilla is not counted: torch 0 failed"):
        costs.count_memory(job, 2)


def call(*words: object) -> None:
    tiny.call(
        costs,
        *("--model", REHEARSAL, "--batch-size", 2, "--memory-images", 2),
        *("--classes", 2, "--rounds", 1, *words),
    )


@pytest.mark.slow
def test_the_command_measures_some_and_saves_all(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(costs, "RESULTS", tmp_path)
    monkeypatch.setattr(costs, "PAGE", tmp_path / "costs.md")
    call("--recipes", "l2-sp")
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["recipes"]) == {
        "vanilla",
        "l2-sp",
    }
    assert not list(tmp_path.iterdir())
    call("--save")
    (saved,) = tmp_path.glob("*.json")
    assert saved.name == f"costs_{REHEARSAL}_cpu.json"
    assert json.loads(saved.read_text())["recipes"].keys() == costs.cases().keys()
    assert (tmp_path / "costs.md").read_text() == costs.page(costs.saved())


def test_wrong_options_are_one_line(refused, monkeypatch, tmp_path):
    # if a mistake passes, nothing must be saved as a result
    monkeypatch.setattr(costs, "RESULTS", tmp_path)
    monkeypatch.setattr(costs, "PAGE", tmp_path / "costs.md")
    assert "l2sp" in refused(costs, "--recipes", "l2sp")
    assert "leave --recipes out" in refused(costs, "--recipes", "l2-sp", "--save")
    for option in ("batch-size", "memory-images"):
        assert f"--{option} is 1; it must be 2 or more" in refused(costs, f"--{option}", 1)
    assert "--rounds is 0" in refused(costs, "--rounds", 0)
    assert "--classes is 1001; it must be from 2 to 1,000" in refused(costs, "--classes", 1001)
    assert "ViT-B-33" in refused(costs, "--model", "ViT-B-33")


def test_the_saved_page_is_made_of_the_saved_results_which_have_every_recipe():
    found = costs.saved()
    assert found, "run make bench"
    assert costs.PAGE.read_text() == costs.page(found)
    for one in found:
        assert one["recipes"].keys() == costs.cases().keys()
