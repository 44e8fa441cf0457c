"""The GPU benchmark runs without a GPU: every part works on a CPU, failures stay separate."""

import json
import re
import signal
import subprocess
import sys
import types

import filelock
import pytest
import torch

from benchmarks import machine, step, wheels
from benchmarks.gpu import command, page, steps
from benchmarks.gpu.group import difference
from benchmarks.gpu.runner import Outcome
from benchmarks.tiny_world import environment
from benchmarks.waiting import until
from tests.conftest import build_model

pytestmark = pytest.mark.slow  # together

PARTS = (
    "chip", "step-rft-rehearsal", "trainer", "tests", "compiled-rft-rehearsal",
    "compiled-trainer", "masks", "large",
    "resume", "evaluation",
)  # fmt: skip
BROKEN = "tests"


@pytest.mark.program
@pytest.mark.timeout(3600)
def test_a_rehearsal(tmp_path):
    """The complete command on this CPU, with one part that finds a folder in place of a file.

    One test: as a fixture of several it would run once in each process of the tests.
    """
    out, work = tmp_path / "out", tmp_path / "work"
    (work / "rehearsal" / "gpu-tests.xml").mkdir(parents=True)
    line = [sys.executable, "-m", "benchmarks.gpu", "--rehearse"]
    line += ["--out", str(out), "--work", str(work), "--minutes", "60"]
    result = subprocess.run(line, env=environment(), capture_output=True, text=True)
    document = json.loads((out / "rehearsal_cpu.json").read_text())
    every_part_ran_and_the_broken_one_alone_failed(result, document)
    parts = {name: part["values"] for name, part in document["parts"].items()}
    steps_were_timed_and_seen_into(parts)
    the_trainer_ran_on_both_kinds_of_shards(parts)
    ceilings_masks_resumption_and_evaluation_were_measured(parts)
    the_table_is_made_of(document, (out / "rehearsal_cpu.md").read_text())
    a_second_call_keeps_what_it_does_not_measure_again(out, tmp_path / "other")


def every_part_ran_and_the_broken_one_alone_failed(result, document):
    found = {name: part["status"] for name, part in document["parts"].items()}
    assert found == {name: "failed" if name == BROKEN else "done" for name in PARTS}, result.stderr
    assert "IsADirectoryError" in document["parts"][BROKEN]["reason"]
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: failed: {BROKEN};")
    assert document["commit"] or document["source_sha256"]
    assert {"torch", "numpy"} <= document["versions"].keys()
    assert document["processor"]


def steps_were_timed_and_seen_into(parts):
    measured = parts["step-rft-rehearsal"]
    both = {**measured["steps"], **parts["compiled-rft-rehearsal"]["steps"]}
    # a kernel that only a GPU runs
    assert set(both) == set(page.STEPS) - {"step_triton"}
    for name, row in both.items():
        assert row["batch_size"] == 8
        assert row["images_per_s"] == pytest.approx(8 / row["seconds"], rel=0.01), name
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["mfu"] > 0
    assert both["textbook_tf32"]["precision"] == "tf32"
    assert both["step"]["precision"] == "bf16"
    assert both["step"]["dry_run_memory"] > 0
    assert {"cam", "clean forward", "counterfactual backward"} <= measured["phase_share"].keys()
    assert sum(measured["phase_share"].values()) == pytest.approx(1, abs=0.01)
    assert all(0.03 < share < 1 for share in measured["kernels"].values())
    assert measured["host_waits"] is None  # no GPU to wait for


def the_trainer_ran_on_both_kinds_of_shards(parts):
    runs = parts["trainer"]["rft-rehearsal"]
    assert set(runs) == {"pixels", "jpeg"}
    for run in runs.values():
        assert run["steps"] == 6  # of 9, the first third is not counted
        assert run["images_per_s"] > 0
        assert 0 <= run["waiting_share"] <= 1


