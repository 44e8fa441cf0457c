"""Compiled kernels equal the eager ones, compile once, and are chosen by measurement."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo

from benchmarks.step import Arguments, build_job
from rft import recipes
from rft.clip import vit
from rft.clip.classifier import load_state
from rft.config import Config
from rft.method import refill, relevance
from rft.runs.filenames import LAST
from rft.storage.documents import typed
from rft.train import fastest, loop
from rft.train.job import Job
from rft.train.kernels import Choice, Kernels, load
from rft.train.step import accumulate_gradients
from tests import tiny
from tests.conftest import build_model
from tests.train.test_objective import build_objective, draw_for, method_of, step

COMPILED = Choice(layers="compiled", cam="compiled")


@pytest.fixture
def quickly(monkeypatch):
    """torch.compile with a backend that traces and splits graphs, but writes no C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for made in (vit.compiled, relevance.compiled_maps):
        made.cache_clear()
    torch._dynamo.reset()
    yield
    for made in (vit.compiled, relevance.compiled_maps):
        made.cache_clear()
    torch._dynamo.reset()


def gradients(method, kernels, images_BCHW, labels_B, **options):
    objective = build_objective(method, kernels=kernels, **options)
    _, _, donor_BP = step(objective, images_BCHW, labels_B)
    found = {name: p.grad for name, p in objective.student.named_parameters()}
    # the compiler's graphs are numbered by first use: repeat, with nothing to compile
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(objective, images_BCHW.flip(0), labels_B.flip(0))
    return found, donor_BP


