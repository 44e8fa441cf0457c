"""The memory of a step as counted by `--dry-run`, compared with the allocations of real steps."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from rft.device import to_device
from rft.loading.dataset import Batch
from rft.train.estimate import estimate
from rft.train.job import Job
from rft.train.memory import (
    Unpinned,
    graph_bytes,
    measure,
    module_bytes,
    needs,
    norms_as_on_a_gpu,
    track,
)
from rft.train.objective import Objective
from rft.train.optim import build_optimizer
from rft.train.step import accumulate_gradients

RECIPES = [
    "object-mask-single-fill",
    "random-mask-multi-fill",
    "random-mask-no-fill",
    "context-mask-no-fill",
    "no-mask",
    "vanilla",
    "linear-probe",
    "car-ft",
    "lipsum-ft",
    "flyp",
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
    """The peak of allocated bytes during `call`, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def real_peak(job: Job) -> int:
    """The peak of a single rank up to its second step, including earlier allocations."""
    optimizer = build_optimizer(job.objective, job.config.optim)
    batch = Batch(*job.batches.packed.batch(job.batches.samples_of(0), job.batches.image_size)[:3])

    def step() -> None:
        accumulate_gradients(job, job.objective, batch, step=0)
        optimizer.step()
        optimizer.zero_grad()

    if job.config.precision == "bf16":
        norms_as_on_a_gpu(job.objective)
    step()
    most = peak_bytes(step)
    state = sum(value.nbytes for found in optimizer.state.values() for value in found.values())
    return most + module_bytes(job.objective) + state + batch.images_BCHW.nbytes


