"""The step and memory benchmarks compare the same work, and their page matches the results."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import cam_memory, cam_share, checkpoint, memory, method, step
from benchmarks.tiny_world import environment
from rft import recipes
from tests.conftest import build_model

SMALL = ["--model", "ViT-S-32-alt", "--batch-size", "2", "--classes", "7", "--rounds", "1"]


@pytest.fixture(scope="module")
def job():
    arguments = step.Arguments(batch_size=6)
    job = step.build_job(arguments, torch.device("cpu"), "fp32", build_model(0))
    # as after some steps: a teacher that equals its student leaves no gradient
    job.objective.teacher.load_state_dict(build_model(1).state_dict())
    return job


def gradients(student) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    return found


def test_textbook_and_training_loop_leave_the_same_gradients(job, images_BCHW, labels_B):
    batch = step.Batch(images_BCHW, labels_B, labels_B)
    student = job.student
    # far above the gradients' norm: only the loop clips here
    config = step.replace(job.config, optim=step.replace(job.config.optim, clip_norm=1e9))
    step.accumulate_gradients(
        step.replace(job, config=config), job.objective, batch, step=step.ADDRESS.step
    )
    ours = gradients(student)
    step.textbook_step(job.objective, images_BCHW, labels_B)
    for name, slow in gradients(student).items():
        scale = slow.abs().max().clamp(min=1)
        assert (ours[name] - slow).abs().max() / scale < 1e-5, name


def test_vanilla_is_the_cross_entropy(job, images_BCHW, labels_B):
    step.vanilla_step(job.student, images_BCHW, labels_B)
    found = gradients(job.student)
    job.objective(images_BCHW, labels_B, None).loss.backward()
    for name, ours in gradients(job.student).items():
        torch.testing.assert_close(found[name], ours, rtol=1e-4, atol=1e-5)


def test_our_own_vanilla_step_has_the_same_gradients_and_no_counterfactual(monkeypatch):
    arguments = step.Arguments(batch_size=3, classes=5)
    student, norms = build_model(0), {}
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: norms.update(gradients(student)))
    steps = step.build_steps(arguments, torch.device("cpu"), "fp32", student)
    steps["vanilla"]()
    through_open_clip = dict(norms)
    steps["own_vanilla"]()
    for name, ours in norms.items():
        torch.testing.assert_close(through_open_clip[name], ours, rtol=1e-4, atol=1e-5)
    steps["step"]()
    assert any(not torch.equal(norms[name], ours) for name, ours in through_open_clip.items())


@pytest.mark.slow
@pytest.mark.program
def test_the_step_benchmark_as_a_program():
    command = [sys.executable, "-m", "benchmarks.step", *SMALL]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found["seconds"]) == {"vanilla", "own_vanilla", "textbook", "step"}
    # which is faster is left to `make bench`: one round on a busy machine cannot decide
    seconds = found["seconds"]
    for below in ("vanilla", "own_vanilla"):
        ratio = seconds["step"] / seconds[below]
        assert found[f"step_over_{below}"]["median"] == pytest.approx(ratio, rel=0.05)
    assert (
        found["flops"]["own_vanilla"]
        <= found["flops"]["vanilla"]
        < found["flops"]["step"]
        < found["flops"]["textbook"]
    )
    phases = {"clean forward", "cam", "clean backward", "teacher forward"}
    phases |= {"counterfactual forward", "counterfactual backward"}
    assert phases <= set(found["phase_share"])
    assert sum(found["phase_share"].values()) == pytest.approx(1, abs=0.01)
    assert all(share > 0 for share in found["mfu"].values())
    assert all(ratio["lowest"] > 0 for ratio in found["alternatives"].values())
    assert method.step_row(found)[0] == "2 images, fp32"
    assert "matrix product: " in method.alternatives(found)


@pytest.mark.slow
@pytest.mark.program
def test_a_map_at_a_time_needs_less_memory_and_too_much_is_told():
    """Within one limit the textbook's maps do not fit, and ours do."""
    arguments = cam_memory.Arguments(model="ViT-S-16-alt", limit_gb=0.6)
    assert cam_memory.measure_case("textbook", arguments, 8) is None
    ours = cam_memory.measure_case("recompute", arguments, 8)
    assert 0 < ours < 0.3e9


@pytest.mark.slow
@pytest.mark.program
def test_the_dry_runs_memory_is_that_of_a_real_step():
    """By the system's account of a process, independently of torch's tracker."""
    arguments = memory.Arguments(model="ViT-S-32-alt", batch_size=64, few=(8, 40))
    case = memory.Case(arguments.model, recipes.DEFAULT, "fp32")
    row = memory.measure_case(case, step.build_classifier(case.model, 1000), arguments)
    assert row["line"]["over_tracker"] == pytest.approx(1, abs=0.1)
    assert row["real"]["dry_run_over_real"] == [pytest.approx(1, abs=0.1)] * 2
    assert method.memory_row(row)[0] == f"ViT-S-32-alt, {recipes.DEFAULT}, fp32"


def test_operators_cost_what_their_tensors_hold():
    left, right = torch.zeros(5, 3), torch.zeros(3, 4)
    with cam_share.Costs() as costs:
        product = left.view(5, 3) @ right
        with costs.during("scaled"):
            product.mul_(2)
            product.t().reshape(2, 10)  # a copy: the transposed view has a different shape
            product.reshape(2, 10)
    numbers = 5 * 3 + 3 * 4 + 5 * 4
    seconds = 4 * numbers / cam_share.BYTES_PER_S
    assert costs.found["other"] == {"flops": 120, "bytes": 4 * numbers, "seconds": seconds}
    assert costs.found["scaled"]["flops"] == 0
    assert costs.found["scaled"]["bytes"] == 4 * 4 * 5 * 4


@pytest.mark.slow
def test_the_cams_share_is_of_all_that_a_step_computes():
    arguments = step.Arguments(model="ViT-S-32-alt", batch_size=2)
    found = cam_share.count_step(arguments)
    student = step.build_classifier(arguments.model, arguments.classes)
    real = step.build_steps(arguments, torch.device("cpu"), "fp32", student)["step"]
    result = cam_share.shares(found)
    assert result["step_flops"] == step.count_flops(real)
    assert {"cam", "maps", "clean backward", "teacher forward"} <= found.keys()
    # two products of a map's size in each layer, beside some dozens of a token's width
    assert 0 < result["share"]["maps"]["flops"] < result["share"]["backward"]["flops"] < 0.2


def test_the_page_says_what_was_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(method, "RESULTS", tmp_path)
    page = method.text()
    assert page.count("not measured") == len(method.STEPS)


def test_the_saved_page_is_made_of_the_saved_results():
    if not method.PAGE.exists():
        pytest.skip("nothing was saved: make bench")
    assert method.PAGE.read_text() == method.text()
    assert method.COUNTED.read_text() == method.counted()


@pytest.mark.slow
def test_a_checkpoint_is_timed_in_three_ways(tmp_path):
    arguments = checkpoint.Arguments(model="ViT-S-32-alt", batch_size=2, rounds=1, seconds=0.01)
    result = checkpoint.measure(arguments, tmp_path)
    assert result["held_seconds"]["none"] == [0.0]
    # training during a write is tested with events: tests/train/test_checkpoint.py
    assert all(result["held_seconds"][way][0] > 0 for way in ("background", "waiting"))
    assert result["checkpoint_bytes"] == max(path.stat().st_size for path in tmp_path.glob("*.pt"))
    assert "| in the background (rft) |" in checkpoint.table(result)
    assert "GPU: not measured" in checkpoint.note(result)