def ceilings_masks_resumption_and_evaluation_were_measured(parts):
    assert set(parts["chip"]["matmul_flops"]) == {"bf16", "tf32", "fp32"}
    trained = parts["masks"]["rft-miniature"]["0.3"]
    assert 0.01 < trained["masked"] < 0.5
    assert trained["bf16"] >= 0.99
    assert parts["masks"]["rft-rehearsal"]["0.3"]["tf32"] == 1  # a CPU has no TF32
    assert set(parts["large"]) == {"model", "step", "recompute"}
    resume = parts["resume"]
    assert resume["group"]["backend"] == "gloo"
    for found in (resume["group"]["gradients"], resume["two_runs"], resume["resumed_run"]):
        assert found == {"bit_equal": True, "largest": 0, "largest_of_its_tensor": 0}
    assert resume["stopped_after"] == 4  # requested in the step after the third
    # of 72, excluding those of the first forward, which waits for the loader to start
    assert parts["evaluation"]["rft-rehearsal"]["images"] == 72 - 64


def the_table_is_made_of(document, text):
    assert text == page.text(document)
    assert text.startswith("A rehearsal on a tiny model.")
    rate = document["parts"]["step-rft-rehearsal"]["values"]["steps"]["step"]["images_per_s"]
    assert re.search(rf"object-mask single-fill \| 8 \| [\d.]+ \| {rate:,.0f} \|", text)
    assert f"`{BROKEN}` failed: " in text


def a_second_call_keeps_what_it_does_not_measure_again(out, work):
    before = json.loads((out / "rehearsal_cpu.json").read_text())["parts"]
    line = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--parts", BROKEN]
    line += ["--out", str(out), "--work", str(work)]
    subprocess.run(line, env=environment(), check=True)
    after = json.loads((out / "rehearsal_cpu.json").read_text())["parts"]
    assert after[BROKEN]["status"] == "done"
    assert after[BROKEN]["values"]["skipped"] > 0  # without a GPU
    assert {**after, BROKEN: None} == {**before, BROKEN: None}


def test_saved_tables_are_made_of_the_saved_results():
    saved = [*command.RESULTS.glob("gpu_*.json"), command.RESULTS / "rehearsal_cpu.json"]
    for path in saved:
        assert path.with_suffix(".md").read_text() == page.text(json.loads(path.read_text())), path


def test_the_dry_runs_memory_is_shown_beside_the_peak():
    row = {"batch_size": 512, "seconds": 0.1, "images_per_s": 5120, "mfu": 0.5}
    row["peak_memory"] = 10_000_000_000
    assert page.step_cells(row, None)[-1] == "10.0 GB"
    row["dry_run_memory"] = 9_800_000_000
    assert page.step_cells(row, None)[-1] == "10.0 GB (--dry-run / it: 0.98)"


def test_no_gpu_is_one_line(tmp_path):
    line = [sys.executable, "-m", "benchmarks.gpu"]
    line += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    hidden = environment(CUDA_VISIBLE_DEVICES="")
    result = subprocess.run(line, env=hidden, capture_output=True, text=True)
    assert result.returncode == 2
    expected = "error: torch sees no GPU here; --rehearse runs every part on a CPU"
    assert result.stderr.splitlines() == [expected]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rehearse", "--parts", "trainr"), "unknown part 'trainr'; did you mean 'trainer'?"),
        (("--models", "ViT-B-3"), "unknown model 'ViT-B-3'; did you mean 'ViT-B-32'?"),
        (("--minutes", "0"), "--minutes is 0; it must be above 0"),
        (("--batch-size", "1"), "a fill needs 2 images or more"),
    ],
)
def test_what_cannot_be_measured_is_one_line(refused, tmp_path, words, message):
    words = (*words, "--out", tmp_path / "out", "--work", tmp_path / "work")
    line = refused(types.SimpleNamespace(main=lambda: command.main(0.0)), *words)
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_package_that_lacks_is_one_line():
    program = (
        "import runpy, sys; sys.modules['open_clip'] = None; "
        "runpy.run_module('benchmarks.gpu', run_name='__main__')"
    )
    line = [sys.executable, "-c", program]
    result = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: open_clip is not installed. ")
    assert result.stderr.count("\n") == 1


RUNNER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.runner import Part, run

def measures(record):
    record.put("a", value=1)
    record.put("a", "b", other=2.5)

def raises(record):
    record.put(value=3)
    print("what it printed")
    raise ValueError("two\\nlines")