# a recipe and options for each path through a step
STEPS = {
    **{name: (name,) for name in RECIPES},
    "accumulate": ("object-mask-single-fill", "--optim.accumulate", "2"),
    "bf16": ("object-mask-single-fill", "--precision", "bf16"),
    "bf16, recompute": ("context-mask-multi-fill", "--precision", "bf16", "--recompute"),
    "key mask": ("random-mask-no-fill", "--method.no-fill", "key-mask"),
    "grad-cam, derangement": (
        *("object-mask-single-fill", "--method.cam", "grad-cam"),
        *("--method.single-fill", "derangement"),
    ),
    "global donors": (
        *("object-mask-multi-fill", "--method.donors", "global"),
        *("--optim.accumulate", "2"),
    ),
    "l2-sp": ("l2-sp",),
    "spd": ("spd",),
    "ftp": ("ftp",),
    "ftp, bf16": ("object-mask-single-fill", "--precision", "bf16", "--optim.optimizer", "ftp"),
    "frozen layers": (
        "object-mask-single-fill",
        "--optim.freeze",
        "visual.[cp]*",
        "*.resblocks.0*",
    ),
    "random texts": ("lipsum-ft",),
    "two towers": ("flyp",),
    "two towers, counterfactuals": ("random-mask-single-fill", "--method.loss", "contrastive"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_the_peak_of_a_real_step(prepare, case):
    recipe, *options = STEPS[case]
    job = prepare(*options, recipe=recipe)
    need = needs(job, [1])
    assert not need.estimated
    assert need.totals == [pytest.approx(real_peak(job), rel=0.05)]


@pytest.mark.slow
def test_two_teachers(prepare):
    job = prepare(recipe="no-mask")
    method = replace(job.config.method, kd_weight=1.0)
    objective = Objective(
        job.student, job.objective.teacher, method, ensemble=copy.deepcopy(job.objective.teacher)
    )
    job = replace(job, config=replace(job.config, method=method), objective=objective)
    assert track(job, [1]) == [pytest.approx(real_peak(job), rel=0.05)]


@pytest.mark.slow
def test_numbers_of_ranks_between_those_counted(prepare):
    job = prepare("--loader.batch-size", "48")
    first, second, between, last = track(job, [1, 2, 4, 16])
    assert first > second > between > last
    assert between == pytest.approx(*track(job, [4]), rel=0.05)
    # weights, gradient and AdamW's state are the same for any number of ranks
    assert last > 5 * module_bytes(job.student)


@pytest.mark.slow
def test_gathered_donors_take_what_a_batch_in_parts_does(prepare):
    options = ("--method.donors", "global")
    # each with micro-batches of 12 and a pool of 24
    parts = prepare(*options, "--optim.accumulate", "2", recipe="object-mask-multi-fill")
    ranks = prepare(*options, recipe="object-mask-multi-fill")
    (alone,), (shared,) = track(parts, [1]), track(ranks, [2])
    # a rank has its own images beside the pool
    own = 12 * parts.batches.packed.image(0, parts.batches.image_size).nbytes
    assert shared - own == pytest.approx(alone, rel=0.005)


@pytest.mark.slow
def test_tokens_that_a_cam_drops_are_counted_as_if_none_were(prepare):
    job = prepare("--method.no-fill", "token-drop", recipe="object-mask-no-fill")
    need = needs(job, [1])
    assert not need.estimated
    assert real_peak(job) < need.totals[0] < 1.5 * real_peak(job)
    assert "as if no token were dropped" in estimate(job, [])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["object-mask-single-fill", "random-mask-no-fill", "vanilla"])
def test_a_torch_without_the_tracker(prepare, monkeypatch, recipe):
    job = prepare(recipe=recipe)
    # as in a release without such a module
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.mem_tracker", None)
    need = needs(job, [1, 2])
    assert need.totals[0] == pytest.approx(real_peak(job), rel=0.15)
    assert need.totals == [measure(job).total(24), measure(job).total(12)]
    assert "tracker failed: ModuleNotFoundError" in need.estimated
    assert f"ESTIMATE ({need.estimated})" in estimate(job, [])


def test_fake_tensors_are_copied_to_a_gpu_unpinned():
    with FakeTensorMode():
        tensor = torch.zeros(3)
        with pytest.raises(AssertionError, match="pin_memory"):
            to_device(tensor, torch.device("cuda"))
        with Unpinned():
            assert to_device(tensor, torch.device("cuda")).device.type == "cuda"


def test_norms_keep_what_a_gpus_autocast_has_them_keep():
    with FakeTensorMode():
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            half = torch.zeros(2, 4, dtype=torch.bfloat16, device="cuda")
            assert F.layer_norm(half, (4,)).dtype == torch.float32
        finally:
            torch.set_autocast_enabled("cuda", False)
    ours = nn.LayerNorm(4)
    norms_as_on_a_gpu(ours)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(torch.zeros(2, 4, dtype=torch.bfloat16))
        # open_clip's norms return their input's type
        assert found.dtype == torch.bfloat16
        assert found.grad_fn.next_functions[0][0]._saved_input.dtype == torch.float32


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
    assert sum(moments) == 2 * memory.trained == memory.states
    assert sum(value.nbytes for value in job.student.state_dict().values()) == memory.weights
    probe = measure(prepare("--method.distill-weight", "0", recipe="linear-probe"))
    assert probe.trained == sum(p.nbytes for p in job.student.head.parameters())
    assert probe.clean.image < memory.clean.image / 10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_holds_weights_to_the_pre_trained_ones_is_counted(prepare, precision):
    jobs = {name: prepare("--precision", precision, recipe=name) for name in ("vanilla", "ftp")}
    plain, held = (measure(job) for job in jobs.values())
    # a step of FTP has the size of the weights, its radii are a few numbers
    assert held.states - plain.states == held.trained
    # a lowered teacher differs from theta_0
    copy_bytes = module_bytes(jobs["ftp"].student) if precision == "bf16" else 0
    assert held.teachers - plain.teachers == copy_bytes
    table = estimate(jobs["ftp"], [])
    assert "AdamW and FTP " in table
    assert ("pre-trained weights in fp32" in table) == (precision == "bf16")


@pytest.mark.slow
def test_nothing_of_the_job_is_changed(prepare):
    job = prepare()
    before = [parameter.clone() for parameter in job.objective.parameters()]
    needs(job, [1, 2])
    measure(job)
    for parameter, old in zip(job.objective.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None