def check_equal(method, images_BCHW, labels_B, choice=COMPILED, **options):
    eager, donors = gradients(method, Kernels(), images_BCHW, labels_B, **options)
    ours, same = gradients(method, load(choice), images_BCHW, labels_B, **options)
    if donors is not None:
        assert torch.equal(donors, same)
    for name, value in eager.items():
        difference = (ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert difference < 1e-5, f"{name}: {difference}"


CASES = {
    recipes.DEFAULT: {},
    "object-mask-no-fill": {},
    "random-mask-no-fill": {},
    "wise-kd-object-mask-single-fill": {},
    "no-mask": {},
    "vanilla": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_gradients_are_the_eager_ones(name, recompute, images_BCHW, labels_B, quickly):
    check_equal(method_of(name), images_BCHW, labels_B, recompute=recompute)


@pytest.mark.slow
def test_the_real_compilers_gradients_are_the_eager_ones(images_BCHW, labels_B):
    torch._dynamo.reset()
    check_equal(method_of(recipes.DEFAULT), images_BCHW, labels_B)


@pytest.mark.slow
def test_lengths_that_differ_by_batch_compile_nothing_anew(images_BCHW, labels_B, quickly):
    method = replace(method_of("object-mask-no-fill"), no_fill="token-drop")
    objective = build_objective(method, kernels=load(COMPILED))
    draws = draw_for(method, images_BCHW)
    for kept in (3, 7, 12):
        donor_BP = draws.own_B1.expand(-1, 16).where(torch.arange(16) < kept, refill.DROP)
        # regions that do not depend on the length are compiled at the first call
        with torch._dynamo.config.patch(error_on_recompile=kept > 3):
            objective(images_BCHW, labels_B, draws, donor_BP)


@pytest.mark.slow
def test_the_cams_backward_computes_no_weights_gradient(images_BCHW, labels_B, quickly):
    """Compiled regions with products inside would: a ninth pass over the tower beside eight."""
    counted = {}
    for choice in (Choice(), COMPILED):
        objective = build_objective(method_of(recipes.DEFAULT), kernels=load(choice))
        step(objective, images_BCHW, labels_B)  # compiles
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            step(objective, images_BCHW, labels_B)
        counted[choice] = counter.get_total_flops()
    # except for the CAM's one small product of a row and a map
    assert counted[COMPILED] <= counted[Choice()]


@pytest.fixture
def job() -> Job:
    return build_job(Arguments(batch_size=6), torch.device("cpu"), "fp32", build_model(0))


def with_compile(job: Job, how: str) -> Job:
    return replace(job, config=replace(job.config, compile=how))


@pytest.mark.parametrize("recorded", [None, COMPILED])
def test_off_is_off(job, recorded):
    assert fastest.choose(with_compile(job, "off"), 0, recorded) == Kernels()


def test_a_cpu_measures_nothing(job, monkeypatch):
    monkeypatch.setattr(fastest, "seconds", None)
    assert fastest.choose(job, 0, None) == Kernels()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_kernels(job, monkeypatch):
    monkeypatch.setattr(fastest, "first_problem", lambda *_: "")
    monkeypatch.setattr(fastest, "fastest", None)
    assert fastest.choose(job, 4, COMPILED).choice == COMPILED
    assert fastest.choose(job, 4, Choice()) == Kernels()


def test_a_run_that_is_done_or_has_no_donor_to_try_with_compiles_nothing(job, monkeypatch):
    monkeypatch.setattr(fastest, "run", None)
    monkeypatch.setattr(fastest, "seconds", None)
    assert fastest.choose(with_compile(job, "on"), job.total_steps, None) == Kernels()
    # as on a GPU, where auto would try; on many ranks each has one image, and donors of all
    alone = replace(job, device=torch.device("cuda"), world=replace(job.world, size=6))
    method = replace(job.config.method, donors="global")
    alone = replace(alone, config=replace(job.config, method=method))
    assert fastest.choose(alone, 0, None) == Kernels()


@pytest.mark.slow
def test_kernels_that_cannot_be_used_are_an_error_or_a_warning(job, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(fastest, "accumulate_gradients", fails)
    says = r"--compile on: layers compiled, CAM compiled cannot be used here "
    with pytest.raises(ValueError, match=says + r"\(RuntimeError: no compiler here\); use"):
        fastest.choose(with_compile(job, "on"), 0, None)
    assert fastest.choose(job, 4, COMPILED) == Kernels()
    assert "this run began with layers compiled, CAM compiled" in capsys.readouterr().err


TIMES = {
    Choice(): 4.0,
    Choice(layers="compiled"): 3.0,
    Choice(layers="compiled", cam="compiled"): 3.5,
    Choice(layers="compiled", cam="triton"): 2.0,
}


@pytest.mark.parametrize(
    ("changed", "best"),
    [
        ({}, Choice(layers="compiled", cam="triton")),
        ({Choice(layers="compiled", cam="triton"): 9.0}, Choice(layers="compiled")),
        ({Choice(layers="compiled"): 5.0, Choice(cam="compiled"): 3.0, Choice(cam="triton"): 4.5},
         Choice(cam="compiled")),
    ],
)  # fmt: skip
def test_the_fastest_is_chosen(job, monkeypatch, changed, best):
    times = TIMES | changed
    monkeypatch.setattr(fastest, "first_problem", lambda *_: "")
    monkeypatch.setattr(fastest, "seconds", lambda _, choice: times[choice])
    monkeypatch.setattr(Job, "total_steps", 1000)
    assert fastest.fastest(job, 0) == best
    # the rest of the run is shorter than the compilation
    assert fastest.fastest(job, 999) == Choice()


def test_steps_that_read_what_a_tower_gave_do_not_pay_for_compiling(job, monkeypatch):
    monkeypatch.setattr(fastest, "first_problem", lambda *_: "")
    monkeypatch.setattr(fastest, "seconds", lambda _, choice: TIMES[choice])
    monkeypatch.setattr(Job, "total_steps", 1000)
    optim = replace(job.config.optim, epochs=2)
    probe = replace(job, config=replace(job.config, optim=optim))
    monkeypatch.setattr(type(job.objective), "frozen", {"student": job.student})
    assert job.batches.plan.steps_per_epoch * TIMES[Choice()] < fastest.WORTH
    assert fastest.fastest(probe, 0) == Choice()


@pytest.mark.slow
def test_a_node_compiles_what_another_does(monkeypatch):
    """The compiler's trials depend on the node; each variant left uncompiled gives a warning."""
    monkeypatch.setattr(torch._inductor.config, "deterministic", False)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    load(COMPILED)
    assert torch._inductor.config.deterministic
    assert torch._dynamo.config.recompile_limit > 8


def test_what_cannot_be_used_is_not_chosen(job, monkeypatch, capsys):
    problem = lambda _, choice: "no Triton" if choice.cam == "triton" else ""  # noqa: E731
    monkeypatch.setattr(fastest, "first_problem", problem)
    monkeypatch.setattr(fastest, "seconds", lambda _, choice: TIMES[choice])
    monkeypatch.setattr(Job, "total_steps", 1000)
    assert fastest.fastest(job, 0) == Choice(layers="compiled")
    assert "no Triton; not used" in capsys.readouterr().err


def test_trying_leaves_no_trace(job):
    before = {name: value.clone() for name, value in job.student.state_dict().items()}
    assert fastest.seconds(job, Choice()) > 0
    assert all(parameter.grad is None for parameter in job.student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in job.student.state_dict().items())
    assert job.objective.kernels == Kernels()


def test_a_cam_that_differs_is_not_used(job):
    fastest.check(job, lambda *a: relevance.through_maps(*a) * 1.00001)
    with pytest.raises(ArithmeticError, match="differs by"):
        fastest.check(job, lambda *a: relevance.through_maps(*a) * 1.001)


@pytest.mark.slow  # imports torch's compiler
def test_a_compilers_cache_that_others_can_write_is_not_used(job, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o775)  # with a umask that trusts the group
    load(COMPILED)
    tmp_path.chmod(0o757)
    with pytest.raises(ValueError, match=rf"other users can write to {tmp_path}, from which"):
        fastest.choose(with_compile(job, "on"), 0, None)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_compilers_cache_of_another_user_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(PermissionError, match="set TORCHINDUCTOR_CACHE_DIR"):
        load(Choice(cam="compiled"))
    load(Choice())


def test_the_flag_of_earlier_runs_is_read():
    document = recipes.build(recipes.DEFAULT, data="d", run="r").to_dict()
    for flag, meaning in ((True, "on"), (False, "off"), ("auto", "auto")):
        data = json.dumps(document | {"compile": flag}).encode()
        assert typed(data, Config, "config.json").compile == meaning
    with pytest.raises(ValueError, match="compile"):
        typed(json.dumps(document | {"compile": "yes"}).encode(), Config, "config.json")


@pytest.mark.slow
def test_a_resumed_run_computes_as_it_began(tmp_path, tiny_data, tiny_clip, quickly, monkeypatch):
    def train(name: str, how: str) -> Path:
        run = tmp_path / name
        options = ("--compile", how, "--log.checkpoint-steps", 4)
        return tiny.train(recipes.DEFAULT, tiny_data, tiny_clip, run, *options)

    class KilledError(Exception):
        pass

    def dying(job, module, batch, at, *rest):
        if at == 5:
            raise KilledError
        return accumulate_gradients(job, module, batch, at, *rest)

    whole = train("whole", "on")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", dying)
        with pytest.raises(KilledError):
            train("stopped", "on")
    # on a CPU, a run that starts with auto is not compiled
    assert tiny.weights(train("stopped", "auto")) == tiny.weights(whole)
    eager, ours = (load_state(train("eager", "auto") / LAST).state, load_state(whole / LAST).state)
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
