"""What `--dry-run` tells, held against what a step and a run really take."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rft import cli, recipes
from rft.config import Config
from rft.dist import World
from rft.loading.dataset import Batch
from rft.train import build
from rft.train.estimate import (
    checkpoint_steps,
    configuration,
    estimate,
    graph_bytes,
    measure,
    possible_ranks,
    size,
    traffic,
)
from rft.train.finish import run_job
from rft.train.job import Job
from rft.train.optim import build_optimizer
from rft.train.step import accumulate_gradients
from rft.train.stop import StopRequest

ALONE = World(rank=0, size=1, local_rank=0)
CPU = torch.device("cpu")


@pytest.fixture
def arguments(tiny_data, tiny_clip, tmp_path) -> list[str]:
    return [
        *("object-mask-single-fill", "--data", str(tiny_data), "--run-dir", str(tmp_path / "run")),
        *("--scale", "miniature", "--model.clip", tiny_clip, "--loader.batch-size", "12"),
        *("--loader.held-out", "16", "--optim.epochs", "3", "--log.checkpoint-steps", "4"),
    ]


@pytest.fixture
def prepare(arguments):
    def job(*options: str, recipe: str = "object-mask-single-fill") -> Job:
        default = replace(recipes.build(recipe, scale="miniature"), precision="fp32")
        config = cli.parse(Config, args=[*arguments[1:], *options], default=default)
        return build.prepare(config, ALONE, CPU)

    return job


RECIPES = [
    "object-mask-single-fill",
    "random-mask-multi-fill",
    "random-mask-no-fill",
    "context-mask-no-fill",
    "no-mask",
    "vanilla",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_and_two_images_tell_what_more_of_them_keep(prepare, recipe):
    job = prepare(recipe=recipe)
    memory = measure(job)
    clean, counterfactual = graph_bytes(job, 7)
    assert memory.clean.bytes(7) == pytest.approx(clean, rel=0.01)
    assert memory.counterfactual.bytes(7) == pytest.approx(counterfactual, rel=0.01)
    assert (counterfactual > 0) == job.config.method.masks
    if recipe == "random-mask-no-fill":
        # a quarter of the tokens
        assert counterfactual < 0.6 * clean


def test_half_precision_and_recomputing_keep_less(prepare):
    whole, half, again = (
        measure(prepare(*options)) for options in ((), ("--precision", "bf16"), ("--recompute",))
    )
    for graph in ("clean", "counterfactual"):
        plain = getattr(whole, graph)
        # weights are cast once for any number of images; norms and the residual stream stay fp32
        assert 0.4 < getattr(half, graph).image / plain.image < 0.8
        assert getattr(half, graph).fixed > 0.3 * half.weights
        assert getattr(again, graph).image < 0.6 * plain.image


def peak_bytes(call) -> int:
    """The most bytes allocated at once by `call`, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("recipe", ["object-mask-single-fill", "random-mask-no-fill", "vanilla"])
def test_the_peak_of_a_real_step(prepare, recipe):
    images = 24
    job = prepare("--loader.batch-size", str(images), recipe=recipe)
    batch = job.batches.packed.batch(job.batches.samples_of(0), job.batches.image_size)
    peak = peak_bytes(lambda: accumulate_gradients(job, job.objective, Batch(*batch[:3]), step=0))
    memory = measure(job)
    # AdamW's state, the weights and the teachers were there before or come later
    estimate = memory.total(images, 1) - memory.weights - memory.teachers - 2 * memory.trained
    assert estimate == pytest.approx(peak, rel=0.1)


def test_weights_and_optimizer_state_are_counted_exactly(prepare):
    job = prepare()
    optimizer = build_optimizer(job.objective, job.config.optim)
    batch = job.batches.packed.batch(job.batches.samples_of(0), job.batches.image_size)
    accumulate_gradients(job, job.objective, Batch(*batch[:3]), step=0)
    optimizer.step()
    memory = measure(job)
    moments = [
        state[name].nbytes
        for state in optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    assert sum(moments) == 2 * memory.trained
    assert sum(value.nbytes for value in job.student.state_dict().values()) == memory.weights
    probe = measure(prepare("--method.distill-weight", "0", recipe="linear-probe"))
    assert probe.trained == sum(p.nbytes for p in job.student.head.parameters())
    assert probe.clean.image < memory.clean.image / 10


def test_nothing_of_the_job_is_changed(prepare):
    job = prepare()
    before = [parameter.clone() for parameter in job.objective.parameters()]
    measure(job)
    for parameter, old in zip(job.objective.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None


def test_numbers_of_ranks_that_can_share_the_batch(prepare):
    config = prepare().config
    assert possible_ranks(config, 1) == [1, 2, 4]
    assert possible_ranks(config, 3) == [1, 2, 3, 4]
    in_parts = replace(config, optim=replace(config.optim, accumulate=3))
    # one image in a micro-batch has no other to be filled from
    assert possible_ranks(in_parts, 1) == [1, 2]
    # data parallelism keeps the gradient twice
    memory = measure(prepare())
    assert memory.total(6, 2) - memory.total(6, 1) == memory.trained


def test_what_it_says(prepare, arguments, tmp_path):
    job = prepare("--seed", "7")
    text = estimate(job, [*arguments, "--seed", "7"])
    assert "* seed                     7  (the recipe's is 0)" in text
    assert "  optim.lr                 0.0003\n" in text
    assert f"    run                      {tmp_path / 'run'}\n" in text
    assert "76 samples of 4 classes in 4 shards" in text
    assert "60 to train on, 16 held out" in text
    assert "5 an epoch, 15 in 3 epochs of global batch 12" in text
    assert "writes 6 checkpoints of " in text
    assert text.splitlines()[-1].startswith(
        "  torchrun --nproc_per_node 1 -m rft.train object-mask-single-fill --data "
    )
    assert not (tmp_path / "run").exists()

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "progress.json").write_text(json.dumps({"step": 12, "of": 15}))
    assert "12 of them are done" in estimate(job, arguments)


def test_zero_shot_trains_nothing(prepare):
    job = prepare("--optim.epochs", "0", recipe="zero-shot")
    text = estimate(job, ["zero-shot"])
    assert "nothing is trained" in text
    assert "writes 0 checkpoints" in text


@pytest.mark.slow
def test_what_is_written_is_what_was_told(prepare):
    job = prepare("--log.keep", "100", "--log.every-steps", "2")
    run_job(job, StopRequest(""))
    run = Path(job.config.run)
    names = [path.name for path in run.glob("checkpoints/step-*.pt")]
    steps = checkpoint_steps(job.total_steps, job.batches.plan.steps_per_epoch, 4)
    assert {f"step-{step:08d}.pt" for step in steps} == set(names)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    told = "\n".join(traffic(job))
    assert f"writes {len(names)} checkpoints of " in told
    assert f"writes {len(lines)} lines of metrics, " in told


def test_sizes():
    assert [size(count) for count in (12, 1234.4, 5.6e9)] == ["12 bytes", "1.2 kB", "5.6 GB"]


def test_the_configuration_is_whole(prepare):
    config = prepare().config
    names = [line[2:].split()[0] for line in configuration(config)]
    assert "cluster.stop_file" in names
    assert len(names) == len(set(names)) > 50