def dies(record):
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(record):
    # ranks of torchrun are in sessions of their own, too
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                             start_new_session=True)
    record.put(child=child.pid)
    signal.pause()

def late(record):
    raise AssertionError("never started")

parts = [Part(name=work.__name__, work=work, least=least, most=most) for work, least, most in
         [(measures, 0, 60), (raises, 0, 60), (dies, 0, 60), (hangs, 0, 3), (late, 1e6, 1e6)]]
outcomes = {}
run(parts, Path(sys.argv[1]), time.monotonic() + 120, outcomes.__setitem__)
for name, outcome in outcomes.items():
    print("outcome", name, outcome.status, outcome.values, outcome.reason)
"""


def test_a_part_that_fails_dies_or_hangs_leaves_the_others_alone(tmp_path):
    line = [sys.executable, "-c", RUNNER, str(tmp_path)]
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, check=True)
    found = {}
    for row in result.stdout.splitlines():
        if row.startswith("outcome "):
            _, name, rest = row.split(" ", 2)
            found[name] = rest
    assert found["measures"] == "done {'a': {'b': {'other': 2.5}, 'value': 1}} "
    assert found["raises"] == "failed {'value': 3} ValueError: two lines"
    assert "what it printed" in result.stderr
    assert found["dies"] == "failed {} ended by SIGKILL"
    child = re.fullmatch(r"cut off \{'child': (\d+)\} not ended after 3 s", found["hangs"])
    assert child, found["hangs"]
    assert not machine.is_alive(int(child[1]))
    assert found["late"].startswith("not reached {} ")


ENDED = """
import os, signal, sys, time
from pathlib import Path
from benchmarks.gpu.runner import Part, run

def hangs(record):
    if os.fork() == 0:
        time.sleep(600)
    record.put(pid=os.getpid())
    signal.pause()

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
done = lambda name, outcome: print("outcome", outcome.status, outcome.values, flush=True)
parts = [Part(name="hangs", work=hangs, least=0, most=600)]
run(parts, Path(sys.argv[1]), time.monotonic() + 600, done)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_no_part_behind(tmp_path, number):
    line = [sys.executable, "-c", ENDED, str(tmp_path)]
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True)
    record = tmp_path / "hangs.json"
    until(record.exists)
    pid = json.loads(record.read_text())["pid"]
    try:
        process.send_signal(number)
        # the child of the part holds our pipe as long as it lives
        output = "" if number == signal.SIGKILL else process.communicate()[0]
        process.wait()
        until(lambda: not machine.is_alive(pid))
        if number == signal.SIGTERM:
            assert process.returncode == 143
            assert f"outcome cut off {{'pid': {pid}}}" in output
            assert not machine.session_processes(pid)
    finally:
        machine.signal_session(pid, signal.SIGKILL)


def test_an_empty_result_says_that_nothing_was_measured():
    document = {
        "benchmark": "gpu", "python": "3.12", "commit": None, "source_sha256": "ab" * 32,
        "date": "2026-11-28T20:00Z", "versions": {}, "parts": {}, "driver": None,
        "settings": {
            "models": ["ViT-B-32"], "batch_size": 512, "trainer_steps": 60, "trainer_workers": 4,
        },
    }  # fmt: skip
    text = page.text(document)
    assert "sources abababababab" in text
    assert text.count("| not measured |") == len(page.STEPS) + len(page.TRAINED)


def test_a_ratio_lies_between_the_extremes_of_both_steps():
    vanilla = {"batch_size": 8, "seconds": 1.0, "fastest": 0.8, "slowest": 1.25}
    ours = {"batch_size": 4, "seconds": 1.0, "fastest": 0.95, "slowest": 1.0}
    assert page.over(vanilla, vanilla) == "1"
    assert page.over(ours, {**vanilla, "fastest": 0.9, "slowest": 1.0}) == "2.00 (1.90 to 2.22)"
    # half of its images, so twice the time per image
    assert page.over(ours, vanilla) == "1.52 to 2.50"


def test_kernels_of_one_beginning_stay_apart_in_the_table():
    names = [f"void at::native::{'x' * 80}<{kind}>" for kind in ("float", "bf16")]
    found = page.shortened({names[0]: 0.1, names[1]: 0.04})
    short = f"`{'x' * page.KERNEL_LETTERS}`"
    assert found == {short: 0.1, f"{short} (2)": 0.04}


def test_a_value_that_is_not_finite_is_never_equal():
    ours = {"a": torch.tensor([1.0, 2.0])}
    assert difference(ours, {"a": torch.tensor([1.0, 2.0])})["bit_equal"]
    found = difference(ours, {"a": torch.tensor([1.0, 2.5])})
    assert found == {"bit_equal": False, "largest": 0.5, "largest_of_its_tensor": 0.25}
    for broken in (torch.nan, torch.inf):
        theirs = {"a": torch.tensor([1.0, broken])}
        for pair in ((ours, theirs), (theirs, ours)):
            with pytest.raises(ValueError, match="a is not finite"):
                difference(*pair)
    with pytest.raises(ValueError, match="only one state has b"):
        difference(ours, {**ours, "b": ours["a"]})


@pytest.mark.parametrize("message", ["CUDA out of memory.", "CUBLAS_STATUS_ALLOC_FAILED when"])
def test_a_batch_is_halved_until_two_steps_fit(monkeypatch, message):
    calls = []

    def build_steps(arguments, *_):
        def run() -> None:
            calls.append(arguments.batch_size)
            # the optimizer's memory is allocated in the first step, so the second one fails
            if arguments.batch_size > 16 and calls.count(arguments.batch_size) == 2:
                raise RuntimeError(message)

        return {"step": run}

    monkeypatch.setattr(step, "build_steps", build_steps)
    arguments, student = step.Arguments(batch_size=64), build_model(0)
    batch, _, cold = steps.fitting(arguments, torch.device("cpu"), student, "step")
    assert (batch, calls) == (16, [64, 64, 32, 32, 16, 16])
    assert cold >= 0


def test_another_failure_is_no_matter_of_memory(monkeypatch):
    def build_steps(arguments, *_):
        raise RuntimeError(f"no kernel for {arguments.batch_size}")

    monkeypatch.setattr(step, "build_steps", build_steps)
    arguments = step.Arguments(batch_size=64)
    with pytest.raises(RuntimeError, match="no kernel for 64"):
        steps.fitting(arguments, torch.device("cpu"), build_model(0), "step")


@pytest.fixture
def result(tmp_path):
    """Opens the result file of a rehearsal, like the next call."""

    def open_it(**changes) -> command.Result:
        arguments = command.Arguments(
            rehearse=True, out=tmp_path / "out", work=tmp_path / "work", **changes
        )
        return command.Result(arguments, arguments.settings(), ["chip", "tests"], "cpu")

    return open_it


def outcome(status: str, **values) -> Outcome:
    return Outcome(status=status, seconds=1.0, reason="why", values=values)


def test_what_is_measured_whole_is_kept(result):
    first = result()
    assert first.lacking(again=False) == ["chip", "tests"]
    first.add("chip", outcome("done", name="CPU"))
    first.add("tests", outcome("cut off", passed=1, failed=0, skipped=0))
    second = result()
    assert second.lacking(again=False) == ["tests"]
    assert second.lacking(again=True) == ["chip", "tests"]
    for status in ("failed", "cut off", "not reached"):
        second.add("chip", outcome(status))
        part = json.loads(second.path.read_text())["parts"]["chip"]
        assert (part["status"], part["values"]) == ("done", {"name": "CPU"})
    assert part["repeated"] == "cut off: why"
    assert (
        "`chip`, when it was repeated, cut off: why" in second.path.with_suffix(".md").read_text()
    )
    second.add("tests", outcome("done", passed=2, failed=0, skipped=0))
    assert result().lacking(again=False) == []


def test_tries_that_end_early_add_up(result):
    first = result()
    first.add("chip", outcome("cut off", a={"x": 1, "y": 1}, b=1))
    second = result()
    second.add("chip", outcome("failed", a={"y": 2, "z": 2}))
    second.add("chip", outcome("not reached"))
    part = json.loads(second.path.read_text())["parts"]["chip"]
    assert (part["status"], part["values"]) == ("failed", {"a": {"x": 1, "y": 2, "z": 2}, "b": 1})
    third = result()
    third.add("chip", outcome("done", a=3))
    assert json.loads(third.path.read_text())["parts"]["chip"]["values"] == {"a": 3}


def test_other_sources_or_settings_start_anew(result, monkeypatch):
    result().add("chip", outcome("done"))
    monkeypatch.setattr(machine, "source_sha256", lambda *_: "0" * 64)
    assert result().lacking(again=False) == ["chip", "tests"]


def test_how_a_call_ended(result):
    found = result()
    with pytest.raises(ValueError, match="no part was measured"):
        found.require_measured(["chip", "tests"])
    found.add("chip", outcome("not reached"))
    with pytest.raises(ValueError, match="no part was measured"):
        found.require_measured(["chip", "tests"])
    found.add("tests", outcome("failed", passed=0, failed=1, skipped=0))
    with pytest.raises(ValueError, match="failed: tests; reasons in"):
        found.require_measured(["chip", "tests"])
    # a failure in an earlier call does not concern this one
    again = result()
    again.add("chip", outcome("done"))
    again.require_measured(["chip"])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1}', '{"parts": {"chip": 3}}', '{"parts": {"large": {}}}']
)
def test_a_damaged_result_is_moved_aside(result, capsys, text):
    path = result().path
    document = json.loads(path.read_text())
    if text.startswith('{"parts"'):
        text = json.dumps({**document, **json.loads(text)})
    path.write_text(text)
    assert result().lacking(again=False) == ["chip", "tests"]
    assert "is not a result file" in capsys.readouterr().err
    assert path.with_suffix(".damaged").read_text() == text


def test_a_folder_that_takes_no_file_is_found_before_anything_is_measured(result, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises((ValueError, OSError)):
        result()


def test_the_figures_survive_a_table_that_cannot_be_made(result, capsys):
    found = result()
    found.add("tests", outcome("done", passed=1))
    assert "no table of" in capsys.readouterr().err
    assert json.loads(found.path.read_text())["parts"]["tests"]["values"] == {"passed": 1}


def test_two_calls_in_one_work_folder(refused, tmp_path):
    (tmp_path / "work" / "rehearsal").mkdir(parents=True)
    with filelock.FileLock(tmp_path / "work" / "rehearsal" / ".lock"):
        words = ("--rehearse", "--out", tmp_path / "out", "--work", tmp_path / "work")
        line = refused(types.SimpleNamespace(main=lambda: command.main(0.0)), *words)
    assert "another call works in" in line


def test_wheels_are_the_packages_that_torch_does_not_bring():
    found = {line.partition("==")[0] for line in wheels.packages(wheels.Arguments())}
    assert {"open-clip-torch", "timm", "safetensors", "tyro", "tensorboard", "pytest"} <= found
    brought = {"torch", "torchvision", "triton", "numpy", "pillow", "fsspec", "sympy", "rft-clip"}
    assert not found & {*brought, *wheels.UNUSED}
    assert not [name for name in found if name.startswith(("nvidia", "cuda"))]


@pytest.mark.program
def test_wheels_install_into_an_empty_environment(tmp_path):
    """From the registry into a folder, and from the folder alone into an environment."""
    version = "{}.{}".format(*sys.version_info[:2])
    arguments = wheels.Arguments(python=version, out=tmp_path / "wheels")
    stale = tmp_path / "wheels" / "tyro-0.1-py3-none-any.whl"
    stale.parent.mkdir()
    stale.touch()
    try:
        paths = wheels.download(arguments, wheels.packages(arguments))
    except ValueError as error:
        if "connect" not in str(error).lower():
            raise
        pytest.skip(f"no package registry: {error}")
    assert not stale.exists()
    assert sum(path.stat().st_size for path in paths) < wheels.MOST_BYTES
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "empty")], check=True)
    python = str(tmp_path / "empty" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, *map(str, paths)], check=True)
    program = "import google.protobuf, isal.isal_zlib, pytest, rich, safetensors, yaml"
    subprocess.run([python, "-c", program], check=True)
